//! A block as a worker: the computing warps are its lanes.

use core::arch::asm;
use core::cell::Cell;
use core::mem::offset_of;

use tilert_mk_shared::limits::DECODE_TOKENS_MAX;
use tilert_mk_shared::program::{Dims, ProgramHeader, SAMPLE_BIN_COUNT};
use tilert_mk_shared::sequence::{StepState, StepToken};
use tilert_mk_shared::task::{Opcode, Task, WeightFormat};
use tilert_mk_shared::tile::{
    COMPUTE_LANES, COMPUTE_WARPS, GPU_STEP_TOKENS_MAX, INPUTS, OP_WORDS, PART_ROWS_MAX, REDUCTION,
    STEP, TILE_ROWS_MAX, WARP_LANES, WIDE_INPUTS,
};

use super::attention::Heads;
use super::barrier::sync_compute;
use super::best::Best;
use super::compute::Kept;
use super::inputs::{Layout, put};
use super::loader::{PageCursor, header};
use super::memory::{
    Quad, add_shared_u64, generic, load_constant, load_constant_words, load_global,
    load_global_early, load_global_pair, load_shared, load_shared_f32, load_shared_word,
    store_global, store_shared_f32, store_shared_pair, store_shared_word, widen_f16,
};
use super::{attention, best, divide, fma, merge, multiply, ops, rsqrt, sreg, warp};
use crate::machine::memory::Span;
use crate::machine::{Attention, Finish, Machine, Rows};
use crate::worker::{Claim, Stopped, Worker};

/// How long an idle block sleeps between looks.
const IDLE_SLEEP_NS: u32 = 200;
/// Values of one load of a lane.
pub const QUAD: u32 = 4;
/// Loads of a lane that are in flight together in a norm.
const NORM_QUADS: usize = 4;
/// Loads of a lane that are asked for together when the best value is looked for; as many are under
/// way meanwhile.
const BEST_QUADS: usize = 12;
/// Values of one load of all lanes.
pub const TURN: u32 = QUAD * COMPUTE_LANES;

/// What the compiler knows of an op's tasks when it compiles the op's function.
#[derive(Clone, Copy)]
pub struct Kind {
    /// Format of the tasks' weights, if they have any.
    pub format: WeightFormat,
    /// Whether input rows are kept as parts.
    pub is_narrow: bool,
    /// The heads of attention.
    pub heads: Heads,
}

impl Kind {
    /// Of tasks without weights and heads.
    pub const NONE: Kind = Kind::linear(WeightFormat::F32, false);

    /// Of linear tasks.
    pub const fn linear(format: WeightFormat, is_narrow: bool) -> Kind {
        Kind { format, is_narrow, heads: Heads::Short }
    }

    /// Of attention.
    pub const fn attention(heads: Heads) -> Kind {
        Kind { heads, ..Kind::NONE }
    }
}

/// The computing part of a block, as one thread sees it.
pub struct Block {
    /// This thread.
    pub thread_idx: u32,
    /// Shared address of the block's memory.
    pub shared: u32,
    /// The kind of tasks.
    pub kind: Kind,
    /// What `store` adds this lane's first product to, if it adds.
    old: Cell<f32>,
    /// How the input rows of the task are kept.
    pub layout: Cell<Layout>,
    /// The next page to multiply.
    pub pages: PageCursor,
    /// Shared address of the slot of the task that runs.
    pub slot: Cell<u32>,
    /// The leader's next word, from `OP_WORDS`.
    pub lead_word: Cell<u32>,
}

impl Block {
    /// The block whose memory begins at `shared`; `lead_word` is the first of two words for the
    /// leader's results. An op and the loop around it have two each: the op's first result may come
    /// when a lane has not yet read the loop's last one.
    #[inline(always)]
    pub fn new(
        thread_idx: u32,
        shared: u32,
        header: &ProgramHeader,
        kind: Kind,
        lead_word: u32,
    ) -> Block {
        let pages = PageCursor::new(shared, header);
        Block {
            thread_idx,
            shared,
            kind,
            old: Cell::new(0.0),
            layout: Cell::new(Layout::Far),
            pages,
            slot: Cell::new(0),
            lead_word: Cell::new(lead_word - OP_WORDS),
        }
    }

    /// Bytes of the area of input rows, from the first row's place on.
    #[inline(always)]
    fn input_bytes(&self) -> u32 {
        let bytes = header(self.shared).input_bytes;
        if self.kind.is_narrow { bytes } else { bytes - (WIDE_INPUTS - INPUTS) }
    }

    /// Index of this thread's warp.
    #[inline(always)]
    pub fn warp_idx(&self) -> u32 {
        self.thread_idx / WARP_LANES
    }

    /// Index of this thread in its warp.
    #[inline(always)]
    pub fn warp_lane(&self) -> u32 {
        self.thread_idx % WARP_LANES
    }

    /// Leaves each warp's sum of `value` for `row`, of at most `GPU_STEP_TOKENS_MAX`; see
    /// `block_total`.
    #[inline(always)]
    fn block_sum(&self, row: usize, value: f32) {
        let sum = warp::sum(value);
        if self.warp_lane() == 0 {
            let index = row as u32 * COMPUTE_WARPS + self.warp_idx();
            // SAFETY: a value of the reduction area that this warp owns.
            unsafe { store_shared_f32(self.shared + REDUCTION + index * 4, sum) };
        }
    }

    /// Copies rows to where they are kept near; `N` loads of a lane are in flight together.
    #[inline(always)]
    fn copy_rows<const N: usize>(&self, from: Rows, count: usize, dim: u32, to: Rows) {
        for row in 0..count as u32 {
            let source = from.values.address() + u64::from(row * from.stride as u32) * 4;
            let mut base = self.thread_idx * QUAD;
            while base < dim {
                let quads = read_quads::<N>(source, base, dim, false);
                for (step, quad) in (0u32..).zip(&quads) {
                    if base + step * TURN < dim {
                        put(self.shared, self.layout.get(), &to, row, base + step * TURN, *quad);
                    }
                }
                base += N as u32 * TURN;
            }
        }
    }

    /// Token and column of this lane's product, of at most `PART_ROWS_MAX` tokens.
    #[inline(always)]
    fn item(&self, finish: &Finish) -> Option<(u32, u32)> {
        const { assert!(PART_ROWS_MAX == 2 && PART_ROWS_MAX * TILE_ROWS_MAX <= COMPUTE_LANES) };
        let len = finish.len as u32;
        let token = u32::from(self.thread_idx >= len);
        let is_there = self.thread_idx < len * finish.count as u32;
        is_there.then_some((token, self.thread_idx - token * len))
    }

    /// Finishes one product.
    #[inline(always)]
    fn finish(&self, finish: &Finish, token: usize, column: usize, out: Span<f32>, old: f32) {
        let product = |row: usize, bias: Span<f32>| {
            let sum = multiply::product(self, row as u32 * finish.count as u32 + token as u32);
            if bias.is_empty() { sum } else { sum + bias.read(column) }
        };
        let mut value = product(finish.first + column, finish.bias);
        if finish.is_gated {
            let up = product(finish.first + finish.len + column, finish.up_bias);
            value = divide(value, 1.0 + self.exp(-value)) * up;
        }
        out.write(column, if finish.adds { old + value } else { value });
    }

    /// The sum of what `block_sum` left for `row`, in the order of the warps; after `sync`.
    #[inline(always)]
    fn block_total(&self, row: usize) -> f32 {
        let first = self.shared + REDUCTION + row as u32 * COMPUTE_WARPS * 4;
        // SAFETY: eight values of the reduction area; `sync` has ordered their stores.
        let (a, b) = unsafe { (load_shared(first), load_shared(first + 16)) };
        a[0] + a[1] + a[2] + a[3] + b[0] + b[1] + b[2] + b[3]
    }
}

impl Machine for Block {
    const IS_STEALABLE: bool = false;

    #[inline(always)]
    fn lane_idx(&self) -> usize {
        self.thread_idx as usize
    }

    #[inline(always)]
    fn lane_count(&self) -> usize {
        COMPUTE_LANES as usize
    }

    #[inline(always)]
    fn sync(&self) {
        sync_compute();
    }

    #[inline(always)]
    fn lead(&self, job: impl FnOnce() -> u32) -> u32 {
        // Two words in turns: a lane can be one barrier behind the leader, never two.
        let word = self.shared + OP_WORDS + self.lead_word.get();
        self.lead_word.set(self.lead_word.get() ^ 4);
        if self.thread_idx == 0 {
            let result = job();
            // SAFETY: a word of this block's memory that only the leader writes.
            unsafe { store_shared_word(word, result) };
        }
        sync_compute();
        // SAFETY: the same word.
        unsafe { load_shared_word(word) }
    }

    #[inline(always)]
    fn keep_step(&self, step: Span<StepState>) {
        // Pairs of words: the counts, and of both lists what a step on a GPU has.
        const LOGIT_TOKENS: u32 = offset_of!(StepState, logit_tokens) as u32;
        const TOKENS: u32 = offset_of!(StepState, tokens) as u32;
        const LOGIT_PAIRS: u32 = GPU_STEP_TOKENS_MAX / 2;
        const TOKEN_PAIRS: u32 = GPU_STEP_TOKENS_MAX * size_of::<StepToken>() as u32 / 8;
        const { assert!(LOGIT_TOKENS == 8 && TOKENS.is_multiple_of(8)) };
        const { assert!(GPU_STEP_TOKENS_MAX <= DECODE_TOKENS_MAX) };
        const { assert!(1 + LOGIT_PAIRS + TOKEN_PAIRS <= COMPUTE_LANES) };
        let pair = self.thread_idx;
        if pair <= LOGIT_PAIRS + TOKEN_PAIRS {
            let offset = match pair {
                0..=LOGIT_PAIRS => pair * 8,
                _ => TOKENS + (pair - LOGIT_PAIRS - 1) * 8,
            };
            // SAFETY: words of the step, which is ready, and of this block's copy of it, which no
            // lane reads: every task of the step before has ended with a barrier.
            unsafe {
                let pair = load_global_pair(step.address() + u64::from(offset));
                store_shared_pair(self.shared + STEP + offset, pair.map(f32::to_bits));
            }
        }
        sync_compute();
    }

    /// At once, so that it is not kept until the op ends.
    #[inline(always)]
    fn keep_prologue(&self, prologue: u64) {
        Kept::of_warp().save_prologue(self, prologue);
    }

    #[inline(always)]
    fn step(&self, _step: Span<StepState>) -> Span<StepState> {
        // SAFETY: the copy that `keep_step` has made. Its address is made anew by each caller.
        unsafe { Span::new(generic(sreg::fresh(self.shared) + STEP), 1) }
    }

    #[inline(always)]
    fn now_ns(&self) -> u64 {
        sreg::now_ns()
    }

    #[inline(always)]
    fn relax(&self) {}

    #[inline(always)]
    fn idle(&self, looks: u32) {
        if looks > 0 {
            sreg::sleep_ns(IDLE_SLEEP_NS);
        }
    }

    #[inline(always)]
    fn stage(&self, _task: &Task) {}

    #[inline(always)]
    fn input_rows(&self, heap: Span<f32>, count: usize, dim: usize) -> Rows {
        let layout = if self.kind.is_narrow {
            Layout::parts(count as u32, dim as u32)
        } else {
            Layout::whole(count as u32, dim as u32, self.input_bytes())
        };
        self.layout.set(layout);
        if layout == Layout::Far {
            return Rows { values: heap, stride: dim.next_multiple_of(16) };
        }
        let inputs = if self.kind.is_narrow { INPUTS } else { WIDE_INPUTS };
        let len = self.input_bytes() as usize / 4;
        // SAFETY: the input area of this block's memory, which only its lanes use.
        let values = unsafe { Span::new(generic(self.shared + inputs), len) };
        Rows { values, stride: dim.next_multiple_of(256) }
    }

    #[inline(always)]
    fn output_rows(&self, heap: Span<f32>, _count: usize, len: usize) -> Rows {
        // Products stay with the warps that have summed them, see `multiply`.
        Rows { values: heap, stride: len }
    }

    #[inline(always)]
    fn gather(
        &self,
        _task: &Task,
        from: Rows,
        count: usize,
        dim: usize,
        to: Rows,
        is_kept: bool,
    ) -> Rows {
        if self.layout.get() == Layout::Far {
            return from;
        }
        if is_kept {
            return to;
        }
        if self.kind.is_narrow {
            self.copy_rows::<8>(from, count, dim as u32, to);
        } else {
            self.copy_rows::<2>(from, count, dim as u32, to);
        }
        sync_compute();
        to
    }

    #[inline(always)]
    fn rms_norm(
        &self,
        from: impl Fn(usize) -> Span<f32>,
        count: usize,
        weight: Span<f32>,
        eps: f32,
        out: Rows,
    ) {
        let (dim, layout) = (weight.len() as u32, self.layout.get());
        let first = self.thread_idx * QUAD;
        let mut quads = [[0.0; QUAD as usize]; NORM_QUADS];
        for row in 0..count {
            let (mut sum, mut base) = (0.0, first);
            while base < dim {
                quads = read_quads(from(row).address(), base, dim, false);
                for quad in &quads {
                    for value in quad {
                        sum = fma(*value, *value, sum);
                    }
                }
                base += NORM_QUADS as u32 * TURN;
            }
            self.block_sum(row, sum);
        }
        // A row that is alone and short is still in registers.
        let is_kept = count == 1 && dim <= NORM_QUADS as u32 * TURN;
        let (mut base, mut is_ordered) = (first, false);
        while base < dim || !is_ordered {
            // The first weights arrive while the block waits for the sums.
            let weights: [Quad; NORM_QUADS] = read_quads(weight.address(), base, dim, true);
            if !is_ordered {
                sync_compute();
                is_ordered = true;
            }
            for row in 0..count {
                if !is_kept {
                    quads = read_quads(from(row).address(), base, dim, false);
                }
                let scale = rsqrt(divide(self.block_total(row), dim as f32) + eps);
                for step in 0..NORM_QUADS {
                    let (quad, weight) = (quads[step], weights[step]);
                    let column = base + step as u32 * TURN;
                    if column < dim {
                        let values = core::array::from_fn(|idx| quad[idx] * scale * weight[idx]);
                        put(self.shared, layout, &out, row as u32, column, values);
                    }
                }
            }
            base += NORM_QUADS as u32 * TURN;
        }
        sync_compute();
    }

    #[inline(always)]
    fn multiply(&self, task: &Task, x: Rows, count: usize, _out: Rows) {
        multiply::multiply(self, task, x, count);
    }

    #[inline(always)]
    fn discard(&self, task: &Task) {
        multiply::discard(self, task);
    }

    /// With few rows each lane has at most one product: it asks for what that is added to.
    #[inline(always)]
    fn expect(&self, finish: &Finish, out: impl Fn(usize) -> Span<f32>) {
        if !self.kind.is_narrow || !finish.adds {
            return;
        }
        if let Some((token, column)) = self.item(finish) {
            let address = out(token as usize).address() + u64::from(column) * 4;
            // SAFETY: a value of the output that this lane alone will change. The statement keeps
            // the load here, well before its value is needed.
            self.old.set(unsafe { load_global_early(address) });
        }
    }

    #[inline(always)]
    fn store(&self, _products: Rows, finish: &Finish, out: impl Fn(usize) -> Span<f32>) {
        if self.kind.is_narrow {
            if let Some((token, column)) = self.item(finish) {
                let out = out(token as usize);
                let old = if finish.adds { self.old.get() } else { 0.0 };
                self.finish(finish, token as usize, column as usize, out, old);
            }
            return;
        }
        // As in `for_each`, but the lane's index is read again: registers are scarce in `multiply`.
        let (columns, mut index) = (finish.len as u32, sreg::thread_idx());
        while index < finish.count as u32 * columns {
            let (token, column) = (index / columns, (index % columns) as usize);
            let out = out(token as usize);
            let old = if finish.adds { out.read(column) } else { 0.0 };
            self.finish(finish, token as usize, column, out, old);
            index += COMPUTE_LANES;
        }
    }

    #[inline(always)]
    fn merge(&self, dims: &Dims, splits: Span<f32>, split_count: usize, out: Rows, row: usize) {
        let (splits, count) = (splits.address(), split_count as u32);
        if self.kind.is_narrow {
            merge::merge_heads::<2>(self, dims, splits, count, &out, row as u32);
        } else {
            merge::merge_heads::<1>(self, dims, splits, count, &out, row as u32);
        }
    }

    #[inline(always)]
    fn attend(
        &self,
        attention: &Attention,
        ready: impl Fn() -> Result<(), Stopped>,
    ) -> Result<(), Stopped> {
        attention::attend(self, attention, ready)
    }

    #[inline(always)]
    fn widen(&self, address: u64, format: WeightFormat, first: u64, out: Span<f32>) {
        let start = address + first * format.value_bytes();
        let mut column = self.thread_idx as usize * 8;
        while column < out.len() {
            let from = start + column as u64 * format.value_bytes();
            let to = out.address() + column as u64 * 4;
            // SAFETY: rows are multiples of 8 values and of 16 bytes; the host has bound the table;
            // this lane alone writes these values.
            unsafe {
                let (low, high) = match format {
                    WeightFormat::F32 => (load_constant(from), load_constant(from + 16)),
                    _ => widen_words(format, load_constant_words(from)),
                };
                store_global(to, low);
                store_global(to + 16, high);
            }
            column += 8 * COMPUTE_LANES as usize;
        }
    }

    #[inline(always)]
    fn argmax(&self, values: Span<f32>) -> Option<u32> {
        let mut best = Best::NONE;
        // A vocabulary need not be a multiple of four: the rest is looked at one by one.
        let len = values.len() as u32;
        let whole = if values.address() % 16 == 0 { len & !(QUAD - 1) } else { 0 };
        let mut base = self.thread_idx * QUAD;
        let take = |base: u32| read_quads::<BEST_QUADS>(values.address(), base, whole, false);
        let mut quads = take(base);
        let mut others = quads;
        // Loads are always under way. The two take turns by name: exchanged, they would be copied.
        let mut turn = |now: &[Quad; BEST_QUADS], then: &mut [Quad; BEST_QUADS]| {
            let first = base;
            base += BEST_QUADS as u32 * TURN;
            *then = take(base);
            best.look_at(now, first, whole);
            base < whole
        };
        while turn(&quads, &mut others) && turn(&others, &mut quads) {}
        let mut index = whole + self.thread_idx;
        while index < len {
            best.look(values.read(index as usize), index);
            index += COMPUTE_LANES;
        }
        best::best_of_block(self, best)
    }

    #[inline(always)]
    fn histogram(&self, len: usize, bins: Span<u64>, item: impl Fn(usize) -> Option<(usize, u64)>) {
        let near = self.shared + REDUCTION;
        // SAFETY: the reduction area has room for all bins, one for each lane here.
        let own = unsafe { Span::<u64>::new(generic(near), SAMPLE_BIN_COUNT as usize) };
        own.write(self.thread_idx as usize, 0);
        sync_compute();
        self.for_each(1, len, |_, index| {
            if let Some((bin, amount)) = item(index) {
                // SAFETY: one of the bins.
                unsafe {
                    add_shared_u64(near + (bin as u32 % SAMPLE_BIN_COUNT as u32) * 8, amount)
                };
            }
        });
        sync_compute();
        bins.write(self.thread_idx as usize, own.read(self.thread_idx as usize));
        sync_compute();
    }

    #[inline(always)]
    fn run(&self, worker: &Worker<Self>, opcode: Opcode, claim: &Claim) -> Result<(), Stopped> {
        ops::run(worker, opcode, claim)
    }

    /// By the chip's power of two: within 2 units in the last place of the scaled argument.
    #[inline(always)]
    fn exp(&self, x: f32) -> f32 {
        let power = if x < -87.0 { 0.0 } else { exp2(x.min(88.0) * core::f32::consts::LOG2_E) };
        if x.is_nan() { x } else { power }
    }
}

/// `2^x`. PTX: `ex2.approx.ftz.f32`.
#[inline(always)]
fn exp2(x: f32) -> f32 {
    let value: f32;
    // SAFETY: arithmetic.
    unsafe {
        asm!("ex2.approx.ftz.f32 {v}, {x};", v = out(reg32) value, x = in(reg32) x,
             options(pure, nomem, nostack));
    }
    value
}

/// `N` quads of a row of `dim` values, from column `base` on, one for each turn of the
/// computing lanes; zeros past the end. All loads are in flight together.
#[inline(always)]
fn read_quads<const N: usize>(address: u64, base: u32, dim: u32, is_constant: bool) -> [Quad; N] {
    let mut quads = [[0.0; QUAD as usize]; N];
    let address = address + u64::from(base) * 4;
    for (step, quad) in (0u32..).zip(&mut quads) {
        if base + step * TURN < dim {
            let from = address + u64::from(step * TURN) * 4;
            // SAFETY: rows are multiples of four values, aligned to 16 bytes, and the column is in
            // the row; what is constant is a bound weight.
            *quad = unsafe { if is_constant { load_constant(from) } else { load_global(from) } };
        }
    }
    quads
}

/// Eight 16-bit values, widened.
#[inline(always)]
pub fn widen_words(format: WeightFormat, words: [u32; 4]) -> (Quad, Quad) {
    let pair = |word: u32| match format {
        WeightFormat::F16 => [widen_f16(word as u16), widen_f16((word >> 16) as u16)],
        _ => [f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000)],
    };
    let [a, b, c, d] = words.map(pair);
    ([a[0], a[1], b[0], b[1]], [c[0], c[1], d[0], d[1]])
}

/// One value of near memory at a value index from `area`.
#[inline(always)]
pub fn near(area: u32, index: u32) -> f32 {
    // SAFETY: callers stay in areas of the block's memory and order their accesses by `sync`.
    unsafe { load_shared_f32(area + index * 4) }
}
