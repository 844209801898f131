//! The machine layer: the only place that touches raw memory, counters and vector arithmetic.

pub mod cpu;
pub mod memory;
