//! Compiles `device/` to PTX with rustc's own NVPTX back end and embeds it.
//!
//! Needs a rustc whose library sources are installed: Debian's `rustc-web` and `rust-web-src`, or a
//! rustup nightly with `rust-src`. Without one the build goes on, warns once, and leaves the GPU
//! side out. `TILERT_MK_PTX=off` leaves it out without looking.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Chips that PTX is made for, and the `cfg` of each; the driver carries it on to later ones.
const TARGETS: [(&str, &str); 2] = [("sm_80", ""), ("sm_90", "--cfg tilert_sm90")];
/// Threads of a block, for the assembler: `BLOCK_THREADS` of `shared/tile.rs`.
const BLOCK_THREADS: u32 = 288;
/// Name of the kernel.
const ENTRY: &str = ".visible .entry tilert_mk(";

/// A compiler that can build `core`.
struct Toolchain {
    rustc: PathBuf,
    cargo: PathBuf,
}

fn main() {
    for path in ["build.rs", "device", "shared", "Cargo.lock"] {
        println!("cargo:rerun-if-changed={path}");
    }
    println!("cargo:rerun-if-env-changed=TILERT_MK_PTX");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default());
    let is_off = std::env::var_os("TILERT_MK_PTX").is_some_and(|value| value == "off");
    let toolchain = if is_off { None } else { find() };
    if toolchain.is_none() && !is_off {
        println!(
            "cargo:warning=the GPU side is left out: no rustc with library sources was found; \
             install rustc-web, cargo-web and rust-web-src (Debian), or a rustup nightly with \
             rust-src, and build again"
        );
    }
    for (target, flags) in TARGETS {
        let text = toolchain.as_ref().map_or(Ok(String::new()), |toolchain| {
            compile(toolchain, target, flags, &out).and_then(|text| finish(&text))
        });
        let text = match text {
            Ok(text) => text,
            Err(message) => {
                println!("cargo:error=device/ does not compile for {target}: {message}");
                std::process::exit(1);
            }
        };
        let file = out.join(format!("tilert_mk_{target}.ptx"));
        if let Err(error) = std::fs::write(&file, text) {
            println!("cargo:error={}: {error}", file.display());
            std::process::exit(1);
        }
    }
}

/// The first compiler that has the sources of `core`.
fn find() -> Option<Toolchain> {
    let has_sources = |toolchain: &Toolchain| {
        let output = Command::new(&toolchain.rustc).args(["--print", "sysroot"]).output();
        let sysroot = output.ok().filter(|output| output.status.success());
        sysroot.is_some_and(|output| {
            let sysroot = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            Path::new(&sysroot).join("lib/rustlib/src/rust/library/core/Cargo.toml").exists()
        })
    };
    let debian = Toolchain { rustc: "/usr/bin/rustc".into(), cargo: "/usr/bin/cargo".into() };
    let which = |tool: &str| {
        let output =
            Command::new("rustup").args(["which", "--toolchain", "nightly", tool]).output();
        let output = output.ok().filter(|output| output.status.success())?;
        Some(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
    };
    let nightly = || Some(Toolchain { rustc: which("rustc")?, cargo: which("cargo")? });
    Some(debian).filter(&has_sources).or_else(|| nightly().filter(has_sources))
}

fn compile(toolchain: &Toolchain, target: &str, flags: &str, out: &Path) -> Result<String, String> {
    let folder = out.join(target);
    let rustflags = format!(
        "-Zunstable-options -Cpanic=immediate-abort -Ctarget-cpu={target} \
         -Ctarget-feature=+ptx80 {flags}"
    );
    let mut command = Command::new(&toolchain.cargo);
    // What cargo tells this script's own compiler must not reach the other one.
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if name.starts_with("CARGO") && name != "CARGO_HOME" || name.starts_with("RUST") {
            command.env_remove(name);
        }
    }
    command
        .env("RUSTC", &toolchain.rustc)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", rustflags)
        .env("CARGO_PROFILE_RELEASE_LTO", "fat")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "none")
        .args(["rustc", "--release", "--locked", "--package", "tilert-mk-device"])
        .args(["--crate-type", "cdylib", "--target", "nvptx64-nvidia-cuda", "-Zbuild-std=core"])
        .arg("--target-dir")
        .arg(&folder)
        // There is no linker for this target, and none is needed: the assembly is complete.
        .args([
            "--",
            "--emit=asm",
            "-Clinker=true",
            "-Cllvm-args=-unroll-threshold=4000 -unroll-runtime=false",
        ]);
    let output = command.output().map_err(|error| error.to_string())?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).replace('\n', " | "));
    }
    let deps = folder.join("nvptx64-nvidia-cuda/release/deps/tilert_mk_device.s");
    std::fs::read_to_string(&deps).map_err(|error| format!("{}: {error}", deps.display()))
}

/// Checks that the text needs nothing from elsewhere, and states the size of a block.
fn finish(text: &str) -> Result<String, String> {
    if let Some(line) = text.lines().find(|line| line.contains(".extern .func")) {
        return Err(format!("a function is left to a linker: {line}"));
    }
    let entry = text.find(ENTRY).ok_or("the kernel is missing")?;
    let end = text[entry..].find(")\n").ok_or("the kernel's parameters do not end")?;
    let (head, tail) = text.split_at(entry + end + 1);
    Ok(format!("{head}\n.maxntid {BLOCK_THREADS}, 1, 1\n.minnctapersm 1{tail}"))
}
