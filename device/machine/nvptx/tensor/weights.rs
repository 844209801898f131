//! Packed weights as a lane takes them, and how they are multiplied: bf16 as they are, E4M3 widened to bf16.

use core::arch::asm;

use tilert_mk_shared::packed::{FRAGMENT_BYTES, HALF_COLUMNS, LANE_BYTES, UNIT_COLUMNS};

use super::super::fma;
use super::super::memory::{load_shared_f32, load_shared_pair, load_shared_words};
use super::Sums;

/// Where a lane's weights of a task are in each block.
#[derive(Clone, Copy)]
pub struct Places {
    /// Offset of those of a whole group, and of a group of 8 rows.
    pub whole: u32,
    /// See `whole`.
    pub half: u32,
    /// Offset of the scale of the lane's first row, if rows have scales.
    pub scale: u32,
}

impl Places {
    /// Of lane `warp_lane` of warp `warp_idx`; `unit_bytes` is that of the task's packing.
    #[inline(always)]
    pub fn new<W: Weights>(warp_idx: u32, warp_lane: u32, unit_bytes: u32) -> Places {
        let whole = W::scale_bytes(unit_bytes) + warp_idx * unit_bytes + warp_lane * LANE_BYTES;
        // Warps that share a half of a block's columns share its scales.
        let half_idx = warp_idx * UNIT_COLUMNS / HALF_COLUMNS;
        let scale = half_idx * W::scale_bytes(unit_bytes) / 2 + warp_lane / 4 * 4;
        Places { whole, half: whole - warp_lane * LANE_BYTES / 2, scale }
    }
}

/// A lane's weights of a group of rows in a unit.
pub trait Weights: Copy {
    /// Bytes from one group to the next.
    const GROUP_BYTES: u32;

    /// Bytes of a block's scales, before its units.
    fn scale_bytes(unit_bytes: u32) -> u32;

    /// Those of group `idx` of the block at `address`, which has 8 rows if `is_half`.
    fn take(places: &Places, address: u32, idx: u32, is_half: bool) -> Self;

    /// Products that are not in the sums yet.
    type Pending<const G: usize, const TILES: usize>: Copy;

    /// None.
    fn none<const G: usize, const TILES: usize>() -> Self::Pending<G, TILES>;

    /// Multiplies each group's weights and each tile's inputs, and adds the products to the sums if nothing
    /// is pending then; the last group has 8 rows if `HALF`.
    fn multiply<const G: usize, const TILES: usize, const HALF: bool>(
        sums: &mut Sums<G, TILES>,
        inputs: &[[u32; 4]; TILES],
        weights: &[Self; G],
    ) -> Self::Pending<G, TILES>;

    /// Adds what is pending.
    fn settle<const G: usize, const TILES: usize>(
        sums: &mut Sums<G, TILES>,
        pending: &Self::Pending<G, TILES>,
    );
}

/// Bf16: two fragments.
#[derive(Clone, Copy)]
pub struct Bf16([[u32; 4]; 2]);

impl Weights for Bf16 {
    const GROUP_BYTES: u32 = 2 * FRAGMENT_BYTES;

    #[inline(always)]
    fn scale_bytes(_unit_bytes: u32) -> u32 {
        0
    }

    #[inline(always)]
    fn take(places: &Places, address: u32, idx: u32, is_half: bool) -> Bf16 {
        let address = address + idx * Bf16::GROUP_BYTES;
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

    type Pending<const G: usize, const TILES: usize> = ();

    #[inline(always)]
    fn none<const G: usize, const TILES: usize>() {}

    #[inline(always)]
    fn multiply<const G: usize, const TILES: usize, const HALF: bool>(
        sums: &mut Sums<G, TILES>,
        inputs: &[[u32; 4]; TILES],
        weights: &[Bf16; G],
    ) {
        multiply(sums, inputs, &weights.map(|Bf16(fragments)| fragments));
    }

    #[inline(always)]
    fn settle<const G: usize, const TILES: usize>(_sums: &mut Sums<G, TILES>, _pending: &()) {}
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

/// E4M3: the codes of two fragments, and the scales of the lane's two rows. A unit's products are added
/// up unscaled, from zero, then scaled: when the next ones are on their way, so that nobody waits for them.
#[derive(Clone, Copy)]
pub struct Fp8 {
    codes: [u32; 4],
    scales: [f32; 2],
}

impl Weights for Fp8 {
    const GROUP_BYTES: u32 = FRAGMENT_BYTES;

    /// A unit has 32 bytes of a row, and a block two scales.
    #[inline(always)]
    fn scale_bytes(unit_bytes: u32) -> u32 {
        unit_bytes / UNIT_COLUMNS * 8
    }

    #[inline(always)]
    fn take(places: &Places, address: u32, idx: u32, is_half: bool) -> Fp8 {
        let scale = address + places.scale + idx * 64;
        let address = address + idx * Fp8::GROUP_BYTES;
        // SAFETY: this lane's values in a full page; a group's rows have their scales one after the other.
        unsafe {
            if is_half {
                let [a, b] = load_shared_pair(address + places.half);
                return Fp8 { codes: [a, b, 0, 0], scales: [load_shared_f32(scale), 0.0] };
            }
            Fp8 {
                codes: load_shared_words(address + places.whole),
                scales: [load_shared_f32(scale), load_shared_f32(scale + 32)],
            }
        }
    }

    type Pending<const G: usize, const TILES: usize> = (Sums<G, TILES>, [[f32; 2]; G]);

    #[inline(always)]
    fn none<const G: usize, const TILES: usize>() -> Self::Pending<G, TILES> {
        ([[[0.0; 4]; TILES]; G], [[0.0; 2]; G])
    }

    #[inline(always)]
    fn multiply<const G: usize, const TILES: usize, const HALF: bool>(
        _sums: &mut Sums<G, TILES>,
        inputs: &[[u32; 4]; TILES],
        weights: &[Fp8; G],
    ) -> Self::Pending<G, TILES> {
        let fragments = core::array::from_fn(|idx| weights[idx].fragments(HALF && idx + 1 == G));
        let mut unscaled = [[[0.0; 4]; TILES]; G];
        multiply(&mut unscaled, inputs, &fragments);
        (unscaled, weights.map(|weights| weights.scales))
    }

    #[inline(always)]
    fn settle<const G: usize, const TILES: usize>(
        sums: &mut Sums<G, TILES>,
        (unscaled, scales): &Self::Pending<G, TILES>,
    ) {
        for (idx, (sums, unscaled)) in sums.iter_mut().zip(unscaled).enumerate() {
            for (sums, unscaled) in sums.iter_mut().zip(unscaled) {
                for row in 0..4 {
                    sums[row] = fma(unscaled[row], scales[idx][row / 2], sums[row]);
                }
            }
        }
    }
}

impl Fp8 {
    /// The two fragments in bf16. Those of 8 rows have half as many codes.
    #[inline(always)]
    fn fragments(&self, is_half: bool) -> [[u32; 4]; 2] {
        let [a, b, c, d] = self.codes;
        if is_half {
            return [a, b].map(|word| [first_codes(word), 0, second_codes(word), 0]);
        }
        [[a, b], [c, d]]
            .map(|[a, b]| [first_codes(a), second_codes(a), first_codes(b), second_codes(b)])
    }
}

/// The first codes of both halves of a word as bf16, see `spread_code`.
#[inline(always)]
fn first_codes(word: u32) -> u32 {
    raised(word & 0x87f0_87f0)
}

/// The second ones.
#[inline(always)]
fn second_codes(word: u32) -> u32 {
    raised(word << 4 & 0x80f0_80f0 | word >> 4 & 0x0700_0700)
}

/// Two bf16 with the fields of E4M3, whose exponents are smaller by 120, times 2^120. Subnormal numbers of
/// E4M3 are such of bf16 before: both lie in the range of the smallest exponent.
#[inline(always)]
fn raised(small: u32) -> u32 {
    const POWER: u32 = 0x7b80_7b80;
    /// Nothing is added.
    const NEGATIVE_ZEROS: u32 = 0x8000_8000;
    let value: u32;
    // SAFETY: arithmetic, exact.
    unsafe {
        asm!("fma.rn.bf16x2 {v}, {s}, {p}, {z};", v = out(reg32) value, s = in(reg32) small,
             p = in(reg32) POWER, z = in(reg32) NEGATIVE_ZEROS, options(pure, nomem, nostack));
    }
    value
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
