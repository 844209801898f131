//! Sequences beside each other: none changes a bit of another, and each ends in its own way.

mod company;
mod fp8;
#[path = "../common/fp8_files.rs"]
mod fp8_files;
mod play;
mod quantised;
mod sampling;
