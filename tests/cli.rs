//! The command line as scripts see it: exit codes, one error line, JSON keys, files.
//!
//! Runs the built binary. Whatever is wrong with the input, it must exit with 1 or 2, print exactly
//! one `error:` line that names the cause, and never panic.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

const FAMILIES: [&str; 4] = ["llama", "smollm2", "qwen3", "qwen3_yarn"];
/// In the vocabulary of every golden model and of the demo model.
const PROMPT_IDS: &str = "11,12,13,14";

fn golden(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(family)
}

/// Runs the binary with `args` and `stdin`.
fn run_with_stdin(args: &[&str], stdin: &[u8]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_tilert-mk"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A process that fails early does not read; that is not this test's business.
    let _ = child.stdin.take().unwrap().write_all(stdin);
    child.wait_with_output().unwrap()
}

fn run(args: &[&str]) -> Output {
    run_with_stdin(args, b"")
}

/// `launch --model DIR` and more, on two workers.
fn launch(model: &Path, args: &[&str]) -> Output {
    let model = model.to_str().unwrap();
    run(&[&["launch", "--model", model, "--workers", "2"], args].concat())
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    assert!(!stderr(output).contains("panicked"), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// The only line on stderr of a run that failed with `code`; it must contain all of `named`.
#[track_caller]
fn assert_error(output: &Output, code: i32, named: &[&str]) {
    let stderr = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.starts_with("error: "), "{stderr}");
    for name in named {
        assert!(stderr.contains(name), "'{name}' is not in: {stderr}");
    }
    assert!(output.stdout.is_empty(), "{output:?}");
}

fn json(output: &Output) -> Value {
    let text = stdout(output);
    assert_eq!(text.lines().count(), 1, "{text}");
    serde_json::from_str(&text).unwrap()
}

fn ids(value: &Value) -> Vec<u64> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect()
}

/// A directory with copies of a golden checkpoint's files.
fn copy_of(family: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(golden(family).join("f32").join(file), dir.path().join(file)).unwrap();
    }
    dir
}

#[test]
fn usage_errors_exit_with_2() {
    let cases: [(&[&str], &str); 17] = [
        (&[], "subcommand"),
        (&["lunch"], "lunch"),
        (&["launch", "--modle", "x"], "--modle"),
        (&["launch", "--model"], "--model"),
        (&["launch", "--max-tokens", "0"], "--max-tokens"),
        (&["launch", "--max-tokens", "many"], "--max-tokens"),
        (&["launch", "--temperature", "-1"], "--temperature"),
        (&["launch", "--top-p", "2"], "--top-p"),
        (&["launch", "--workers", "0"], "--workers"),
        (&["launch", "--devices", "9"], "--devices"),
        (&["launch", "--device", "cpu", "--devices", "2"], "--device cuda"),
        (&["launch", "--prefill-chunk", "65"], "--prefill-chunk"),
        (&["launch", "--compute", "int3"], "--compute"),
        (&["launch", "--prompt-ids", "1,x"], "--prompt-ids"),
        (&["launch", "--prompt-ids", ""], "--prompt-ids"),
        (&["launch", "--prompt", "a", "--prompt-ids", "1"], "--prompt"),
        (&["launch", "--stop", ""], "--stop"),
    ];
    for (args, named) in cases {
        assert_error(&run(args), 2, &[named]);
    }
}

#[test]
fn help_shows_every_flag_and_examples() {
    let help = stdout(&run(&["--help"]));
    assert!(help.contains("Examples:") && help.contains("launch") && help.contains("inspect"));
    assert!(stdout(&run(&["bench", "--help"])).contains("Examples:"));
    let help = stdout(&run(&["launch", "--help"]));
    for flag in [
        "model",
        "prompt",
        "prompt-file",
        "prompt-ids",
        "max-tokens",
        "temperature",
        "top-k",
        "top-p",
        "min-p",
        "seed",
        "repetition-penalty",
        "frequency-penalty",
        "presence-penalty",
        "stop",
        "ignore-eos",
        "device",
        "workers",
        "max-context",
        "load",
        "compute",
        "busy-poll",
        "prefill-chunk",
        "format",
        "logits",
        "trace",
    ] {
        assert!(help.contains(&format!("--{flag} ")) || help.contains(&format!("--{flag}\n")));
    }
    assert!(help.contains("Examples:"));
    assert!(stdout(&run(&["--version"])).contains(env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_model_that_is_not_there() {
    let path = "/nonexistent/model";
    for args in [
        &["launch", "--model", path, "--prompt-ids", "1"][..],
        &["launch", "--model", path, "--prompt", "text"],
        &["inspect", "--model", path],
    ] {
        assert_error(&run(args), 1, &[path]);
    }
}

#[test]
fn text_without_a_tokenizer() {
    let model = golden("qwen3").join("f32");
    assert_error(&launch(&model, &["--prompt", "text"]), 1, &["tokenizer.json"]);
    let stop = ["--prompt-ids", PROMPT_IDS, "--stop", "x"];
    assert_error(&launch(&model, &stop), 1, &["tokenizer.json"]);
}

#[test]
fn golden_models_generate_their_tokens() {
    for family in FAMILIES {
        let spec = std::fs::read(golden(family).join("golden.json")).unwrap();
        let spec: Value = serde_json::from_slice(&spec).unwrap();
        let prompt: Vec<String> = ids(&spec["prompt"]).iter().map(u64::to_string).collect();
        for (name, directory) in [("f32", "f32"), ("bf16w_f32", "bf16")] {
            let variants = spec["variants"].as_array().unwrap();
            let variant = variants.iter().find(|variant| variant["name"] == name).unwrap();
            let want = ids(&variant["greedy"]);
            let count = want.len().to_string();
            let output = launch(
                &golden(family).join(directory),
                &[
                    "--prompt-ids",
                    &prompt.join(","),
                    "--max-tokens",
                    &count,
                    "--ignore-eos",
                    "--format",
                    "json",
                ],
            );
            let answer = json(&output);
            assert_eq!(ids(&answer["ids"]), want, "{family} {name}");
            assert_eq!(ids(&answer["prompt_ids"]), ids(&spec["prompt"]));
            assert_eq!(answer["finish_reason"], "length");
        }
    }
}

#[test]
fn json_has_the_promised_keys() {
    let model = golden("llama").join("bf16");
    let args = [
        "--prompt-ids",
        PROMPT_IDS,
        "--max-tokens",
        "8",
        "--ignore-eos",
        "--format",
        "json",
        "--device",
        "cpu",
        "--temperature",
        "1",
        "--seed",
        "42",
    ];
    let answer = json(&launch(&model, &args));
    let keys: Vec<&str> = answer.as_object().unwrap().keys().map(String::as_str).collect();
    let mut want = [
        "prompt_ids",
        "ids",
        "text",
        "finish_reason",
        "ttft_us",
        "tpot_us",
        "tokens_per_second",
        "device",
        "workers",
        "seed",
    ];
    want.sort_unstable();
    let mut sorted = keys.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, want);
    assert_eq!(answer["text"], "");
    assert_eq!((&answer["device"], &answer["workers"]), (&"cpu".into(), &2.into()));
    assert_eq!(answer["seed"], 42);
    assert_eq!(ids(&answer["ids"]).len(), 8);
    for figure in [&answer["ttft_us"], &answer["tokens_per_second"]] {
        assert!(figure.as_f64().unwrap() > 0.0, "{answer}");
    }
    for quantile in ["p50", "p99", "p999", "max"] {
        assert!(answer["tpot_us"][quantile].as_f64().unwrap() > 0.0, "{answer}");
    }
    let same_seed = json(&launch(&model, &args));
    assert_eq!(answer["ids"], same_seed["ids"]);
}

#[test]
fn ids_are_the_text_of_a_model_without_tokenizer() {
    let model = golden("llama").join("f32");
    let output = launch(&model, &["--prompt-ids", PROMPT_IDS, "--max-tokens", "4", "--ignore-eos"]);
    let text = stdout(&output);
    let words: Vec<u32> = text.split_whitespace().map(|word| word.parse().unwrap()).collect();
    assert_eq!(words.len(), 4, "{text}");
    assert!(text.ends_with('\n'));
    let status = stderr(&output);
    assert_eq!(status.lines().count(), 1, "{status}");
    assert!(status.contains("4 prompt tokens, 4 generated, TTFT"), "{status}");
}

#[test]
fn bad_prompts() {
    let model = golden("qwen3").join("f32");
    assert_error(&launch(&model, &["--prompt-ids", "1,256"]), 1, &["256"]);
    assert_error(&launch(&model, &["--prompt-ids", "4294967295"]), 1, &["4294967295"]);
    let long = vec!["7"; 20].join(",");
    let args = ["--prompt-ids", &long, "--max-context", "16"];
    assert_error(&launch(&model, &args), 1, &["20 tokens", "16"]);
    assert_error(&launch(&model, &["--prompt", ""]), 1, &["empty prompt", "--prompt"]);
    assert_error(&launch(&model, &[]), 1, &["empty prompt", "stdin"]);
    assert_error(&launch(&model, &["--prompt-file", "/nonexistent/p"]), 1, &["/nonexistent/p"]);
    assert_error(&run_with_stdin(&["launch"], b"\xff\xfe"), 1, &["stdin"]);
    let empty = tempfile::NamedTempFile::new().unwrap();
    let path = empty.path().to_str().unwrap();
    assert_error(&run(&["launch", "--prompt-file", path]), 1, &["empty prompt", path]);
}

#[test]
fn busy_polling_changes_no_token() {
    let model = golden("llama").join("bf16");
    let args = ["--prompt-ids", PROMPT_IDS, "--max-tokens", "8", "--ignore-eos"];
    let ids = stdout(&launch(&model, &args));
    let path = model.to_str().unwrap();
    // With fewer workers than this machine has cores, perhaps, and with more.
    for workers in ["1", "33"] {
        let launch = ["launch", "--model", path, "--workers", workers, "--busy-poll"];
        assert_eq!(stdout(&run(&[&launch[..], &args].concat())), ids, "{workers} workers");
    }
}

#[test]
fn the_answer_ends_where_the_context_ends() {
    let model = golden("qwen3").join("f32");
    let args = [
        "--prompt-ids",
        PROMPT_IDS,
        "--max-context",
        "16",
        "--max-tokens",
        "100",
        "--ignore-eos",
        "--format",
        "json",
    ];
    let answer = json(&launch(&model, &args));
    assert_eq!(ids(&answer["ids"]).len(), 12);
    assert_eq!(answer["finish_reason"], "length");
}

#[test]
fn output_files_are_checked_before_the_model_is_loaded() {
    for flag in ["--logits", "--trace"] {
        let path = "/nonexistent/output";
        let args = ["--prompt-ids", "1", flag, path];
        assert_error(&launch(Path::new("/nonexistent/model"), &args), 1, &[path]);
    }
}

#[test]
fn logits_have_a_row_for_every_processed_position() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("logits");
    let args = [
        "--prompt-ids",
        PROMPT_IDS,
        "--max-tokens",
        "5",
        "--ignore-eos",
        "--logits",
        path.to_str().unwrap(),
    ];
    assert!(launch(&golden("qwen3").join("f32"), &args).status.success());
    let bytes = std::fs::read(&path).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(tensors.tensor("logits").unwrap().shape(), [4 + 5 - 1, 256]);
}

#[test]
fn a_trace_has_a_track_for_each_worker() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("trace.json");
    let args = [
        "--prompt-ids",
        PROMPT_IDS,
        "--max-tokens",
        "5",
        "--ignore-eos",
        "--trace",
        path.to_str().unwrap(),
    ];
    assert!(launch(&golden("qwen3").join("f32"), &args).status.success());
    let trace: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    for worker in ["worker 0", "worker 1"] {
        assert!(events.iter().any(|event| event["args"]["name"] == worker), "{worker}");
    }
    for category in ["stage", "wait", "run"] {
        assert!(events.iter().any(|event| event["cat"] == category), "{category}");
    }
}

#[test]
fn damaged_checkpoints() {
    let weights = "model.safetensors";
    let whole = std::fs::read(golden("qwen3").join("f32").join(weights)).unwrap();
    for byte_count in [0, 4, 8, 100, whole.len() / 2, whole.len() - 1] {
        let dir = copy_of("qwen3");
        std::fs::write(dir.path().join(weights), &whole[..byte_count]).unwrap();
        assert_error(&launch(dir.path(), &["--prompt-ids", "1"]), 1, &[weights]);
    }
    let dir = copy_of("qwen3");
    let mut endless = whole;
    endless[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    std::fs::write(dir.path().join(weights), endless).unwrap();
    assert_error(&launch(dir.path(), &["--prompt-ids", "1"]), 1, &[weights]);
    std::fs::remove_file(dir.path().join(weights)).unwrap();
    assert_error(&launch(dir.path(), &["--prompt-ids", "1"]), 1, &[weights]);
    let dir = copy_of("qwen3");
    std::fs::write(dir.path().join("config.json"), "{").unwrap();
    assert_error(&launch(dir.path(), &["--prompt-ids", "1"]), 1, &["config.json"]);
}

#[test]
fn a_broken_tokenizer_is_named() {
    let dir = copy_of("qwen3");
    std::fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    assert_error(&launch(dir.path(), &["--prompt", "a"]), 1, &["tokenizer.json"]);
}

#[test]
fn the_demo_model_writes_a_tape() {
    let text = stdout(&run(&["launch", "--max-tokens", "40", "--ignore-eos"]));
    let events = ["BID", "ASK", "TRADE", "CANCEL"];
    assert!(events.iter().any(|event| text.contains(event)), "{text}");
    let ids_of = |args: &[&str], stdin: &[u8]| {
        let args = [&["launch", "--max-tokens", "4", "--format", "json"], args].concat();
        json(&run_with_stdin(&args, stdin))["prompt_ids"].clone()
    };
    let prompt = "TRADE BID +1 x100 5ms\n";
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), prompt).unwrap();
    let by_flag = ids_of(&["--prompt", prompt], b"");
    assert_eq!(by_flag, ids_of(&[], prompt.as_bytes()));
    assert_eq!(by_flag, ids_of(&["--prompt-file", file.path().to_str().unwrap()], b""));
    assert_ne!(by_flag, ids_of(&[], b""), "an empty stdin takes the built-in prompt");
}

#[test]
fn a_stop_text_ends_the_answer_before_itself() {
    let launch = ["launch", "--prompt", "BID +1 x200 5ms\n", "--max-tokens", "64", "--ignore-eos"];
    let args = [&launch[..], &["--format", "json"]].concat();
    let whole = json(&run(&args));
    let whole = whole["text"].as_str().unwrap();
    // A few characters from the middle of the answer; its words are shorter, so they span tokens.
    let middle = whole.len() / 2;
    let stop = &whole[middle..middle + 8];
    let cut = whole.find(stop).unwrap();
    let stopped = json(&run(&[&args[..], &["--stop", "not a tape", "--stop", stop]].concat()));
    assert_eq!(stopped["text"], whole[..cut]);
    assert_eq!(stopped["finish_reason"], "stop");
    let text = stdout(&run(&[&launch[..], &["--stop", stop]].concat()));
    assert_eq!(text.trim_end_matches('\n'), whole[..cut].trim_end_matches('\n'));
}

#[test]
fn a_reader_that_leaves_is_no_failure() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_tilert-mk"))
        .args(["launch", "--max-tokens", "900", "--ignore-eos"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(stderr(&output), "");
}

#[test]
fn inspect_prints_text_and_json() {
    let model = golden("qwen3").join("bf16");
    let model = model.to_str().unwrap();
    let args = ["inspect", "--model", model, "--workers", "2"];
    let text = stdout(&run(&args));
    for row in [
        "parameters",
        "read per token",
        "tasks per step",
        "events per step",
        "dependent stages",
        "heap",
        "bandwidth floor",
    ] {
        assert!(text.contains(row), "{row} is not in\n{text}");
    }
    let summary: Value =
        serde_json::from_str(&stdout(&run(&[&args[..], &["--json"]].concat()))).unwrap();
    for key in [
        "parameters",
        "bytes_per_token",
        "task_count",
        "event_count",
        "stage_count",
        "heap_bytes",
        "floor_us_per_token",
    ] {
        assert!(summary[key].as_f64().unwrap() > 0.0, "{key}: {summary}");
    }
}
