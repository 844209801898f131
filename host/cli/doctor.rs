//! `tilert-mk doctor`: what was found of this machine, and what is missing.
//!
//! A machine without a GPU is no failure: the report says why there is none, and what would change
//! that.

use std::path::Path;

use clap::Args;
use serde::Serialize;
use tilert_mk_device::machine::cpu::Isa;
use tilert_mk_shared::tile::{INPUT_BYTES_MAX, PAGE_BYTES, SharedPlan};

use super::output::{Output, pretty_json};
use crate::driver::cuda::{KERNEL_VARIABLE, Purpose, fitting_kernel, kernels};
use crate::driver::survey::{Survey, survey};
use crate::error::Result;

/// The lowest compute capability that any PTX is made for.
const CAPABILITY_MIN: u32 = 80;
/// Where Linux says when it gives huge pages.
const HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
/// What to do about a build without a kernel.
const NO_KERNEL: &str = "this build has no GPU kernel: install rustc-web, cargo-web and \
    rust-web-src (Debian 12), or a rustup nightly with rust-src, and build again without \
    TILERT_MK_PTX=off";

const EXAMPLES: &str = "\
Examples:
  tilert-mk doctor
  tilert-mk doctor --json

Exits with 0 whatever is found; lines that begin with \"missing\" say what would make this machine
faster or let it run on a GPU.";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(super) struct DoctorArgs {
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Everything that was found. What is None could not be found out.
#[derive(Clone, Debug, Serialize)]
struct Findings {
    version: &'static str,
    cpu: Cpu,
    memory: Memory,
    driver: Driver,
    gpus: Vec<GpuFindings>,
    kernel: Kernel,
    /// What `--device auto` opens.
    device: String,
    /// What is not as it could be, a line each.
    missing: Vec<String>,
}

#[derive(Clone, Debug, Serialize)]
struct Cpu {
    model: Option<String>,
    /// Cores that this process may use.
    cores: usize,
    /// Instruction set of the CPU device: `amx`, `avx512`, `avx2` or `portable`.
    instruction_set: &'static str,
}

#[derive(Clone, Debug, Serialize)]
struct Memory {
    total_bytes: Option<u64>,
    available_bytes: Option<u64>,
    /// `always`, `madvise` or `never`.
    huge_pages: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
struct Driver {
    /// The newest CUDA version that the driver speaks.
    cuda_version: Option<String>,
    /// Why there is no driver.
    problem: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
struct GpuFindings {
    ordinal: i32,
    name: String,
    capability: String,
    sm_count: u32,
    /// Shared memory of a block.
    shared_bytes: u32,
    memory_bytes: u64,
    is_cooperative: bool,
    /// GPUs whose memory this one reaches.
    peers: Vec<i32>,
    /// Embedded PTX that it runs, for example `sm_90`.
    kernel: Option<String>,
    /// Pages of the ring with the shortest and with the longest input rows.
    ring_pages: Option<[u32; 2]>,
}

#[derive(Clone, Debug, Serialize)]
struct Kernel {
    /// Chips that PTX is embedded for.
    embedded: Vec<String>,
    /// A file that takes the place of the embedded ones.
    replaced_by: Option<String>,
}

/// Runs the subcommand.
pub(super) fn run(args: &DoctorArgs) -> Result<()> {
    let findings = find();
    let text = if args.json { pretty_json(&findings)? } else { to_text(&findings) };
    Output::new().write(&text).map(|_| ())
}

fn find() -> Findings {
    let read = |path: &str| std::fs::read_to_string(Path::new(path)).ok();
    let meminfo = read("/proc/meminfo");
    let memory_bytes = |name| meminfo.as_deref().and_then(|text| field_bytes(text, name));
    let embedded = kernels().map(|kernel| kernel.name()).collect();
    let replaced_by = std::env::var_os(KERNEL_VARIABLE).map(|path| path.display().to_string());
    let (driver, gpus) = match survey() {
        Ok(survey) => of_survey(survey),
        Err(error) => {
            let problem = Some(error.to_string());
            (Driver { cuda_version: None, problem }, Vec::new())
        }
    };
    let mut findings = Findings {
        version: env!("CARGO_PKG_VERSION"),
        cpu: Cpu {
            model: read("/proc/cpuinfo").as_deref().and_then(cpu_model),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            instruction_set: isa_name(Isa::detect()),
        },
        memory: Memory {
            total_bytes: memory_bytes("MemTotal"),
            available_bytes: memory_bytes("MemAvailable"),
            huge_pages: read(HUGE_PAGES).as_deref().and_then(bracketed),
        },
        driver,
        gpus,
        kernel: Kernel { embedded, replaced_by },
        device: String::new(),
        missing: Vec::new(),
    };
    findings.device = default_device(&findings);
    findings.missing = missing(&findings);
    findings
}

fn of_survey(survey: Survey) -> (Driver, Vec<GpuFindings>) {
    let version = survey.cuda_version;
    let cuda_version = Some(format!("{}.{}", version / 1000, version % 1000 / 10));
    let gpus = survey.gpus.into_iter().map(|(gpu, peers)| GpuFindings {
        ordinal: gpu.ordinal,
        capability: format!("{}.{}", gpu.capability / 10, gpu.capability % 10),
        sm_count: gpu.sm_count,
        shared_bytes: gpu.shared_bytes,
        memory_bytes: gpu.memory_bytes,
        is_cooperative: gpu.is_cooperative,
        peers,
        kernel: fitting_kernel(gpu.capability, Purpose::Single).map(|kernel| kernel.name()),
        ring_pages: ring_pages(gpu.shared_bytes),
        name: gpu.name,
    });
    (Driver { cuda_version, problem: None }, gpus.collect())
}

/// Pages of a ring with the shortest and with the longest input rows; none if no ring fits.
fn ring_pages(shared_bytes: u32) -> Option<[u32; 2]> {
    let page_count =
        |row_bytes| Some(SharedPlan::new(shared_bytes, row_bytes, PAGE_BYTES)?.page_count);
    Some([page_count(0)?, page_count(INPUT_BYTES_MAX)?])
}

fn isa_name(isa: Isa) -> &'static str {
    match isa {
        Isa::Amx => "amx",
        Isa::Avx512 => "avx512",
        Isa::Avx2 => "avx2",
        Isa::Portable => "portable",
    }
}

/// The processor's name in the text of `/proc/cpuinfo`.
fn cpu_model(text: &str) -> Option<String> {
    let mut fields = text.lines().filter_map(|line| line.split_once(':'));
    let (_, model) = fields.find(|(name, _)| name.trim() == "model name")?;
    Some(model.trim().to_owned())
}

/// A field of `/proc/meminfo`, which counts in KiB.
fn field_bytes(text: &str, name: &str) -> Option<u64> {
    let mut fields = text.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = fields.find(|(field, _)| *field == name)?;
    let kibibytes: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

/// The choice in a list as Linux prints it: `madvise` of `always [madvise] never`.
fn bracketed(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    rest.split_once(']').map(|(choice, _)| choice.to_owned())
}

/// What `--device auto` opens: the first GPU if it can run a kernel, else the CPU.
fn default_device(findings: &Findings) -> String {
    let is_usable = |gpu: &&GpuFindings| {
        let has_kernel = gpu.kernel.is_some() || findings.kernel.replaced_by.is_some();
        gpu.ordinal == 0 && has_kernel && gpu.ring_pages.is_some()
    };
    let usable = findings.gpus.iter().find(is_usable);
    usable.map_or("cpu".to_owned(), |gpu| format!("cuda:{} {}", gpu.ordinal, gpu.name))
}

/// What is not as it could be, a line each.
fn missing(findings: &Findings) -> Vec<String> {
    let mut lines = Vec::new();
    if findings.cpu.instruction_set == "portable" {
        lines.push("AVX2 with FMA and F16C: the CPU device is several times slower".to_owned());
    }
    if findings.memory.huge_pages.as_deref() == Some("never") {
        lines.push(format!("huge pages: echo madvise > {HUGE_PAGES} (as root)"));
    }
    lines.extend(findings.driver.problem.clone());
    if findings.driver.problem.is_none() && findings.gpus.is_empty() {
        lines.push("the NVIDIA driver sees no GPU".to_owned());
    }
    let is_replaced = findings.kernel.replaced_by.is_some();
    if findings.kernel.embedded.is_empty() && !is_replaced {
        lines.push(NO_KERNEL.to_owned());
    }
    for gpu in &findings.gpus {
        let name = format!("cuda:{} {}", gpu.ordinal, gpu.name);
        if gpu.kernel.is_none() && !findings.kernel.embedded.is_empty() && !is_replaced {
            let lowest = CAPABILITY_MIN / 10;
            let capability = &gpu.capability;
            lines.push(format!("{name}: too old, {capability} where {lowest}.0 is needed"));
        }
        if gpu.ring_pages.is_none() {
            lines.push(format!("{name}: too little shared memory for a ring of pages"));
        }
        if !gpu.is_cooperative {
            lines.push(format!(
                "{name}: no cooperative launch; other processes on it can keep blocks out"
            ));
        }
    }
    lines
}

/// A table for people, then what is missing.
fn to_text(findings: &Findings) -> String {
    let Findings { cpu, memory, driver, kernel, .. } = findings;
    let unknown = || "unknown".to_owned();
    let model = cpu.model.clone().unwrap_or_else(unknown);
    let gibibytes = |bytes: Option<u64>| bytes.map_or_else(unknown, format_gib);
    let (total, available) = (gibibytes(memory.total_bytes), gibibytes(memory.available_bytes));
    let driver = match (&driver.cuda_version, &driver.problem) {
        (Some(version), _) => format!("found, CUDA {version}"),
        (None, problem) => problem.clone().unwrap_or_else(unknown),
    };
    let ptx = match (&kernel.replaced_by, kernel.embedded.is_empty()) {
        (Some(path), _) => format!("{path} ({KERNEL_VARIABLE})"),
        (None, false) => format!("embedded for {}", kernel.embedded.join(", ")),
        (None, true) => "none in this build".to_owned(),
    };
    let mut rows = vec![
        ("version".to_owned(), findings.version.to_owned()),
        ("cpu".to_owned(), format!("{model}, {} cores, {}", cpu.cores, cpu.instruction_set)),
        ("memory".to_owned(), format!("{total}, {available} available")),
        ("huge pages".to_owned(), memory.huge_pages.clone().unwrap_or_else(unknown)),
        ("nvidia driver".to_owned(), driver),
        ("gpu kernel".to_owned(), ptx),
    ];
    rows.extend(findings.gpus.iter().flat_map(gpu_rows));
    rows.push(("--device auto".to_owned(), findings.device.clone()));
    rows.extend(findings.missing.iter().map(|line| ("missing".to_owned(), line.clone())));
    let width = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    rows.iter().map(|(name, value)| format!("{name:width$}  {value}\n")).collect()
}

fn gpu_rows(gpu: &GpuFindings) -> Vec<(String, String)> {
    let row = |name: &str, value: String| (format!("  {name}"), value);
    let peers: Vec<String> = gpu.peers.iter().map(|peer| format!("cuda:{peer}")).collect();
    let ring = match gpu.ring_pages {
        None => "no page fits".to_owned(),
        Some([most, least]) if most == least => format!("a ring of {most} pages"),
        Some([most, least]) => format!("a ring of {least} to {most} pages, by the model"),
    };
    let memory = format_gib(gpu.memory_bytes);
    let shared_kib = gpu.shared_bytes >> 10;
    let cooperative = if gpu.is_cooperative { "cooperative" } else { "not cooperative" };
    vec![
        (format!("cuda:{}", gpu.ordinal), format!("{}, {memory}", gpu.name)),
        row("capability", format!("{}, {} SMs", gpu.capability, gpu.sm_count)),
        row("shared memory", format!("{shared_kib} KiB a block, {ring}")),
        row("launch", cooperative.to_owned()),
        row("kernel", gpu.kernel.clone().unwrap_or_else(|| "none".to_owned())),
        row("peer links", if peers.is_empty() { "none".to_owned() } else { peers.join(", ") }),
    ]
}

/// Memory for people, in powers of two as it is sold.
fn format_gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1u32 << 30))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::cuda::Gpu;

    /// A machine with two GPUs of `capability` that reach each other, whatever this build embeds.
    fn two_gpus(capability: u32, shared_bytes: u32) -> Findings {
        let gpu = |ordinal| Gpu {
            ordinal,
            name: "Test GPU".into(),
            capability,
            sm_count: 132,
            shared_bytes,
            memory_bytes: 80 << 30,
            is_cooperative: true,
        };
        let survey =
            Survey { cuda_version: 12080, gpus: vec![(gpu(0), vec![1]), (gpu(1), vec![0])] };
        let (driver, mut gpus) = of_survey(survey);
        for gpu in &mut gpus {
            gpu.kernel = (capability >= CAPABILITY_MIN).then(|| "sm_80".to_owned());
        }
        let kernel = Kernel { embedded: vec!["sm_80".into()], replaced_by: None };
        let mut findings = Findings { driver, gpus, kernel, ..find() };
        findings.device = default_device(&findings);
        findings.missing = missing(&findings);
        findings
    }

    #[test]
    fn files_of_linux_are_read() {
        let cpuinfo = "processor\t: 0\nmodel name\t: Test CPU: fast\nflags\t: fpu\n";
        assert_eq!(cpu_model(cpuinfo).as_deref(), Some("Test CPU: fast"));
        assert_eq!(cpu_model(""), None);
        let meminfo = "MemTotal:       24683656 kB\nMemFree: 1 kB\nHugePages_Total:  0\n";
        assert_eq!(field_bytes(meminfo, "MemTotal"), Some(24_683_656 << 10));
        assert_eq!(field_bytes(meminfo, "HugePages_Total"), None);
        assert_eq!(bracketed("always [madvise] never\n").as_deref(), Some("madvise"));
        assert_eq!(bracketed("always"), None);
    }

    #[test]
    fn this_machine_has_a_report() {
        let findings = find();
        assert!(findings.cpu.cores > 0);
        assert_eq!(findings.driver.problem.is_some(), findings.driver.cuda_version.is_none());
        let json: serde_json::Value =
            serde_json::from_str(&pretty_json(&findings).unwrap()).unwrap();
        for key in ["version", "cpu", "memory", "driver", "gpus", "kernel", "device", "missing"] {
            assert!(json.get(key).is_some(), "{key} is not in {json}");
        }
        let text = to_text(&findings);
        assert!(text.lines().all(|line| line.trim_end() == line), "{text}");
    }

    #[test]
    fn gpus_are_described() {
        let findings = two_gpus(90, 227 << 10);
        let text = to_text(&findings);
        for shown in [
            "found, CUDA 12.8",
            "cuda:1",
            "Test GPU, 80.0 GiB",
            "9.0, 132 SMs",
            "227 KiB a block",
            "peer links     cuda:0",
            "--device auto    cuda:0 Test GPU",
        ] {
            assert!(text.contains(shown), "{shown} is not in\n{text}");
        }
        assert!(findings.missing.iter().all(|line| !line.contains("GPU")), "{text}");
    }

    #[test]
    fn what_keeps_a_gpu_from_working_is_named() {
        let old = two_gpus(75, 64 << 10);
        assert_eq!(old.device, "cpu");
        let says = |findings: &Findings, words: &str| {
            findings.missing.iter().any(|line| line.contains(words))
        };
        assert!(says(&old, "too old, 7.5 where 8.0"), "{:?}", old.missing);
        assert!(says(&old, "too little shared memory"), "{:?}", old.missing);
        let mut bare = two_gpus(90, 227 << 10);
        bare.kernel.embedded.clear();
        bare.gpus.iter_mut().for_each(|gpu| gpu.kernel = None);
        assert_eq!(default_device(&bare), "cpu");
        bare.missing = missing(&bare);
        assert!(says(&bare, "rust-web-src") && !says(&bare, "too old"), "{:?}", bare.missing);
        bare.kernel.replaced_by = Some("other.ptx".into());
        assert!(!missing(&bare).iter().any(|line| line.contains("rust-web-src")));
        assert!(default_device(&bare).starts_with("cuda:0"));
    }
}
