//! A block as a worker: the computing warps are its lanes.

use core::marker::PhantomData;
use core::ops::Deref;

use tilert_mk_shared::packed::Packing;
use tilert_mk_shared::program::{Dims, ProgramHeader, SAMPLE_BIN_COUNT};
use tilert_mk_shared::sequence::{StepState, StepToken};
use tilert_mk_shared::task::{Opcode, Task, WeightFormat};
use tilert_mk_shared::tile::{COMPUTE_LANES, INPUTS, OP_WORDS, REDUCTION, STAGE_WORD, WIDE_INPUTS};

use super::barrier::sync_compute;
use super::best::Seen;
use super::block::{Block, QUAD, TURN, read_quads, widen_words};
use super::compute::Kept;
use super::digest::Digest;
use super::header::header;
use super::inputs::Layout;
use super::kind::Kind;
use super::memory::{
    Quad, add_shared_u64, generic, load_constant, load_constant_words, load_shared_word,
    store_shared_word,
};
use super::record::record;
use super::rows::NormAhead;
use super::stamped::Looks;
use super::{attention, best, empty, exp, merge, ops, peer, sreg, stamped, step};
use crate::machine::memory::Span;
use crate::machine::{Attention, BestPlace, Finish, Join, Machine, Rows};
use crate::worker::{Claim, Stopped, Worker};

/// How long an idle block sleeps between looks.
const IDLE_SLEEP_NS: u32 = 200;
/// Loads of a lane that are asked for together when the best value is looked for; as many are under
/// way meanwhile.
const BEST_QUADS: usize = 12;

/// A block that runs ops of a kind.
pub struct OpBlock<K> {
    block: Block,
    kind: PhantomData<K>,
}

impl<K: Kind> OpBlock<K> {
    /// See `Block::new`.
    #[inline(always)]
    pub fn new(thread_idx: u32, shared: u32, header: &ProgramHeader, lead_word: u32) -> OpBlock<K> {
        OpBlock { block: Block::new(thread_idx, shared, header, lead_word), kind: PhantomData }
    }

    /// Bytes of the area of input rows, from the first row's place on.
    #[inline(always)]
    fn input_bytes(&self) -> u32 {
        let bytes = header().input_bytes;
        if K::IS_NARROW { bytes } else { bytes - (WIDE_INPUTS - INPUTS) }
    }
}

impl<K> Deref for OpBlock<K> {
    type Target = Block;

    #[inline(always)]
    fn deref(&self) -> &Block {
        &self.block
    }
}

impl<K: Kind> Machine for OpBlock<K> {
    const IS_STEALABLE: bool = false;
    const HAS_STAMPS: bool = true;
    const HAS_PEERS: bool = peer::HAS_PEERS;
    const JOINS: bool = K::JOINS;
    type NormAhead = NormAhead;

    #[inline(always)]
    fn lane_idx(&self) -> usize {
        self.thread_idx as usize
    }

    #[inline(always)]
    fn lane_count(&self) -> usize {
        COMPUTE_LANES as usize
    }

    #[inline(always)]
    fn header<'a>(&self, _bound: &'a ProgramHeader) -> impl Deref<Target = ProgramHeader> + 'a {
        header()
    }

    #[inline(always)]
    fn record<'a>(&self, _task: &'a Task) -> impl Deref<Target = Task> + 'a {
        record(self.slot.get())
    }

    #[inline(always)]
    fn distance(&self, pe: u32) -> u64 {
        peer::distance(pe)
    }

    #[inline(always)]
    fn put_step(&self, step: Span<StepState>) {
        step::put(self, step);
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
    fn keep_step(&self, step: Span<StepState>, epoch: u32) {
        step::keep(self, step, epoch);
        sync_compute();
    }

    /// At once, so that it is not kept until the op ends.
    #[inline(always)]
    fn keep_prologue(&self, prologue: u64) {
        Kept::of_warp().save_prologue(self, prologue);
    }

    #[inline(always)]
    fn step(&self, _step: Span<StepState>) -> Span<StepState> {
        // Its address is made anew by each caller.
        step::near(sreg::fresh(self.shared))
    }

    #[inline(always)]
    fn step_counts(&self, _step: Span<StepState>) -> [u32; 2] {
        step::counts(self.shared)
    }

    #[inline(always)]
    fn step_token(&self, _step: Span<StepState>, idx: usize) -> StepToken {
        step::token(self.shared, idx as u32)
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
        let layout = if K::IS_NARROW {
            Layout::parts(count as u32, dim as u32)
        } else {
            Layout::whole(count as u32, dim as u32, self.input_bytes())
        };
        self.layout.set(layout);
        if layout == Layout::Far {
            return Rows { values: heap, stride: dim.next_multiple_of(16) };
        }
        let inputs = if K::IS_NARROW { INPUTS } else { WIDE_INPUTS };
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
        if self.layout.get() == Layout::Far && Packing::is_for(K::FORMAT) {
            // Each warp reads its columns but once: a copy would only be read again.
            self.layout.set(Layout::Stamped);
            stamped::wait(self, Looks::AfterHint, || ((), 0));
            return from;
        }
        let mut columns = dim as u32;
        if K::IN_PIECES {
            // Of another task of the stage the last one is there.
            columns = Digest::read(self.slot.get()).piece_columns(count as u32);
            self.layout.set(Layout::parts(count as u32, columns));
        } else if is_kept {
            return to;
        }
        self.copy_rows(from, count as u32, columns, to);
        sync_compute();
        to
    }

    /// Rows times weights; what they are divided by follows in `finish`, from sums that stay in the
    /// reduction area as long as the rows are kept.
    #[inline(always)]
    fn rms_norm(
        &self,
        from: impl Fn(usize) -> Span<f32>,
        count: usize,
        weight: Span<f32>,
        _eps: f32,
        out: Rows,
        ahead: NormAhead,
    ) {
        if K::IN_PIECES {
            sreg::trap();
        } else if K::IS_NARROW {
            self.weigh_rows::<1>(from, count, weight, out, ahead);
        } else {
            self.weigh_rows::<2>(from, count, weight, out, ahead);
        }
        sync_compute();
    }

    #[inline(always)]
    fn norm_ahead(&self, first_row: Span<f32>, weight: Span<f32>) -> NormAhead {
        self.weights_ahead(first_row, weight)
    }

    /// Tells the loading warp, for which the task's stage has begun.
    #[inline(always)]
    fn note_input(&self, task: &Task) {
        if self.thread_idx == 0 {
            // SAFETY: a word of the block's memory.
            unsafe {
                store_shared_word(self.shared + STAGE_WORD, self.record(task).signal_event.0)
            };
        }
    }

    #[inline(always)]
    fn multiply(&self, task: &Task, x: Rows, count: usize, _out: Rows) {
        K::multiply(self, task, x, count as u32);
        sync_compute();
    }

    #[inline(always)]
    fn expect(&self, finish: &Finish, out: impl Fn(usize) -> Span<f32>) {
        self.expect_residual(finish, out);
    }

    #[inline(always)]
    fn store(
        &self,
        _products: Rows,
        finish: &Finish,
        out: impl Fn(usize) -> Span<f32>,
        best: impl Fn(usize) -> BestPlace,
    ) {
        self.store_finished(finish, out);
        if self.leaves_best(finish) {
            self.leave_bests(finish, best);
        }
    }

    #[inline(always)]
    fn join(&self, join: &Join<impl Fn(usize) -> u32>) {
        attention::join(self, join);
    }

    #[inline(always)]
    fn merge(&self, dims: &Dims, splits: Span<f32>, split_count: usize, out: Rows, row: usize) {
        if K::IN_PIECES {
            sreg::trap();
        }
        let (splits, count) = (splits.address(), split_count as u32);
        merge::merge_heads(self, dims, splits, count, &out, row as u32);
    }

    #[inline(always)]
    fn attend(&self, attention: &Attention) {
        K::attend(self, attention);
    }

    #[inline(always)]
    fn pass_on(&self, from: Span<f32>, to: Span<f32>) {
        empty::pass_on(self, from, to);
    }

    #[inline(always)]
    fn widen(&self, address: u64, format: WeightFormat, first: u64, out: Span<f32>) {
        let start = address + first * format.value_bytes();
        let stamp = stamped::output_stamp(self);
        let mut column = self.thread_idx as usize * 8;
        while column < out.len() {
            let from = start + column as u64 * format.value_bytes();
            let to = out.address() + column as u64 * 4;
            // SAFETY: rows are multiples of 8 values and of 16 bytes; the host has bound the table.
            let (low, high) = unsafe {
                match format {
                    WeightFormat::F32 => (load_constant(from), load_constant(from + 16)),
                    _ => widen_words(format, load_constant_words(from)),
                }
            };
            stamped::store_quad(to, low, stamp);
            stamped::store_quad(to + 16, high, stamp);
            column += 8 * COMPUTE_LANES as usize;
        }
    }

    #[inline(always)]
    fn argmax(&self, values: Span<f32>) -> Option<u32> {
        let mut seen = Seen::NOTHING;
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
            seen.look_at(now, first, whole);
            base < whole
        };
        while turn(&quads, &mut others) && turn(&others, &mut quads) {}
        let mut index = whole + self.thread_idx;
        while index < len {
            seen.look(values.read(index as usize), index);
            index += COMPUTE_LANES;
        }
        best::best_of_block(self, seen.best())
    }

    #[inline(always)]
    fn best_of(&self, bests: Span<u64>) -> Option<u32> {
        best::best_of(self, bests)
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
    fn run(&self, worker: &Worker<Self>, opcode: Opcode, _claim: &Claim) -> Result<(), Stopped> {
        ops::run(worker, opcode)
    }

    #[inline(always)]
    fn exp(&self, x: f32) -> f32 {
        exp(x)
    }
}
