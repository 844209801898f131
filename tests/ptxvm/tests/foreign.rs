//! Kernels that this interpreter was not written for, compiled by nvcc and clang: right results
//! without findings, and their racy variants reported.

use half::bf16;
use ptxvm::{Arg, DeviceId, FindingKind, Module, RunState, Vm, VmConfig};

const SEEDS: std::ops::Range<u64> = 0..24;

/// Both compilers' PTX of a kernel file.
fn modules(name: &str) -> Vec<Module> {
    ["nvcc", "clang"]
        .map(|compiler| {
            let path = format!("{}/kernels/{name}.{compiler}.ptx", env!("CARGO_MANIFEST_DIR"));
            let text = std::fs::read_to_string(&path).unwrap();
            Module::parse(&text).unwrap_or_else(|e| panic!("{path}: {e}"))
        })
        .into()
}

fn machine(seed: u64) -> (Vm, DeviceId) {
    let mut vm = Vm::new(VmConfig { seed, ..VmConfig::default() });
    let gpu = vm.add_device("gpu0");
    (vm, gpu)
}

fn buffer<T: Copy, const N: usize>(
    vm: &mut Vm,
    gpu: DeviceId,
    name: &str,
    values: &[T],
    bytes: impl Fn(T) -> [u8; N],
) -> u64 {
    let raw: Vec<u8> = values.iter().flat_map(|&v| bytes(v)).collect();
    let at = vm.alloc(gpu, name, raw.len() as u64, 16);
    vm.write(at, &raw).unwrap();
    at
}

fn floats(vm: &mut Vm, at: u64, count: usize) -> Vec<f32> {
    let mut raw = vec![0; count * 4];
    vm.read(at, &mut raw).unwrap();
    raw.chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect()
}

fn assert_clean(vm: &mut Vm) {
    let state = vm.run(u64::MAX);
    let found: Vec<String> = vm.findings().iter().map(|f| f.to_string()).collect();
    assert!(found.is_empty(), "{}", found.join("\n"));
    assert_eq!(state, RunState::Finished);
}

/// Runs a racy variant, which must be reported as a race with its place in the source.
fn assert_race(vm: &mut Vm, source: &str) {
    vm.run(u64::MAX);
    let race = vm.findings().iter().find(|f| f.kind == FindingKind::DataRace);
    let race = race.unwrap_or_else(|| panic!("no race among {:?}", vm.findings()));
    let place = race.source.as_deref().unwrap_or("");
    assert!(place.starts_with(source), "{race}");
}

#[test]
fn vector_add() {
    for (module, seed) in modules("vector_add").iter().flat_map(|m| SEEDS.map(move |s| (m, s))) {
        for racy in [false, true] {
            let (mut vm, gpu) = machine(seed);
            let n = 1000usize;
            let a: Vec<f32> = (0..n).map(|i| i as f32 * 0.5).collect();
            let b: Vec<f32> = (0..n).map(|i| 1.0 - i as f32).collect();
            let (pa, pb) = (
                buffer(&mut vm, gpu, "a", &a, f32::to_le_bytes),
                buffer(&mut vm, gpu, "b", &b, f32::to_le_bytes),
            );
            let c = vm.alloc(gpu, "c", n as u64 * 4, 16);
            let args = [Arg::U64(pa), Arg::U64(pb), Arg::U64(c), Arg::U32(n as u32)];
            let entry = if racy { "vector_add_racy" } else { "vector_add" };
            vm.launch(gpu, module, entry, 4, 256, 0, &args).unwrap();
            if racy {
                assert_race(&mut vm, "vector_add.cu");
                continue;
            }
            assert_clean(&mut vm);
            let want: Vec<f32> = a.iter().zip(&b).map(|(x, y)| x + y).collect();
            assert_eq!(floats(&mut vm, c, n), want);
        }
    }
}

#[test]
fn matmul() {
    for (module, seed) in modules("matmul").iter().flat_map(|m| SEEDS.map(move |s| (m, s))) {
        for racy in [false, true] {
            let (mut vm, gpu) = machine(seed);
            let n = 32usize;
            let a: Vec<f32> = (0..n * n).map(|i| (i % 7) as f32 - 3.0).collect();
            let b: Vec<f32> = (0..n * n).map(|i| (i % 5) as f32 - 2.0).collect();
            let (pa, pb) = (
                buffer(&mut vm, gpu, "a", &a, f32::to_le_bytes),
                buffer(&mut vm, gpu, "b", &b, f32::to_le_bytes),
            );
            let c = vm.alloc(gpu, "c", (n * n) as u64 * 4, 16);
            let args = [Arg::U64(pa), Arg::U64(pb), Arg::U64(c), Arg::U32(n as u32)];
            let entry = if racy { "matmul_shared_racy" } else { "matmul_shared" };
            vm.launch(gpu, module, entry, 4, 256, 0, &args).unwrap();
            if racy {
                assert_race(&mut vm, "matmul.cu");
                continue;
            }
            assert_clean(&mut vm);
            let got = floats(&mut vm, c, n * n);
            for (i, value) in got.iter().enumerate() {
                let want: f32 = (0..n).map(|k| a[i / n * n + k] * b[k * n + i % n]).sum();
                assert_eq!(*value, want, "element {i}");
            }
        }
    }
}

#[test]
fn reduce() {
    for (module, seed) in modules("reduce").iter().flat_map(|m| SEEDS.map(move |s| (m, s))) {
        for racy in [false, true] {
            let (mut vm, gpu) = machine(seed);
            let x: Vec<f32> = (0..5000).map(|i| (i % 13) as f32).collect();
            let px = buffer(&mut vm, gpu, "x", &x, f32::to_le_bytes);
            let sum = buffer(&mut vm, gpu, "sum", &[0f32], f32::to_le_bytes);
            let args = [Arg::U64(px), Arg::U64(sum), Arg::U32(x.len() as u32)];
            let entry = if racy { "warp_reduce_racy" } else { "warp_reduce" };
            vm.launch(gpu, module, entry, 3, 128, 0, &args).unwrap();
            if racy {
                assert_race(&mut vm, "reduce.cu");
                continue;
            }
            assert_clean(&mut vm);
            assert_eq!(floats(&mut vm, sum, 1)[0], x.iter().sum::<f32>());
        }
    }
}

#[test]
fn grid_barrier() {
    for (module, seed) in modules("grid_barrier").iter().flat_map(|m| SEEDS.map(move |s| (m, s))) {
        for racy in [false, true] {
            let (mut vm, gpu) = machine(seed);
            let n = 4 * 64usize;
            let (from, to) =
                (vm.alloc(gpu, "from", n as u64 * 4, 16), vm.alloc(gpu, "to", n as u64 * 4, 16));
            let counter = buffer(&mut vm, gpu, "counter", &[0u32], u32::to_le_bytes);
            let args = [Arg::U64(from), Arg::U64(to), Arg::U64(counter)];
            let entry = if racy { "grid_barrier_racy" } else { "grid_barrier" };
            vm.launch(gpu, module, entry, 4, 64, 0, &args).unwrap();
            if racy {
                assert_race(&mut vm, "grid_barrier.cu");
                continue;
            }
            assert_clean(&mut vm);
            let mut raw = vec![0; n * 4];
            vm.read(to, &mut raw).unwrap();
            for (i, c) in raw.chunks_exact(4).enumerate() {
                let value = i32::from_le_bytes(c.try_into().unwrap());
                assert_eq!(value, 3 * ((i + 64) % n) as i32);
            }
        }
    }
}

#[test]
fn bulk_pipeline() {
    for (module, seed) in modules("bulk_pipeline").iter().flat_map(|m| SEEDS.map(move |s| (m, s))) {
        for racy in [false, true] {
            let (mut vm, gpu) = machine(seed);
            let pages = 10usize;
            let x: Vec<f32> = (0..pages * 256).map(|i| (i % 11) as f32).collect();
            let px = buffer(&mut vm, gpu, "x", &x, f32::to_le_bytes);
            let out = vm.alloc(gpu, "out", 64 * 4, 16);
            let args = [Arg::U64(px), Arg::U64(out), Arg::U32(pages as u32)];
            let entry = if racy { "bulk_pipeline_racy" } else { "bulk_pipeline" };
            vm.launch(gpu, module, entry, 1, 96, 0, &args).unwrap();
            if racy {
                assert_race(&mut vm, "bulk_pipeline.cu");
                continue;
            }
            assert_clean(&mut vm);
            let got = floats(&mut vm, out, 64);
            for (t, value) in got.iter().enumerate() {
                let want: f32 = x.iter().skip(t).step_by(64).sum();
                assert_eq!(*value, want, "thread {t}");
            }
        }
    }
}

#[test]
fn mma_bf16() {
    for (module, seed) in modules("mma_bf16").iter().flat_map(|m| SEEDS.map(move |s| (m, s))) {
        for racy in [false, true] {
            let (mut vm, gpu) = machine(seed);
            let k = 64usize;
            let a: Vec<f32> = (0..16 * k).map(|i| (i % 9) as f32 * 0.25 - 1.0).collect();
            let b: Vec<f32> = (0..8 * k).map(|i| (i % 7) as f32 * 0.5 - 1.5).collect();
            let half = |x: f32| bf16::from_f32(x).to_le_bytes();
            let (pa, pb) =
                (buffer(&mut vm, gpu, "a", &a, half), buffer(&mut vm, gpu, "b", &b, half));
            let d = vm.alloc(gpu, "d", 16 * 8 * 4, 16);
            let args = [Arg::U64(pa), Arg::U64(pb), Arg::U64(d), Arg::U32(k as u32)];
            let entry = if racy { "mma_bf16_racy" } else { "mma_bf16" };
            vm.launch(gpu, module, entry, 1, 32, 0, &args).unwrap();
            if racy {
                assert_race(&mut vm, "mma_bf16.cu");
                continue;
            }
            assert_clean(&mut vm);
            let got = floats(&mut vm, d, 128);
            for (i, value) in got.iter().enumerate() {
                let want: f32 = (0..k).map(|j| a[i / 8 * k + j] * b[i % 8 * k + j]).sum();
                assert_eq!(*value, want, "element {i}");
            }
        }
    }
}
