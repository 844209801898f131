//! Sequences beside each other: none changes a bit of another, and each ends in its own way.

mod company;
mod fp8;
mod play;
mod quantised;
mod sampling;
