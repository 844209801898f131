//! Products with weights in blocks (`shared/blocks.rs`).
//!
//! With `Q8` and `Q4` the arithmetic is that of integers, which has no order. 32 input values
//! become integers of 24 bits and a scale that is a power of two: off by at most 2^-23 of the largest
//! of them, as sums of f32 are anyway. The sum of a block's products is exact; it is rounded once and
//! added to the row's total with the scales. Instruction sets cut the integers into parts as their
//! multiplications want them and yet give the same bits, as they do with `Fp8`, whose products are
//! those of f32.

// Their loops count: closures have no instruction set of their own.
#[cfg(target_arch = "x86_64")]
#[allow(clippy::needless_range_loop)]
mod avx2;
#[cfg(target_arch = "x86_64")]
#[allow(clippy::needless_range_loop)]
mod avx512;
mod portable;

use std::mem::transmute;

use super::{InputForm, Isa, Matrix};
use crate::machine::Rows;
use crate::machine::memory::Span;
use tilert_mk_shared::blocks::{
    BlockShape, FP8_BLOCK, Q_COLUMNS, Q4_OFFSET, Q8_OFFSET, STRIP_ROWS,
};
use tilert_mk_shared::task::{Precision, WeightFormat};

/// Rows of a strip.
const ROWS: usize = STRIP_ROWS as usize;
/// Bytes of a block's scales.
const Q_SCALE_BYTES: usize = 2 * ROWS;
/// Bytes of a block's codes.
const FP8_CODE_BYTES: usize = FP8_BLOCK * ROWS;
/// See `Q_SCALE_BYTES`.
const FP8_SCALE_BYTES: usize = 4 * ROWS;
/// What the upper part of a sum counts.
const UPPER: f32 = 65536.0;
/// Bits of the lower part of a sum.
const LOWER_BITS: u32 = 16;

/// Bytes of a block's codes.
const fn q_code_bytes<const IS_Q8: bool>() -> usize {
    Q_COLUMNS * ROWS / if IS_Q8 { 1 } else { 2 }
}

/// 32 input values as integers, in the parts that the portable body and, with `Q8`, AVX2
/// multiplies.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
struct Halves {
    /// The lower 16 bits of each integer.
    low: [i16; Q_COLUMNS],
    /// What is above them, in units of 2^16.
    high: [i8; Q_COLUMNS],
    /// For each part, what the sums of products begin with: what the codes' offset adds to them,
    /// negated.
    start: [i32; 2],
    /// A value is its integer times this; not a number if one of the values is not finite.
    scale: f32,
    reserved: [u32; 5],
}

/// 32 input values as integers, in the parts that AVX-512 and, with `Q4`, AVX2 multiplies.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
struct Digits {
    /// Three digits of 8 bits with a sign, the lowest first.
    digits: [[i8; Q_COLUMNS]; 3],
    /// As in `Halves`.
    start: [i32; 3],
    /// As in `Halves`.
    scale: f32,
    reserved: [u32; 4],
}

/// Memory of a block of input values, whatever they are.
type Block = [u32; Q_COLUMNS];

const _: () = assert!(size_of::<Digits>() == size_of::<Block>() && align_of::<Digits>() == 4);
const _: () = assert!(size_of::<Halves>() == size_of::<Block>() && align_of::<Halves>() == 4);

/// Exponents of f32 whose scales would be too small; smaller values are integers of fewer digits.
const EXPONENT_MIN: u32 = 24;
/// That of values that are not finite.
const EXPONENT_MAX: u32 = 255;
/// Integers are so far below 2^23 that their upper digit does not overflow.
const HEADROOM: u32 = 0x2_0000;
/// What `integer_bits` are with `Precision::Exact`.
const EXACT_BITS: u32 = 22;

/// An integer's bits below the exponent of its block's largest value.
pub(super) const fn integer_bits(precision: Precision) -> u32 {
    match precision {
        Precision::Exact => EXACT_BITS,
        Precision::Bf16 => EXACT_BITS - 8,
    }
}

/// The exponent, as f32 stores it, that the integers of values belong to; `largest` is the bits of
/// their largest magnitude.
#[inline(always)]
fn exponent(largest: u32) -> u32 {
    ((largest + HEADROOM) >> 23).clamp(EXPONENT_MIN, EXPONENT_MAX)
}

/// What values are multiplied by to become integers of `bits` bits, and what integers are
/// multiplied by.
#[inline(always)]
fn factors(exponent: u32, bits: u32) -> [f32; 2] {
    if exponent == EXPONENT_MAX {
        return [0.0, f32::NAN];
    }
    [254 + bits - exponent, exponent - bits].map(|bits| f32::from_bits(bits << 23))
}

/// What is added to codes of `format`, which has no `Fp8`.
#[inline(always)]
fn offset(format: WeightFormat) -> i32 {
    if format == WeightFormat::Q4 { Q4_OFFSET } else { Q8_OFFSET }
}

/// Requests the weights that are `ahead` bytes after a block, unless that is 0.
#[inline(always)]
fn request(block: &[u8], ahead: usize) {
    if ahead > 0 {
        super::prefetch(block.as_ptr().wrapping_add(ahead) as u64, block.len() as u64);
    }
}

/// Writes the integers of `bits` bits of a row `from` over `to`, which may be the same memory and
/// has as many values as `from`, rounded up to whole blocks.
pub(super) fn split(isa: Isa, format: WeightFormat, bits: u32, from: Span<f32>, to: Span<f32>) {
    let len = from.len();
    let to = to.sub(0, len.next_multiple_of(Q_COLUMNS));
    // SAFETY: as many bytes as `to` has, all this worker's own, and any bytes are words.
    let blocks = unsafe { Span::<Block>::new(to.address(), len.div_ceil(Q_COLUMNS)) };
    let (isa, offset) = (BlockIsa::of(isa, format), offset(format));
    for (idx, first) in (0..len).step_by(Q_COLUMNS).enumerate() {
        let mut values = [0.0; Q_COLUMNS];
        let count = Q_COLUMNS.min(len - first);
        values[..count].copy_from_slice(from.sub(first, count).as_slice());
        let block = match isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `BlockIsa::of` has found the instructions; words without padding.
            BlockIsa::Avx512 => unsafe {
                transmute::<Digits, Block>(avx512::split(&values, offset, bits))
            },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            BlockIsa::Avx2 if format == WeightFormat::Q4 => unsafe {
                transmute::<Digits, Block>(avx2::split_digits(&values, bits))
            },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            BlockIsa::Avx2 => unsafe {
                transmute::<Halves, Block>(avx2::split_halves(&values, bits))
            },
            // SAFETY: words without padding.
            _ => unsafe { transmute::<Halves, Block>(portable::split(&values, offset, bits)) },
        };
        blocks.write(idx, block);
    }
}

/// `y[token, row] = matrix[row] · x[token]`; inputs are integers but for `Fp8`.
pub(super) fn matmul(isa: Isa, m: Matrix, x: Rows, token_count: usize, y: Rows) {
    let Some(shape) = BlockShape::of(m.format) else { return };
    let strip_bytes = shape.strip_bytes(m.in_dim as u32) as usize;
    let byte_count = shape.byte_count(m.row_count as u32, m.in_dim as u32) as usize;
    // SAFETY: a linear task names weights that the host has bound and keeps until the workers end.
    let bytes = unsafe { Span::<u8>::new(m.address, byte_count) };
    let isa = BlockIsa::of(isa, m.format);
    let pair_bytes = 2 * strip_bytes;
    for (idx, bytes) in bytes.as_slice().chunks(pair_bytes).enumerate() {
        let first = 2 * idx * ROWS;
        let out = Rows { values: y.values.sub(first, y.values.len() - first), stride: y.stride };
        let len = m.row_count - first;
        let (low, high) = bytes.split_at(strip_bytes);
        let (inputs, in_dim) = (m.inputs, m.in_dim);
        if high.is_empty() {
            let strip = Strips { isa, inputs, in_dim, bytes: [low] };
            strip.multiply_all(&x, token_count, &out, len);
        } else {
            let pair = Strips { isa, inputs, in_dim, bytes: [low, high] };
            pair.multiply_all(&x, token_count, &out, len);
        }
    }
}

/// The instructions that a format's products are made of.
#[derive(Clone, Copy)]
enum BlockIsa {
    /// AVX-512 with VNNI, if products are those of integers.
    Avx512,
    Avx2,
    Portable,
}

impl BlockIsa {
    fn of(isa: Isa, format: WeightFormat) -> BlockIsa {
        #[cfg(target_arch = "x86_64")]
        {
            let has_products =
                format == WeightFormat::Fp8 || std::arch::is_x86_feature_detected!("avx512vnni");
            match isa {
                Isa::Amx | Isa::Avx512 if has_products => return BlockIsa::Avx512,
                Isa::Amx | Isa::Avx512 | Isa::Avx2 => return BlockIsa::Avx2,
                Isa::Portable => {}
            }
        }
        let _ = (isa, format);
        BlockIsa::Portable
    }
}

/// Strips of rows.
struct Strips<'a, const S: usize> {
    isa: BlockIsa,
    inputs: InputForm,
    in_dim: usize,
    bytes: [&'a [u8]; S],
}

impl<const S: usize> Strips<'_, S> {
    /// Products with all tokens, the first `len` of them to each row of `out`.
    fn multiply_all(&self, x: &Rows, token_count: usize, out: &Rows, len: usize) {
        let mut token = 0;
        while token + 4 <= token_count {
            self.multiply::<4>(x, token, out, len);
            token += 4;
        }
        // Strip by strip, so that weights are one stream.
        for (idx, bytes) in self.bytes.into_iter().enumerate() {
            let strip =
                Strips { isa: self.isa, inputs: self.inputs, in_dim: self.in_dim, bytes: [bytes] };
            let first = idx * ROWS;
            let out = Rows { values: out.values.sub(first, out.values.len() - first), ..*out };
            for token in token..token_count {
                strip.multiply::<1>(x, token, &out, len - first);
            }
        }
    }

    /// Products with `T` tokens, the first `len` of them to each row of `out`.
    #[inline]
    fn multiply<const T: usize>(&self, x: &Rows, token: usize, out: &Rows, len: usize) {
        let products = match self.inputs {
            InputForm::Integers { format: WeightFormat::Q8, bits: EXACT_BITS } => {
                self.integer_products::<T, true, true>(x, token)
            }
            InputForm::Integers { format: WeightFormat::Q8, .. } => {
                self.integer_products::<T, true, false>(x, token)
            }
            InputForm::Integers { bits: EXACT_BITS, .. } => {
                self.integer_products::<T, false, true>(x, token)
            }
            InputForm::Integers { .. } => self.integer_products::<T, false, false>(x, token),
            _ => self.float_products::<T>(x, token),
        };
        for (first, products) in (0..).step_by(ROWS).zip(products) {
            let len = ROWS.min(len - first);
            for (t, products) in products.iter().enumerate() {
                let row = out.values.sub((token + t) * out.stride + first, len);
                row.as_mut_slice().copy_from_slice(&products[..len]);
            }
        }
    }

    /// Products with integers, of which `IS_EXACT` has parts above the lowest 16 bits.
    fn integer_products<const T: usize, const IS_Q8: bool, const IS_EXACT: bool>(
        &self,
        x: &Rows,
        token: usize,
    ) -> [[[f32; ROWS]; T]; S] {
        match self.isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `BlockIsa::of` has found the instructions; `split` has left its digits.
            BlockIsa::Avx512 => unsafe {
                let inputs = self.input_blocks(x, token);
                avx512::integers::<S, T, IS_Q8, IS_EXACT>(self.bytes, inputs)
            },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            BlockIsa::Avx2 if IS_Q8 => self.bytes.map(|bytes| unsafe {
                avx2::halves::<T, IS_EXACT>(bytes, self.input_blocks(x, token))
            }),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            BlockIsa::Avx2 => self.bytes.map(|bytes| unsafe {
                avx2::digits::<T, IS_EXACT>(bytes, self.input_blocks(x, token))
            }),
            // SAFETY: `split` has left them.
            _ => self.bytes.map(|bytes| unsafe {
                portable::integers::<T, IS_Q8>(bytes, self.input_blocks(x, token))
            }),
        }
    }

    /// The input blocks of `T` tokens.
    ///
    /// # Safety
    /// They are `Q`s, which have the size of `Block`.
    unsafe fn input_blocks<Q, const T: usize>(&self, x: &Rows, token: usize) -> [&[Q]; T] {
        let count = self.in_dim.div_ceil(Q_COLUMNS);
        let mut inputs: [&[Q]; T] = [&[]; T];
        for (t, input) in inputs.iter_mut().enumerate() {
            let row = x.row(token + t, count * Q_COLUMNS);
            // SAFETY: as many bytes as the row has; what is there by the caller's word.
            *input = unsafe { std::slice::from_raw_parts(row.address() as *const Q, count) };
        }
        inputs
    }

    fn float_products<const T: usize>(&self, x: &Rows, token: usize) -> [[[f32; ROWS]; T]; S] {
        let mut inputs: [&[f32]; T] = [&[]; T];
        let values = x.values.as_slice();
        for (t, input) in inputs.iter_mut().enumerate() {
            *input = &values[(token + t) * x.stride..][..self.in_dim];
        }
        self.bytes.map(|bytes| match self.isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `BlockIsa::of` has found the instructions.
            BlockIsa::Avx512 => unsafe { avx512::floats(bytes, inputs) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            BlockIsa::Avx2 => unsafe { avx2::floats(bytes, inputs) },
            _ => portable::floats(bytes, inputs),
        })
    }
}
