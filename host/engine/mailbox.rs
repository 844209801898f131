//! The host's side of the mailbox; `shared/mailbox.rs` says which word orders what.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;

use tilert_mk_device::machine::memory::{Span, counter_u32};
use tilert_mk_shared::fault::{FaultCode, FaultRecord};
use tilert_mk_shared::limits::{COMMAND_COUNT_MAX, OUTPUT_COUNT_MAX};
use tilert_mk_shared::mailbox::{Command, CommandKind, Mailbox, Output, StopWord};
use tilert_mk_shared::sequence::SequenceParams;

use super::Engine;
use crate::error::{Error, Result};

impl Engine {
    pub(super) fn word(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: the mailbox lives as long as the engine; its words are only used as counters.
        unsafe { counter_u32(self.header.mailbox + offset as u64) }
    }

    /// Writes a command for slot 0.
    pub(super) fn command(&self, kind: CommandKind, params: SequenceParams) {
        let ring = self.header.mailbox + offset_of!(Mailbox, commands) as u64;
        // SAFETY: the ring is in the mailbox; the device does not read past `command_tail`.
        let ring: Span<Command> = unsafe { Span::new(ring, COMMAND_COUNT_MAX as usize) };
        let tail_word = self.word(offset_of!(Mailbox, command_tail));
        let tail = tail_word.load(Ordering::Relaxed);
        let command = Command { kind: kind as u32, slot: 0, params };
        ring.write((tail % COMMAND_COUNT_MAX) as usize, command);
        tail_word.store(tail.wrapping_add(1), Ordering::Release);
    }

    /// The oldest output that has not been consumed; a fault of the device is an error.
    pub(super) fn next_output(&self) -> Result<Option<Output>> {
        let head = self.word(offset_of!(Mailbox, output_head)).load(Ordering::Relaxed);
        let tail = self.word(offset_of!(Mailbox, output_tail)).load(Ordering::Acquire);
        if head != tail {
            let ring = self.header.mailbox + offset_of!(Mailbox, outputs) as u64;
            // SAFETY: the ring is in the mailbox; records before `output_tail` are complete.
            let ring: Span<Output> = unsafe { Span::new(ring, OUTPUT_COUNT_MAX as usize) };
            return Ok(Some(ring.read((head % OUTPUT_COUNT_MAX) as usize)));
        }
        let stop = self.word(offset_of!(Mailbox, stop)).load(Ordering::Acquire);
        if stop == StopWord::Fault as u32 {
            // SAFETY: the record is in the engine's memory and complete once `stop` says so.
            let fault: Span<FaultRecord> = unsafe { Span::new(self.header.fault, 1) };
            let fault = fault.read(0);
            return Err(Error::Fault(format!(
                "worker {} stopped at `{}` in step {}: {:?}, event {} expected {} but was {}",
                fault.worker_idx,
                self.task_name(fault.task_idx),
                fault.epoch,
                FaultCode::from_raw(fault.code),
                fault.event,
                fault.expected,
                fault.observed
            )));
        }
        if self.workers.iter().any(JoinHandle::is_finished) {
            return Err(Error::Fault("a worker has ended without a fault record".into()));
        }
        Ok(None)
    }

    /// Frees the oldest output.
    pub(super) fn consume(&self) {
        let word = self.word(offset_of!(Mailbox, output_head));
        word.store(word.load(Ordering::Relaxed).wrapping_add(1), Ordering::Release);
    }
}
