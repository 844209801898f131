//! The CPU machine's inner primitives on data in cache, at this machine's instruction set.
//! Run with `cargo bench -p tilert-mk-device`.

use std::hint::black_box;
use std::time::Instant;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use tilert_mk_device::machine::cpu::Isa;
use tilert_mk_device::machine::cpu::thread::{Idling, Thread};
use tilert_mk_device::machine::memory::Span;
use tilert_mk_device::machine::{Attention, Machine, Rows};
use tilert_mk_shared::limits::{
    ATTENTION_SPLIT_MAX, DECODE_TOKENS_MAX, SPLIT_ROWS, STEP_TOKENS_MAX,
};
use tilert_mk_shared::task::{
    Epilogue, LinearArgs, Precision, Prologue, Segment, TokenRows, WeightFormat,
};

/// Values of a row of weights, of a norm and of a hidden state.
const IN_DIM: usize = 1024;
/// Rows of a linear task: 128 KiB of two-byte weights.
const ROW_COUNT: usize = 64;
const HEAD_DIM: usize = 128;
/// Values of a split: `HEAD_DIM` and two more, in whole vectors.
const SPLIT_VALUES: usize = HEAD_DIM + 16;
/// Query heads that share a KV head.
const QUERY_COUNT: usize = 2;

fn machine() -> Thread {
    Thread { isa: Isa::detect(), idling: Idling::Yield, clock: Instant::now() }
}

/// `count` small values, and as many more as `span` may leave out.
fn values(count: usize) -> Vec<f32> {
    (0..count + 16).map(|idx| (idx % 17) as f32 * 0.01 - 0.08).collect()
}

/// A view of values that the caller keeps, from the first on that begins a cache line.
fn span(values: &mut [f32]) -> Span<f32> {
    let unaligned = values.as_ptr().align_offset(64);
    let values = &mut values[unaligned..];
    let address = values.as_mut_ptr().expose_provenance() as u64;
    // SAFETY: memory of the caller, who keeps it for as long as the view and reads it no other way
    // meanwhile; there is one thread.
    unsafe { Span::new(address, values.len()) }
}

fn matmul(criterion: &mut Criterion) {
    let machine = machine();
    let mut group = criterion.benchmark_group("matmul");
    let formats = [
        (WeightFormat::F32, Precision::Exact),
        (WeightFormat::F16, Precision::Exact),
        (WeightFormat::Bf16, Precision::Exact),
        (WeightFormat::Bf16, Precision::Bf16),
        (WeightFormat::Q8, Precision::Exact),
        (WeightFormat::Q8, Precision::Bf16),
        (WeightFormat::Q4, Precision::Exact),
        (WeightFormat::Q4, Precision::Bf16),
        (WeightFormat::Fp8, Precision::Exact),
    ];
    for (format, precision) in formats {
        // Any bytes will do as weights; these are small numbers in each format.
        let weights = vec![0x2c00_2c00u32; ROW_COUNT * IN_DIM];
        let task = LinearArgs {
            prologue: Prologue::None,
            epilogue: Epilogue::Store,
            token_rows: TokenRows::All,
            format,
            precision,
            residual_age: 0,
            is_announced: false,
            best_idx: 0,
            in_dim: IN_DIM as u32,
            x_stride: IN_DIM as u32,
            y_stride: ROW_COUNT as u32,
            prologue_key: 0,
            x: 0,
            y: 0,
            norm_weight: 0,
            segments: [
                Segment {
                    weights: weights.as_ptr().expose_provenance() as u64,
                    row_count: ROW_COUNT as u32,
                    ..Segment::default()
                },
                Segment::default(),
                Segment::default(),
            ],
        }
        .pack();
        for tokens in [1, 2, 3, 4, DECODE_TOKENS_MAX as usize, STEP_TOKENS_MAX as usize] {
            let (mut x, mut y) = (values(tokens * IN_DIM), values(tokens * ROW_COUNT));
            let mut settled = values(tokens * IN_DIM);
            let [x, settled] =
                [&mut x, &mut settled].map(|rows| Rows { values: span(rows), stride: IN_DIM });
            let x = machine.gather(&task, x, tokens, IN_DIM, settled, false);
            let y = Rows { values: span(&mut y), stride: ROW_COUNT };
            let bytes = ROW_COUNT as u64 * format.row_bytes(IN_DIM as u32);
            group.throughput(Throughput::Bytes(bytes));
            let id =
                BenchmarkId::new(format!("{format:?}, {precision:?}"), format!("{tokens} tokens"));
            group.bench_function(id, |bencher| {
                bencher.iter(|| machine.multiply(black_box(&task), x, tokens, y));
            });
        }
    }
}

fn rms_norm(criterion: &mut Criterion) {
    let machine = machine();
    let [mut x, mut weight, mut out] = [0; 3].map(|_| values(IN_DIM));
    let x = span(&mut x).sub(0, IN_DIM);
    let weight = span(&mut weight).sub(0, IN_DIM);
    let out = Rows { values: span(&mut out), stride: IN_DIM };
    criterion.bench_function(&format!("rms_norm/{IN_DIM}"), |bencher| {
        bencher.iter(|| machine.rms_norm(|_| black_box(x), 1, weight, 1e-5, out, ()));
    });
}

fn attend(criterion: &mut Criterion) {
    let machine = machine();
    let mut group = criterion.benchmark_group("attend");
    // A split attends to one block of each 1024 positions.
    for (tokens, positions) in [(1, 64), (1, 4096), (64, 64), (64, 4096)] {
        let [mut keys, mut cached] = [0; 2].map(|_| values(positions * HEAD_DIM));
        let query_values = QUERY_COUNT * HEAD_DIM;
        let [mut queries, mut scratch] = [0; 2].map(|_| values(tokens * query_values));
        let [mut key, mut value, mut cos, mut sin] = [0; 4].map(|_| values(HEAD_DIM));
        let out_values = QUERY_COUNT * SPLIT_ROWS as usize * SPLIT_VALUES;
        let mut out = values(tokens * out_values);
        let half = HEAD_DIM / 2;
        let none = span(&mut key).sub(0, 0);
        let attention = Attention {
            head_dim: HEAD_DIM,
            query_count: QUERY_COUNT,
            queries: span(&mut queries),
            key: span(&mut key).sub(0, HEAD_DIM),
            value: span(&mut value).sub(0, HEAD_DIM),
            query_norm: none,
            key_norm: none,
            eps: 1e-5,
            cos: span(&mut cos).sub(0, half),
            sin: span(&mut sin).sub(0, half),
            keys: span(&mut keys).sub(0, positions * HEAD_DIM),
            values: span(&mut cached).sub(0, positions * HEAD_DIM),
            position: (positions - tokens) as u32,
            scale: 0.1,
            part_idx: 0,
            part_count: ATTENTION_SPLIT_MAX,
            out: span(&mut out),
            split_values: SPLIT_VALUES,
            scratch: span(&mut scratch),
        };
        let token = |idx: u32| Attention {
            position: attention.position + idx,
            queries: attention.queries.sub(idx as usize * query_values, query_values),
            out: attention.out.sub(idx as usize * out_values, out_values),
            ..attention
        };
        group.bench_function(format!("{tokens} tokens, {positions} positions"), |bencher| {
            bencher.iter(|| machine.attend_run(black_box(tokens as u32), token));
        });
    }
}

fn exp(criterion: &mut Criterion) {
    let machine = machine();
    criterion.bench_function("exp", |bencher| {
        bencher.iter(|| machine.exp(black_box(-1.5)));
    });
}

criterion_group!(primitives, matmul, rms_norm, attend, exp);
criterion_main!(primitives);
