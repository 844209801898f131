//! From `config.json` to what the device runs, and the slow reference it is tested against.
//!
//! Imports run one way: this crate knows `shared` and nothing of the device or the host.

#![forbid(unsafe_code)]

pub mod config;
pub mod families;
pub mod graph;
pub mod lower;
mod place;
pub mod quantise;
pub mod reference;
pub mod rope;
mod schedule;
pub mod strips;
pub mod validate;
pub mod weights;
