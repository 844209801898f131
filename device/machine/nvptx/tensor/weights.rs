//! Packed weights as a lane takes them, and how they are multiplied: bf16 as they are, codes widened to bf16.

#[cfg(not(tilert_integers))]
mod bf16;
#[cfg(any(tilert_fp8, tilert_integers))]
mod codes;
#[cfg(tilert_fp8)]
mod e4m3;
#[cfg(tilert_integers)]
mod integers;

use core::arch::asm;

use tilert_mk_shared::task::WeightFormat;

#[cfg(not(tilert_integers))]
pub(crate) use self::bf16::Bf16;
#[cfg(tilert_fp8)]
pub(crate) use self::e4m3::Fp8;
#[cfg(tilert_integers)]
pub(crate) use self::integers::{Q4, Q8};
use super::super::block::Block;
use super::{Lane, Next, Shape, Sums};

/// Where a lane's weights of a task are in each block.
#[derive(Clone, Copy)]
pub(crate) struct Places {
    /// Offset of those of a whole group, and of a group of 8 rows.
    pub(crate) whole: u32,
    /// See `whole`.
    pub(crate) half: u32,
    /// Offset of the scale of the lane's first row, if rows have scales.
    #[cfg_attr(not(any(tilert_fp8, tilert_integers)), expect(dead_code, reason = "bf16 has none"))]
    pub(crate) scale: u32,
}

impl Places {
    /// Of lane `warp_lane` of warp `warp_idx`; `unit_bytes` is that of the task's packing.
    #[inline(always)]
    pub(crate) fn new<W: Weights>(warp_idx: u32, warp_lane: u32, unit_bytes: u32) -> Places {
        let whole = W::scale_bytes(unit_bytes) + warp_idx * unit_bytes + warp_lane * W::LANE_BYTES;
        let scale = W::scale_place(warp_idx, warp_lane / 4, unit_bytes);
        Places { whole, half: whole - warp_lane * W::LANE_BYTES / 2, scale }
    }
}

/// A lane's weights of a group of rows in a unit.
pub(crate) trait Weights: Copy {
    /// Their format.
    const FORMAT: WeightFormat;
    /// Bytes of a lane in a group of 16 rows, or in a fragment of it.
    const LANE_BYTES: u32;

    /// Bytes of a block's scales, before its units.
    #[inline(always)]
    fn scale_bytes(_unit_bytes: u32) -> u32 {
        0
    }

    /// Offset in a block of the scale of row `row` of the first group, for a warp, if rows have scales.
    #[inline(always)]
    fn scale_place(_warp_idx: u32, _row: u32, _unit_bytes: u32) -> u32 {
        0
    }

    /// Those of group `idx` of the block at `address`, which has 8 rows if `is_half`.
    fn take(places: &Places, address: u32, idx: u32, is_half: bool) -> Self;

    /// Adds products with one tile of inputs, from the next block to the end of those that are there.
    fn product<const G: usize, const HALF: bool>(
        sums: &mut Sums<G, 1>,
        next: &mut Next,
        block: &Block,
        lane: &Lane,
        shape: &Shape,
    );

    /// Multiplies each group's weights and each tile's inputs, and adds the products to the sums; the last
    /// group has 8 rows if `HALF`.
    fn add<const G: usize, const TILES: usize, const HALF: bool>(
        sums: &mut Sums<G, TILES>,
        inputs: &[[u32; 4]; TILES],
        weights: &[Self; G],
    );
}

/// `sums += fragments * inputs` for each group and tile.
#[inline(always)]
fn multiply<const G: usize, const TILES: usize>(
    sums: &mut Sums<G, TILES>,
    inputs: &[[u32; 4]; TILES],
    fragments: &[[[u32; 4]; 2]; G],
) {
    // Neighbours in this order do not depend on each other.
    for half in 0..2 {
        for (sums, fragments) in sums.iter_mut().zip(fragments) {
            for (sums, b) in sums.iter_mut().zip(inputs) {
                mma(sums, fragments[half], [b[2 * half], b[2 * half + 1]]);
            }
        }
    }
}

/// `c += a * b` for 16 rows, 8 columns and 16 values of k. PTX: `mma.sync.m16n8k16`.
#[inline(always)]
fn mma(c: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
    // SAFETY: all 32 lanes call this together.
    unsafe {
        asm!("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 \
              {{{c0}, {c1}, {c2}, {c3}}}, {{{a0}, {a1}, {a2}, {a3}}}, {{{b0}, {b1}}}, \
              {{{c0}, {c1}, {c2}, {c3}}};",
             c0 = inout(reg32) c[0], c1 = inout(reg32) c[1], c2 = inout(reg32) c[2],
             c3 = inout(reg32) c[3], a0 = in(reg32) a[0], a1 = in(reg32) a[1],
             a2 = in(reg32) a[2], a3 = in(reg32) a[3], b0 = in(reg32) b[0], b1 = in(reg32) b[1],
             options(nomem, nostack));
    }
}
