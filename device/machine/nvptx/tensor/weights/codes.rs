//! Codes of fewer bits than bf16, with scales.

use core::arch::asm;

use tilert_mk_shared::packed::BLOCK_COLUMNS;
use tilert_mk_shared::task::WeightFormat;
use tilert_mk_shared::tile::WARP_LANES;

use super::super::super::block::Block;
use super::super::super::fma;
use super::super::super::memory::{load_shared_pair, load_shared_words};
use super::super::{Lane, Next, Operands, Shape, Sums, add_last, take_operands};
use super::{Places, Weights, multiply};

/// A lane's codes of a group of rows in a unit.
pub(crate) trait Codes: Copy {
    /// Their format.
    const FORMAT: WeightFormat;
    /// Bytes of a lane in a group of 16 rows.
    const LANE_BYTES: u32;

    /// See `Weights::scale_bytes`.
    #[inline(always)]
    fn scale_bytes(_unit_bytes: u32) -> u32 {
        0
    }

    /// See `Weights::scale_place`.
    fn scale_place(warp_idx: u32, row: u32, unit_bytes: u32) -> u32;

    /// The lane's codes at a shared address, of a group of 8 rows if `is_half`.
    fn take(address: u32, is_half: bool) -> Self;

    /// What the products of the lane's two rows of group `idx` are multiplied with; `address` is
    /// that of the scale of its first row in the first group.
    fn scales(address: u32, idx: u32, is_half: bool) -> [f32; 2];

    /// The two fragments in bf16.
    fn fragments(&self, is_half: bool) -> [[u32; 4]; 2];
}

/// A group's codes, and the scales of the lane's two rows. A unit's products are added up unscaled,
/// from zero, then scaled: when the next ones are on their way, so that nobody waits for them.
#[derive(Clone, Copy)]
pub(crate) struct Scaled<C> {
    codes: C,
    scales: [f32; 2],
}

impl<C: Codes> Weights for Scaled<C> {
    const FORMAT: WeightFormat = C::FORMAT;
    const LANE_BYTES: u32 = C::LANE_BYTES;

    #[inline(always)]
    fn scale_bytes(unit_bytes: u32) -> u32 {
        C::scale_bytes(unit_bytes)
    }

    #[inline(always)]
    fn scale_place(warp_idx: u32, row: u32, unit_bytes: u32) -> u32 {
        C::scale_place(warp_idx, row, unit_bytes)
    }

    #[inline(always)]
    fn take(places: &Places, address: u32, idx: u32, is_half: bool) -> Scaled<C> {
        let group = address + idx * C::LANE_BYTES * WARP_LANES;
        let codes = C::take(group + if is_half { places.half } else { places.whole }, is_half);
        Scaled { codes, scales: C::scales(address + places.scale, idx, is_half) }
    }

    #[inline(always)]
    fn product<const G: usize, const HALF: bool>(
        sums: &mut Sums<G, 1>,
        next: &mut Next,
        block: &Block,
        lane: &Lane,
        shape: &Shape,
    ) {
        product_ahead::<C, G, HALF>(sums, next, block, lane, shape)
    }

    /// Group by group: unscaled products of all would not fit the registers.
    #[inline(always)]
    fn add<const G: usize, const TILES: usize, const HALF: bool>(
        sums: &mut Sums<G, TILES>,
        inputs: &[[u32; 4]; TILES],
        weights: &[Scaled<C>; G],
    ) {
        for (idx, (sums, weights)) in sums.iter_mut().zip(weights).enumerate() {
            let mut unscaled = [[[0.0; 4]; TILES]; 1];
            multiply(&mut unscaled, inputs, &[weights.codes.fragments(HALF && idx + 1 == G)]);
            add_scaled(sums, &unscaled[0], weights.scales);
        }
    }
}

/// Products with one tile. The next block's operands are loaded while one is multiplied, into registers that take
/// turns.
#[inline(always)]
fn product_ahead<C: Codes, const G: usize, const HALF: bool>(
    sums: &mut Sums<G, 1>,
    next: &mut Next,
    block: &Block,
    lane: &Lane,
    shape: &Shape,
) {
    next.begin(block, shape);
    let mut left = (shape.end - next.first) / BLOCK_COLUMNS;
    if left > 0 {
        let mut pending = ([[[0.0; 4]; 1]; G], [[0.0; 2]; G]);
        let mut operands = take_operands::<Scaled<C>, G, HALF>(lane, next.first, next.address);
        let mut others = operands;
        // The two take turns by name: exchanged, they would be copied.
        let mut turn = |now: &Operands<Scaled<C>, G>, then: &mut Operands<Scaled<C>, G>| {
            left -= 1;
            let is_page_end = next.advance::<false>(block, shape, 1);
            if left > 0 {
                *then = take_operands::<Scaled<C>, G, HALF>(lane, next.first, next.address);
            }
            let products = unscaled::<C, G, HALF>(&now.0, &now.1);
            settle(sums, &pending);
            pending = products;
            if is_page_end {
                block.pages.release(block.warp_lane());
            }
            left > 0
        };
        while turn(&operands, &mut others) && turn(&others, &mut operands) {}
        settle(sums, &pending);
    }
    if next.first < shape.end {
        add_last::<Scaled<C>, G, 1, HALF>(sums, lane, shape, next);
        block.pages.release(block.warp_lane());
    }
}

/// Products of a block that are not in the sums yet, and their scales.
type Pending<const G: usize> = (Sums<G, 1>, [[f32; 2]; G]);

/// A block's products with the inputs of one tile.
#[inline(always)]
fn unscaled<C: Codes, const G: usize, const HALF: bool>(
    inputs: &[[u32; 4]; 1],
    weights: &[Scaled<C>; G],
) -> Pending<G> {
    let fragments = core::array::from_fn(|idx| weights[idx].codes.fragments(HALF && idx + 1 == G));
    let mut products = [[[0.0; 4]; 1]; G];
    multiply(&mut products, inputs, &fragments);
    (products, weights.map(|weights| weights.scales))
}

/// Adds what is pending.
#[inline(always)]
fn settle<const G: usize>(sums: &mut Sums<G, 1>, (products, scales): &Pending<G>) {
    for (idx, (sums, products)) in sums.iter_mut().zip(products).enumerate() {
        add_scaled(sums, products, scales[idx]);
    }
}

/// `sums += unscaled * scales` of a group: the first two of a tile's four are of the lane's first row.
#[inline(always)]
fn add_scaled<const TILES: usize>(
    sums: &mut [[f32; 4]; TILES],
    unscaled: &[[f32; 4]; TILES],
    scales: [f32; 2],
) {
    for (sums, unscaled) in sums.iter_mut().zip(unscaled) {
        for row in 0..4 {
            sums[row] = fma(unscaled[row], scales[row / 2], sums[row]);
        }
    }
}

/// The lane's words of a group with a byte for each code.
#[inline(always)]
pub(crate) fn take_words(address: u32, is_half: bool) -> [u32; 4] {
    // SAFETY: this lane's codes in a full page.
    unsafe {
        if is_half {
            let [a, b] = load_shared_pair(address);
            [a, b, 0, 0]
        } else {
            load_shared_words(address)
        }
    }
}

/// Fragments of words with two codes in each half: the first and the second ones by functions of
/// their own. Those of 8 rows have half as many codes.
#[inline(always)]
pub(crate) fn spread_out(
    [a, b, c, d]: [u32; 4],
    is_half: bool,
    first: impl Fn(u32) -> u32,
    second: impl Fn(u32) -> u32,
) -> [[u32; 4]; 2] {
    if is_half {
        return [a, b].map(|word| [first(word), 0, second(word), 0]);
    }
    [[a, b], [c, d]].map(|[a, b]| [first(a), second(a), first(b), second(b)])
}

/// Two bf16 times powers of two.
#[inline(always)]
pub(crate) fn raised<const POWER: u32>(small: u32) -> u32 {
    /// Nothing is added.
    const NEGATIVE_ZEROS: u32 = 0x8000_8000;
    fma_pair(small, POWER, NEGATIVE_ZEROS)
}

/// `a * b + c` of two bf16 each; exact as it is used here.
#[inline(always)]
pub(crate) fn fma_pair(a: u32, b: u32, c: u32) -> u32 {
    let value: u32;
    // SAFETY: arithmetic.
    unsafe {
        asm!("fma.rn.bf16x2 {v}, {a}, {b}, {c};", v = out(reg32) value, a = in(reg32) a,
             b = in(reg32) b, c = in(reg32) c, options(pure, nomem, nostack));
    }
    value
}
