//! Mistakes planted in the PTX and in the program: each is found, with its task, op and line.

use std::ops::Range;

use tilert_mk_shared::task::{Epilogue, LinearArgs, Opcode, Prologue, Task};
use tilert_mk_shared::tile::{COMPUTE_WARPS, INPUT_BYTES_MIN, PAGE_BYTES, PAGE_COUNT_MIN, ring};

use super::ptx_device::{PtxDevice, PtxOptions};
use super::{PROMPT, edit, run, shipped};

/// Where a mistake is planted.
enum Place {
    /// Every occurrence of a statement is replaced by another.
    Statement(&'static str, &'static str),
    /// The PTX is edited.
    Text(fn(&str) -> String),
    /// The uploaded tasks are edited.
    Tasks(fn(&mut [Task])),
}

use Place::{Statement, Tasks, Text};

/// A mistake, and how the first message about it may begin.
struct Planted {
    what: &'static str,
    capability: u32,
    place: Place,
    found_as: &'static [&'static str],
}

const fn planted(what: &'static str, place: Place, found_as: &'static [&'static str]) -> Planted {
    Planted { what, capability: 90, place, found_as }
}

/// A mistake in the PTX for older chips, whose copies are those of their threads.
const fn older(what: &'static str, place: Place, found_as: &'static [&'static str]) -> Planted {
    Planted { what, capability: 80, place, found_as }
}

const RACE: &[&str] = &["DataRace"];
const UNWRITTEN: &[&str] = &["UninitialisedMemory"];
/// Values that come too early, or to another's place, may be another's or nobody's yet.
pub(crate) const EARLY: &[&str] = &["DataRace", "UninitialisedMemory"];
/// Nothing goes on; what notices first depends on who waits.
const STUCK: &[&str] = &["NoProgress", FAULT];
/// How weights or values that do not arrive are found: the block ends itself after it has told of them.
const OVERDUE: &[&str] = &["Trap"];
/// Barriers that some warps pass too soon, or that wait for other warps than some expect.
const UNEQUAL: &[&str] = &["DataRace", "UninitialisedMemory", "Barrier"];
/// A row that two tasks store and one that none does.
const MISSING: &[&str] = &["DataRace", "UninitialisedMemory", "Trap"];
/// A barrier whose phases come too soon: what they guard races, or its two sides no longer meet.
const OUT_OF_STEP: &[&str] = &["DataRace", "NoProgress", "Barrier", FAULT];
/// How a fault record's message begins. It has no line.
const FAULT: &str = "worker ";

const ORDER: [Planted; 10] = [
    planted("a relaxed poll", Statement("ld.acquire.gpu", "ld.relaxed.gpu"), RACE),
    older("an older chip's relaxed poll", Statement("ld.acquire.gpu", "ld.relaxed.gpu"), RACE),
    planted("a relaxed signal", Statement("red.release.gpu", "red.relaxed.gpu"), RACE),
    planted(
        "a signal of too narrow a scope",
        Statement("red.release.gpu", "red.release.cta"),
        RACE,
    ),
    planted("a poll of too narrow a scope", Statement("ld.acquire.gpu", "ld.acquire.cta"), RACE),
    planted("commands read at the scope of the GPU", Text(narrow_commands), RACE),
    planted("outputs released at the scope of the GPU", Text(narrow_outputs), RACE),
    planted("outputs that are not released", Text(relaxed_outputs), RACE),
    planted("a signal that comes before the stores", Text(early_signal), EARLY),
    planted("an epoch that is missing from a threshold", Text(missing_epoch), EARLY),
];

const BARRIERS: [Planted; 6] = [
    planted("dropped barriers", Text(no_barriers), EARLY),
    planted("barriers that do not wait for a warp", Text(smaller_barriers), UNEQUAL),
    planted("a shuffle without its first lane", Text(fewer_members), &["WarpSync"]),
    planted("input rows that are not stored", Statement("st.shared.v2.u32", "//"), UNWRITTEN),
    planted("partial sums that are not stored", Statement("st.shared.f32", "//"), UNWRITTEN),
    planted("an output that nothing writes", Statement("prmt.b32", "//"), &["UninitialisedReg"]),
];

const COPIES: [Planted; 10] = [
    planted("pages that nobody waits for", Text(no_wait), EARLY),
    planted("pages that are released before they are read", Text(early_release), RACE),
    planted("pages that are released by all warps but one", Text(fewer_arrivals), OUT_OF_STEP),
    planted("a copy that is not made", Statement("cp.async.bulk.shared", "//"), OVERDUE),
    planted("bytes that no barrier expects", Text(unexpected_bytes), EARLY),
    planted("a barrier that expects 16 bytes more", Text(more_bytes), OVERDUE),
    planted("copies that are longer than their rows", Text(longer_copies), &["OutOfBounds"]),
    planted(
        "an asm output that shares an input's register",
        Text(shared_register),
        &["OutOfBounds"],
    ),
    older(
        "a copy that no barrier learns of",
        Statement("cp.async.mbarrier.arrive.noinc.shared.b64", "mbarrier.arrive.shared.b64 _,"),
        EARLY,
    ),
    older("rows that are copied to odd places", Text(odd_copies), &["Misaligned"]),
];

const VALUES: [Planted; 12] = [
    planted("a load of four words from an odd place", Text(odd_loads), &["Misaligned"]),
    planted("a tail without its guard", Text(no_guard), &["OutOfBounds"]),
    planted(
        "activations read through the constant cache",
        Statement("ld.global.v4.f32", "ld.global.nc.v4.f32"),
        &["BadAccess"],
    ),
    planted("thresholds of one arrival", Tasks(low_thresholds), EARLY),
    planted("a threshold that is one too high", Tasks(high_threshold), STUCK),
    planted("a hint that does not come", Tasks(high_hint), OVERDUE),
    planted("residuals of another stage", Tasks(older_residuals), OVERDUE),
    planted(
        "values that are stored in words without order",
        Statement("st.relaxed.gpu.global.b64", "st.global.b64"),
        RACE,
    ),
    planted(
        "values that are read in words without order",
        Statement("ld.relaxed.gpu.global.v2.b64", "ld.global.v2.b64"),
        RACE,
    ),
    planted("values that are not stored", Statement("st.relaxed.gpu.global.b64", "//"), OVERDUE),
    planted("a tile whose rows are too long", Tasks(longer_rows), &["OutOfBounds"]),
    planted("tiles that overlap by a row", Tasks(overlapping_tiles), MISSING),
];

/// Seeds of the schedules under which a mistake is looked for.
const SCHEDULES: Range<u64> = 5..13;

/// The loop of the kernel.
const LOOP: &str = "compute";

fn narrow_commands(text: &str) -> String {
    edit::function(text, "admit", |body| body.replace("ld.acquire.sys", "ld.acquire.gpu"))
}

fn narrow_outputs(text: &str) -> String {
    edit::function(text, "sample", |body| body.replace("st.release.sys", "st.release.gpu"))
}

fn relaxed_outputs(text: &str) -> String {
    edit::function(text, "sample", |body| body.replace("st.release.sys", "st.relaxed.sys"))
}

/// Drops the barrier between an op's stores and the leader's signal.
fn early_signal(text: &str) -> String {
    edit::function(text, LOOP, |body| {
        let signal = body.find("red.release.gpu").expect("the loop signals");
        let barrier = "barrier.cta.sync 1, 256;";
        let at = body[..signal].rfind(barrier).expect("a barrier precedes the signal");
        format!("{}{}", &body[..at], &body[at + barrier.len()..])
    })
}

/// Computes every threshold for the first step: the epoch counts no further than 1.
fn missing_epoch(text: &str) -> String {
    edit::function(text, LOOP, |body| {
        let lines: Vec<_> = body.lines().collect();
        edit::lines(body, |line| {
            let [goal, a, b] = edit::operands(line)[..] else { return None };
            let is_compared = |line: &&str| {
                line.trim().starts_with("sub.s32") && edit::operands(line).last() == Some(&goal)
            };
            if !line.trim().starts_with("mul.lo.s32") || !lines.iter().any(is_compared) {
                return None;
            }
            // The count is in the task's record; the epoch is computed.
            let is_count = |register: &str| lines.iter().any(|line| edit::loads(line, register));
            let (count, epoch) = if is_count(a) { (a, b) } else { (b, a) };
            Some(format!(
                "{{ .reg .b32 first; min.u32 first, {epoch}, 1;\n\
                 mul.lo.s32 {goal}, first, {count}; }}"
            ))
        })
    })
}

/// The op of most tasks; of its own, so that a mistake is in a task and not in the loop around it.
fn in_linear(text: &str, find: &str, replace: &str) -> String {
    edit::function(text, "linear_bf16", |body| body.replace(find, replace))
}

fn no_barriers(text: &str) -> String {
    in_linear(text, "barrier.cta.sync 1, 256;", "")
}

fn smaller_barriers(text: &str) -> String {
    in_linear(text, "barrier.cta.sync 1, 256;", "barrier.cta.sync 1, 224;")
}

fn fewer_members(text: &str) -> String {
    in_linear(text, "0x1f, 0xffffffff;", "0x1f, 0xfffffffe;")
}

fn no_wait(text: &str) -> String {
    in_linear(text, "mbarrier.try_wait.parity.shared::cta.b64 p, [", "setp.eq.u32 p, 1, 1; //")
}

/// Lane 0 gives a page back without waiting for the other lanes of its warp.
fn early_release(text: &str) -> String {
    in_linear(text, "bar.warp.sync 0xffffffff;", "")
}

/// Lets the pages' "empty" barriers expect an arrival less than there are warps.
fn fewer_arrivals(text: &str) -> String {
    edit::lines(text, |line| {
        let barrier = edit::between(line, "mbarrier.init.shared.b64", "[", "]")?;
        let count = edit::between(line, "mbarrier.init.shared.b64", "],", ";")?;
        Some(format!(
            "{{ .reg .b32 fewer; min.u32 fewer, {count}, {};\n\
             mbarrier.init.shared.b64 [{barrier}], fewer; }}",
            COMPUTE_WARPS - 1
        ))
    })
}

const EXPECT: &str = "mbarrier.arrive.expect_tx.shared::cta.b64 state,";

fn unexpected_bytes(text: &str) -> String {
    edit::lines(text, |line| {
        let barrier = edit::between(line, EXPECT, "[", "]")?;
        Some(format!("{{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [{barrier}]; }}"))
    })
}

pub(crate) fn more_bytes(text: &str) -> String {
    edit::lines(text, |line| {
        let barrier = edit::between(line, EXPECT, "[", "]")?;
        let bytes = edit::between(line, EXPECT, "],", ";")?;
        Some(format!(
            "{{ .reg .b64 state; .reg .b32 more; add.u32 more, {bytes}, 16;\n\
             {EXPECT} [{barrier}], more; }}"
        ))
    })
}

/// Copies 16 bytes more than a page's rows have, and expects them.
fn longer_copies(text: &str) -> String {
    edit::lines(&more_bytes(text), |line| {
        let (copy, rest) = line.split_once("L2::cache_hint ")?;
        let places: Vec<_> = rest.trim_end_matches(';').split(", ").collect();
        let [to, from, bytes, barrier, policy] = places[..] else { return None };
        Some(format!(
            "{{ .reg .b32 more; add.u32 more, {bytes}, 16;\n\
             {copy}L2::cache_hint {to}, {from}, more, {barrier}, {policy}; }}"
        ))
    })
}

/// What `lateout` for the result of a wait would allow: one register for the barrier's address
/// and the result, which the first instruction writes.
fn shared_register(text: &str) -> String {
    const WAIT: &str = "mbarrier.try_wait.parity.shared::cta.b64 p,";
    edit::function(text, "linear_bf16", |body| {
        edit::lines(body, |line| {
            let barrier = edit::between(line, WAIT, "[", "]")?;
            let parity = edit::between(line, WAIT, "],", ";")?;
            Some(format!(
                "{{ .reg .b32 both; mov.b32 both, {barrier}; mov.b32 both, 0;\n\
                 {WAIT} [both], {parity}; }}"
            ))
        })
    })
}

fn odd_copies(text: &str) -> String {
    edit::lines(text, |line| {
        let is_copy = line.trim().starts_with("cp.async.cg.shared.global");
        is_copy.then(|| line.replacen("],", "+4],", 1))
    })
}

fn odd_loads(text: &str) -> String {
    edit::function(text, "linear_bf16", |body| {
        edit::lines(body, |line| {
            line.trim().starts_with("ld.shared.v4.u32").then(|| line.replace("];", "+4];"))
        })
    })
}

/// Drops the branches around loads of a norm's weights, which lanes past the end of a row take.
fn no_guard(text: &str) -> String {
    edit::function(text, "linear_bf16", |body| {
        let mut lines: Vec<_> = body.lines().collect();
        let loads: Vec<_> =
            (0..lines.len()).filter(|idx| lines[*idx].contains("ld.global.nc.v4.f32")).collect();
        for load in loads {
            let is_branch = |idx: &usize| lines[*idx].trim().starts_with('@');
            let guard = (0..load).rev().find(is_branch).expect("a branch precedes the load");
            lines[guard] = "";
        }
        lines.join("\n")
    })
}

fn low_thresholds(tasks: &mut [Task]) {
    for task in tasks {
        task.wait_count = task.wait_count.min(1);
    }
}

fn high_threshold(tasks: &mut [Task]) {
    let sample = |task: &&mut Task| task.opcode == Opcode::Sample as u16;
    tasks.iter_mut().find(sample).expect("tokens are sampled").wait_count += 1;
}

/// The hint for which output projections wait, before they look at values, never comes.
fn high_hint(tasks: &mut [Task]) {
    let merges = |task: &&mut Task| {
        task.opcode == Opcode::Linear as u16
            && LinearArgs::unpack(task).prologue == Prologue::MergeSplits
    };
    tasks.iter_mut().find(merges).expect("splits are merged").wait_count += 1;
}

/// Residuals are looked for with the stamp of another stage than the one that has left them.
fn older_residuals(tasks: &mut [Task]) {
    for task in tasks.iter_mut().filter(|task| task.opcode == Opcode::Linear as u16) {
        let mut args = LinearArgs::unpack(task);
        args.residual_age += u32::from(args.epilogue == Epilogue::AddResidual);
        task.flags = args.pack().flags;
    }
}

/// Columns after the last ones of the last matrix.
fn longer_rows(tasks: &mut [Task]) {
    let linear = |task: &&mut Task| task.opcode == Opcode::Linear as u16;
    tasks.iter_mut().rfind(linear).expect("there are matrices").words[0] += 256;
}

/// Tiles put their first product where the last one of the tile before is.
fn overlapping_tiles(tasks: &mut [Task]) {
    for idx in 1..tasks.len() {
        let [task, next] = [&tasks[idx - 1], &tasks[idx]].map(LinearArgs::unpack);
        let [end, first] =
            [task.segments[0].out_first + task.row_count(), next.segments[0].out_first];
        let are_linear = tasks[idx - 1..=idx].iter().all(|t| t.opcode == Opcode::Linear as u16);
        if are_linear && tasks[idx].segment_count() == 1 && task.y == next.y && end == first {
            tasks[idx].words[5] -= 1;
        }
    }
}

/// What is said about a mistake, in the order in which it is noticed: under the first schedule that
/// shows it, since one in which all happens in time has nothing to show.
fn messages(mistake: &Planted) -> Vec<String> {
    let mut schedules = SCHEDULES.map(|seed| messages_under(mistake, seed));
    schedules.find(|lines| !lines.is_empty()).unwrap_or_default()
}

fn messages_under(mistake: &Planted, seed: u64) -> Vec<String> {
    // With few pages, each is soon filled again.
    let shared_bytes = ring(INPUT_BYTES_MIN) + PAGE_COUNT_MIN * PAGE_BYTES;
    let mut options = PtxOptions { shared_bytes, ..shipped(mistake.capability, 2, seed) };
    let text = match mistake.place {
        Statement(find, replace) => options.text.replace(find, replace),
        Text(edit) => edit(&options.text),
        Tasks(edit) => {
            options.edit_tasks = edit;
            String::new()
        }
    };
    if !matches!(mistake.place, Tasks(_)) {
        assert!(text.trim_end() != options.text.trim_end(), "{}: no such place", mistake.what);
        options = PtxOptions { text, ..options };
    }
    let (device, report) = PtxDevice::new(options);
    let output = run(["qwen3", "bf16"], Box::new(device), 8, &PROMPT, 2);
    let mut lines = report.lock().expect("the device has not panicked").findings.clone();
    lines.extend(output.err().map(|error| error.to_string()));
    lines
}

/// Whether a message says which task of which op is concerned: the interpreter by
/// `task 7 (linear)`, a fault record by the task's name, as in "before `layer 0 attention head 1`".
fn names_the_task(message: &str) -> bool {
    let noted = edit::between(message, "; ", "task ", ")").is_some_and(|note| {
        let Some((task_idx, op)) = note.split_once(" (") else { return false };
        let mut ops = (0..).map_while(Opcode::from_raw).map(Opcode::name);
        task_idx.parse::<u32>().is_ok() && ops.any(|name| name == op)
    });
    noted || edit::between(message, " before ", "`", "`").is_some_and(|name| !name.is_empty())
}

/// Whether a message of the interpreter names a line; a fault record has none.
fn names_the_line(message: &str) -> bool {
    let line = edit::between(message, " at ", "line ", " in ");
    let line = line.and_then(|line| line.split(' ').next());
    line.is_some_and(|line| line.parse::<u32>().is_ok_and(|line| line > 0))
}

/// What is wrong with the messages about a mistake, if anything.
fn complaint(mistake: &Planted) -> Option<String> {
    let what = mistake.what;
    let lines = messages(mistake);
    let Some(first) = lines.first() else { return Some(format!("{what} is not found")) };
    println!("{what}: {first}");
    let is_found_as = |kind: &&str| first.starts_with(*kind);
    let problem = if !mistake.found_as.iter().any(is_found_as) {
        "is found as something else"
    } else if !names_the_task(first) {
        "is found without its task and op"
    } else if !first.starts_with(FAULT) && !names_the_line(first) {
        "is found without its line"
    } else {
        return None;
    };
    Some(format!("{what} {problem}: {lines:#?}"))
}

fn all_are_found(mistakes: &[Planted]) {
    let complaints: Vec<_> = mistakes.iter().filter_map(complaint).collect();
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[test]
fn mistakes_of_order_are_found() {
    all_are_found(&ORDER);
}

#[test]
fn mistakes_of_barriers_are_found() {
    all_are_found(&BARRIERS);
}

#[test]
fn mistakes_of_copies_are_found() {
    all_are_found(&COPIES);
}

#[test]
fn mistakes_of_values_are_found() {
    all_are_found(&VALUES);
}
