//! The command `ptxvm`: runs one kernel of a PTX file and reports what the checks find.

use clap::Parser;
use ptxvm::{Arg, Checks, DeviceId, Module, RunState, Vm, VmConfig};
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

const EXAMPLES: &str = "\
Arguments, in the order of the kernel's parameters:
  u32:5  s32:-1  u64:0x10  f32:1.5  f64:2   numbers
  in:FILE                              a buffer with the bytes of FILE
  out:BYTES:FILE                       an unwritten buffer, saved to FILE afterwards
  inout:FILE:OUT                       a buffer with the bytes of FILE, saved to OUT afterwards
  zero:BYTES                           a buffer of zeros

Examples:
  ptxvm add.ptx --entry add --grid 4 --block 256 --arg in:a.bin --arg in:b.bin \\
      --arg out:4096:c.bin --arg u32:1024
  ptxvm k.ptx --list
  for seed in $(seq 100); do ptxvm k.ptx --entry k --grid 2 --block 64 --seed $seed || break; done

Exit status: 0 nothing found, 1 findings, 2 wrong usage.";

/// Executes a kernel of a PTX file instruction by instruction and reports races, uninitialised
/// reads, wrong addresses, misused barriers and hangs.
#[derive(Parser)]
#[command(version, after_help = EXAMPLES)]
struct Cli {
    /// The PTX file.
    file: PathBuf,
    /// List the kernels of the file and the sizes of their parameters.
    #[arg(long)]
    list: bool,
    /// The kernel; not needed when the file has only one.
    #[arg(long)]
    entry: Option<String>,
    /// Blocks in the grid.
    #[arg(long, default_value_t = 1)]
    grid: u32,
    /// Threads in a block.
    #[arg(long, default_value_t = 32)]
    block: u32,
    /// Bytes of dynamic shared memory.
    #[arg(long, default_value_t = 0)]
    shared: u32,
    /// The seed of the schedule.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// A kernel argument (see below).
    #[arg(long = "arg", value_name = "KIND:VALUE")]
    args: Vec<CliArg>,
    /// The most warp instructions to run.
    #[arg(long, default_value_t = 10_000_000_000)]
    steps: u64,
    /// Warp instructions without any change after which the run counts as stuck.
    #[arg(long, default_value_t = 2_000_000)]
    stall_steps: u64,
    /// Nanoseconds of %globaltimer for each warp instruction.
    #[arg(long, default_value_t = 1)]
    ns_per_step: u64,
    /// Check only bounds, alignment, barriers and hangs.
    #[arg(long)]
    fast: bool,
    /// Print how much was executed and how fast.
    #[arg(long)]
    stats: bool,
}

#[derive(Clone, Debug)]
enum CliArg {
    Value(Arg),
    Buffer { input: Option<PathBuf>, bytes: u64, output: Option<PathBuf> },
}

fn integer(text: &str) -> Result<u64, String> {
    let parsed = match (text.strip_prefix("0x"), text.strip_prefix('-')) {
        (Some(hex), _) => u64::from_str_radix(hex, 16),
        (_, Some(_)) => text.parse::<i64>().map(|x| x as u64),
        _ => text.parse(),
    };
    parsed.map_err(|e| format!("{text}: {e}"))
}

fn small(text: &str) -> Result<u32, String> {
    let value = integer(text)?;
    let fits = u32::try_from(value).or_else(|_| i32::try_from(value as i64).map(|x| x as u32));
    fits.map_err(|_| format!("{text} does not fit 32 bits"))
}

impl FromStr for CliArg {
    type Err = String;

    fn from_str(text: &str) -> Result<CliArg, String> {
        let (kind, rest) = text.split_once(':').ok_or("an argument is KIND:VALUE")?;
        let float = |e: std::num::ParseFloatError| format!("{rest}: {e}");
        let buffer = |input: Option<&str>, bytes, output: Option<&str>| CliArg::Buffer {
            input: input.map(PathBuf::from),
            bytes,
            output: output.map(PathBuf::from),
        };
        let two = || rest.split_once(':').ok_or(format!("{kind}: needs two parts, see --help"));
        Ok(match kind {
            "u32" | "s32" => CliArg::Value(Arg::U32(small(rest)?)),
            "u64" | "s64" => CliArg::Value(Arg::U64(integer(rest)?)),
            "f32" => CliArg::Value(Arg::F32(rest.parse().map_err(float)?)),
            "f64" => CliArg::Value(Arg::F64(rest.parse().map_err(float)?)),
            "in" => buffer(Some(rest), 0, None),
            "out" => buffer(None, integer(two()?.0)?, Some(two()?.1)),
            "inout" => buffer(Some(two()?.0), 0, Some(two()?.1)),
            "zero" => buffer(None, integer(rest)?, None),
            _ => return Err(format!("unknown kind of argument {kind}")),
        })
    }
}

/// A buffer to be saved: address, length, file.
type Output = (u64, u64, PathBuf);

fn buffers(vm: &mut Vm, gpu: DeviceId, args: &[CliArg]) -> Result<(Vec<Arg>, Vec<Output>), String> {
    let (mut values, mut outputs) = (Vec::new(), Vec::new());
    for (i, arg) in args.iter().enumerate() {
        let (input, bytes, output) = match arg {
            CliArg::Value(value) => {
                values.push(value.clone());
                continue;
            }
            CliArg::Buffer { input, bytes, output } => (input, *bytes, output),
        };
        let mut data = Vec::new();
        if let Some(path) = input {
            data = std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
        } else if output.is_none() {
            data = vec![0; bytes as usize];
        }
        let len = bytes.max(data.len() as u64);
        let addr = vm.alloc(gpu, &format!("argument {i}"), len, 256);
        vm.write(addr, &data).map_err(|e| e.to_string())?;
        values.push(Arg::U64(addr));
        outputs.extend(output.iter().map(|path| (addr, len, path.clone())));
    }
    Ok((values, outputs))
}

fn run(cli: &Cli) -> Result<bool, String> {
    let path = cli.file.display();
    let text = std::fs::read_to_string(&cli.file).map_err(|e| format!("{path}: {e}"))?;
    let module = Module::parse(&text).map_err(|e| format!("{path}: {e}"))?;
    if cli.list {
        for entry in module.entries() {
            println!("{entry} {:?}", module.params(entry).unwrap_or_default());
        }
        return Ok(true);
    }
    let entries = module.entries();
    let entry = match (&cli.entry, entries.as_slice()) {
        (Some(name), _) => name.clone(),
        (None, [only]) => (*only).to_string(),
        (None, _) => return Err(format!("--entry is needed: one of {}", entries.join(", "))),
    };
    let mut vm = Vm::new(VmConfig {
        seed: cli.seed,
        checks: if cli.fast { Checks::NONE } else { Checks::ALL },
        step_limit: cli.steps,
        stall_steps: cli.stall_steps,
        ns_per_step: cli.ns_per_step,
    });
    let gpu = vm.add_device("gpu0");
    let (args, outputs) = buffers(&mut vm, gpu, &cli.args)?;
    vm.launch(gpu, &module, &entry, cli.grid, cli.block, cli.shared, &args)
        .map_err(|e| e.to_string())?;
    let start = std::time::Instant::now();
    let state = vm.run(u64::MAX);
    if cli.stats {
        let (seconds, lanes) = (start.elapsed().as_secs_f64(), vm.lane_steps());
        let rate = lanes as f64 / seconds / 1e6;
        println!("{} warp and {lanes} lane instructions in {seconds:.3} s", vm.steps());
        println!("{rate:.1} million lane instructions a second");
    }
    for (addr, len, path) in outputs {
        let mut bytes = vec![0; len as usize];
        vm.read(addr, &mut bytes).map_err(|e| e.to_string())?;
        std::fs::write(&path, bytes).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    for finding in vm.findings() {
        println!("{finding}");
    }
    Ok(state == RunState::Finished && vm.findings().is_empty())
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(message) => {
            eprintln!("ptxvm: {message}");
            ExitCode::from(2)
        }
    }
}
