//! A short way to write and run a PTX kernel in a test.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part")]

use ptxvm::{Arg, DeviceId, Finding, FindingKind, Module, RunState, Vm, VmConfig};

/// Wraps statements into a kernel `k(p, q)` with registers of every kind and shared memory `s`.
pub fn kernel(body: &str) -> String {
    format!(
        ".version 8.4\n.target sm_90\n.address_size 64\n\
         .extern .shared .align 128 .b8 s[];\n\
         .visible .entry k(.param .u64 p, .param .u64 q)\n{{\n\
         .reg .pred %p<20>; .reg .b16 %h<20>; .reg .b32 %r<40>; .reg .b64 %rd<40>;\n\
         .reg .f32 %f<40>; .reg .f64 %fd<20>; .local .align 8 .b8 loc[64];\n\
         ld.param.u64 %rd1, [p]; ld.param.u64 %rd2, [q];\n\
         mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mov.u32 %r3, s;\n{body}\nret;\n}}\n"
    )
}

/// A machine that has run a kernel.
pub struct Ran {
    pub vm: Vm,
    pub state: RunState,
    pub gpu: DeviceId,
    pub p: u64,
    pub q: u64,
}

/// Bytes of each of the buffers p (zeros) and q (unwritten).
pub const BUFFER: u64 = 4096;

pub fn config(seed: u64) -> VmConfig {
    VmConfig { seed, stall_steps: 20_000, step_limit: 2_000_000, ..VmConfig::default() }
}

/// Runs `k` of a module on one device, with 4096 bytes of dynamic shared memory.
pub fn run_module(text: &str, grid: u32, block: u32, seed: u64) -> Ran {
    let module = Module::parse(text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    let mut vm = Vm::new(config(seed));
    let gpu = vm.add_device("gpu0");
    let p = vm.alloc(gpu, "p", BUFFER, 256);
    let q = vm.alloc(gpu, "q", BUFFER, 256);
    vm.fill(p, 0, BUFFER).unwrap();
    vm.launch(gpu, &module, "k", grid, block, 4096, &[Arg::U64(p), Arg::U64(q)]).unwrap();
    let state = vm.run(u64::MAX);
    Ran { vm, state, gpu, p, q }
}

impl Ran {
    pub fn u32s(&mut self, at: u64, count: usize) -> Vec<u32> {
        let mut raw = vec![0; count * 4];
        self.vm.read(at, &mut raw).unwrap();
        raw.chunks_exact(4).map(|c| u32::from_le_bytes(c.try_into().unwrap())).collect()
    }

    pub fn list(&self) -> String {
        self.vm.findings().iter().map(|f| format!("{f}\n")).collect()
    }
}

pub const SEEDS: std::ops::Range<u64> = 0..16;

/// The kernel is clean under every seed.
pub fn clean(body: &str, grid: u32, block: u32) {
    for seed in SEEDS {
        let ran = run_module(&kernel(body), grid, block, seed);
        assert!(ran.vm.findings().is_empty(), "seed {seed}:\n{}{body}", ran.list());
        assert_eq!(ran.state, RunState::Finished);
    }
}

/// Every seed reports `kind` at an instruction on the line of the body that holds `at`.
pub fn planted(body: &str, grid: u32, block: u32, kind: FindingKind, at: &str) -> Finding {
    let mut last = None;
    let text = kernel(body);
    for seed in SEEDS {
        let ran = run_module(&text, grid, block, seed);
        let hit = |f: &&Finding| {
            let line = text.lines().nth(f.line as usize - 1).unwrap_or("");
            f.kind == kind && line.contains(at)
        };
        let found = ran.vm.findings().iter().find(hit).cloned();
        last = Some(found.unwrap_or_else(|| {
            panic!("seed {seed}: no {kind:?} at `{at}` among:\n{}{body}", ran.list())
        }));
    }
    last.unwrap()
}
