//! From `config.json` to what the device runs, and the slow reference it is tested against.
//!
//! Imports run one way: this crate knows `shared` and nothing of the device or the host.

#![forbid(unsafe_code)]

pub mod config;
pub mod lower;
pub mod reference;
pub mod rope;
pub mod validate;
pub mod weights;
