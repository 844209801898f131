//! Arithmetic on raw register bits. Everything here is a pure function of its operands.

pub(crate) mod cvt;
pub(crate) mod float;
pub(crate) mod int;
pub(crate) mod mma;
pub(crate) mod soft;
