//! The same bits whatever the number of workers and the width of the steps.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const FAMILIES: [&str; 4] = ["llama", "smollm2", "qwen3", "qwen3_yarn"];
const PROMPT: &str = "74,179,209,167,92,25,102,252,72,70,7,55,211,179,100,152,87,241";

/// The logits file of one run.
fn logits(family: &str, workers: u32, width: u32, folder: &Path) -> Vec<u8> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let file: PathBuf = folder.join(format!("{family}-{workers}-{width}"));
    let status = Command::new(env!("CARGO_BIN_EXE_tilert-mk"))
        .args(["launch", "--ignore-eos", "--max-tokens", "12", "--prompt-ids", PROMPT])
        .args(["--workers", &workers.to_string(), "--prefill-chunk", &width.to_string()])
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
    for family in FAMILIES {
        let expected = logits(family, 1, 64, folder.path());
        for workers in [1, 2, 4] {
            for width in [1, 2, 3, 5, 8] {
                let found = logits(family, workers, width, folder.path());
                assert!(expected == found, "{family}: {workers} workers, width {width} differ");
            }
        }
    }
}

#[test]
fn repeats_leave_the_bits_alone() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let expected = logits("qwen3", 2, 64, folder.path());
    for repeat in 0..50 {
        let found = logits("qwen3", [1, 2, 4][repeat % 3], 64, folder.path());
        assert!(expected == found, "repeat {repeat} differs");
    }
}
