//! E4M3.

use tilert_mk_shared::packed::{HALF_COLUMNS, LANE_BYTES, UNIT_COLUMNS};
use tilert_mk_shared::task::WeightFormat;

use super::super::super::memory::load_shared_f32;
use super::codes::{Codes, Scaled, raised, spread_out, take_words};

/// Two bf16 of 2^120. The exponents of E4M3 are smaller by as much. Its subnormal numbers are such
/// of bf16 before: both lie in the range of the smallest exponent.
const POWER_120: u32 = 0x7b80_7b80;

/// With scales.
pub(crate) type Fp8 = Scaled<E4m3>;

/// E4M3: four words, or two of 8 rows.
#[derive(Clone, Copy)]
pub(crate) struct E4m3([u32; 4]);

impl Codes for E4m3 {
    const FORMAT: WeightFormat = WeightFormat::Fp8;
    const LANE_BYTES: u32 = LANE_BYTES;

    /// A unit has 32 bytes of a row, and a block two scales.
    #[inline(always)]
    fn scale_bytes(unit_bytes: u32) -> u32 {
        unit_bytes / UNIT_COLUMNS * 8
    }

    /// Warps that share a half of a block's columns share its scales.
    #[inline(always)]
    fn scale_place(warp_idx: u32, row: u32, unit_bytes: u32) -> u32 {
        let half_idx = warp_idx * UNIT_COLUMNS / HALF_COLUMNS;
        half_idx * E4m3::scale_bytes(unit_bytes) / 2 + row * 4
    }

    #[inline(always)]
    fn take(address: u32, is_half: bool) -> E4m3 {
        E4m3(take_words(address, is_half))
    }

    #[inline(always)]
    fn scales(address: u32, idx: u32, is_half: bool) -> [f32; 2] {
        let address = address + idx * 64;
        // SAFETY: scales in a full page; a group's rows have theirs one after the other.
        unsafe {
            [load_shared_f32(address), if is_half { 0.0 } else { load_shared_f32(address + 32) }]
        }
    }

    #[inline(always)]
    fn fragments(&self, is_half: bool) -> [[u32; 4]; 2] {
        spread_out(
            self.0,
            is_half,
            |word| raised::<POWER_120>(word & 0x87f0_87f0),
            |word| raised::<POWER_120>(word << 4 & 0x80f0_80f0 | word >> 4 & 0x0700_0700),
        )
    }
}
