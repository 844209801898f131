//! What every PE is given: its tasks, its heap, and where the heaps of the others are.

use tilert_mk_model::lower::Program;
use tilert_mk_shared::ABI_VERSION;
use tilert_mk_shared::fault::FaultRecord;
use tilert_mk_shared::limits::PE_COUNT_MAX;
use tilert_mk_shared::mailbox::Mailbox;
use tilert_mk_shared::program::ProgramHeader;
use tilert_mk_shared::task::{LinearArgs, Opcode, Prologue, Task, WeightFormat};
use tilert_mk_shared::tile::{
    INPUT_BYTES_MAX, PAGE_BYTES, PART_ROWS_MAX, SharedPlan, page_bytes, part_bytes,
};
use tilert_mk_shared::trace::TraceRecord;

use super::EngineOptions;
use super::bind::bytes_of;
use crate::driver::{Device, Profile};
use crate::error::Result;

/// Reserves and fills the memory that headers name, but for the heaps' contents; the headers, one for each
/// PE. `tasks` are the program's as each PE has them.
///
/// Errors: memory that is not there; what the driver says.
pub(super) fn upload(
    program: &Program,
    tasks: &[Vec<Task>],
    device: &mut dyn Device,
    options: &EngineOptions,
) -> Result<Vec<ProgramHeader>> {
    let (dims, task_count) = (&program.dims, program.tasks.len() as u32);
    let worker_count = program.queue_spans.len() as u32 - 1;
    let wanted = u64::from(options.trace_steps) * u64::from(task_count);
    let trace_capacity = if wanted == 0 { 0 } else { wanted.next_power_of_two() };
    let trace_bytes = trace_capacity * u64::from(worker_count) * size_of::<TraceRecord>() as u64;
    let prompts = u64::from(dims.kv.slot_count) * u64::from(dims.kv.context_max) * 4;
    let near = shared_plan(program, device.profile());
    let shared = ProgramHeader {
        abi_version: ABI_VERSION,
        worker_count,
        task_count,
        event_count: program.event_arrivals.len() as u32,
        begin_event: program.begin_event.0,
        trace_capacity: trace_capacity as u32,
        page_count: near.map_or(0, |plan| plan.page_count),
        polls_per_look: device.profile().polls_per_look,
        input_bytes: near.map_or(0, |plan| plan.input_bytes),
        page_bytes: near.map_or(0, |plan| plan.page_bytes),
        wait_ns_max: options.wait_ns_max,
        mailbox: device.reserve_shared("the mailbox", size_of::<Mailbox>() as u64)?,
        prompts: device.reserve_shared("the prompts", prompts)?,
        fault: device.reserve_shared("the fault record", size_of::<FaultRecord>() as u64)?,
        dims: *dims,
        plan: program.plan,
        pe_count: tasks.len() as u32,
        ..ProgramHeader::default()
    };
    let mut headers = Vec::with_capacity(tasks.len());
    for (pe, tasks) in (0u32..).zip(tasks) {
        let mut uploaded = |what: &str, bytes: &[u8]| {
            let address = device.reserve(pe, what, bytes.len() as u64)?;
            device.write(pe, address, bytes).map(|()| address)
        };
        headers.push(ProgramHeader {
            first_worker: pe * shared.pe_worker_count(),
            tasks: uploaded("the tasks", bytes_of(tasks))?,
            queue_spans: uploaded("the queues", bytes_of(&program.queue_spans))?,
            queue_entries: uploaded("the queues", bytes_of(&program.queue_entries))?,
            heap: device.reserve_heap(pe, &program.plan)?,
            trace: device.reserve(pe, "the trace", trace_bytes.max(64))?,
            ..shared
        });
    }
    let heaps: Vec<u64> = headers.iter().map(|header| header.heap).collect();
    for header in &mut headers {
        header.distances = distances(header.heap, &heaps);
    }
    Ok(headers)
}

/// Pages that the ring must gain for rows to come in pieces that have room as a whole. On an H200 shapes that gain two
/// are faster with them and most of those that gain one are slower.
const PIECES_GAIN: u32 = 2;

/// Pages that a ring of larger ones must have: three of Llama-3.1-8B's are slower than four with less in each.
const LARGE_PAGES_MIN: u32 = 4;

/// How a GPU's block divides its shared memory; none if that is too little. Rows without a prologue may come in pieces:
/// the ring has what they would take.
fn shared_plan(program: &Program, profile: &Profile) -> Option<SharedPlan> {
    // Of the rows that have room.
    let (mut longest, mut longest_whole) = (0, 0);
    let linear = program.tasks.iter().filter(|task| task.opcode == Opcode::Linear as u16);
    for args in linear.map(LinearArgs::unpack) {
        let bytes = part_bytes(args.in_dim);
        if bytes > INPUT_BYTES_MAX {
            continue;
        }
        longest = longest.max(bytes);
        if args.prologue != Prologue::None || args.format != WeightFormat::Bf16 {
            longest_whole = longest_whole.max(bytes);
        }
    }
    // If there may be two tokens, both have room.
    let least = program.dims.kv.slot_count.min(PART_ROWS_MAX) * longest_whole;
    let of_pages = |page_bytes| {
        let plan = |row_bytes| SharedPlan::new(profile.shared_bytes, row_bytes, page_bytes);
        let (whole, in_pieces) = (plan(least.max(longest))?, plan(least)?);
        let gain = in_pieces.page_count - whole.page_count;
        Some(if profile.takes_pieces && gain >= PIECES_GAIN { in_pieces } else { whole })
    };
    let wanted = program.formats().into_iter().map(page_bytes).max().unwrap_or(PAGE_BYTES);
    let (plan, other) = (of_pages(wanted)?, of_pages(PAGE_BYTES)?);
    let is_short = plan.page_count < LARGE_PAGES_MIN.min(other.page_count);
    Some(if is_short { other } else { plan })
}

/// See `ProgramHeader::distances`.
fn distances(own: u64, heaps: &[u64]) -> [u64; PE_COUNT_MAX] {
    let mut distances = [0; PE_COUNT_MAX];
    for (distance, heap) in distances.iter_mut().zip(heaps) {
        *distance = heap.wrapping_sub(own);
    }
    distances
}
