//! The command: arguments, files, exit status.

use std::path::PathBuf;
use std::process::{Command, Output};

fn kernels(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("kernels").join(name)
}

fn ptxvm(file: &str, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ptxvm")).arg(kernels(file)).args(args).output().unwrap()
}

#[test]
fn runs_a_kernel_on_files() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let floats =
        |f: fn(u32) -> f32| -> Vec<u8> { (0..256).flat_map(|i| f(i).to_le_bytes()).collect() };
    std::fs::write(path("a"), floats(|i| i as f32)).unwrap();
    std::fs::write(path("b"), floats(|i| 0.5 * i as f32)).unwrap();
    let (a, b) = (format!("in:{}", path("a")), format!("in:{}", path("b")));
    let out = format!("out:1024:{}", path("c"));
    let shape = ["--grid", "2", "--block", "128", "--stats", "--entry"];
    let values = ["--arg", &a, "--arg", &b, "--arg", &out, "--arg", "u32:256"];
    let run =
        |entry: &str| ptxvm("vector_add.nvcc.ptx", &[&shape[..], &[entry], &values[..]].concat());
    let clean = run("vector_add");
    assert_eq!(clean.status.code(), Some(0), "{clean:?}");
    assert!(String::from_utf8_lossy(&clean.stdout).contains("lane instructions a second"));
    assert_eq!(std::fs::read(path("c")).unwrap(), floats(|i| 1.5 * i as f32));
    let racy = run("vector_add_racy");
    assert_eq!(racy.status.code(), Some(1));
    let text = String::from_utf8_lossy(&racy.stdout).to_string();
    assert!(text.contains("DataRace") && text.contains("vector_add.cu:5"), "{text}");
}

#[test]
fn explains_wrong_usage() {
    let fails = |args: &[&str], says: &str| {
        let out = ptxvm("reduce.clang.ptx", args);
        let text = String::from_utf8_lossy(&out.stderr).to_string();
        assert_eq!(out.status.code(), Some(2), "{text}");
        assert!(text.contains(says), "{text}");
    };
    fails(&[], "--entry is needed: one of warp_reduce, warp_reduce_racy");
    fails(&["--entry", "nothing"], "no kernel nothing");
    fails(&["--entry", "warp_reduce", "--arg", "u32:5"], "takes 3 arguments, not 1");
    fails(&["--arg", "i9:5"], "unknown kind of argument i9");
    fails(&["--arg", "u32:5000000000"], "does not fit 32 bits");
    let list = ptxvm("reduce.clang.ptx", &["--list"]);
    assert!(String::from_utf8_lossy(&list.stdout).contains("warp_reduce [8, 8, 4]"));
    let missing = ptxvm("no.ptx", &[]);
    assert_eq!(missing.status.code(), Some(2));
    let not_ptx = ptxvm("reduce.cu", &["--list"]);
    assert_eq!(not_ptx.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&not_ptx.stderr).contains("line 3"));
}
