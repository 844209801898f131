//! Models of all shapes that the kernel tells apart, beside the CPU's.

use tilert_mk::driver::Device;
use tilert_mk::driver::cuda::Purpose;
use tilert_mk::engine::{DeviceKind, Engine, EngineOptions, LoadMode, ModelSource, Weights};

use crate::edit;
use crate::planted::EARLY;
use crate::ptx_device::PtxDevice;
use crate::quantised::shipped_for;
use crate::{answer, run_clean, shipped};

/// Largest difference from the CPU's logits, relative to the largest of a row.
const TOLERANCE: f32 = 1e-4;

/// Query heads, key heads and values of a head; Qwen's heads have norms.
pub(crate) type Heads = (u32, u32, u32, &'static str);
/// Values of a row between layers, and between gate and down.
pub(crate) type Rows = [u32; 2];
pub(crate) const SHORT: Rows = [64, 64];
/// No row of gate and down has room near.
pub(crate) const TOO_LONG: Rows = [64, 16_672];

/// Logits after each token of a prompt of `len`.
pub(crate) fn logits(
    device: Box<dyn Device>,
    heads: Heads,
    rows: Rows,
    width: u32,
    len: u32,
    weights: Weights,
) -> Vec<Vec<f32>> {
    let prompt: Vec<u32> = (0..len).map(|idx| idx * 37 % 96).collect();
    let mut engine = open(device, heads, rows, width, len, weights);
    answer(&mut engine, &prompt, 1).expect("the request ends").rows
}

/// A model of one layer with random weights, for a prompt of `len`.
fn open(
    device: Box<dyn Device>,
    heads: Heads,
    [hidden, intermediate]: Rows,
    width: u32,
    len: u32,
    weights: Weights,
) -> Engine {
    let (head_count, kv_head_count, head_dim, family) = heads;
    let config = format!(
        r#"{{"vocab_size": 96, "hidden_act": "silu", "torch_dtype": "bfloat16",
            "architectures": ["{family}ForCausalLM"], "model_type": "{}", "hidden_size": {hidden},
            "intermediate_size": {intermediate}, "num_hidden_layers": 1, "rms_norm_eps": 1e-6,
            "num_attention_heads": {head_count}, "num_key_value_heads": {kv_head_count},
            "head_dim": {head_dim}, "rope_theta": 10000, "max_position_embeddings": 4096}}"#,
        family.to_lowercase()
    );
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(folder.path().join("config.json"), config).expect("the config is written");
    let options = EngineOptions {
        max_context: Some(len + 2),
        step_tokens: width,
        // A warp's deadline is that of an op. One of 8 tokens over 1100 positions takes more than the 50 ms
        // of the interpreter's clock that are enough elsewhere.
        wait_ns_max: 50_000_000.max(u64::from(len) * 450_000),
        load: LoadMode::Dummy,
        weights,
        ..EngineOptions::default()
    };
    let source = ModelSource::Directory(folder.path());
    Engine::open(source, device, &options, &mut |_, _| ()).expect("it opens")
}

/// Compares the kernel with the CPU; its bits are the same in all widths and with all workers.
fn check(heads: Heads, rows: Rows, len: u32, runs: &[(u32, u32, u32)]) {
    check_weights(heads, rows, len, runs, Weights::Native);
}

/// The same with weights in some form.
fn check_weights(heads: Heads, rows: Rows, len: u32, runs: &[(u32, u32, u32)], weights: Weights) {
    let logits = |device, width| logits(device, heads, rows, width, len, weights);
    let expected = logits(DeviceKind::Cpu.open(1, false).expect("the CPU is there"), 8);
    let mut first: [Option<Vec<Vec<f32>>>; 2] = [None, None];
    for (capability, workers, width) in runs {
        let what =
            format!("{heads:?}, {rows:?}, sm_{capability}, {workers} workers, width {width}");
        let options = match weights {
            Weights::Native => shipped(*capability, *workers, 5),
            Weights::Fp8 => shipped_for(Purpose::Fp8, *workers, 5),
            Weights::Q8 | Weights::Q4 => shipped_for(Purpose::Integers, *workers, 5),
        };
        let found = run_clean(&what, options, |device| logits(device, *width));
        assert_eq!(found.len(), expected.len(), "{what}");
        for (position, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let largest = expected.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
            for (found, expected) in found.iter().zip(expected) {
                let is_near = (found - expected).abs() <= TOLERANCE * largest;
                assert!(is_near, "{what}, position {position}: {found} for {expected}");
            }
        }
        let first = first[usize::from(*capability == 80)].get_or_insert_with(|| found.clone());
        let bits = |rows: &[Vec<f32>]| rows.concat().into_iter().map(f32::to_bits).collect();
        let (first, found): (Vec<u32>, Vec<u32>) = (bits(first), bits(&found));
        assert!(first == found, "{what}: bits differ");
    }
}

#[test]
fn heads_of_all_shapes_give_the_logits_of_the_cpu() {
    for heads in [
        (4, 1, 64, "Llama"),
        (5, 1, 40, "Qwen3"),
        (2, 1, 128, "Qwen3"),
        (6, 1, 96, "Llama"),
        (4, 1, 128, "Qwen3"),
        (3, 1, 256, "Qwen3"),
    ] {
        check(heads, SHORT, 70, &[(90, 1, 8), (90, 3, 3)]);
    }
    check((4, 1, 128, "Qwen3"), SHORT, 70, &[(80, 2, 8)]);
}

/// With nine workers the last two have both parts of positions, and no rows of QKV.
#[test]
fn attention_with_workers_of_its_own_gives_the_logits_of_the_cpu() {
    check((2, 1, 128, "Qwen3"), SHORT, 70, &[(90, 9, 3), (90, 1, 8)]);
}

/// So many values of queries that attention merges two splits already; in steps of three tokens, one that
/// has two beside others.
#[test]
fn attention_that_merges_gives_the_logits_of_the_cpu() {
    check((72, 8, 128, "Llama"), SHORT, 68, &[(90, 17, 3), (90, 1, 8)]);
}

/// Rows of which 8 tokens' have no room in a block's memory, and 3 tokens' have.
#[test]
fn long_rows_give_the_logits_of_the_cpu() {
    check((2, 1, 64, "Llama"), [1608, 2056], 9, &[(90, 1, 8), (90, 3, 3), (80, 2, 8)]);
    // Tasks of few rows ask for inputs further ahead.
    check((2, 1, 64, "Llama"), [264, 2056], 9, &[(90, 17, 8), (90, 9, 8), (90, 2, 3)]);
}

/// Rows of two tokens, and of one, that have no room near as a whole.
#[test]
fn rows_in_pieces_give_the_logits_of_the_cpu() {
    let heads = (2, 1, 64, "Llama");
    check(heads, [264, 2312], 5, &[(90, 1, 2), (90, 3, 1), (90, 2, 8), (90, 17, 2)]);
    check(heads, TOO_LONG, 2, &[(90, 1, 1), (90, 2, 2)]);
    check(heads, TOO_LONG, 2, &[(80, 3, 1), (80, 2, 2)]);
    for weights in [Weights::Fp8, Weights::Q8, Weights::Q4] {
        check_weights(heads, TOO_LONG, 2, &[(90, 2, 1), (90, 1, 2)], weights);
    }
}

#[test]
fn a_missing_barrier_between_pieces_is_found() {
    let mut options = shipped(90, 1, 5);
    options.text = edit::function(&options.text, "linear_bf16_in_pieces", |body| {
        const BARRIER: &str = "barrier.cta.sync 1, 256;";
        assert!(body.contains(BARRIER), "the block meets");
        body.replace(BARRIER, "")
    });
    let (device, _) = PtxDevice::new(options);
    let heads = (2, 1, 64, "Llama");
    let mut engine = open(Box::new(device), heads, TOO_LONG, 1, 1, Weights::Native);
    let error = answer(&mut engine, &[1], 1).err().expect("something is found").to_string();
    assert!(EARLY.iter().any(|kind| error.contains(kind)), "{error}");
}

#[test]
#[ignore = "takes minutes"]
fn long_sequences_give_the_logits_of_the_cpu() {
    for heads in [(4, 1, 64, "Llama"), (2, 1, 128, "Qwen3"), (3, 1, 256, "Llama")] {
        check(heads, SHORT, 1100, &[(90, 1, 8), (90, 5, 8)]);
    }
}
