//! The same bits whatever the number of workers, the width of the steps, and the machine's load.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const FAMILIES: [&str; 4] = ["llama", "smollm2", "qwen3", "qwen3_yarn"];
const PROMPT: &str = "74,179,209,167,92,25,102,252,72,70,7,55,211,179,100,152,87,241";

/// The logits file of one run.
fn logits(family: &str, compute: &str, workers: u32, width: u32, folder: &Path) -> Vec<u8> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let file: PathBuf = folder.join(format!("{family}-{compute}-{workers}-{width}"));
    // A GPU takes no other.
    let device = if compute == "exact" { "auto" } else { "cpu" };
    let status = Command::new(env!("CARGO_BIN_EXE_tilert-mk"))
        .args(["launch", "--ignore-eos", "--max-tokens", "12", "--prompt-ids", PROMPT])
        .args(["--workers", &workers.to_string(), "--prefill-chunk", &width.to_string()])
        .args(["--device", device, "--compute", compute])
        .arg("--model")
        .arg(root.join("tests/golden").join(family).join("bf16"))
        .arg("--logits")
        .arg(&file)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .expect("the binary runs");
    assert!(status.success(), "{family}, {workers} workers, width {width}: {status}");
    std::fs::read(file).expect("the run left its logits")
}

#[test]
fn workers_and_step_widths_leave_the_bits_alone() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (family, compute) in FAMILIES.into_iter().flat_map(|f| [(f, "exact"), (f, "bf16")]) {
        let expected = logits(family, compute, 1, 64, folder.path());
        for workers in [1, 2, 4] {
            for width in [1, 2, 3, 5, 8] {
                let found = logits(family, compute, workers, width, folder.path());
                let what = format!("{family}, {compute}, {workers} workers, width {width}");
                assert!(expected == found, "{what}: bits differ");
            }
        }
    }
}

#[test]
fn repeats_leave_the_bits_alone() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let expected = logits("qwen3", "exact", 2, 64, folder.path());
    for repeat in 0..50 {
        let found = logits("qwen3", "exact", [1, 2, 4][repeat % 3], 64, folder.path());
        assert!(expected == found, "repeat {repeat} differs");
    }
}

/// A second process that keeps a core busy until it is dropped.
struct Load(Child);

impl Load {
    /// This test binary again, running nothing but `a_busy_core`.
    fn new() -> Load {
        let binary = std::env::current_exe().expect("this binary has a path");
        let child = Command::new(binary)
            .args(["--ignored", "--exact", "a_busy_core"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        Load(child.expect("this binary runs"))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "the load of the test below, in a process of its own; no test"]
fn a_busy_core() {
    let begin = Instant::now();
    // Bounded, should nobody be left to end it.
    while begin.elapsed() < Duration::from_secs(120) {
        std::hint::spin_loop();
    }
}

#[test]
fn a_second_process_on_the_cpu_leaves_the_bits_alone() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let expected = FAMILIES.map(|family| logits(family, "exact", 1, 64, folder.path()));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut loads: Vec<Load> = (0..cores).map(|_| Load::new()).collect();
    for repeat in 0..50 {
        let workers = [1, 2, 4][repeat % 3];
        let which = repeat % FAMILIES.len();
        let found = logits(FAMILIES[which], "exact", workers, 64, folder.path());
        assert!(expected[which] == found, "repeat {repeat}, {workers} workers: differs");
    }
    for load in &mut loads {
        let state = load.0.try_wait().expect("the load is a child");
        assert!(state.is_none(), "the load ended before the test did: {state:?}");
    }
}
