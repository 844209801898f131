//! Weights that are bf16 already.

use tilert_mk_shared::packed::{
    BLOCK_COLUMNS, FRAGMENT_BYTES, GROUP_ROWS, LANE_BYTES, PAD_ROWS, Packing,
};
use tilert_mk_shared::task::WeightFormat;
use tilert_mk_shared::tile::{BLOCKS_TOGETHER_MAX, PAGE_BYTES};

use super::super::super::block::Block;
use super::super::super::memory::{load_shared_pair, load_shared_words};
use super::super::{Lane, Next, Operands, Shape, Sums, add_last, take_operands};
use super::{Places, Weights, multiply};

/// Bf16: two fragments.
#[derive(Clone, Copy)]
pub(crate) struct Bf16([[u32; 4]; 2]);

impl Weights for Bf16 {
    const FORMAT: WeightFormat = WeightFormat::Bf16;
    const LANE_BYTES: u32 = LANE_BYTES;

    #[inline(always)]
    fn take(places: &Places, address: u32, idx: u32, is_half: bool) -> Bf16 {
        let address = address + idx * 2 * FRAGMENT_BYTES;
        if is_half {
            let address = address + places.half;
            // SAFETY: this lane's values in a full page.
            let pairs = unsafe {
                [load_shared_pair(address), load_shared_pair(address + FRAGMENT_BYTES / 2)]
            };
            return Bf16(pairs.map(|[a, b]| [a, 0, b, 0]));
        }
        let address = address + places.whole;
        // SAFETY: this lane's values in a full page.
        Bf16(unsafe { [load_shared_words(address), load_shared_words(address + FRAGMENT_BYTES)] })
    }

    #[inline(always)]
    fn product<const G: usize, const HALF: bool>(
        sums: &mut Sums<G, 1>,
        next: &mut Next,
        block: &Block,
        lane: &Lane,
        shape: &Shape,
    ) {
        match G {
            1 => product_together::<G, HALF, { BLOCKS_TOGETHER_MAX as usize }>(
                sums, next, block, lane, shape,
            ),
            2 => product_together::<G, HALF, 2>(sums, next, block, lane, shape),
            _ => product_together::<G, HALF, 1>(sums, next, block, lane, shape),
        }
    }

    #[inline(always)]
    fn add<const G: usize, const TILES: usize, const HALF: bool>(
        sums: &mut Sums<G, TILES>,
        inputs: &[[u32; 4]; TILES],
        weights: &[Bf16; G],
    ) {
        multiply(sums, inputs, &weights.map(|Bf16(fragments)| fragments));
    }
}

/// Products with one tile, `BLOCKS` blocks at a time. The next
/// ones' operands are loaded while some are multiplied, into registers that take turns; with more tiles
/// they would not fit.
#[inline(always)]
fn product_together<const G: usize, const HALF: bool, const BLOCKS: usize>(
    sums: &mut Sums<G, 1>,
    next: &mut Next,
    block: &Block,
    lane: &Lane,
    shape: &Shape,
) {
    next.begin(block, shape);
    let mut left = (shape.end - next.first) / (BLOCKS as u32 * BLOCK_COLUMNS);
    if left > 0 {
        let mut multiply = |operands: &[Operands<Bf16, G>; BLOCKS], is_page_end: bool| {
            for (inputs, weights) in operands {
                Bf16::add::<G, 1, HALF>(sums, inputs, weights);
            }
            if is_page_end {
                block.pages.release(block.warp_lane());
            }
        };
        let mut advance = |next: &mut Next| {
            left -= 1;
            let is_page_end = if const { fills_page(G, HALF, BLOCKS) } {
                next.advance::<true>(block, shape, BLOCKS as u32)
            } else {
                next.advance::<false>(block, shape, BLOCKS as u32)
            };
            (left == 0, is_page_end)
        };
        // The two take turns by name: exchanged, they would be copied.
        let mut operands = take_all::<G, HALF, BLOCKS>(lane, shape, next);
        loop {
            let (is_last, is_page_end) = advance(next);
            if is_last {
                multiply(&operands, is_page_end);
                break;
            }
            let others = take_all::<G, HALF, BLOCKS>(lane, shape, next);
            multiply(&operands, is_page_end);
            let (is_last, is_page_end) = advance(next);
            if is_last {
                multiply(&others, is_page_end);
                break;
            }
            operands = take_all::<G, HALF, BLOCKS>(lane, shape, next);
            multiply(&others, is_page_end);
        }
    }
    // What is left are fewer blocks, of which the last may have fewer columns.
    while next.first < shape.end {
        add_last::<Bf16, G, 1, HALF>(sums, lane, shape, next);
        if next.advance::<false>(block, shape, 1) {
            block.pages.release(block.warp_lane());
        }
    }
}

/// Whether so many blocks of `groups` groups fill a page.
const fn fills_page(groups: usize, is_half: bool, blocks: usize) -> bool {
    let rows = groups as u32 * GROUP_ROWS - if is_half { PAD_ROWS } else { 0 };
    Packing::new(rows, BLOCK_COLUMNS, WeightFormat::Bf16).page_blocks(PAGE_BYTES) == blocks as u32
}

/// The lane's operands of whole blocks.
#[inline(always)]
fn take_all<const G: usize, const HALF: bool, const BLOCKS: usize>(
    lane: &Lane,
    shape: &Shape,
    next: &Next,
) -> [Operands<Bf16, G>; BLOCKS] {
    core::array::from_fn(|idx| {
        let (first, address) = (idx as u32 * BLOCK_COLUMNS, idx as u32 * shape.block_bytes);
        take_operands::<Bf16, G, HALF>(lane, next.first + first, next.address + address)
    })
}
