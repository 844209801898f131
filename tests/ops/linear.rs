//! Linear tasks: every prologue, epilogue, format, with and without biases.

use tilert_mk_device::machine::best::Best;
use tilert_mk_model::quantise::{dequantised, fp8_scales};
use tilert_mk_model::reference;
use tilert_mk_model::strips::{Quantiser, StoredRows};
use tilert_mk_model::weights::Dtype;
use tilert_mk_shared::kv::attention_split_count;
use tilert_mk_shared::limits::ATTENTION_SPLIT_MAX;
use tilert_mk_shared::program::Dims;
use tilert_mk_shared::sequence::{NO_LOGITS, StepToken};
use tilert_mk_shared::task::{
    Epilogue, LinearArgs, Precision, Prologue, Segment, TokenRows, WeightFormat,
};

use crate::rig::{BLOCKED, FORMATS, Memory, Near, Random, Rig, UNIT, dims, matrix};

/// Heads of the splits that `MergeSplits` merges.
const HEADS: [u32; 3] = [3, 1, 24];
/// Rounding of `exp` and of its argument, which is at most 4 in these tests.
const EXP_UNITS: f64 = 4.0 + 4.0;

/// Tasks of a head, and the one that runs.
const HEAD_TASKS: u32 = 3;
const BEST_IDX: u32 = 1;

/// One way to run a linear task.
#[derive(Clone, Copy, Debug)]
struct Case {
    prologue: Prologue,
    epilogue: Epilogue,
    token_rows: TokenRows,
    format: WeightFormat,
    precision: Precision,
    in_dim: u32,
    has_bias: bool,
    positions: &'static [u32],
}

/// A matrix of the task, with its values.
struct Rows {
    stored: Memory,
    values: Vec<f32>,
    bias: Memory,
    bias_values: Vec<f32>,
    row_count: usize,
}

impl Rows {
    fn new(random: &mut Random, case: &Case, row_count: usize) -> Rows {
        let count = row_count * case.in_dim as usize;
        let (stored, values) = if case.format.is_blocked() {
            // Packed with the other segments' rows; see `strips`.
            (Memory::new(0), random.values(count))
        } else {
            matrix(random, case.format, count)
        };
        let bias_values = random.values(row_count);
        Rows { stored, values, bias: Memory::of(&bias_values), bias_values, row_count }
    }

    fn segment(&self, case: &Case, out_first: usize) -> Segment {
        Segment {
            weights: self.stored.address(),
            bias: if case.has_bias { self.bias.address() } else { 0 },
            row_count: self.row_count as u32,
            out_first: out_first as u32,
        }
    }

    /// Products with an input whose values are off by `x_error`, plus biases.
    fn apply(&self, case: &Case, x: &[f32], x_error: &[f64]) -> Vec<Near> {
        let products = reference::matvec(&self.values, x);
        // 32 lanes of fused multiply-adds, five additions that fold them, and the twin's rounding.
        // Of blocks, at most 32 additions, a product of scales and as many in the block.
        let sum_units = f64::from(case.in_dim) / 32.0
            + 1.0
            + 5.0
            + 1.0
            + if case.format == WeightFormat::Fp8 { 32.0 + 3.0 } else { 0.0 };
        // Inputs as integers are off by 2^-23, or 2^-15, of the largest in their block; as bf16 by 2^-9
        // of themselves.
        let is_integer = case.format.is_blocked() && case.format != WeightFormat::Fp8;
        let input_units = match (is_integer, case.precision) {
            (true, Precision::Exact) => 2.0,
            (true, Precision::Bf16) => 512.0,
            (false, Precision::Exact) => 0.0,
            (false, Precision::Bf16) => 32768.0,
        };
        let largest: Vec<f64> = x
            .chunks(32)
            .flat_map(|block| {
                let most = block.iter().fold(0.0, |most: f64, x| most.max(f64::from(x.abs())));
                vec![most; block.len()]
            })
            .collect();
        let rows = self.values.chunks(x.len()).zip(products).zip(&self.bias_values);
        rows.map(|((row, product), bias)| {
            let mut error = 0.0;
            for (((w, x), x_error), largest) in row.iter().zip(x).zip(x_error).zip(&largest) {
                let w = f64::from(w.abs());
                error += w * x_error * 1.01 + w * f64::from(x.abs()) * sum_units * UNIT;
                let size = if is_integer { *largest } else { f64::from(x.abs()) };
                error += w * (size + x_error) * input_units * 1.01 * UNIT;
            }
            let bias = if case.has_bias { f64::from(*bias) } else { 0.0 };
            let value = f64::from(product) + bias;
            Near { value, error: error + value.abs() * UNIT }
        })
        .collect()
    }
}

/// The strips of a task's rows, whose values become what these mean.
fn strips(case: &Case, rows: &mut [Rows]) -> Memory {
    let in_dim = case.in_dim as usize;
    let quantiser = Quantiser::new(case.format, in_dim).unwrap();
    let bytes = rows.iter().map(|rows| rows.values.iter().flat_map(|v| v.to_le_bytes()).collect());
    let bytes: Vec<Vec<u8>> = bytes.collect();
    let scales: Vec<Vec<f32>> = rows.iter().map(|rows| fp8_scales(&rows.values, in_dim)).collect();
    let stored = bytes.iter().zip(&scales).map(|(values, scales)| StoredRows {
        dtype: Dtype::F32,
        values,
        first: 0,
        scales,
    });
    let row_count: usize = rows.iter().map(|rows| rows.row_count).sum();
    let mut out = vec![0; quantiser.byte_count(row_count as u32)];
    assert_eq!(quantiser.pack(&stored.collect::<Vec<_>>(), &mut out), Ok(()));
    for rows in rows {
        rows.values = dequantised(case.format, &rows.values, in_dim);
    }
    Memory::of(&out)
}

/// The task's input rows after the prologue, and the errors of their values.
type Inputs = Vec<(Vec<f32>, Vec<f64>)>;

fn rows_of_tokens(case: &Case) -> Vec<usize> {
    let is_taken = |token: &usize| match case.token_rows {
        TokenRows::All => true,
        TokenRows::Logits => token % 2 == 1,
    };
    (0..case.positions.len()).filter(is_taken).collect()
}

/// Fills the splits region for all tokens and gives the merged rows.
fn merged(rig: &Rig, case: &Case, random: &mut Random) -> Inputs {
    let (dims, dim) = (rig.header.dims, HEADS[2] as usize);
    let merge_token = |token_idx: usize| {
        let (mut row, mut errors) = (Vec::new(), Vec::new());
        let count = attention_split_count(case.positions[token_idx]);
        assert!(count <= ATTENTION_SPLIT_MAX);
        for head_idx in 0..HEADS[0] {
            let part = |random: &mut Random| {
                let mut part = random.values(dim + 2);
                part[dim] *= 2.0;
                part[dim + 1] = part[dim + 1].abs() * 30.0 + 1.0;
                part
            };
            let parts: Vec<Vec<f32>> = (0..count).map(|_| part(random)).collect();
            for (split, part) in (0..).zip(&parts) {
                let first = dims.split_idx(token_idx as u32, head_idx, split);
                let span = rig.heap::<f32>(rig.header.plan.splits + first * 4, dim as u64 + 2);
                span.as_mut_slice().copy_from_slice(part);
            }
            let views: Vec<&[f32]> = parts.iter().map(Vec::as_slice).collect();
            row.extend(reference::merge(&views));
            // The same sum of magnitudes; its weights are off by `EXP_UNITS`, and each addition
            // rounds, above the division and below it.
            let sizes: Vec<Vec<f32>> = parts
                .iter()
                .map(|part| {
                    let size = |(i, v): (usize, &f32)| if i < dim { v.abs() } else { *v };
                    part.iter().enumerate().map(size).collect()
                })
                .collect();
            let views: Vec<&[f32]> = sizes.iter().map(Vec::as_slice).collect();
            let units = 2.0 * (EXP_UNITS + f64::from(count) + 1.0) + 2.0;
            errors.extend(reference::merge(&views).iter().map(|s| f64::from(*s) * units * UNIT));
        }
        (row, errors)
    };
    (0..case.positions.len()).map(merge_token).collect()
}

/// Fills the hidden rows for all tokens and gives them, normed or not.
fn hidden(rig: &Rig, case: &Case, random: &mut Random, norm: &[f32]) -> Inputs {
    let (dim, count) = (case.in_dim as usize, case.positions.len());
    let values = random.values(count * dim);
    let span = rig.heap::<f32>(rig.header.plan.hidden, values.len() as u64);
    span.as_mut_slice().copy_from_slice(&values);
    let eps = rig.header.dims.rms_norm_eps;
    let row = |x: &[f32]| match case.prologue {
        Prologue::RmsNorm => {
            let normed = reference::rms_norm(x, norm, eps);
            // Half the error of the sum of squares, through the root; then the mean, eps, root,
            // inverse, two products and the twin's rounding.
            let units = (f64::from(case.in_dim) / 32.0 + 6.0) / 2.0 + 7.0;
            let errors = normed.iter().map(|v| f64::from(v.abs()) * units * UNIT).collect();
            (normed, errors)
        }
        _ => (x.to_vec(), vec![0.0; dim]),
    };
    values.chunks(dim).map(row).collect()
}

/// What the epilogue makes of a token's products.
fn finish(case: &Case, products: &[Vec<Near>], old: &[f32]) -> Vec<Near> {
    match case.epilogue {
        Epilogue::Store | Epilogue::StoreBest => products.concat(),
        Epilogue::AddResidual => {
            let add = |(near, old): (Near, &f32)| {
                let value = near.value + f64::from(*old);
                Near { value, error: near.error + value.abs() * UNIT }
            };
            products.concat().into_iter().zip(old).map(add).collect()
        }
        Epilogue::SiluMul => {
            let silu = |x: f64| x / (1.0 + (-x).exp());
            let gate = |(gate, up): (&Near, &Near)| {
                let value = silu(gate.value) * up.value;
                // `silu` has slopes up to 1.1; `exp`, an addition, a division, a product.
                let error = 1.1 * gate.error * (up.value.abs() + up.error)
                    + silu(gate.value).abs() * up.error
                    + value.abs() * (4.0 + 3.0 + 1.0) * UNIT;
                Near { value, error }
            };
            products[0].iter().zip(&products[1]).map(gate).collect()
        }
    }
}

fn check(rig: &Rig, case: &Case) -> Vec<u32> {
    let mut random = Random::new(u64::from(case.in_dim) + case.positions.len() as u64);
    let plan = rig.header.plan;
    let mut logit_row = 0;
    let tokens: Vec<StepToken> = (0..case.positions.len())
        .map(|idx| {
            let has_logits = idx % 2 == 1;
            let row = if has_logits { logit_row } else { NO_LOGITS };
            logit_row += u32::from(has_logits);
            StepToken { position: case.positions[idx], logit_row: row, ..StepToken::default() }
        })
        .collect();
    rig.set_step(&tokens);
    let norm_values = random.values(case.in_dim as usize);
    let norm = Memory::of(&norm_values);
    let inputs = match case.prologue {
        Prologue::MergeSplits => merged(rig, case, &mut random),
        _ => hidden(rig, case, &mut random, &norm_values),
    };
    let counts: &[usize] = match case.epilogue {
        Epilogue::SiluMul => &[7, 7],
        Epilogue::StoreBest => &[15],
        _ => &[5, 1, 9],
    };
    let mut rows: Vec<Rows> = counts.iter().map(|n| Rows::new(&mut random, case, *n)).collect();
    let strips = case.format.is_blocked().then(|| strips(case, &mut rows));
    let (mut segments, mut first) = ([Segment::default(); 3], 0);
    for (segment, rows) in segments.iter_mut().zip(&rows) {
        *segment = rows.segment(case, first);
        if let Some(strips) = &strips {
            segment.weights = strips.address();
        }
        first += if case.epilogue == Epilogue::SiluMul { 0 } else { rows.row_count };
    }
    let out_count = first.max(counts[0]);
    let args = LinearArgs {
        prologue: case.prologue,
        epilogue: case.epilogue,
        token_rows: case.token_rows,
        format: case.format,
        precision: case.precision,
        residual_age: 0,
        is_announced: false,
        best_idx: if case.epilogue == Epilogue::StoreBest { BEST_IDX } else { 0 },
        in_dim: case.in_dim,
        x_stride: case.in_dim,
        y_stride: 40,
        prologue_key: 3,
        x: if case.prologue == Prologue::MergeSplits { plan.splits } else { plan.hidden },
        y: plan.logits,
        norm_weight: if case.prologue == Prologue::RmsNorm { norm.address() } else { 0 },
        segments,
    };
    let y = rig.heap::<f32>(plan.logits, 40 * case.positions.len() as u64);
    let old = random.values(y.len());
    y.as_mut_slice().copy_from_slice(&old);
    rig.run(&args.pack());
    let taken = rows_of_tokens(case);
    for (row_idx, token_idx) in taken.iter().enumerate() {
        let (x, x_error) = &inputs[*token_idx];
        let products: Vec<_> = rows.iter().map(|rows| rows.apply(case, x, x_error)).collect();
        let old = &old[row_idx * 40..][..40];
        let found = &y.as_slice()[row_idx * 40..][..40];
        for (column, near) in finish(case, &products, old).iter().enumerate() {
            near.check(found[column], &|| format!("{case:?}[{row_idx}, {column}]"));
        }
        assert_eq!(found[out_count..], old[out_count..], "{case:?}: stores beside its columns");
    }
    assert_eq!(y.as_slice()[taken.len() * 40..], old[taken.len() * 40..], "{case:?}: other rows");
    let bests = rig.heap::<u64>(plan.bests, u64::from(HEAD_TASKS) * case.positions.len() as u64);
    for (row_idx, row) in bests.as_slice().chunks(HEAD_TASKS as usize).enumerate() {
        for (idx, best) in row.iter().enumerate() {
            let is_left = case.epilogue == Epilogue::StoreBest
                && (idx, row_idx < taken.len()) == (BEST_IDX as usize, true);
            let of_row = || reference::argmax(&y.as_slice()[row_idx * 40..][..out_count]);
            let found = (*best != 0).then(|| Best(*best).chosen());
            assert_eq!(found, is_left.then(|| Some(of_row())), "{case:?}: best {row_idx}, {idx}");
        }
    }
    y.as_slice().iter().map(|value| value.to_bits()).collect()
}

/// Runs a case on every instruction set; all must agree in every bit, as far as they promise to.
fn check_all(case: &Case) {
    let mut first: Option<Vec<u32>> = None;
    // What multiplies bf16 by bf16 rounds in a way of its own.
    let is_same = (case.format, case.precision) != (WeightFormat::Bf16, Precision::Bf16);
    let dims = Dims { head_task_count: HEAD_TASKS, ..dims(case.in_dim, HEADS, 2048) };
    Rig::for_each_isa(&dims, |rig| {
        let bits = check(rig, case);
        assert!(!is_same || *first.get_or_insert(bits.clone()) == bits, "{case:?}: bits differ");
    });
}

/// All formats, in both precisions.
fn formats() -> impl Iterator<Item = (WeightFormat, Precision)> {
    let formats = FORMATS.into_iter().chain(BLOCKED);
    formats
        .flat_map(|format| [Precision::Exact, Precision::Bf16].map(|precision| (format, precision)))
}

const STEPS: [&[u32]; 4] =
    [&[5], &[0, 1], &[3, 63, 64, 200, 1], &[1023, 1024, 1025, 2047, 2, 3, 4, 5]];

#[test]
fn every_prologue_epilogue_format_and_bias() {
    for (format, precision) in formats() {
        for epilogue in
            [Epilogue::Store, Epilogue::AddResidual, Epilogue::SiluMul, Epilogue::StoreBest]
        {
            for prologue in [Prologue::None, Prologue::RmsNorm, Prologue::MergeSplits] {
                for has_bias in [false, true] {
                    for positions in STEPS {
                        let (in_dim, token_rows) = (72, TokenRows::All);
                        let case = Case {
                            prologue,
                            epilogue,
                            token_rows,
                            format,
                            precision,
                            in_dim,
                            has_bias,
                            positions,
                        };
                        check_all(&case);
                    }
                }
            }
        }
    }
}

#[test]
fn rows_of_logits_and_other_lengths() {
    for (format, precision) in formats() {
        for in_dim in [8, 64, 136, 1032] {
            for token_rows in [TokenRows::All, TokenRows::Logits] {
                let case = Case {
                    prologue: Prologue::RmsNorm,
                    epilogue: Epilogue::Store,
                    token_rows,
                    format,
                    precision,
                    in_dim,
                    has_bias: false,
                    positions: STEPS[2],
                };
                check_all(&case);
            }
        }
    }
}
