//! Products with bf16 weights, and with codes that become bf16, on tensor cores, for all widths of a step.
//!
//! Weights come packed as `shared/packed.rs` describes: a warp multiplies its unit of 32 columns of
//! each block with all rows of the task, so inputs are read once for up to four groups of rows, and a
//! fragment is one load without shuffling. Every pair of token and part has a column of accumulators
//! of its own, and a warp's order of additions is that of the columns, so products depend on neither
//! the task's shape nor a token's neighbours. The parts are summed at the end, the smallest first,
//! then the warps in order.
//!
//! Cost: per unit and group of 16 rows two loads of weights and two `mma` for one or two tokens, six
//! for more.

#[cfg(tilert_sm90)]
mod pieces;
mod weights;

use tilert_mk_shared::packed::{BLOCK_COLUMNS, GROUP_ROWS, LANE_COLUMNS, UNIT_COLUMNS};
use tilert_mk_shared::task::{LinearArgs, Task, WeightFormat};
use tilert_mk_shared::tile::{COMPUTE_WARPS, INPUTS, PARTIALS, PARTS, WARP_LANES, WIDE_INPUTS};

#[cfg(not(tilert_integers))]
pub(crate) use self::weights::Bf16;
#[cfg(tilert_fp8)]
pub(crate) use self::weights::Fp8;
use self::weights::{Places, Weights};
#[cfg(tilert_integers)]
pub(crate) use self::weights::{Q4, Q8};
use super::barrier::sync_warp;
use super::block::Block;
use super::digest::Digest;
use super::header::header;
use super::inputs::{Layout, split_pair, swizzled};
use super::kind::Format;
use super::memory::{Quad, load_global, load_shared, load_shared_words, store_shared_f32};
use super::record::record;
use super::stamped::{self, Looks, Words};
use super::warp;
use crate::machine::Rows;

/// What of a task's packing the product needs.
pub(crate) struct Shape {
    /// Columns.
    in_dim: u32,
    /// Where the columns end whose inputs are near.
    end: u32,
    /// Blocks of a page.
    page_blocks: u32,
    /// Bytes of a block.
    block_bytes: u32,
}

/// What one lane multiplies in every block.
pub(crate) struct Lane {
    /// First of the lane's columns in a block.
    column: u32,
    /// First of the warp's columns in a block.
    warp_column: u32,
    places: Places,
    layout: Layout,
    /// Address of the lane's inputs in the first block: shared if near, else global.
    input: u64,
    /// The stamp of inputs that have one.
    stamp: u32,
}

impl Shape {
    #[inline(always)]
    fn new<W: Weights>(args: &LinearArgs, digest: &Digest) -> Shape {
        Shape {
            in_dim: args.in_dim,
            end: args.in_dim,
            page_blocks: digest.page_blocks,
            block_bytes: W::scale_bytes(digest.unit_bytes) + digest.unit_bytes * COMPUTE_WARPS,
        }
    }
}

impl Lane {
    /// That of the block's thread, for `count` rows.
    #[inline(always)]
    fn new<W: Weights>(block: &Block, digest: &Digest, x: Rows, count: u32) -> Lane {
        let (group, t) = (block.warp_lane() / 4, block.warp_lane() % 4);
        let warp_column = block.warp_idx() * UNIT_COLUMNS;
        let column = warp_column + t * LANE_COLUMNS;
        let layout = block.layout.get();
        // Columns of accumulators that belong to nobody repeat another's inputs.
        let token = group.min(count - 1);
        let far = x.values.address() + u64::from(token * x.stride as u32 + column) * 4;
        let input = match layout {
            Layout::Parts { rows, pitch } => {
                let (part, token) = ((group / 2).min(PARTS - 1), (group % 2).min(count - 1));
                u64::from(block.shared + INPUTS + ((part * rows + token) * pitch + column) * 2)
            }
            Layout::Near => {
                let offset = (token * x.stride as u32 + swizzled(column)) * 4;
                u64::from(block.shared + WIDE_INPUTS + offset)
            }
            Layout::Far => far,
            Layout::Stamped => stamped::place(&header(), far),
        };
        let places = Places::new::<W>(block.warp_idx(), block.warp_lane(), digest.unit_bytes);
        let stamp = stamped::input_stamp(block, 0);
        Lane { column, warp_column, places, layout, input, stamp }
    }
}

impl<W: Weights> Format for W {
    const FORMAT: WeightFormat = W::FORMAT;

    #[inline(always)]
    fn multiply<const NARROW: bool, const IN_PIECES: bool>(
        block: &Block,
        _task: &Task,
        x: Rows,
        count: u32,
    ) {
        multiply::<W, NARROW, IN_PIECES>(block, x, count);
    }
}

/// Leaves the partial products of all rows, one for each warp, in the area of partials.
#[inline(always)]
fn multiply<W: Weights, const NARROW: bool, const IN_PIECES: bool>(
    block: &Block,
    x: Rows,
    count: u32,
) {
    let args = LinearArgs::unpack(&record(block.slot.get()));
    let digest = Digest::read(block.slot.get());
    let shape = Shape::new::<W>(&args, &digest);
    let lane = Lane::new::<W>(block, &digest, x, count);
    let rows = [args.row_count(), count];
    macro_rules! by_groups {
        ($of:ident) => {
            match (digest.groups / 2, digest.groups % 2 != 0) {
                (1, false) => $of::<W, 1, false>(block, lane, shape, rows),
                (1, true) => $of::<W, 1, true>(block, lane, shape, rows),
                (2, false) => $of::<W, 2, false>(block, lane, shape, rows),
                (2, true) => $of::<W, 2, true>(block, lane, shape, rows),
                (3, false) => $of::<W, 3, false>(block, lane, shape, rows),
                (3, true) => $of::<W, 3, true>(block, lane, shape, rows),
                (_, false) => $of::<W, 4, false>(block, lane, shape, rows),
                (_, true) => $of::<W, 4, true>(block, lane, shape, rows),
            }
        };
    }
    #[cfg(tilert_sm90)]
    if IN_PIECES {
        return by_groups!(narrow_in_pieces);
    }
    if NARROW {
        by_groups!(narrow);
    } else {
        by_groups!(wide);
    }
}

/// One or two tokens: a tile's columns are both tokens' parts. `G` groups of rows, the last of which
/// has 8 rows if `HALF`.
#[inline(always)]
fn narrow<W: Weights, const G: usize, const HALF: bool>(
    block: &Block,
    lane: Lane,
    shape: Shape,
    rows: [u32; 2],
) {
    let mut sums = [[[0.0; 4]; 1]; G];
    let mut next = Next::FIRST;
    W::product::<G, HALF>(&mut sums, &mut next, block, &lane, &shape);
    leave_all(block, &sums, rows);
}

/// The same with inputs that come in pieces.
#[cfg(tilert_sm90)]
#[inline(always)]
fn narrow_in_pieces<W: Weights, const G: usize, const HALF: bool>(
    block: &Block,
    lane: Lane,
    shape: Shape,
    _rows: [u32; 2],
) {
    let sums = pieces::product::<W, G, HALF>(block, lane, shape);
    // Again: registers are scarce until then.
    let args = LinearArgs::unpack(&record(block.slot.get()));
    let count = args.token_rows.count(super::step::counts(block.shared));
    leave_all(block, &sums, [args.row_count(), count]);
}

/// Leaves the products of all groups of rows of one or two tokens.
#[inline(always)]
fn leave_all<const G: usize>(block: &Block, sums: &Sums<G, 1>, rows: [u32; 2]) {
    for (idx, [sums]) in (0u32..).zip(sums) {
        leave_narrow(block, *sums, idx * GROUP_ROWS, rows);
    }
}

/// More tokens: a tile for each part.
#[inline(always)]
fn wide<W: Weights, const G: usize, const HALF: bool>(
    block: &Block,
    lane: Lane,
    shape: Shape,
    rows: [u32; 2],
) {
    // As many blocks ahead as there are registers for.
    let sums = match lane.layout {
        Layout::Stamped if G <= 2 => product_far::<W, [Words; 2], G, HALF, 3>(block, &lane, &shape),
        Layout::Stamped => product_far::<W, [Words; 2], G, HALF, 1>(block, &lane, &shape),
        Layout::Far => product_far::<W, [Quad; 2], G, HALF, 2>(block, &lane, &shape),
        _ => product::<W, G, HALF>(block, &lane, &shape),
    };
    for (idx, [large, middle, small]) in (0u32..).zip(&sums) {
        let sum = |idx: usize| small[idx] + middle[idx] + large[idx];
        leave(block, [sum(0), sum(1), sum(2), sum(3)], idx * GROUP_ROWS, rows);
    }
}

/// What a lane multiplies of one block: the inputs of one tile, the weights of each group.
type Operands<W, const G: usize> = ([[u32; 4]; 1], [W; G]);
/// Sums of each group and tile.
type Sums<const G: usize, const TILES: usize> = [[[f32; 4]; TILES]; G];

/// Where the next block to load is.
pub(crate) struct Next {
    /// Its first column.
    first: u32,
    /// Its shared address.
    address: u32,
    /// Blocks left in its page, with it.
    left: u32,
}

impl Next {
    /// The first block, before its page is looked at.
    const FIRST: Next = Next { first: 0, address: 0, left: 0 };

    /// Waits for the block's page, if it is the first that is taken of it.
    #[inline(always)]
    fn begin(&mut self, block: &Block, shape: &Shape) {
        if self.left == 0 {
            block.pages.wait_full();
            (self.address, self.left) = (block.pages.address(), shape.page_blocks);
        }
    }

    /// Goes on by some blocks of a page to the next, once its page is full if its inputs are near. Whether those
    /// before ended their page, as they always do if they `FILL` it.
    #[inline(always)]
    fn advance<const FILL: bool>(&mut self, block: &Block, shape: &Shape, blocks: u32) -> bool {
        self.first += blocks * BLOCK_COLUMNS;
        self.address += blocks * shape.block_bytes;
        self.left -= blocks;
        if !FILL && self.left > 0 && self.first < shape.in_dim {
            return false;
        }
        if self.first < shape.end {
            (self.address, self.left) = (block.pages.wait_next(), shape.page_blocks);
        }
        true
    }
}

/// Products of `G` groups of rows over all blocks, with a tile for each part.
#[inline(always)]
fn product<W: Weights, const G: usize, const HALF: bool>(
    block: &Block,
    lane: &Lane,
    shape: &Shape,
) -> Sums<G, 3> {
    let mut sums = [[[0.0; 4]; 3]; G];
    let mut next = Next::FIRST;
    next.begin(block, shape);
    while next.first < shape.in_dim {
        add_last::<W, G, 3, HALF>(&mut sums, lane, shape, &next);
        if next.advance::<false>(block, shape, 1) {
            block.pages.release(block.warp_lane());
        }
    }
    sums
}

/// The same with inputs in the heap, which are asked for `AHEAD` blocks ahead.
#[inline(always)]
fn product_far<W: Weights, F: Far, const G: usize, const HALF: bool, const AHEAD: usize>(
    block: &Block,
    lane: &Lane,
    shape: &Shape,
) -> Sums<G, 3> {
    let mut sums = [[[0.0; 4]; 3]; G];
    let mut next = Next::FIRST;
    next.begin(block, shape);
    let mut ahead: [F; AHEAD] =
        core::array::from_fn(|idx| take_far(lane, shape, idx as u32 * BLOCK_COLUMNS));
    while next.first < shape.in_dim {
        for far in &mut ahead {
            if next.first < shape.in_dim {
                let first = next.first;
                let inputs = split_inputs(far.settle(block, lane, || take_far(lane, shape, first)));
                *far = take_far(lane, shape, first + AHEAD as u32 * BLOCK_COLUMNS);
                if first + lane.warp_column < shape.in_dim {
                    let weights = take_groups::<W, G, HALF>(lane, next.address);
                    W::add::<G, 3, HALF>(&mut sums, &inputs, &weights);
                }
                if next.advance::<false>(block, shape, 1) {
                    block.pages.release(block.warp_lane());
                }
            }
        }
    }
    sums
}

/// The lane's operands of a whole block, whose columns begin at `first`, at a shared address.
#[inline(always)]
fn take_operands<W: Weights, const G: usize, const HALF: bool>(
    lane: &Lane,
    first: u32,
    address: u32,
) -> Operands<W, G> {
    let weights = take_groups::<W, G, HALF>(lane, address);
    (take_inputs(lane, first), weights)
}

#[inline(always)]
fn take_groups<W: Weights, const G: usize, const HALF: bool>(lane: &Lane, address: u32) -> [W; G] {
    core::array::from_fn(|idx| W::take(&lane.places, address, idx as u32, HALF && idx + 1 == G))
}

/// Multiplies a block that may be the last, which has fewer columns.
#[inline(always)]
fn add_last<W: Weights, const G: usize, const TILES: usize, const HALF: bool>(
    sums: &mut Sums<G, TILES>,
    lane: &Lane,
    shape: &Shape,
    next: &Next,
) {
    if next.first + lane.warp_column < shape.in_dim {
        let is_inside = next.first + lane.column < shape.in_dim;
        let inputs = if is_inside { take_inputs(lane, next.first) } else { [[0; 4]; TILES] };
        let weights = take_groups::<W, G, HALF>(lane, next.address);
        W::add::<G, TILES, HALF>(sums, &inputs, &weights);
    }
}

/// The lane's 8 inputs in the block whose columns begin at `first`, as bf16 for each tile.
#[inline(always)]
fn take_inputs<const TILES: usize>(lane: &Lane, first: u32) -> [[u32; 4]; TILES] {
    if TILES == 1 {
        // SAFETY: this lane's columns of a part's row.
        return [unsafe { load_shared_words(lane.input as u32 + first * 2) }; TILES];
    }
    let place = lane.input as u32 + first * 4;
    // SAFETY: this lane's columns of an input row; halves of a group are 128 values apart.
    split_inputs(unsafe { [load_shared(place), load_shared(place + 512)] })
}

/// A lane's 8 inputs in the heap, which may still be on their way.
trait Far: Copy {
    /// Bytes of a value.
    const BYTES: u64;

    /// Zeros.
    fn zeros(lane: &Lane) -> Self;

    /// Asks for those at an address.
    ///
    /// # Safety
    /// It is that of a lane's columns of an input row.
    unsafe fn take(place: u64) -> Self;

    /// The values, once they are there; `again` asks for them again. The warp meets.
    fn settle(self, block: &Block, lane: &Lane, again: impl Fn() -> Self) -> [Quad; 2];
}

impl Far for [Quad; 2] {
    const BYTES: u64 = 4;

    #[inline(always)]
    fn zeros(_lane: &Lane) -> Self {
        [[0.0; 4]; 2]
    }

    #[inline(always)]
    unsafe fn take(place: u64) -> Self {
        // SAFETY: by this function's contract.
        unsafe { [load_global(place), load_global(place + 16)] }
    }

    #[inline(always)]
    fn settle(self, _block: &Block, _lane: &Lane, _again: impl Fn() -> Self) -> [Quad; 2] {
        self
    }
}

impl Far for [Words; 2] {
    const BYTES: u64 = 8;

    #[inline(always)]
    fn zeros(lane: &Lane) -> Self {
        [stamped::zeros(lane.stamp); 2]
    }

    /// Adjacent fours have adjacent pairs of words; whole groups further on, they lie as they do here.
    #[inline(always)]
    unsafe fn take(place: u64) -> Self {
        // SAFETY: by this function's contract.
        unsafe { [stamped::load_quad(place), stamped::load_quad(place + 16)] }
    }

    #[inline(always)]
    fn settle(self, block: &Block, lane: &Lane, again: impl Fn() -> Self) -> [Quad; 2] {
        let mut words = self;
        if stamped::difference(words.as_flattened(), lane.stamp) != 0 {
            words = stamped::wait(block, Looks::AtOnce, || {
                let words = again();
                (words, stamped::difference(words.as_flattened(), lane.stamp))
            });
        }
        // Lanes multiply together.
        sync_warp();
        words.map(stamped::values)
    }
}

/// Asks for the lane's inputs in the block whose columns begin at `first`; zeros past the row's end.
#[inline(always)]
fn take_far<F: Far>(lane: &Lane, shape: &Shape, first: u32) -> F {
    if first + lane.column >= shape.in_dim {
        return F::zeros(lane);
    }
    // SAFETY: this lane's columns of an input row.
    unsafe { F::take(lane.input + u64::from(first) * F::BYTES) }
}

/// A lane's 8 inputs as bf16 for each tile.
#[inline(always)]
fn split_inputs<const TILES: usize>([low, high]: [Quad; 2]) -> [[u32; 4]; TILES] {
    let pairs = [
        split_pair(low[0], low[1]),
        split_pair(low[2], low[3]),
        split_pair(high[0], high[1]),
        split_pair(high[2], high[3]),
    ];
    core::array::from_fn(|tile| core::array::from_fn(|idx| pairs[idx][tile]))
}

/// Sums the parts, which are in lanes 1 and 2 after their group's first, and leaves the products.
#[inline(always)]
fn leave_narrow(block: &Block, sums: [f32; 4], first: u32, rows: [u32; 2]) {
    let first_lane = block.warp_lane() & !3;
    let sum = |idx: usize| {
        let (middle, small) =
            (warp::take(sums[idx], first_lane + 1), warp::take(sums[idx], first_lane + 2));
        small + middle + sums[idx]
    };
    let totals = [sum(0), sum(1), sum(2), sum(3)];
    if block.warp_lane() % 4 == 0 {
        leave(block, totals, first, rows);
    }
}

/// Leaves a lane's products: two tokens of two rows, 8 apart, of the group that begins at `first`.
#[inline(always)]
fn leave(block: &Block, sums: [f32; 4], first: u32, [row_count, count]: [u32; 2]) {
    let (group, t) = (block.warp_lane() / 4, block.warp_lane() % 4);
    for idx in 0..4 {
        let sum = sums[idx as usize];
        let (row, token) = (first + group + idx / 2 * 8, t * 2 + idx % 2);
        if row < row_count && token < count {
            let place = (row * count + token) * COMPUTE_WARPS + block.warp_idx();
            // SAFETY: this lane's own partial sum, in the area of partials.
            unsafe { store_shared_f32(block.shared + PARTIALS + place * 4, sum) };
        }
    }
}

const _: () = assert!(WARP_LANES == 32 && COMPUTE_WARPS * UNIT_COLUMNS == BLOCK_COLUMNS);
