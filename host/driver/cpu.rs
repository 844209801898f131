//! The CPU as a device: one thread for each worker.

use std::thread::JoinHandle;
use std::time::Instant;

use core_affinity::CoreId;
use memmap2::{Advice, MmapMut};
use tilert_mk_device::machine::cpu::Isa;
use tilert_mk_device::machine::cpu::thread::{Idling, Thread};
use tilert_mk_device::machine::memory::Span;
use tilert_mk_device::worker::{Progress, Worker};
use tilert_mk_shared::limits::{SEGMENT_ROWS_MAX, STEP_TOKENS_MAX, WORKER_COUNT_MAX};
use tilert_mk_shared::program::{HeapPlan, ProgramHeader};

use super::{Device, Profile};
use crate::error::{Error, Result};

/// Weight bytes of a linear task, about: a few microseconds of reading.
const TILE_BYTES: u64 = 256 << 10;

/// Bytes of a huge page, of most systems.
const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// Polls of an event between two looks at the stop word, the clock and other queues.
const POLLS_PER_LOOK: u32 = 256;

/// Threads of this process.
pub struct CpuDevice {
    profile: Profile,
    machine: Thread,
    polls_busily: bool,
    workers: Vec<JoinHandle<()>>,
    // What addresses point into; dropped after the workers have been joined.
    memory: Vec<MmapMut>,
}

impl CpuDevice {
    /// The cores that this process may use. Workers that poll busily never sleep.
    pub fn new(polls_busily: bool) -> CpuDevice {
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
        let profile = Profile {
            name: "cpu".into(),
            pe_count: 1,
            worker_count: cores,
            worker_count_max: WORKER_COUNT_MAX,
            step_tokens_max: STEP_TOKENS_MAX,
            tile_bytes: TILE_BYTES,
            tile_rows_max: SEGMENT_ROWS_MAX,
            shared_bytes: 0,
            packs_weights: false,
            stamps_values: false,
            takes_pieces: false,
            polls_per_look: POLLS_PER_LOOK,
            host_spins: false,
        };
        let machine = Thread { isa: Isa::detect(), idling: Idling::Park, clock: Instant::now() };
        CpuDevice { profile, machine, polls_busily, workers: Vec::new(), memory: Vec::new() }
    }
}

/// A core for each worker; none if there are not enough, or the system does not tell.
///
/// Workers of all cores are always pinned: the system else puts two on one while something runs on
/// another, and each waits for the other's time slice. Fewer are pinned if they poll busily: the
/// system finds the better cores for those that do not.
fn cores_for(worker_count: u32, polls_busily: bool) -> Option<Vec<CoreId>> {
    let cores = core_affinity::get_core_ids()?;
    let (wanted, found) = (worker_count as usize, cores.len());
    (wanted == found || wanted < found && polls_busily).then_some(cores)
}

/// Zeroed memory, in huge pages where the system has them.
pub(crate) fn anonymous(what: &str, bytes: u64) -> Result<MmapMut> {
    let map = MmapMut::map_anon(bytes.max(4096) as usize)
        .map_err(|error| Error::Device(format!("{bytes} bytes for {what}: {error}")))?;
    // A hint: without huge pages everything works, a little slower.
    let _ = map.advise(Advice::HugePage);
    Ok(map)
}

impl Device for CpuDevice {
    fn profile(&self) -> &Profile {
        &self.profile
    }

    fn place(&mut self, _pe: u32, bytes: &[u8]) -> Result<u64> {
        Ok(bytes.as_ptr() as u64)
    }

    fn reserve(&mut self, _pe: u32, what: &str, bytes: u64) -> Result<u64> {
        let map = anonymous(what, bytes)?;
        let address = map.as_ptr() as u64;
        self.memory.push(map);
        Ok(address)
    }

    /// The cache is in small pages: a huge one holds all positions of a head, or several heads, and is cleared
    /// when the first of them is stored.
    fn reserve_heap(&mut self, pe: u32, plan: &HeapPlan) -> Result<u64> {
        let address = self.reserve(pe, "the heap", plan.total_bytes)?;
        let first = plan.kv.next_multiple_of(HUGE_PAGE_BYTES).min(plan.total_bytes);
        let (offset, bytes) = (first as usize, (plan.total_bytes - first) as usize);
        // A hint, as for huge pages.
        let _ = self.memory.last().map(|map| map.advise_range(Advice::NoHugePage, offset, bytes));
        Ok(address)
    }

    fn reserve_shared(&mut self, what: &str, bytes: u64) -> Result<u64> {
        self.reserve(0, what, bytes)
    }

    fn write(&mut self, _pe: u32, address: u64, bytes: &[u8]) -> Result<()> {
        // SAFETY: an address of `reserve`, before any worker runs.
        let target: Span<u8> = unsafe { Span::new(address, bytes.len()) };
        target.as_mut_slice().copy_from_slice(bytes);
        Ok(())
    }

    fn read(&self, _pe: u32, address: u64, out: &mut [u8]) -> Result<()> {
        // SAFETY: an address of `reserve` that no worker writes meanwhile.
        let source: Span<u8> = unsafe { Span::new(address, out.len()) };
        out.copy_from_slice(source.as_slice());
        Ok(())
    }

    fn launch(&mut self, headers: &[ProgramHeader]) -> Result<()> {
        let header = &headers[0];
        let cores = cores_for(header.worker_count, self.polls_busily);
        for worker_idx in 0..header.worker_count {
            let (header, mut machine) = (*header, self.machine);
            let core = cores.as_ref().and_then(|cores| cores.get(worker_idx as usize)).copied();
            let polls_busily = self.polls_busily;
            let handle = std::thread::Builder::new()
                .name(format!("worker {worker_idx}"))
                .spawn(move || {
                    let is_pinned = core.is_some_and(core_affinity::set_for_current);
                    machine.idling = match (polls_busily, is_pinned) {
                        (false, _) => Idling::Park,
                        (true, false) => Idling::Yield,
                        (true, true) => Idling::Spin,
                    };
                    machine.isa.warm_up();
                    // SAFETY: the engine keeps all memory until `join` has joined this thread.
                    let worker =
                        unsafe { Worker::new(&header, worker_idx, &machine, Progress::NONE) };
                    worker.run();
                })
                .map_err(|error| Error::Device(format!("starting a worker: {error}")))?;
            self.workers.push(handle);
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        if self.workers.iter().any(JoinHandle::is_finished) {
            return Err(Error::Fault("a worker has ended without a fault record".into()));
        }
        Ok(())
    }

    fn join(&mut self) {
        for worker in self.workers.drain(..) {
            // A worker that panicked has nothing more to say here.
            let _ = worker.join();
        }
    }

    fn now_ns(&self) -> Option<u64> {
        Some(self.machine.clock.elapsed().as_nanos() as u64)
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use tilert_mk_shared::kv::KvGeometry;
    use tilert_mk_shared::program::Dims;

    /// Resident bytes of the mappings that have a part between two addresses.
    fn resident(first: u64, end: u64) -> u64 {
        let maps = std::fs::read_to_string("/proc/self/smaps").expect("Linux tells");
        let (mut is_within, mut bytes) = (false, 0);
        for line in maps.lines() {
            let word = line.split_whitespace().next().unwrap_or_default();
            let range = word
                .split_once('-')
                .map(|(a, b)| (u64::from_str_radix(a, 16).ok(), u64::from_str_radix(b, 16).ok()));
            if let Some((Some(from), Some(to))) = range {
                is_within = from < end && to > first;
            } else if is_within && word == "Rss:" {
                let kib = line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok());
                bytes += kib.expect("a number of KiB") << 10;
            }
        }
        bytes
    }

    #[test]
    fn a_cache_takes_memory_where_it_is_used() {
        let kv = KvGeometry {
            layer_count: 4,
            slot_count: 2,
            kv_head_count: 4,
            context_max: 32_768,
            head_dim: 64,
        };
        let dims = Dims { head_count: 4, step_tokens_max: 1, kv, ..Dims::default() };
        let plan = HeapPlan::new(&dims, 1, 1, 1);
        let mut device = CpuDevice::new(false);
        let heap = device.reserve_heap(0, &plan).expect("an anonymous mapping");
        // The first position of every head of one sequence, but those that share a huge page with the rest.
        let mut written = 0;
        for (layer_idx, head_idx) in (1..4).flat_map(|layer| (0..4).map(move |head| (layer, head)))
        {
            for plane in 0..2 {
                let idx = kv.key_idx(layer_idx, 0, head_idx) + plane * kv.plane_values();
                device.write(0, heap + plan.kv + idx * 4, &[1; 256]).expect("it is there");
                written += 1;
            }
        }
        let first = heap + plan.kv.next_multiple_of(HUGE_PAGE_BYTES);
        let found = resident(first, heap + plan.total_bytes);
        // Small pages may have 64 KiB; a plane has 8 MiB.
        assert!(
            (written * 4096..=written * 65536).contains(&found),
            "{found} bytes for {written} rows"
        );
    }
}
