//! A short way to write and run a PTX kernel in a test.

use ptxvm::{Arg, Finding, FindingKind, Module, RunState, Vm, VmConfig};

/// Wraps statements into a kernel `k(p, q)` with registers of every kind and shared memory `s`.
pub(crate) fn kernel(body: &str) -> String {
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
pub(crate) struct Ran {
    pub(crate) vm: Vm,
    pub(crate) state: RunState,
    pub(crate) p: u64,
    pub(crate) q: u64,
}

/// Bytes of each of the buffers p (zeros) and q (unwritten).
pub(crate) const BUFFER: u64 = 4096;

pub(crate) fn config(seed: u64) -> VmConfig {
    VmConfig { seed, stall_steps: 20_000, step_limit: 2_000_000, ..VmConfig::default() }
}

/// Runs `k` of a module on one device, with 4096 bytes of dynamic shared memory.
pub(crate) fn run_module(text: &str, grid: u32, block: u32, seed: u64) -> Ran {
    let module = Module::parse(text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    let mut vm = Vm::new(config(seed));
    let gpu = vm.add_device("gpu0");
    let p = vm.alloc(gpu, "p", BUFFER, 256);
    let q = vm.alloc(gpu, "q", BUFFER, 256);
    vm.fill(p, 0, BUFFER).unwrap();
    vm.launch(gpu, &module, "k", grid, block, 4096, &[Arg::U64(p), Arg::U64(q)]).unwrap();
    let state = vm.run(u64::MAX);
    Ran { vm, state, p, q }
}

impl Ran {
    pub(crate) fn u32s(&mut self, at: u64, count: usize) -> Vec<u32> {
        let mut raw = vec![0; count * 4];
        self.vm.read(at, &mut raw).unwrap();
        raw.chunks_exact(4).map(|c| u32::from_le_bytes(c.try_into().unwrap())).collect()
    }

    pub(crate) fn list(&self) -> String {
        self.vm.findings().iter().map(|f| format!("{f}\n")).collect()
    }
}

pub(crate) const SEEDS: std::ops::Range<u64> = 0..16;

/// The kernel is clean under every seed.
pub(crate) fn clean(body: &str, grid: u32, block: u32) {
    for seed in SEEDS {
        let ran = run_module(&kernel(body), grid, block, seed);
        assert!(ran.vm.findings().is_empty(), "seed {seed}:\n{}{body}", ran.list());
        assert_eq!(ran.state, RunState::Finished);
    }
}

/// Every seed reports `kind` at an instruction on the line of the body that holds `at`.
pub(crate) fn planted(body: &str, grid: u32, block: u32, kind: FindingKind, at: &str) -> Finding {
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

/// Executes one instruction for each case. `op` uses `A`, `B` and `C` for the sources and `D` for
/// the result, which are registers of the given widths in bits.
pub(crate) fn eval(op: &str, widths: [u32; 4], cases: &[[u64; 3]]) -> Vec<u64> {
    let name = |i: usize| ["%a", "%b", "%c", "%d"][i];
    let mut text = String::from(
        ".version 8.4\n.target sm_90\n.address_size 64\n.visible .entry k(.param .u64 p, \
         .param .u64 q, .param .u32 n)\n{\n.reg .b64 %x<9>; .reg .b32 %y<9>; .reg .pred %out;\n",
    );
    for (i, width) in widths.iter().enumerate() {
        text += &format!(".reg .b{width} {};\n", name(i));
    }
    text += "ld.param.u64 %x1, [p]; ld.param.u64 %x2, [q]; ld.param.u32 %y5, [n];\n\
             mov.u32 %y1, %tid.x; mov.u32 %y2, %ctaid.x; mad.lo.u32 %y1, %y2, 256, %y1;\n\
             setp.ge.u32 %out, %y1, %y5; @%out ret;\n\
             mad.wide.u32 %x1, %y1, 24, %x1; mad.wide.u32 %x2, %y1, 8, %x2;\n";
    for (i, width) in widths[..3].iter().enumerate() {
        text += &format!("ld.global.u{width} {}, [%x1+{}];\n", name(i), i * 8);
    }
    let op = op.replace('A', "%a").replace('B', "%b").replace('C', "%c").replace('D', "%d");
    text += &format!("{op}\nst.global.u{} [%x2], %d;\nret;\n}}\n", widths[3]);
    let module = Module::parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    let mut vm = Vm::new(VmConfig { checks: ptxvm::Checks::NONE, ..VmConfig::default() });
    let gpu = vm.add_device("gpu0");
    let raw: Vec<u8> = cases.iter().flatten().flat_map(|x| x.to_le_bytes()).collect();
    let p = vm.alloc(gpu, "p", raw.len() as u64, 256);
    let q = vm.alloc(gpu, "q", cases.len() as u64 * 8, 256);
    vm.write(p, &raw).unwrap();
    let grid = cases.len().div_ceil(256) as u32;
    let args = [Arg::U64(p), Arg::U64(q), Arg::U32(cases.len() as u32)];
    vm.launch(gpu, &module, "k", grid, 256, 0, &args).unwrap();
    assert_eq!(vm.run(u64::MAX), RunState::Finished);
    let mut out = vec![0; cases.len() * 8];
    vm.read(q, &mut out).unwrap();
    out.chunks_exact(8).map(|c| u64::from_le_bytes(c.try_into().unwrap())).collect()
}

/// Compares an instruction with a function of the host for every case.
pub(crate) fn agree(
    op: &str,
    widths: [u32; 4],
    cases: &[[u64; 3]],
    host: impl Fn(u64, u64, u64) -> u64,
) {
    let mask = |x: u64, width: u32| if width == 64 { x } else { x & ((1 << width) - 1) };
    for (case, got) in cases.iter().zip(eval(op, widths, cases)) {
        let [a, b, c] = *case;
        let (a, b, c) = (mask(a, widths[0]), mask(b, widths[1]), mask(c, widths[2]));
        let want = mask(host(a, b, c), widths[3]);
        assert_eq!(got, want, "{op} of {a:#x} {b:#x} {c:#x}: {got:#x}, not {want:#x}");
    }
}
