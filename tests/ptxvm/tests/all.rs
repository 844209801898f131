//! All tests in one program: linking is what takes long.

mod arith;
mod checks;
mod command;
mod common;
mod convert;
mod copies;
mod foreign;
mod host;
mod hostile;
mod integers;
mod persistent;
mod warps;
