//! Linear: a prologue, rows of up to three matrices times the step's activations, an epilogue.

use tilert_mk_shared::kv::attention_split_count;
use tilert_mk_shared::sequence::StepState;
use tilert_mk_shared::task::{Epilogue, LinearArgs, Prologue, Segment, TokenRows};

use crate::machine::cpu::{Matrix, Rows, add_scaled, exp, matmul, rms_norm, silu_mul};
use crate::machine::memory::Span;
use crate::worker::{Claim, Worker};

pub(super) fn run(worker: &mut Worker, claim: &Claim) {
    let args = LinearArgs::unpack(&claim.task);
    let step_view = super::step(worker);
    let step = &step_view.as_slice()[0];
    let row_count = match args.token_rows {
        TokenRows::All => step.token_count,
        TokenRows::Logits => step.logit_count,
    } as usize;
    if row_count == 0 {
        return;
    }
    let x = input(worker, claim.epoch, &args, step, row_count);
    let y = Rows { values: super::scratch_output(worker), stride: args.row_count() as usize };
    let mut first = 0;
    for segment in &args.segments {
        if segment.row_count > 0 {
            let matrix = Matrix {
                address: segment.weights,
                format: args.format,
                row_count: segment.row_count as usize,
                in_dim: args.in_dim as usize,
            };
            matmul(worker.isa, matrix, x, row_count, y, first);
            add_bias(segment, y, row_count, first);
            first += segment.row_count as usize;
        }
    }
    store(worker, &args, y, row_count);
}

fn input(w: &mut Worker, epoch: u32, args: &LinearArgs, step: &StepState, count: usize) -> Rows {
    let dim = args.in_dim as usize;
    if args.prologue == Prologue::None {
        let len = u64::from(args.x_stride) * count as u64;
        return Rows { values: w.heap(args.x, len), stride: args.x_stride as usize };
    }
    let x = Rows { values: super::scratch_input(w), stride: dim.next_multiple_of(16) };
    if w.prologue == Some((epoch, args.prologue_key)) {
        return x;
    }
    for row in 0..count {
        let token_idx = match args.token_rows {
            TokenRows::All => row as u32,
            TokenRows::Logits => step.logit_tokens[row],
        };
        let out = x.values.sub(row * x.stride, dim);
        if args.prologue == Prologue::RmsNorm {
            let offset = args.x + u64::from(token_idx) * u64::from(args.x_stride) * 4;
            let from = w.heap::<f32>(offset, dim as u64);
            // SAFETY: the host has bound the norm's weight, `[in_dim] f32`, until the workers end.
            let weight = unsafe { Span::<f32>::new(args.norm_weight, dim) };
            let eps = w.header.dims.rms_norm_eps;
            rms_norm(w.isa, from.as_slice(), weight.as_slice(), eps, out.as_mut_slice());
        } else {
            merge(w, args.x, token_idx, step.tokens[token_idx as usize].position, out);
        }
    }
    w.prologue = Some((epoch, args.prologue_key));
    x
}

/// Merges the attention splits of all heads of one token, in the order of the splits.
fn merge(worker: &Worker, splits: u64, token_idx: u32, position: u32, out: Span<f32>) {
    let dims = &worker.header.dims;
    let dim = dims.kv.head_dim as usize;
    let split_count = attention_split_count(position);
    for head in 0..dims.head_count {
        let split = |idx: u32| {
            let first = dims.split_idx(token_idx, head, idx);
            worker.heap::<f32>(splits + first * 4, u64::from(dims.split_values()))
        };
        let largest =
            (0..split_count).map(|idx| split(idx).read(dim)).fold(f32::NEG_INFINITY, f32::max);
        let head_view = out.sub(head as usize * dim, dim);
        let head_out = head_view.as_mut_slice();
        head_out.fill(0.0);
        let mut total = 0.0;
        for idx in 0..split_count {
            let part = split(idx);
            let weight = exp(worker.isa, part.read(dim) - largest);
            total += weight * part.read(dim + 1);
            add_scaled(worker.isa, head_out, part.sub(0, dim).as_slice(), weight);
        }
        for value in head_out {
            *value /= total;
        }
    }
}

fn add_bias(segment: &Segment, y: Rows, row_count: usize, first: usize) {
    if segment.bias == 0 {
        return;
    }
    let len = segment.row_count as usize;
    // SAFETY: the host has bound the biases, `[row_count] f32`, until the workers end.
    let bias = unsafe { Span::<f32>::new(segment.bias, len) };
    for row in 0..row_count {
        let products = y.values.sub(row * y.stride + first, len);
        for (product, bias) in products.as_mut_slice().iter_mut().zip(bias.as_slice()) {
            *product += bias;
        }
    }
}

fn store(worker: &Worker, args: &LinearArgs, y: Rows, row_count: usize) {
    for row in 0..row_count {
        let mut first = 0;
        for segment in &args.segments {
            let len = segment.row_count as usize;
            if len == 0 {
                continue;
            }
            let products = y.values.sub(row * y.stride + first, len);
            let column = row as u64 * u64::from(args.y_stride) + u64::from(segment.out_first);
            let out = worker.heap::<f32>(args.y + column * 4, len as u64);
            first += len;
            match args.epilogue {
                Epilogue::Store => out.as_mut_slice().copy_from_slice(products.as_slice()),
                Epilogue::AddResidual => {
                    for (out, product) in out.as_mut_slice().iter_mut().zip(products.as_slice()) {
                        *out += product;
                    }
                }
                Epilogue::SiluMul => {
                    let up = y.values.sub(row * y.stride + len, len);
                    silu_mul(worker.isa, products.as_mut_slice(), up.as_slice());
                    out.as_mut_slice().copy_from_slice(products.as_slice());
                    break;
                }
            }
        }
    }
}
