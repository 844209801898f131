//! The host's side of the memory that it shares with the device; `shared/mailbox.rs` says which word
//! orders what.

use std::mem::offset_of;

use tilert_mk_device::machine::HostCounter;
use tilert_mk_device::machine::memory::Span;
use tilert_mk_shared::fault::{FaultCode, FaultRecord};
use tilert_mk_shared::limits::{COMMAND_COUNT_MAX, OUTPUT_COUNT_MAX};
use tilert_mk_shared::mailbox::{Command, CommandKind, Mailbox, Output, StopWord};
use tilert_mk_shared::sequence::SequenceParams;
use tilert_mk_shared::trace::TraceRecord;

use super::Engine;
use super::bind::bytes_of_mut;
use crate::error::{Error, Result};

impl Engine {
    pub(super) fn word(&self, offset: usize) -> &HostCounter {
        // SAFETY: the mailbox lives as long as the device; its words are only used as counters.
        unsafe { HostCounter::at(self.header().mailbox + offset as u64) }
    }

    /// The device's clock when it began; after `ready`.
    pub(super) fn started_ns(&self) -> u64 {
        let address = self.header().mailbox + offset_of!(Mailbox, clock_ns) as u64;
        // SAFETY: a word of the mailbox that the device wrote before `ready`, and never again.
        unsafe { Span::<u64>::new(address, 1) }.read(0)
    }

    /// Fills a slot's row of the prompts; before the command that names it.
    pub(super) fn write_prompt(&self, slot: u32, prompt: &[u32]) {
        let context = self.header().dims.kv.context_max;
        let address = self.header().prompts + u64::from(slot) * u64::from(context) * 4;
        // SAFETY: the row of a free slot, which the device does not read before its command.
        let row: Span<u32> = unsafe { Span::new(address, context as usize) };
        row.sub(0, prompt.len()).as_mut_slice().copy_from_slice(prompt);
    }

    /// Writes a command for a slot; waits while the ring is full.
    ///
    /// Bounds: the device reads all commands before each step, whatever outputs wait for the host,
    /// so the wait is as long as a step, or as the limit after which a step is a fault.
    pub(super) fn command(&self, kind: CommandKind, slot: u32, params: SequenceParams) {
        let ring = self.header().mailbox + offset_of!(Mailbox, commands) as u64;
        // SAFETY: the ring is in the mailbox; the device does not read past `command_tail`.
        let ring: Span<Command> = unsafe { Span::new(ring, COMMAND_COUNT_MAX as usize) };
        let tail_word = self.word(offset_of!(Mailbox, command_tail));
        let tail = tail_word.load_relaxed();
        let head_word = self.word(offset_of!(Mailbox, command_head));
        while tail.wrapping_sub(head_word.load_acquire()) >= COMMAND_COUNT_MAX {
            // Nobody reads the commands of a device that has stopped; `poll` reports it.
            if self.check_fault().is_err() {
                return;
            }
            std::thread::yield_now();
        }
        let command = Command { kind: kind as u32, slot, params };
        ring.write((tail % COMMAND_COUNT_MAX) as usize, command);
        tail_word.store_release(tail.wrapping_add(1));
    }

    /// The oldest output that has not been consumed; a fault that the device has told is an error.
    pub(super) fn next_output(&self) -> Result<Option<Output>> {
        let head = self.word(offset_of!(Mailbox, output_head)).load_relaxed();
        let tail = self.word(offset_of!(Mailbox, output_tail)).load_acquire();
        if head == tail {
            return self.check_stop().map(|()| None);
        }
        let ring = self.header().mailbox + offset_of!(Mailbox, outputs) as u64;
        // SAFETY: the ring is in the mailbox; records before `output_tail` are complete.
        let ring: Span<Output> = unsafe { Span::new(ring, OUTPUT_COUNT_MAX as usize) };
        Ok(Some(ring.read((head % OUTPUT_COUNT_MAX) as usize)))
    }

    /// Frees the oldest output.
    pub(super) fn consume(&self) {
        let word = self.word(offset_of!(Mailbox, output_head));
        word.store_release(word.load_relaxed().wrapping_add(1));
    }

    /// An error if the device has stopped by itself, whether it could tell or not.
    pub(super) fn check_fault(&self) -> Result<()> {
        let check = self.device.check();
        // After that look: a device that has ended since the last one may have told why.
        self.check_stop()?;
        check
    }

    /// An error if the device has told of a fault.
    fn check_stop(&self) -> Result<()> {
        if self.word(offset_of!(Mailbox, stop)).load_acquire() != StopWord::Fault as u32 {
            return Ok(());
        }
        // SAFETY: the record lives as long as the device and is complete once `stop` says so.
        let fault: Span<FaultRecord> = unsafe { Span::new(self.header().fault, 1) };
        let fault = fault.read(0);
        let code = FaultCode::from_raw(fault.code);
        Err(Error::Fault(match code {
            FaultCode::WaitTimeout => format!(
                "worker {} waited too long before `{}` in step {}: event {} is at {}, not {}",
                fault.worker_idx,
                self.task_name(fault.task_idx),
                fault.epoch,
                fault.event,
                fault.observed,
                fault.expected
            ),
            FaultCode::WeightsTimeout | FaultCode::ValuesTimeout => format!(
                "worker {} waited too long for the {} of `{}` in step {}",
                fault.worker_idx,
                if code == FaultCode::WeightsTimeout { "weights" } else { "input values" },
                self.task_name(fault.task_idx),
                fault.epoch,
            ),
            _ => format!(
                "worker {} stopped at `{}` in step {}: {code:?}, expected {}, found {}",
                fault.worker_idx,
                self.task_name(fault.task_idx),
                fault.epoch,
                fault.expected,
                fault.observed
            ),
        }))
    }

    /// A worker's traced tasks in the order of time; after its end.
    pub(super) fn trace_of(&self, worker_idx: u32) -> Result<Vec<TraceRecord>> {
        // Each PE has a ring for every worker, and fills its own.
        let pe = worker_idx / self.header().pe_worker_count();
        let header = &self.headers[pe as usize];
        let capacity = header.trace_capacity as usize;
        let mut records = vec![TraceRecord::default(); capacity];
        let ring_bytes = size_of_val(records.as_slice()) as u64;
        let address = header.trace + u64::from(worker_idx) * ring_bytes;
        self.device.read(pe, address, bytes_of_mut(&mut records))?;
        records.retain(|record| record.epoch != 0);
        records.sort_by_key(|record| record.started_ns);
        Ok(records)
    }
}
