//! A persistent kernel with a loader warp, a ring, named barriers and events, clean and with one
//! edge left out at a time.

use ptxvm::{Arg, FindingKind, Module, RunState, Vm, VmConfig};

const DIM: usize = 64;
const LAYERS: usize = 4;

fn modules() -> Vec<Module> {
    ["nvcc", "clang"]
        .map(|compiler| {
            let dir = env!("CARGO_MANIFEST_DIR");
            let text = std::fs::read_to_string(format!("{dir}/kernels/persistent.{compiler}.ptx"));
            Module::parse(&text.unwrap()).unwrap()
        })
        .into()
}

fn weight(i: usize) -> f32 {
    // Small enough for every sum to be exact in any order.
    (i % 3) as f32 - 1.0
}

fn run(module: &Module, entry: &str, grid: u32, seed: u64) -> (Vm, RunState, Vec<f32>) {
    let mut vm = Vm::new(VmConfig { seed, stall_steps: 20_000, ..VmConfig::default() });
    let gpu = vm.add_device("gpu0");
    let weights: Vec<u8> =
        (0..LAYERS * DIM * DIM).flat_map(|i| weight(i * 7 / 3).to_le_bytes()).collect();
    let w = vm.alloc(gpu, "weights", weights.len() as u64, 128);
    let x = vm.alloc(gpu, "x", ((LAYERS + 1) * DIM * 4) as u64, 128);
    let events = vm.alloc(gpu, "events", (LAYERS * 4) as u64, 128);
    vm.write(w, &weights).unwrap();
    vm.write(x, &[1f32.to_le_bytes(); DIM].concat()).unwrap();
    vm.fill(events, 0, (LAYERS * 4) as u64).unwrap();
    let args = [Arg::U64(w), Arg::U64(x), Arg::U64(events), Arg::U32(LAYERS as u32)];
    vm.launch(gpu, module, entry, grid, 288, 8192, &args).unwrap();
    let state = vm.run(u64::MAX);
    let mut raw = vec![0; DIM * 4];
    vm.read(x + (LAYERS * DIM * 4) as u64, &mut raw).unwrap();
    let out = raw.chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect();
    (vm, state, out)
}

fn expected() -> Vec<f32> {
    (0..LAYERS).fold(vec![1f32; DIM], |x, layer| {
        let row = |r: usize| {
            (0..DIM).map(|i| weight((layer * DIM * DIM + r * DIM + i) * 7 / 3) * x[i]).sum()
        };
        (0..DIM).map(row).collect()
    })
}

#[test]
fn clean_kernel_is_clean_on_any_grid() {
    for module in modules() {
        for grid in [1, 2, 3, 5] {
            for seed in 0..12 {
                let (vm, state, out) = run(&module, "persistent", grid, seed);
                let found: Vec<_> = vm.findings().iter().map(|f| f.to_string()).collect();
                assert!(found.is_empty(), "grid {grid} seed {seed}:\n{}", found.join("\n"));
                assert_eq!(state, RunState::Finished);
                assert_eq!(out, expected());
            }
        }
    }
}

#[test]
fn every_missing_edge_is_reported() {
    let races = &[FindingKind::DataRace][..];
    let planted = [
        ("no_acquire", races),
        ("relaxed_signal", races),
        ("no_barrier", races),
        ("early_release", races),
        ("early_signal", races),
        // One tile of the layer below may not have been written at all.
        ("low_target", &[FindingKind::DataRace, FindingKind::UninitialisedMemory]),
        ("wrong_bytes", &[FindingKind::NoProgress]),
        // A wait that succeeds before the copy comes, or one for a phase that is long over.
        (
            "wrong_parity",
            &[FindingKind::DataRace, FindingKind::UninitialisedMemory, FindingKind::NoProgress],
        ),
    ];
    for module in modules() {
        for (entry, kinds) in planted {
            for seed in 0..12 {
                let (vm, ..) = run(&module, entry, 3, seed);
                let hit = vm.findings().iter().find(|f| kinds.contains(&f.kind));
                let all: Vec<_> = vm.findings().iter().map(|f| f.to_string()).collect();
                let hit = hit.unwrap_or_else(|| panic!("{entry} seed {seed}: {}", all.join("\n")));
                let owes = hit.message.contains("still expects");
                assert!(owes || entry != "wrong_bytes", "{hit}");
                assert!(hit.source.as_deref().unwrap_or("").contains("persistent.cu"), "{hit}");
            }
        }
    }
}
