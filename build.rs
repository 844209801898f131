//! Compiles `device/` to PTX with rustc's own NVPTX back end and embeds it.
//!
//! Needs a rustc whose library sources are installed: Debian's `rustc-web` and `rust-web-src`, or a
//! rustup nightly with `rust-src`. Without one the build goes on, warns once, and leaves the GPU
//! side out. `TILERT_MK_PTX=off` leaves it out without looking. All output is in `OUT_DIR`.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// PTX that is made.
const TARGETS: [Target; 5] = [
    Target { name: "sm_80", chip: "sm_80", cfgs: &[] },
    Target { name: "sm_90", chip: "sm_90", cfgs: &["tilert_sm90"] },
    Target { name: "sm_90_fp8", chip: "sm_90", cfgs: &["tilert_sm90", "tilert_fp8"] },
    Target { name: "sm_90_integers", chip: "sm_90", cfgs: &["tilert_sm90", "tilert_integers"] },
    Target {
        name: "sm_90_peers",
        chip: "sm_90",
        cfgs: &["tilert_sm90", "tilert_peers", "tilert_fp8"],
    },
];
/// Threads of a block, for the assembler: `BLOCK_THREADS` of `shared/tile.rs`.
const BLOCK_THREADS: u32 = 288;
/// Name of the kernel.
const ENTRY: &str = ".visible .entry tilert_mk(";
/// The oldest compiler that this has been tried with: 1.96. Distributions ship far older ones.
const RUSTC_MINOR_MIN: u32 = 96;
/// What is left of the environment that cargo gives to this script. The rest describes this build
/// and its compiler, and must not reach the other one.
const KEPT_VARIABLES: [&str; 6] = [
    "CARGO_HOME",
    // The job slots of the outer build, which the inner one shares.
    "CARGO_MAKEFLAGS",
    "CARGO_NET_",
    "CARGO_HTTP_",
    "CARGO_REGISTR",
    "CARGO_SOURCE_",
];
const MISSING: &str = "the GPU side is left out: no rustc 1.96 or later with library sources was \
    found; install rustc-web, cargo-web and rust-web-src (Debian 12), or a rustup nightly with \
    rust-src, and build again";
const NO_SOURCES: &str = "the GPU side is left out: it is built in a checkout of the repository";

/// One file of PTX.
#[derive(Clone, Copy)]
struct Target {
    /// Its name, and that of the folder that it is built in.
    name: &'static str,
    /// The chip, whose PTX the driver carries on to later ones.
    chip: &'static str,
    /// What the device crate is compiled with.
    cfgs: &'static [&'static str],
}

/// A compiler that can build `core`.
struct Toolchain {
    rustc: PathBuf,
    cargo: PathBuf,
}

fn main() {
    println!("cargo:rerun-if-env-changed=TILERT_MK_PTX");
    watch_sources();
    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default());
    let texts = if std::env::var_os("TILERT_MK_PTX").is_some_and(|value| value == "off") {
        Vec::new()
    } else if !Path::new("device/Cargo.toml").exists() {
        println!("cargo:warning={NO_SOURCES}");
        Vec::new()
    } else if let Some(toolchain) = find() {
        // Another compiler makes another PTX.
        println!("cargo:rerun-if-changed={}", toolchain.rustc.display());
        compile_all(&toolchain, &out)
    } else {
        watch_installations();
        println!("cargo:warning={MISSING}");
        Vec::new()
    };
    for (idx, Target { name, .. }) in TARGETS.into_iter().enumerate() {
        let file = out.join(format!("tilert_mk_{name}.ptx"));
        // The host takes an empty file for PTX that was left out.
        let text = texts.get(idx).map_or("", String::as_str);
        if let Err(error) = std::fs::write(&file, text) {
            fail(&format!("{}: {error}", file.display()));
        }
    }
}

/// Ends the build with one line; cargo shows it.
fn fail(message: &str) -> ! {
    println!("cargo::error={message}");
    std::process::exit(1)
}

/// Runs this script again when what the device crate is made of changes.
fn watch_sources() {
    for path in ["Cargo.toml", "Cargo.lock"] {
        println!("cargo:rerun-if-changed={path}");
    }
    for folder in ["device", "shared"] {
        let Ok(entries) = std::fs::read_dir(folder) else { continue };
        for entry in entries.flatten() {
            let name = entry.file_name();
            // Tests and prose are not in the PTX.
            if name != "tests" && Path::new(&name).extension() != Some("md".as_ref()) {
                println!("cargo:rerun-if-changed={}", entry.path().display());
            }
        }
    }
}

/// Runs this script again when a compiler may have been installed. Only paths that exist count:
/// cargo takes one that does not for changed, each time.
fn watch_installations() {
    let home = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let rustup = home("RUSTUP_HOME").or_else(|| Some(home("HOME")?.join(".rustup")));
    let mut places = vec![PathBuf::from("/usr/lib/rustlib"), PathBuf::from("/usr/bin")];
    if let Some(rustup) = rustup {
        places.push(rustup.join("update-hashes"));
        let toolchains = std::fs::read_dir(rustup.join("toolchains"));
        let toolchains = toolchains.into_iter().flatten().flatten();
        places.extend(toolchains.map(|entry| entry.path().join("lib/rustlib/components")));
    }
    for place in places.iter().filter(|place| place.exists()) {
        println!("cargo:rerun-if-changed={}", place.display());
    }
}

/// The first compiler that has the sources of `core`.
fn find() -> Option<Toolchain> {
    let debian = Toolchain { rustc: "/usr/bin/rustc".into(), cargo: "/usr/bin/cargo".into() };
    let which = |tool: &str| {
        let mut command = Command::new("rustup");
        // Asking must not download a toolchain.
        command.env("RUSTUP_AUTO_INSTALL", "0").args(["which", "--toolchain", "nightly", tool]);
        Some(PathBuf::from(stdout_of(&mut command)?))
    };
    let nightly = || Some(Toolchain { rustc: which("rustc")?, cargo: which("cargo")? });
    Some(debian).filter(can_build_core).or_else(|| nightly().filter(can_build_core))
}

fn can_build_core(toolchain: &Toolchain) -> bool {
    let ask = |args: &[&str]| stdout_of(Command::new(&toolchain.rustc).args(args));
    let minor = ask(&["--version"]).and_then(|text| {
        let version = text.split(' ').nth(1)?;
        version.strip_prefix("1.")?.split('.').next()?.parse::<u32>().ok()
    });
    let has_sources = |sysroot: String| {
        Path::new(&sysroot).join("lib/rustlib/src/rust/library/core/Cargo.toml").exists()
    };
    minor.is_some_and(|minor| minor >= RUSTC_MINOR_MIN)
        && toolchain.cargo.exists()
        && ask(&["--print", "sysroot"]).is_some_and(has_sources)
}

/// What a command prints, if it succeeds.
fn stdout_of(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The PTX of all targets; ends the build on an error.
///
/// To compile `core` takes twice as long as the kernel. Targets of one chip share it: the first is
/// compiled from nothing, and the others begin with a copy of its folder.
fn compile_all(toolchain: &Toolchain, out: &Path) -> Vec<String> {
    let first_of = |target: &Target| TARGETS.iter().find(|other| other.chip == target.chip);
    // The folder that a target begins with.
    let begin_of = |target: &Target| {
        first_of(target).filter(|first| first.name != target.name).map(|first| out.join(first.name))
    };
    let mut texts = vec![String::new(); TARGETS.len()];
    for firsts in [true, false] {
        // Side by side.
        std::thread::scope(|scope| {
            for (target, text) in TARGETS.iter().zip(&mut texts) {
                let begin = begin_of(target);
                if begin.is_none() != firsts {
                    continue;
                }
                scope.spawn(move || {
                    let copied =
                        begin.map_or(Ok(()), |from| begin_with(&from, &out.join(target.name)));
                    let compiled = copied.and_then(|()| compile(toolchain, *target, out));
                    *text = compiled.and_then(|text| finish(&text)).unwrap_or_else(|message| {
                        let name = target.name;
                        fail(&format!("device/ does not compile to PTX for {name}: {message}"))
                    });
                });
            }
        });
    }
    texts
}

/// Copies a folder that cargo has built in, unless there is one already.
fn begin_with(from: &Path, to: &Path) -> Result<(), String> {
    if to.exists() {
        return Ok(());
    }
    // A build that is broken off leaves no half of a folder under its name.
    let part = to.with_extension("part");
    let copied = copy_folder(from, &part).and_then(|()| std::fs::rename(&part, to));
    copied.map_err(|error| format!("copying {}: {error}", from.display()))
}

/// Copies a folder over another with the times of its files, which cargo compares.
fn copy_folder(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let (metadata, to) = (entry.metadata()?, to.join(entry.file_name()));
        if metadata.is_dir() {
            copy_folder(&entry.path(), &to)?;
        } else {
            std::fs::copy(entry.path(), &to)?;
            let file = std::fs::File::options().write(true).open(&to)?;
            file.set_modified(metadata.modified()?)?;
        }
    }
    Ok(())
}

/// The assembly of the device crate for one target.
fn compile(toolchain: &Toolchain, target: Target, out: &Path) -> Result<String, String> {
    let folder = out.join(target.name);
    let run = |network: &[&str]| -> Result<Output, String> {
        let mut command = cargo(toolchain, target.chip, &folder);
        command.args(network).args(["--", "--emit=asm", "-Clinker=true"]);
        command.arg("-Cllvm-args=-unroll-threshold=4000 -unroll-runtime=false");
        // For this crate alone: flags of all crates would be a reason to compile `core` anew.
        command.args(target.cfgs.iter().flat_map(|cfg| ["--cfg", cfg]));
        let shown = toolchain.cargo.display();
        command.output().map_err(|error| format!("{shown}: {error}"))
    };
    // What this build needs has mostly been downloaded for the host already; only a new home of
    // cargo lacks what `core` needs on top.
    let mut output = run(&["--offline"])?;
    if !output.status.success() && String::from_utf8_lossy(&output.stderr).contains("--offline") {
        output = run(&[])?;
    }
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        eprintln!("{stderr}");
        let is_error = |line: &&str| line.starts_with("error");
        return Err(stderr.lines().find(is_error).unwrap_or("cargo fails without an error").into());
    }
    let assembly = folder.join("nvptx64-nvidia-cuda/release/deps/tilert_mk_device.s");
    std::fs::read_to_string(&assembly).map_err(|error| format!("{}: {error}", assembly.display()))
}

/// `cargo rustc` for the device crate, up to the arguments of rustc.
fn cargo(toolchain: &Toolchain, chip: &str, folder: &Path) -> Command {
    let rustflags = format!(
        "-Zunstable-options -Cpanic=immediate-abort -Ctarget-cpu={chip} -Ctarget-feature=+ptx80"
    );
    let mut command = Command::new(&toolchain.cargo);
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        let is_kept = KEPT_VARIABLES.iter().any(|kept| text.starts_with(kept));
        if !is_kept && (text.starts_with("CARGO") || text.starts_with("RUST")) {
            command.env_remove(&name);
        }
    }
    command
        .env("RUSTC", &toolchain.rustc)
        // `core` is built from source with a compiler that may call itself stable.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", rustflags)
        .env("CARGO_PROFILE_RELEASE_LTO", "fat")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "none")
        // There is no linker for this target, and none is needed: the assembly is complete.
        .args(["rustc", "--release", "--locked", "--package", "tilert-mk-device"])
        .args(["--crate-type", "cdylib", "--target", "nvptx64-nvidia-cuda", "-Zbuild-std=core"])
        .arg("--target-dir")
        .arg(folder);
    command
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
