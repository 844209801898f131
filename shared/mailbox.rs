//! The mailbox: two rings of fixed records between the host and one device.
//!
//! | word            | writer | reader | order                                                 |
//! |-----------------|--------|--------|-------------------------------------------------------|
//! | `command_tail`  | host   | device | release after the records; acquire before them        |
//! | `command_head`  | device | host   | release after reading; acquire before reuse           |
//! | `output_tail`   | device | host   | release after the records; acquire before them        |
//! | `output_head`   | host   | device | release after reading; acquire before reuse           |
//! | `stop`          | both   | both   | release; a `StopWord`                                 |
//! | `ready`         | device | host   | release after `clock_ns`; acquire before it           |
//!
//! All four indices count records from 0 and wrap modulo 2^32; a ring's slot is the index modulo its
//! capacity. Each word is on a cache line of its own.

use crate::limits::{COMMAND_COUNT_MAX, OUTPUT_COUNT_MAX};
use crate::sequence::SequenceParams;

/// What a command asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum CommandKind {
    /// Begin a sequence in a slot.
    Start = 1,
    /// End the sequence in a slot before it ends by itself.
    Cancel = 2,
}

/// A record from the host to the device.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct Command {
    /// A `CommandKind`.
    pub kind: u32,
    /// The slot it is about.
    pub slot: u32,
    /// The request, for `Start`.
    pub params: SequenceParams,
}

/// What an output record reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum OutputKind {
    /// `value` is a generated token.
    Token = 1,
    /// The sequence ended after `generate_max` tokens.
    EndLength = 2,
    /// The sequence ended with one of its stop ids, which was its last token.
    EndStop = 3,
    /// The sequence ended because the host cancelled it.
    EndCancelled = 4,
    /// The sequence ended because its logits were not numbers.
    EndNotANumber = 5,
    /// Row `value` of the logits region belongs to `position`; the device waits until the record has
    /// been consumed before it begins another step.
    Logits = 6,
}

impl OutputKind {
    /// The kind stored as `raw`.
    pub const fn from_raw(raw: u32) -> Option<OutputKind> {
        Some(match raw {
            1 => OutputKind::Token,
            2 => OutputKind::EndLength,
            3 => OutputKind::EndStop,
            4 => OutputKind::EndCancelled,
            5 => OutputKind::EndNotANumber,
            6 => OutputKind::Logits,
            _ => return None,
        })
    }
}

/// A record from the device to the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Output {
    /// An `OutputKind`.
    pub kind: u32,
    /// The slot it is about.
    pub slot: u32,
    /// Position of the token or of the logits row.
    pub position: u32,
    /// The token, or the row of the logits region.
    pub value: u32,
    /// When it was made, on the device's clock, in nanoseconds.
    pub time_ns: u64,
}

/// Values of the stop word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum StopWord {
    /// Keep running.
    Run = 0,
    /// The host asked for the end; workers leave when they are idle.
    Shutdown = 1,
    /// A worker faulted; all leave at once and the fault record says why.
    Fault = 2,
}

/// A word alone on its cache line.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(64))]
pub struct PaddedWord {
    /// The word.
    pub value: u32,
}

/// The mailbox's memory. Both sides reach it through their own counter types, never by reference.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Mailbox {
    /// Commands written.
    pub command_tail: PaddedWord,
    /// Commands read.
    pub command_head: PaddedWord,
    /// Outputs written.
    pub output_tail: PaddedWord,
    /// Outputs read.
    pub output_head: PaddedWord,
    /// A `StopWord`.
    pub stop: PaddedWord,
    /// 1 once worker 0 runs and `clock_ns` is filled.
    pub ready: PaddedWord,
    /// The device's clock when worker 0 began.
    pub clock_ns: u64,
    /// The ring of commands.
    pub commands: [Command; COMMAND_COUNT_MAX as usize],
    /// The ring of outputs.
    pub outputs: [Output; OUTPUT_COUNT_MAX as usize],
}

/// What the device knows of the mailbox, in its own memory: a GPU reads the host's as slowly as it
/// computes a stage. Written by `Admit` and `Sample` alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct MailboxView {
    /// `Mailbox::command_tail` when the device last looked.
    pub command_tail: u32,
    /// Commands read.
    pub command_head: u32,
    /// Outputs written.
    pub output_tail: u32,
    /// `Mailbox::output_head` when the device last looked.
    pub output_head: u32,
}

const _: () = assert!(size_of::<Command>() == 96);
const _: () = assert!(size_of::<Output>() == 24);
