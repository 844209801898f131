//! Several GPUs that run a program together: the bits of one, and mistakes between them that are found.

use tilert_mk::driver::cuda::{Purpose, kernels};
use tilert_mk::engine::Weights;

use super::heads::{Heads, Rows, SHORT, TOO_LONG, logits};
use super::ptx_device::{PtxDevice, PtxOptions};
use super::{Output, PROMPT, run, run_clean, run_ptx, shipped};

/// The shipped PTX for several GPUs, unchanged.
pub(crate) fn shipped_peers(devices: u32, workers: u32, seed: u64) -> PtxOptions {
    let text = kernels()
        .find(|kernel| kernel.purpose == Purpose::Peers)
        .expect("the kernel is built")
        .text;
    PtxOptions { text: text.to_owned(), devices, ..shipped(90, workers, seed) }
}

#[test]
fn several_devices_leave_the_bits_of_one() {
    let golden = ["qwen3", "bf16"];
    let expected = run_ptx(golden, shipped(90, 2, 0), 8, &PROMPT, 3);
    assert_eq!((expected.ids.len(), expected.rows.len()), (3, PROMPT.len() + 2));
    for (seed, (devices, workers, width)) in
        (1..).zip([(1, 2, 8), (2, 4, 1), (2, 6, 3), (3, 3, 8), (8, 8, 2)])
    {
        let options = shipped_peers(devices, workers, seed);
        let found = run_ptx(golden, options, width, &PROMPT, 3);
        assert!(found.is_same(&expected), "{devices} devices, {workers} workers, width {width}");
    }
}

#[test]
fn some_schedules_of_two_devices_give_the_same_bits() {
    let request = |seed| run_ptx(["llama", "bf16"], shipped_peers(2, 4, seed), 2, &PROMPT[..3], 2);
    let expected: Output = request(0);
    for seed in 1..5 {
        assert!(request(seed).is_same(&expected), "seed {seed}");
    }
}

/// Compares a model's logits on two devices with those on one.
fn check_two(heads: Heads, rows: Rows, width: u32, len: u32, workers: u32) {
    let bits = |options: PtxOptions| -> Vec<u32> {
        let logits = run_clean("two devices", options, |device| {
            logits(device, heads, rows, width, len, Weights::Native)
        });
        logits.concat().into_iter().map(f32::to_bits).collect()
    };
    assert!(bits(shipped(90, workers, 5)) == bits(shipped_peers(2, workers, 5)));
}

/// Tasks of a KV head that are on several devices merge its splits together.
#[test]
fn attention_that_merges_across_devices_gives_the_same_bits() {
    check_two((72, 8, 128, "Llama"), SHORT, 3, 68, 18);
}

#[test]
fn rows_in_pieces_of_two_devices_give_the_same_bits() {
    check_two((2, 1, 64, "Llama"), TOO_LONG, 1, 2, 4);
}

/// What is said of a run of the PTX after `edit`.
fn found_after(edit: impl Fn(String) -> String) -> String {
    let options = shipped_peers(2, 4, 3);
    let (device, report) =
        PtxDevice::new(PtxOptions { text: edit(options.text), ..shipped_peers(2, 4, 3) });
    let error = run(["qwen3", "bf16"], Box::new(device), 2, &PROMPT[..3], 2).err();
    let report = report.lock().expect("the device has not panicked");
    let first = report.findings.first().cloned();
    first.or_else(|| error.map(|error| error.to_string())).unwrap_or_default()
}

#[test]
fn mistakes_between_devices_are_found() {
    let narrowed = |statement: &'static str| {
        let narrow = statement.replace(".sys", ".gpu");
        move |text: String| {
            assert!(text.contains(statement), "{statement} is in the PTX");
            text.replace(statement, &narrow)
        }
    };
    for statement in [
        "st.relaxed.sys.global.v2.b64",
        "st.relaxed.sys.global.b64",
        "ld.relaxed.sys.global.v2.b64",
        "red.relaxed.sys.global.add.u32",
        "fence.acq_rel.sys",
    ] {
        let found = found_after(narrowed(statement));
        println!("{statement} at the scope of the GPU: {found}");
        assert!(found.contains("DataRace"), "{statement}: {found}");
    }
    // Everything goes to the first device: the others wait for it, and tell for what.
    let lonely = found_after(|text| {
        const CHOICE: &str = "mad.lo.u32 place, ";
        assert!(text.contains(CHOICE), "distances are chosen");
        text.replace(CHOICE, "// ")
    });
    println!("nothing reaches the second device: {lonely}");
    assert!(lonely.contains("values_overdue"), "{lonely}");
}
