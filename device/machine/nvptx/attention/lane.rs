//! A lane of attention: its part of rows, and what its warp keeps near.

use tilert_mk_shared::kv::attention_split;
use tilert_mk_shared::limits::HEAD_DIM_MAX;
use tilert_mk_shared::tile::{
    ATTENTION_PLACE_BYTES, ATTENTION_PLACES, ATTENTION_ROW, ATTENTION_SUMS, ATTENTION_VALUES,
    COMPUTE_WARPS, WARP_LANES,
};

use super::Pass;
use crate::machine::Attention;
use crate::machine::memory::Span;
use crate::machine::nvptx::barrier::sync_warp;
use crate::machine::nvptx::block::{Block, QUAD};
use crate::machine::nvptx::header::header;
use crate::machine::nvptx::memory::{
    Quad, load_global, load_shared, load_shared_words, store_global, store_shared,
};
use crate::machine::nvptx::stamped::Looks;
use crate::machine::nvptx::{sreg, stamped};

/// Lanes that share a key or value.
pub(super) const KEY_LANES: u32 = 8;
/// Keys that one load of a warp takes from.
pub(super) const KEYS: u32 = WARP_LANES / KEY_LANES;
/// Values of half a key that one load of its lanes takes.
pub(super) const KEY_STEP: u32 = KEY_LANES * QUAD;
/// Addresses that a warp keeps near in pairs, since registers are scarce.
#[derive(Clone, Copy)]
pub(super) enum Places {
    /// The queries, and the weight of their norm.
    Queries,
    /// The position's cosines and sines.
    Turns,
    /// The token's key and value.
    Own,
    /// The weight of the key's norm, and the result.
    KeyNormAndOut,
    /// Numbers instead: see `Numbers`.
    Numbers,
}

/// Numbers that are kept with the addresses.
pub(super) struct Numbers {
    pub(super) part_count: u32,
    pub(super) query_count: u32,
    pub(super) split_values: u32,
    pub(super) scale: f32,
}

impl Places {
    #[inline(always)]
    pub(super) fn place(self, lane: &Lane) -> u32 {
        let warp = lane.shared + ATTENTION_PLACES + lane.warp() * ATTENTION_PLACE_BYTES;
        warp + self as u32 * 16
    }

    /// Leaves all of a token's.
    #[inline(always)]
    pub(super) fn keep(lane: &Lane, attention: &Attention) {
        let pairs = [
            (Places::Queries, attention.queries, attention.query_norm),
            (Places::Turns, attention.cos, attention.sin),
            (Places::Own, attention.key, attention.value),
            (Places::KeyNormAndOut, attention.key_norm, attention.out),
        ];
        let lane = &lane.again();
        let halves = |span: Span<f32>| {
            let address = span.address();
            [address as u32, (address >> 32) as u32].map(f32::from_bits)
        };
        if lane.lane() == 0 {
            for (pair, first, second) in pairs {
                let ([a, b], [c, d]) = (halves(first), halves(second));
                // SAFETY: 16 bytes of this warp's.
                unsafe { store_shared(pair.place(lane), [a, b, c, d]) };
            }
            let counts = [
                attention.part_count,
                attention.query_count as u32,
                attention.split_values as u32,
                attention.scale.to_bits(),
            ];
            // SAFETY: likewise.
            unsafe { store_shared(Places::Numbers.place(lane), counts.map(f32::from_bits)) };
        }
        sync_warp();
    }

    /// The numbers.
    #[inline(always)]
    pub(super) fn numbers(lane: &Lane) -> Numbers {
        // SAFETY: what `keep` has left.
        let words = unsafe { load_shared_words(Places::Numbers.place(lane)) };
        let [part_count, query_count, split_values, scale] = words;
        Numbers { part_count, query_count, split_values, scale: f32::from_bits(scale) }
    }

    /// One pair of them; an absent norm is at 0.
    #[inline(always)]
    pub(super) fn get(self, lane: &Lane) -> [u64; 2] {
        // SAFETY: what `keep` has left.
        let words = unsafe { load_shared_words(self.place(lane)) };
        let [a, b, c, d] = words.map(u64::from);
        [a | b << 32, c | d << 32]
    }
}

/// A lane's keys or values.
pub(super) type Taken<const D: usize, const B: usize> = [[Quad; D]; B];

/// A lane, and what the heads are like. Little is kept: what follows from it is worked out where it
/// is used.
pub(super) struct Lane {
    pub(super) thread: u32,
    /// Columns of half a head.
    pub(super) half: u32,
    /// Shared address of the block's memory.
    pub(super) shared: u32,
}

impl Lane {
    #[inline(always)]
    pub(super) fn new(block: &Block, attention: &Attention) -> Lane {
        let half = attention.head_dim as u32 / 2;
        Lane { thread: block.thread_idx, half, shared: block.shared }
    }

    /// The same, in registers of its own: what is worked out of it is not kept from one use to the
    /// next.
    #[inline(always)]
    pub(super) fn again(&self) -> Lane {
        let fresh = sreg::fresh;
        Lane { thread: fresh(self.thread), half: fresh(self.half), shared: fresh(self.shared) }
    }

    #[inline(always)]
    pub(super) fn warp(&self) -> u32 {
        self.thread / WARP_LANES
    }

    /// Index in its warp.
    #[inline(always)]
    pub(super) fn lane(&self) -> u32 {
        self.thread % WARP_LANES
    }

    /// Which of the keys that its warp loads from at once.
    #[inline(always)]
    pub(super) fn key(&self) -> u32 {
        self.lane() / KEY_LANES
    }

    /// First column of its loads.
    #[inline(always)]
    pub(super) fn first_column(&self) -> u32 {
        self.lane() % KEY_LANES * QUAD
    }

    /// The warp's first position in what the block takes at once.
    #[inline(always)]
    pub(super) fn first<const B: usize>(&self) -> u32 {
        self.warp() * KEYS * B as u32
    }

    /// The position of the lane's key `b` in what the block takes from position `first` on.
    #[inline(always)]
    pub(super) fn position<const B: usize>(&self, first: u32, b: u32) -> u32 {
        first + self.first::<B>() + b * KEYS + self.key()
    }

    /// Shared address of this warp's queries, and then sums.
    #[inline(always)]
    pub(super) fn sums(&self) -> u32 {
        self.shared + ATTENTION_SUMS + self.warp() * ATTENTION_VALUES * 4
    }

    /// First column of load `d` of `D`: those of the lower half come first.
    #[inline(always)]
    pub(super) fn column<const D: usize>(&self, d: usize) -> u32 {
        let upper = if d < D / 2 { 0 } else { self.half };
        upper + self.first_column() + (d % (D / 2)) as u32 * KEY_STEP
    }

    /// Whether a head has these columns.
    #[inline(always)]
    pub(super) fn is_inside<const D: usize>(&self, d: usize) -> bool {
        self.first_column() + (d % (D / 2)) as u32 * KEY_STEP < self.half
    }

    /// Addresses of the lane's loads `d` of `D` of a row at `row`.
    #[inline(always)]
    pub(super) fn places<const D: usize>(&self, row: u64) -> [u64; D] {
        let lower = row + u64::from(self.first_column()) * 4;
        let upper = lower + u64::from(self.half) * 4;
        // Constant distances become part of the loads.
        let from = |d: usize| if d < D / 2 { lower } else { upper };
        core::array::from_fn(|d| from(d) + (d % (D / 2)) as u64 * u64::from(KEY_STEP) * 4)
    }

    /// The lane's quads of a row.
    #[inline(always)]
    pub(super) fn row<const D: usize>(&self, row: u64) -> [Quad; D] {
        let (places, mut quads) = (self.places::<D>(row), [[0.0; 4]; D]);
        for (d, quad) in quads.iter_mut().enumerate() {
            if self.is_inside::<D>(d) {
                // SAFETY: four values of the row; rows are multiples of 8 values.
                *quad = unsafe { load_global(places[d]) };
            }
        }
        quads
    }

    /// The lane's quads of a norm's weights; zeros if there is no norm.
    #[inline(always)]
    pub(super) fn norm_weights<const D: usize>(&self, norm: u64) -> [Quad; D] {
        if norm == 0 { [[0.0; 4]; D] } else { self.row(norm) }
    }

    /// The lane's quads of rows of stamped values.
    #[inline(always)]
    pub(super) fn stamped_rows<const D: usize, const N: usize>(
        &self,
        block: &Block,
        rows: [u64; N],
        stamp: u32,
    ) -> [[Quad; D]; N] {
        let places =
            rows.map(|row| self.places::<D>(row).map(|address| stamped::place(&header(), address)));
        stamped::wait(block, Looks::AtOnce, || {
            let mut words = [[stamped::zeros(stamp); D]; N];
            for (words, places) in words.iter_mut().zip(&places) {
                for (d, words) in words.iter_mut().enumerate() {
                    if self.is_inside::<D>(d) {
                        // SAFETY: four values of the row; rows are multiples of 8 values.
                        *words = unsafe { stamped::load_quad(places[d]) };
                    }
                }
            }
            let seen = words.as_flattened().as_flattened();
            (words.map(|row| row.map(stamped::values)), stamped::difference(seen, stamp))
        })
    }

    /// The lane's quads of what the block takes of a plane from position `first` on; zeros from the
    /// token's own position on.
    #[inline(always)]
    pub(super) fn take<const D: usize, const B: usize>(
        &self,
        attention: &Attention,
        plane: Span<f32>,
        first: u32,
    ) -> Taken<D, B> {
        let lane = self.again();
        let mut rows = [[[0.0; 4]; D]; B];
        for (b, quads) in (0u32..).zip(&mut rows) {
            let row = lane.position::<B>(first, b);
            let first = plane.address() + u64::from(row * 2 * lane.half) * 4;
            let places = lane.places::<D>(first);
            for (d, quad) in quads.iter_mut().enumerate() {
                if row < attention.position && lane.is_inside::<D>(d) {
                    // SAFETY: both planes have rows of a head's values for all positions.
                    *quad = unsafe { load_global(places[d]) };
                }
            }
        }
        rows
    }

    /// Whether this warp has the token's own position in this pass.
    #[inline(always)]
    pub(super) fn has_own<const B: usize>(&self, attention: &Attention, pass: &Pass) -> bool {
        let own = attention.position % (COMPUTE_WARPS * KEYS * B as u32);
        let is_owner = own / (KEYS * B as u32) == self.warp();
        is_owner && attention_split(attention.position) == pass.split
    }

    /// The lane's quads of the position's cosines, then of its sines.
    #[inline(always)]
    pub(super) fn turns<const D: usize>(&self) -> [Quad; D] {
        let [cos, sin] = Places::Turns.get(self).map(|table| self.places::<D>(table));
        let mut quads = [[0.0; 4]; D];
        for (d, quad) in quads.iter_mut().enumerate() {
            if self.is_inside::<D>(d) {
                // Columns of the lower half.
                let place = if d < D / 2 { cos[d] } else { sin[d - D / 2] };
                // SAFETY: four values of the table's row; rows are multiples of 4 values.
                *quad = unsafe { load_global(place) };
            }
        }
        quads
    }

    /// Takes the token's own row from where `append` keeps it, if it is among the positions from
    /// `first` on. `near`: see `append`.
    #[inline(always)]
    pub(super) fn take_own<const D: usize, const B: usize>(
        &self,
        attention: &Attention,
        first: u32,
        near: u32,
        rows: &mut Taken<D, B>,
    ) {
        for (b, row) in (0u32..).zip(rows) {
            let is_own = self.position::<B>(first, b) == attention.position;
            for (d, quad) in row.iter_mut().enumerate() {
                if is_own && self.is_inside::<D>(d) {
                    let row = self.shared + ATTENTION_ROW + near * HEAD_DIM_MAX * 4;
                    // SAFETY: what this warp has left there.
                    *quad = unsafe { load_shared(row + self.column::<D>(d) * 4) };
                }
            }
        }
    }

    /// Keeps the token's own row near, in row `near` of two, and appends it to a plane. The lanes of key
    /// `from` do, if all have it.
    #[inline(always)]
    pub(super) fn append<const D: usize>(
        &self,
        attention: &Attention,
        plane: Span<f32>,
        near: u32,
        from: u32,
        quads: &[Quad; D],
    ) {
        if self.key() != from {
            return;
        }
        self.keep(self.shared + ATTENTION_ROW + near * HEAD_DIM_MAX * 4, quads);
        let first = u64::from(attention.position * 2 * self.half) * 4;
        let places = self.places::<D>(plane.address() + first);
        for (d, quad) in quads.iter().enumerate() {
            if self.is_inside::<D>(d) {
                // SAFETY: four values of a row of this task's splits.
                unsafe { store_global(places[d], *quad) };
            }
        }
    }

    /// Stores the lane's quads of a row that begins at a shared address.
    #[inline(always)]
    pub(super) fn keep<const D: usize>(&self, address: u32, quads: &[Quad; D]) {
        for (d, quad) in quads.iter().enumerate() {
            if self.is_inside::<D>(d) {
                // SAFETY: four values of a row in this warp's memory.
                unsafe { store_shared(address + self.column::<D>(d) * 4, *quad) };
            }
        }
    }
}
