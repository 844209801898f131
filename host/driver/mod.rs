//! Devices: the ways to give workers memory and to start them.
//!
//! The engine speaks to every device through `Device`. Addresses are the device's own; memory from
//! `reserve_shared` has one address for both sides. A device may be several that run a program together:
//! processing elements (PEs), each with memory of its own.

pub mod cpu;
pub mod cuda;
pub mod survey;

use tilert_mk_shared::program::{HeapPlan, ProgramHeader};
use tilert_mk_shared::task::WeightFormat;

use crate::error::Result;

/// What lowering and the engine need to know of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    /// Name for people and JSON.
    pub name: String,
    /// PEs.
    pub pe_count: u32,
    /// Workers of all PEs, unless the user says otherwise.
    pub worker_count: u32,
    /// Workers at most, likewise.
    pub worker_count_max: u32,
    /// Tokens of a step at most.
    pub step_tokens_max: u32,
    /// Weight bytes of a linear task, about.
    pub tile_bytes: u64,
    /// Rows of a linear task at most.
    pub tile_rows_max: u32,
    /// Shared memory of a worker's block; 0 if workers have none.
    pub shared_bytes: u32,
    /// Whether linear tasks want weights as `shared/packed.rs` describes.
    pub packs_weights: bool,
    /// Whether workers stamp values (`shared/stamp.rs`).
    pub stamps_values: bool,
    /// Whether workers can take long input rows in pieces, so that less of them is near at a time.
    pub takes_pieces: bool,
    /// Polls of an event between two looks at the stop word, the clock and other queues.
    pub polls_per_look: u32,
    /// Whether the host may spin while a request runs, without taking the workers' cores.
    pub host_spins: bool,
}

/// Memory and workers of one device, or of several together.
pub trait Device: Send {
    /// What it is.
    fn profile(&self) -> &Profile;

    /// Begins what `launch` has to wait for, for a program whose linear tasks have these formats.
    ///
    /// Errors: a device that cannot run such programs.
    fn prepare(&mut self, formats: &[WeightFormat]) -> Result<()> {
        let _ = formats;
        Ok(())
    }

    /// The address at which the workers of a PE find `bytes`, which the caller keeps until the device is gone.
    ///
    /// Errors: memory that is not there.
    fn place(&mut self, pe: u32, bytes: &[u8]) -> Result<u64>;

    /// Zeroed memory of a PE.
    ///
    /// Errors: memory that is not there.
    fn reserve(&mut self, pe: u32, what: &str, bytes: u64) -> Result<u64>;

    /// The same for a heap, at whose end is the cache of keys and values, of which a sequence needs as much as it
    /// is long.
    fn reserve_heap(&mut self, pe: u32, plan: &HeapPlan) -> Result<u64> {
        self.reserve(pe, "the heap", plan.total_bytes)
    }

    /// Zeroed memory that the host and all PEs reach, at the same address.
    ///
    /// Errors: memory that is not there.
    fn reserve_shared(&mut self, what: &str, bytes: u64) -> Result<u64>;

    /// Copies `bytes` to an address from `reserve` for the PE, before the launch.
    ///
    /// Errors: what the driver says.
    fn write(&mut self, pe: u32, address: u64, bytes: &[u8]) -> Result<()>;

    /// Copies from an address of `reserve` for the PE that no worker writes meanwhile.
    ///
    /// Errors: what the driver says.
    fn read(&self, pe: u32, address: u64, out: &mut [u8]) -> Result<()>;

    /// Starts the workers of all PEs, of each with its header.
    ///
    /// Errors: what the driver says.
    fn launch(&mut self, headers: &[ProgramHeader]) -> Result<()>;

    /// An error if a worker has ended.
    ///
    /// Errors: a worker that has ended, with what is known of it.
    fn check(&self) -> Result<()>;

    /// Waits for the workers' ends; the mailbox has told them to stop.
    fn join(&mut self);

    /// Now, on the clock that the device's records use, if the host has that clock too.
    fn now_ns(&self) -> Option<u64>;
}
