//! The forms in which input rows are multiplied.

use tilert_mk_shared::program::INPUT_ROW_MULTIPLE;
use tilert_mk_shared::task::{Precision, WeightFormat};

use super::{Isa, blocks};
use crate::machine::Rows;
use crate::machine::memory::Span;

/// Rows that share panels.
pub(super) const PANEL_ROWS: usize = 2;
/// Rows below which none are in panels: too few products to pay for packing.
const PANELED_MIN: usize = 2 * PANEL_ROWS;

/// How many of `count` rows are in panels with `InputForm::Panels`: the first ones, in pairs.
pub(super) fn paneled(count: usize) -> usize {
    if count < PANELED_MIN { 0 } else { count - count % PANEL_ROWS }
}

/// How input rows are stored once they are ready to be multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputForm {
    /// As f32.
    Float,
    /// As f32 that are rounded to bf16.
    Rounded,
    /// As f32, those of two rows in the order in which AVX2 multiplies them (`paneled`).
    Panels {
        /// Whether they are rounded to bf16.
        is_rounded: bool,
    },
    /// As bf16, for the chip's own products.
    Packed,
    /// As bf16, in tiles of up to 16 rows.
    Tiles,
    /// As integers of `bits` bits with a scale for each block, for weights of this format.
    Integers {
        /// See above.
        format: WeightFormat,
        /// Bits of an integer, below that of the sign.
        bits: u32,
    },
}

impl InputForm {
    /// The form for weights of a format.
    pub fn of(isa: Isa, format: WeightFormat, precision: Precision) -> InputForm {
        match (format, precision) {
            (WeightFormat::Q8 | WeightFormat::Q4, _) => {
                InputForm::Integers { format, bits: blocks::integer_bits(precision) }
            }
            _ if isa == Isa::Avx2 && !format.is_blocked() => {
                InputForm::Panels { is_rounded: precision == Precision::Bf16 }
            }
            (_, Precision::Exact) => InputForm::Float,
            (WeightFormat::Bf16, Precision::Bf16) if isa == Isa::Amx => InputForm::Tiles,
            (WeightFormat::Bf16, Precision::Bf16) if isa.multiplies_bf16() => InputForm::Packed,
            (_, Precision::Bf16) => InputForm::Rounded,
        }
    }

    /// Whether `count` rows of f32 are in this form already.
    pub(super) fn is_plain(self, count: usize) -> bool {
        match self {
            InputForm::Float => true,
            InputForm::Panels { is_rounded } => !is_rounded && paneled(count) == 0,
            _ => false,
        }
    }

    /// Writes `count` rows of `dim` values in this form to `to`, whose rows have as many, rounded up
    /// to a multiple of 32, and may be the same.
    pub(super) fn convert(self, isa: Isa, from: Rows, to: Rows, count: usize, dim: usize) {
        #[cfg(target_arch = "x86_64")]
        if self == InputForm::Tiles {
            // SAFETY: `InputForm::of` has found the instructions.
            return unsafe { super::amx::pack(&from, &to, count, dim) };
        }
        let len = dim.next_multiple_of(INPUT_ROW_MULTIPLE as usize);
        let whole = self.pack_panels(from, to, count, dim);
        for row in 0..count {
            let to = to.row(row, len);
            let from = if row < whole { to } else { from.row(row, dim) };
            self.convert_row(isa, from, to);
        }
    }

    /// Packs rows into panels, if that is the form, and says how many. The values stay the same.
    fn pack_panels(self, from: Rows, to: Rows, count: usize, dim: usize) -> usize {
        #[cfg(target_arch = "x86_64")]
        if matches!(self, InputForm::Panels { .. }) && paneled(count) > 0 {
            let whole = paneled(count);
            // SAFETY: `InputForm::of` has found the instructions.
            unsafe { super::avx2::panels::pack(&from, &to, whole, dim) };
            return whole;
        }
        let _ = (from, to, count, dim);
        0
    }

    fn convert_row(self, isa: Isa, from: Span<f32>, to: Span<f32>) {
        match self {
            // Tiles are made of several rows.
            InputForm::Float | InputForm::Tiles => {}
            InputForm::Panels { is_rounded: false } => {
                if from.address() != to.address() {
                    to.sub(0, from.len()).as_mut_slice().copy_from_slice(from.as_slice());
                }
            }
            InputForm::Rounded | InputForm::Panels { is_rounded: true } => {
                super::round(isa, from, to)
            }
            InputForm::Packed => super::pack(isa, from, to),
            InputForm::Integers { format, bits } => blocks::split(isa, format, bits, from, to),
        }
    }
}

/// Values that are converted at once. In loops, not in closures: these have no instruction set of their own.
const CHUNK: usize = 32;

/// Writes the values of a row, rounded to bf16, over `to`, which may be the same memory.
#[inline(always)]
pub(super) fn round(from: Span<f32>, to: Span<f32>) {
    for first in (0..from.len()).step_by(CHUNK) {
        let count = CHUNK.min(from.len() - first);
        let mut values = chunk(from, first, count);
        for value in &mut values {
            *value = f32::from_bits(u32::from(bf16_bits(*value)) << 16);
        }
        to.sub(first, count).as_mut_slice().copy_from_slice(&values[..count]);
    }
}

/// Writes the values of a row, as bf16, to the begin of `to`, which may be the same memory.
#[inline(always)]
pub(super) fn pack(from: Span<f32>, to: Span<f32>) {
    // SAFETY: half of the row's bytes, all this worker's own, and any bytes are words.
    let packed = unsafe { Span::<u16>::new(to.address(), from.len()) };
    for first in (0..from.len()).step_by(CHUNK) {
        let count = CHUNK.min(from.len() - first);
        // Read before their place is written to, which ends before the next values begin.
        let values = chunk(from, first, count);
        let mut bits = [0; CHUNK];
        for (bits, value) in bits.iter_mut().zip(values) {
            *bits = bf16_bits(value);
        }
        packed.sub(first, count).as_mut_slice().copy_from_slice(&bits[..count]);
    }
}

/// The values `first..first + count` of a row, and zeros after them.
#[inline(always)]
fn chunk(from: Span<f32>, first: usize, count: usize) -> [f32; CHUNK] {
    let mut values = [0.0; CHUNK];
    values[..count].copy_from_slice(from.sub(first, count).as_slice());
    values
}

/// The bf16 value nearest to a value, halves to even; a NaN stays one.
#[inline(always)]
fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    let is_nan = bits & 0x7fff_ffff > 0x7f80_0000;
    if is_nan { (bits >> 16) as u16 | 0x40 } else { (rounded >> 16) as u16 }
}

#[cfg(test)]
mod tests {
    use super::bf16_bits;
    use half::bf16;

    #[test]
    fn rounding_is_that_of_half() {
        for high in 0..=u16::MAX {
            for low in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let value = f32::from_bits(u32::from(high) << 16 | low);
                let expected = bf16::from_f32(value);
                let found = bf16::from_bits(bf16_bits(value));
                let is_same = found.to_bits() == expected.to_bits();
                assert!(is_same || found.is_nan() && expected.is_nan(), "{value}: {found}");
            }
        }
    }
}
