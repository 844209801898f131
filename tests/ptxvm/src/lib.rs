//! An interpreter for PTX that finds races, uninitialised reads and hangs.
#![allow(dead_code)]
mod body;
mod decode;
mod lex;
mod link;
mod num;
mod parse;
mod program;
mod types;
pub use program::Module;
/// Text that is not PTX, or not PTX that this interpreter knows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {message}")]
pub struct ParseError {
    /// The line, from 1.
    pub line: u32,
    /// What is wrong.
    pub message: String,
}
