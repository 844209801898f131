//! Integers of 8 and of 4 bits.

use tilert_mk_shared::blocks::Q4_OFFSET;
use tilert_mk_shared::packed::{LANE_BYTES, Q4_ROW_BYTES, Q8_ROW_BYTES, UNIT_SCALE_BYTES};
use tilert_mk_shared::task::WeightFormat;
use tilert_mk_shared::tile::WARP_LANES;

use super::super::super::memory::{load_shared_pair, load_shared_word, widen_f16};
use super::super::super::sreg;
use super::codes::{Codes, Scaled, fma_pair, raised, spread_out, take_words};

/// Two bf16 of 2^127.
const POWER_127: u32 = 0x7f00_7f00;

/// Integers of 8 bits with scales.
pub(crate) type Q8 = Scaled<Bytes>;
/// Integers of 4 bits with scales.
pub(crate) type Q4 = Scaled<Nibbles>;

/// Integers of 8 bits: four words, or two of 8 rows.
#[derive(Clone, Copy)]
pub(crate) struct Bytes([u32; 4]);

impl Codes for Bytes {
    const FORMAT: WeightFormat = WeightFormat::Q8;
    const LANE_BYTES: u32 = LANE_BYTES;

    #[inline(always)]
    fn scale_place(warp_idx: u32, row: u32, unit_bytes: u32) -> u32 {
        after_codes(Q8_ROW_BYTES, warp_idx, row, unit_bytes)
    }

    #[inline(always)]
    fn take(address: u32, is_half: bool) -> Bytes {
        Bytes(take_words(address, is_half))
    }

    /// A magnitude becomes a subnormal bf16, a multiple of 2^-133, times 2^127.
    #[inline(always)]
    fn scales(address: u32, idx: u32, is_half: bool) -> [f32; 2] {
        take_halves(address, idx, is_half).map(|scale| scale * 64.0)
    }

    #[inline(always)]
    fn fragments(&self, is_half: bool) -> [[u32; 4]; 2] {
        spread_out(
            self.0,
            is_half,
            |word| raised::<POWER_127>(word & 0x807f_807f),
            |word| raised::<POWER_127>(word << 1 & 0x8000_8000 | word >> 7 & 0x007f_007f),
        )
    }
}

/// Integers of 4 bits: two words, or one of 8 rows.
#[derive(Clone, Copy)]
pub(crate) struct Nibbles([u32; 2]);

impl Codes for Nibbles {
    const FORMAT: WeightFormat = WeightFormat::Q4;
    const LANE_BYTES: u32 = LANE_BYTES / 2;

    #[inline(always)]
    fn scale_place(warp_idx: u32, row: u32, unit_bytes: u32) -> u32 {
        after_codes(Q4_ROW_BYTES, warp_idx, row, unit_bytes)
    }

    #[inline(always)]
    fn take(address: u32, is_half: bool) -> Nibbles {
        // SAFETY: this lane's codes in a full page.
        Nibbles(unsafe {
            if is_half { [load_shared_word(address), 0] } else { load_shared_pair(address) }
        })
    }

    #[inline(always)]
    fn scales(address: u32, idx: u32, is_half: bool) -> [f32; 2] {
        take_halves(address, idx, is_half)
    }

    #[inline(always)]
    fn fragments(&self, is_half: bool) -> [[u32; 4]; 2] {
        let [a, b] = self.0;
        if is_half {
            return [a, a >> 8].map(|word| [offset(word), 0, offset(word >> 4), 0]);
        }
        [a, b].map(|word| [offset(word), offset(word >> 4), offset(word >> 8), offset(word >> 12)])
    }
}

/// See `Codes::scale_place`: a unit, of `row_bytes` for each row, ends with its scales.
#[inline(always)]
fn after_codes(row_bytes: u32, warp_idx: u32, row: u32, unit_bytes: u32) -> u32 {
    let code_bytes = unit_bytes / row_bytes * (row_bytes - UNIT_SCALE_BYTES);
    warp_idx * unit_bytes + code_bytes + row * 4
}

/// The scales of the lane's rows in group `idx`, as a unit of integers ends with them: two of a
/// word, or one of 8 rows.
#[inline(always)]
fn take_halves(address: u32, idx: u32, is_half: bool) -> [f32; 2] {
    if is_half {
        // The row's is half as far from the first row's, in a word that two rows share.
        let row = sreg::thread_idx() % WARP_LANES / 4;
        let first = address + idx * 32 - row * 4;
        // SAFETY: scales in a full page.
        let word = unsafe { load_shared_word(first + row / 2 * 4) };
        return [widen_f16((word >> (row % 2 * 16)) as u16), 0.0];
    }
    // SAFETY: scales in a full page.
    let word = unsafe { load_shared_word(address + idx * 32) };
    [widen_f16(word as u16), widen_f16((word >> 16) as u16)]
}

/// The integers whose four bits, with 8 added to them, are the lowest of each half of a word, in bf16.
#[inline(always)]
fn offset(word: u32) -> u32 {
    /// Two bf16 of 128, whose fractions count ones.
    const WHOLE: u32 = 0x4300_4300;
    const ONES: u32 = 0x3f80_3f80;
    /// Two bf16 of -136.
    const OFFSET: u32 = 0xc308_c308;
    const { assert!(Q4_OFFSET == 8) };
    fma_pair(word & 0x000f_000f | WHOLE, ONES, OFFSET)
}
