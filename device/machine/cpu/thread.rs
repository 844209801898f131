//! A worker of the CPU machine: one thread, one lane.

use std::time::{Duration, Instant};

use tilert_mk_shared::kv::{attention_split, attention_split_count};
use tilert_mk_shared::limits::{ATTENTION_BLOCK, SPLIT_ROWS};
use tilert_mk_shared::program::{Dims, INPUT_ROW_MULTIPLE};
use tilert_mk_shared::sequence::StepState;
use tilert_mk_shared::task::{LinearArgs, Opcode, Task, WeightFormat};

use super::{ATTEND_QUERIES_MAX, InputForm, Isa, Matrix, Query, blocks};
use crate::machine::best::Best;
use crate::machine::memory::Span;
use crate::machine::{Attention, BestPlace, Finish, Machine, Rows};

/// Looks after which an idle worker sleeps between looks.
const IDLE_LOOKS_MAX: u32 = 200;
/// How long it sleeps.
const IDLE_SLEEP: Duration = Duration::from_micros(50);
/// Bytes of each of a task's matrices that are requested before the worker comes to it: until the
/// chip's own prefetcher follows.
const STAGE_BYTES: u64 = 2 << 10;

/// What a worker does between looks for something to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Idling {
    /// Lets other threads run, and after a while sleeps.
    Park,
    /// Lets other threads run.
    Yield,
    /// Looks again at once: for a worker that has a core of its own.
    Spin,
}

/// One thread.
#[derive(Clone, Copy, Debug)]
pub struct Thread {
    /// Instruction set of the primitives.
    pub isa: Isa,
    /// How it waits.
    pub idling: Idling,
    /// Zero of the device's clock.
    pub clock: Instant,
}

impl Thread {
    /// The form in which a linear task multiplies its inputs.
    fn form(&self, args: &LinearArgs) -> InputForm {
        InputForm::of(self.isa, args.format, args.precision)
    }

    /// Half-split RoPE of a head after its norm, if it has one.
    fn rotate(&self, attention: &Attention, from: Span<f32>, norm: Span<f32>, out: Span<f32>) {
        let out = out.as_mut_slice();
        if norm.is_empty() {
            out.copy_from_slice(from.as_slice());
        } else {
            super::rms_norm(self.isa, from.as_slice(), norm.as_slice(), attention.eps, out);
        }
        super::rope(self.isa, out, attention.cos.as_slice(), attention.sin.as_slice());
    }

    /// Appends the key and value of token `idx` of a run, and leaves its rotated queries in the scratch.
    fn prepare(&self, attention: &Attention, idx: u32) {
        let Attention { head_dim: dim, query_count, position, .. } = *attention;
        if attention_split(position) % attention.part_count == attention.part_idx {
            let row = position as usize * dim;
            self.rotate(attention, attention.key, attention.key_norm, attention.keys.sub(row, dim));
            let value = attention.values.sub(row, dim);
            value.as_mut_slice().copy_from_slice(attention.value.as_slice());
        }
        for query in 0..query_count {
            let from = attention.queries.sub(query * dim, dim);
            self.rotate(attention, from, attention.query_norm, rotated(attention, idx, query));
        }
    }

    /// Attends to a split for all queries of the `count` tokens of a run.
    fn attend_split(&self, split: u32, count: u32, attention: &impl Fn(u32) -> Attention) {
        let last = attention(count - 1);
        let dim = last.head_dim;
        let first = split * ATTENTION_BLOCK;
        let [keys, values] = [last.keys, last.values].map(|plane| {
            plane.sub(first as usize * dim, (last.position + 1 - first) as usize * dim)
        });
        let attend = |queries: &[Query]| {
            super::attend(self.isa, queries, keys.as_slice(), values.as_slice(), last.scale);
        };
        let mut queries = [Query { values: last.out, count: 0, out: last.out }; ATTEND_QUERIES_MAX];
        let mut len = 0;
        for idx in 0..count {
            let token = attention(idx);
            for query in 0..token.query_count {
                queries[len] = Query {
                    values: rotated(&token, idx, query),
                    count: (token.position + 1 - first) as usize,
                    out: token.out.sub(token.out_idx(query as u32, split), dim + 2),
                };
                len += 1;
                if len == ATTEND_QUERIES_MAX {
                    attend(&queries);
                    len = 0;
                }
            }
        }
        if len > 0 {
            attend(&queries[..len]);
        }
    }
}

impl Machine for Thread {
    const IS_STEALABLE: bool = true;

    const ATTENDS_RUNS: bool = true;

    type NormAhead = ();

    #[inline(always)]
    fn lane_idx(&self) -> usize {
        0
    }

    #[inline(always)]
    fn lane_count(&self) -> usize {
        1
    }

    #[inline(always)]
    fn sync(&self) {}

    #[inline(always)]
    fn lead(&self, job: impl FnOnce() -> u32) -> u32 {
        job()
    }

    fn now_ns(&self) -> u64 {
        self.clock.elapsed().as_nanos() as u64
    }

    /// The caches keep it near.
    #[inline(always)]
    fn keep_step(&self, _step: Span<StepState>, _epoch: u32) {}

    #[inline(always)]
    fn step(&self, step: Span<StepState>) -> Span<StepState> {
        step
    }

    #[inline(always)]
    fn relax(&self) {
        std::hint::spin_loop();
    }

    fn idle(&self, looks: u32) {
        match self.idling {
            Idling::Park if looks > IDLE_LOOKS_MAX => std::thread::sleep(IDLE_SLEEP),
            Idling::Park | Idling::Yield => std::thread::yield_now(),
            Idling::Spin => std::hint::spin_loop(),
        }
    }

    fn stage(&self, task: &Task) {
        if task.opcode == Opcode::Linear as u16 {
            for idx in 0..task.segment_count() {
                super::prefetch(task.segment(idx).weights, STAGE_BYTES);
            }
        }
    }

    #[inline(always)]
    fn input_rows(&self, heap: Span<f32>, _count: usize, dim: usize) -> Rows {
        Rows { values: heap, stride: dim.next_multiple_of(INPUT_ROW_MULTIPLE as usize) }
    }

    #[inline(always)]
    fn output_rows(&self, heap: Span<f32>, _count: usize, len: usize) -> Rows {
        Rows { values: heap, stride: len }
    }

    #[inline(always)]
    fn gather(
        &self,
        task: &Task,
        from: Rows,
        count: usize,
        dim: usize,
        to: Rows,
        is_kept: bool,
    ) -> Rows {
        let form = self.form(&LinearArgs::unpack(task));
        if form.is_plain(count) {
            return from;
        }
        if !is_kept {
            form.convert(self.isa, from, to, count, dim);
        }
        to
    }

    #[inline(always)]
    fn settle(&self, task: &Task, x: Rows, count: usize, dim: usize) {
        self.form(&LinearArgs::unpack(task)).convert(self.isa, x, x, count, dim);
    }

    #[inline(always)]
    fn rms_norm(
        &self,
        from: impl Fn(usize) -> Span<f32>,
        count: usize,
        weight: Span<f32>,
        eps: f32,
        out: Rows,
        _ahead: (),
    ) {
        for row in 0..count {
            let (x, out) = (from(row), out.row(row, weight.len()));
            super::rms_norm(self.isa, x.as_slice(), weight.as_slice(), eps, out.as_mut_slice());
        }
    }

    fn multiply(&self, task: &Task, x: Rows, count: usize, out: Rows) {
        let args = LinearArgs::unpack(task);
        let matrix = |address, row_count: u32| Matrix {
            address,
            format: args.format,
            inputs: self.form(&args),
            row_count: row_count as usize,
            in_dim: args.in_dim as usize,
        };
        if args.format.is_blocked() {
            // Segments touch.
            let whole = matrix(task.segment(0).weights, args.row_count());
            return blocks::matmul(self.isa, whole, x, count, out);
        }
        let mut first = 0;
        for segment in args.segments.iter().filter(|segment| segment.row_count > 0) {
            let rows = matrix(segment.weights, segment.row_count);
            super::matmul(self.isa, rows, x, count, out, first);
            first += segment.row_count as usize;
        }
    }

    fn expect(&self, finish: &Finish, out: impl Fn(usize) -> Span<f32>) {
        for token in 0..finish.count {
            super::expect(out(token));
        }
    }

    fn store(
        &self,
        products: Rows,
        finish: &Finish,
        out: impl Fn(usize) -> Span<f32>,
        best: impl Fn(usize) -> BestPlace,
    ) {
        let len = finish.len;
        for token in 0..finish.count {
            let row = |first| products.values.sub(token * products.stride + first, len);
            let biased = |first, bias: Span<f32>| {
                let row = row(first);
                if !bias.is_empty() {
                    super::add_scaled(self.isa, row.as_mut_slice(), bias.as_slice(), 1.0);
                }
                row
            };
            let (values, out) = (biased(finish.first, finish.bias), out(token));
            if finish.is_gated {
                let up = biased(finish.first + len, finish.up_bias);
                super::silu_mul(self.isa, values.as_mut_slice(), up.as_slice());
            }
            if finish.adds {
                super::add_scaled(self.isa, out.as_mut_slice(), values.as_slice(), 1.0);
            } else {
                out.as_mut_slice().copy_from_slice(values.as_slice());
            }
            if finish.leaves_best {
                let BestPlace { word, first } = best(token);
                word.write(0, super::best_of(self.isa, first, out.as_slice()).0);
            }
        }
    }

    fn merge(&self, dims: &Dims, splits: Span<f32>, split_count: usize, out: Rows, row: usize) {
        let (dim, stride) = (dims.kv.head_dim as usize, dims.split_values() as usize);
        for head_idx in 0..dims.head_count as usize {
            let first = head_idx * SPLIT_ROWS as usize * stride;
            let splits = splits.sub(first, (split_count - 1) * stride + dim + 2);
            let out = out.values.sub(row * out.stride + head_idx * dim, dim);
            super::merge(self.isa, splits.as_slice(), stride, out.as_mut_slice());
        }
    }

    fn attend(&self, attention: &Attention) {
        self.attend_run(1, |_| *attention);
    }

    fn attend_run(&self, count: u32, attention: impl Fn(u32) -> Attention) {
        let last = attention(count - 1);
        for idx in 0..count {
            self.prepare(&attention(idx), idx);
        }
        let splits = last.part_idx..attention_split_count(last.position);
        for split in splits.step_by(last.part_count as usize) {
            self.attend_split(split, count, &attention);
        }
    }

    fn widen(&self, address: u64, format: WeightFormat, first: u64, out: Span<f32>) {
        super::widen(self.isa, address, format, first, out.as_mut_slice());
    }

    fn argmax(&self, values: Span<f32>) -> Option<u32> {
        super::best_of(self.isa, 0, values.as_slice()).chosen()
    }

    fn best_of(&self, bests: Span<u64>) -> Option<u32> {
        let best = bests.as_slice().iter().max();
        best.map_or(Best::NONE, |best| Best(*best)).chosen()
    }

    #[inline(always)]
    fn histogram(&self, len: usize, bins: Span<u64>, item: impl Fn(usize) -> Option<(usize, u64)>) {
        bins.as_mut_slice().fill(0);
        for index in 0..len {
            if let Some((bin, amount)) = item(index) {
                bins.write(bin, bins.read(bin) + amount);
            }
        }
    }

    #[inline(always)]
    fn sum(&self, len: usize, _bins: Span<u64>, amount: impl Fn(usize) -> u64) -> u64 {
        (0..len).map(amount).sum()
    }

    #[inline(always)]
    fn find(
        &self,
        len: usize,
        _bins: Span<u64>,
        mut left: u64,
        amount: impl Fn(usize) -> u64,
    ) -> usize {
        for index in 0..len {
            let amount = amount(index);
            if left < amount {
                return index;
            }
            left -= amount;
        }
        len - 1
    }

    fn weigh(&self, logits: Span<f32>, [largest, temperature, one]: [f32; 3], weights: Span<u64>) {
        let (logits, weights) = (logits.as_slice(), weights.as_mut_slice());
        super::weigh(self.isa, logits, largest, temperature, one, weights);
    }

    fn exp(&self, x: f32) -> f32 {
        super::exp(self.isa, x)
    }
}

/// Where a rotated query of token `idx` of a run is.
fn rotated(attention: &Attention, idx: u32, query: usize) -> Span<f32> {
    let Attention { head_dim: dim, query_count, .. } = *attention;
    attention.scratch.sub((idx as usize * query_count + query) * dim, dim)
}
