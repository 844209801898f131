//! `bench` as scripts see it: each subcommand with small sizes; JSON, comparison, plot.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

/// Runs `bench` on two workers of the CPU.
fn bench(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tilert-mk"));
    command.arg("bench").args(args).output().unwrap()
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Arguments that choose a small checkpoint on two workers.
fn model_args() -> Vec<String> {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/qwen3/bf16");
    let model = model.to_str().unwrap();
    ["--model", model, "--workers", "2", "--device", "cpu"].map(str::to_owned).to_vec()
}

/// Runs a subcommand on the checkpoint.
fn on_model(args: &[&str]) -> Output {
    let model = model_args();
    let args: Vec<&str> = args.iter().copied().chain(model.iter().map(String::as_str)).collect();
    bench(&args)
}

fn json(output: &Output) -> Value {
    serde_json::from_str(&stdout(output)).unwrap()
}

fn assert_contains(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
}

#[test]
fn decode_prints_text_and_json() {
    let args = ["decode", "--rounds", "2", "--tokens", "20", "--context", "5"];
    let text = stdout(&on_model(&args));
    let rows = ["round 2", "time per token", "read bandwidth", "share", "peak resident"];
    assert_contains(&text, &rows);
    let figures = json(&on_model(&[&args[..], &["--json"]].concat()));
    assert_eq!((&figures["tokens"], &figures["workers"]), (&40.into(), &2.into()));
    assert_eq!((&figures["bench"], &figures["context"]), (&"decode".into(), &5.into()));
    assert_eq!(figures["rounds"].as_array().unwrap().len(), 2);
    for key in ["bytes_per_token", "share_of_best", "share_of_median", "peak_resident_bytes"] {
        assert!(figures[key].as_f64().unwrap() > 0.0, "{key}: {figures}");
    }
}

#[test]
fn prefill_has_a_row_for_each_length() {
    let args = ["prefill", "--rounds", "2", "--prompt-tokens", "3,70"];
    assert_contains(&stdout(&on_model(&args)), &["3 tokens", "70 tokens", "tok/s"]);
    let figures = json(&on_model(&[&args[..], &["--json"]].concat()));
    let rows = figures["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 2);
    for row in rows {
        assert!(row["tokens_per_second"].as_f64().unwrap() > 0.0, "{row}");
        assert!(row["ttft_us"]["p50"].as_f64().unwrap() > 0.0, "{row}");
    }
}

#[test]
fn steps_have_a_row_for_each_context_and_width() {
    let args = ["steps", "--tokens", "8", "--context", "3,70", "--width", "1,8"];
    let figures = json(&on_model(&[&args[..], &["--json"]].concat()));
    let rows = figures["rows"].as_array().unwrap();
    let sizes: Vec<_> =
        rows.iter().map(|row| (row["context"].as_u64(), row["width"].as_u64())).collect();
    let sizes_wanted = [(3, 1), (3, 8), (70, 1), (70, 8)].map(|(c, w)| (Some(c), Some(w)));
    assert_eq!(sizes, sizes_wanted);
    for row in rows {
        assert!(row["step_us"]["p50"].as_f64().unwrap() > 0.0, "{row}");
        assert!(row["positions_mean"].as_f64() > row["context"].as_f64(), "{row}");
    }
    let output = on_model(&[&args[..], &["--max-context", "75"]].concat());
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_contains(&String::from_utf8(output.stderr).unwrap(), &["do not fit a context of 75"]);
}

#[test]
fn figures_are_compared_and_plotted() {
    let dir = tempfile::tempdir().unwrap();
    let [old, plot] = ["old.json", "plot.svg"].map(|name| dir.path().join(name));
    let [old, plot] = [&old, &plot].map(|path| path.to_str().unwrap());
    let args = ["bandwidth", "--threads", "1", "--json", "--plot", plot];
    let json_text = stdout(&bench(&args));
    assert_contains(&std::fs::read_to_string(plot).unwrap(), &["<svg", "GB/s", "</svg>"]);
    std::fs::write(old, json_text).unwrap();
    let text = stdout(&bench(&["bandwidth", "--threads", "1", "--compare", old]));
    assert_contains(&text, &["read bandwidth of 1 threads", "new/old", "median_bytes_per_second"]);
    // Before anything is measured.
    let output = bench(&["decode", "--compare", old]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_contains(&stderr, &["error: ", old, "`bench bandwidth`, not of `bench decode`"]);
    assert_eq!(bench(&["decode", "--plot", "/nonexistent/p.svg"]).status.code(), Some(1));
}

#[test]
fn help_has_examples_and_a_subcommand_is_needed() {
    for what in [&["--help"][..], &["decode", "--help"], &["prefill", "--help"]] {
        assert_contains(&stdout(&bench(what)), &["Examples:"]);
    }
    for what in [["steps", "--help"], ["bandwidth", "--help"], ["runtime", "--help"]] {
        assert_contains(&stdout(&bench(&what)), &["Examples:", "--plot", "--compare", "--json"]);
    }
    let output = bench(&[]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert_contains(&String::from_utf8(output.stderr).unwrap(), &["decode"]);
}

#[test]
fn runtime_has_a_row_for_each_cost() {
    let args = ["runtime", "--workers", "2", "--device", "cpu", "--samples", "20"];
    let figures = json(&bench(&[&args[..], &["--json"]].concat()));
    let rows = figures["rows"].as_array().unwrap();
    for name in ["claim", "signal", "put of 4096", "task", "2 workers in turns", "reaction", "1024"]
    {
        let is_row = |row: &&Value| row["name"].as_str().unwrap().contains(name);
        let row = rows.iter().find(is_row).unwrap_or_else(|| panic!("{name}: {figures}"));
        for key in ["p50_ns", "p99_ns", "p999_ns", "max_ns"] {
            assert!(row[key].as_f64().unwrap() > 0.0, "{row}");
        }
        assert_eq!(row["samples"], 20, "{row}");
    }
    let text = stdout(&bench(&[&args[..], &["--only", "claim", "--busy-poll"]].concat()));
    assert_contains(&text, &["claim of a task  p50 ", "20 samples of 32"]);
    assert!(!text.contains("signal"), "{text}");
    assert_eq!(bench(&["runtime", "--only", "no such row"]).status.code(), Some(2));
}
