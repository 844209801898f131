//! Bodies of AVX-512, for integers with VNNI.

use std::arch::x86_64::{
    __m512, __m512i, _mm_loadu_si128, _mm_storeu_si128, _mm256_loadu_si256, _mm512_add_epi32,
    _mm512_add_ps, _mm512_and_si512, _mm512_castps_si512, _mm512_castsi512_ps,
    _mm512_cvtepi8_epi32, _mm512_cvtepi32_epi8, _mm512_cvtepi32_ps, _mm512_cvtph_ps,
    _mm512_cvtps_epi32, _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512,
    _mm512_max_epu32, _mm512_mul_ps, _mm512_reduce_add_epi32, _mm512_reduce_max_epu32,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_slli_epi32, _mm512_srai_epi32,
    _mm512_srli_epi32, _mm512_storeu_ps,
};

use super::{
    Digits, FP8_BLOCK, FP8_CODE_BYTES, FP8_SCALE_BYTES, Q_COLUMNS, Q_SCALE_BYTES, ROWS, UPPER,
    exponent, factors, q_code_bytes,
};
use crate::machine::cpu::STREAM_AHEAD;
use crate::machine::cpu::avx512::stream_ahead;

/// Digits of an integer.
const DIGITS: usize = 3;
/// Columns of a vector of codes.
const VECTOR_COLUMNS: usize = 4;
/// Vectors of a block's codes, once they are whole bytes.
const VECTORS: usize = Q_COLUMNS / VECTOR_COLUMNS;

/// See `portable::split`.
#[target_feature(enable = "avx512f")]
pub(super) fn split(values: &[f32; Q_COLUMNS], offset: i32, bits: u32) -> Digits {
    let magnitude = _mm512_set1_epi32(0x7fff_ffff);
    let (low, high) = values.split_at(16);
    // SAFETY: 16 values each.
    let halves = unsafe { [_mm512_loadu_ps(low.as_ptr()), _mm512_loadu_ps(high.as_ptr())] };
    let largest = _mm512_max_epu32(
        _mm512_and_si512(_mm512_castps_si512(halves[0]), magnitude),
        _mm512_and_si512(_mm512_castps_si512(halves[1]), magnitude),
    );
    let [factor, scale] = factors(exponent(_mm512_reduce_max_epu32(largest)), bits);
    let mut split = Digits { digits: [[0; Q_COLUMNS]; 3], start: [0; 3], scale, reserved: [0; 4] };
    let mut rest = [_mm512_set1_epi32(0); 2];
    for half in 0..2 {
        rest[half] = _mm512_cvtps_epi32(_mm512_mul_ps(halves[half], _mm512_set1_ps(factor)));
    }
    for digit in 0..DIGITS {
        let mut sums = _mm512_set1_epi32(0);
        for half in 0..2 {
            let bytes = _mm512_cvtepi32_epi8(rest[half]);
            let place = split.digits[digit][half * 16..].as_mut_ptr();
            // SAFETY: 16 bytes of the digits.
            unsafe { _mm_storeu_si128(place.cast(), bytes) };
            sums = _mm512_add_epi32(sums, _mm512_cvtepi8_epi32(bytes));
            // What is left is a multiple of 256 once the digit, which has a sign, is taken away.
            let rounded = _mm512_add_epi32(rest[half], _mm512_set1_epi32(128));
            rest[half] = _mm512_srai_epi32::<8>(rounded);
        }
        split.start[digit] = -offset * _mm512_reduce_add_epi32(sums);
    }
    split
}

/// See `portable::integers`; strips side by side share the loads of inputs.
#[target_feature(enable = "avx512f,avx512vnni,f16c")]
pub(super) fn integers<const S: usize, const T: usize, const IS_Q8: bool, const IS_EXACT: bool>(
    strips: [&[u8]; S],
    x: [&[Digits]; T],
) -> [[[f32; ROWS]; T]; S] {
    let block_bytes = q_code_bytes::<IS_Q8>() + Q_SCALE_BYTES;
    // With 4-bit weights a Zen 4 loses nothing by it.
    let ahead = if IS_Q8 { stream_ahead() } else { STREAM_AHEAD };
    let mut totals = [[_mm512_setzero_ps(); T]; S];
    for idx in 0..x[0].len() {
        let mut blocks = [&strips[0][..0]; S];
        for s in 0..S {
            blocks[s] = &strips[s][idx * block_bytes..][..block_bytes];
        }
        let mut inputs = [&x[0][idx]; T];
        for t in 0..T {
            inputs[t] = &x[t][idx];
        }
        if T == 1 {
            super::request(blocks[0], ahead);
        }
        add_block::<S, T, IS_Q8, IS_EXACT>(&mut totals, &blocks, &inputs);
    }
    let mut products = [[[0.0; ROWS]; T]; S];
    for s in 0..S {
        products[s] = store(&totals[s]);
    }
    products
}

/// Adds the products of a block of columns.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni,f16c")]
fn add_block<const S: usize, const T: usize, const IS_Q8: bool, const IS_EXACT: bool>(
    totals: &mut [[__m512; T]; S],
    blocks: &[&[u8]; S],
    inputs: &[&Digits; T],
) {
    let mut sums = [[[_mm512_set1_epi32(0); DIGITS]; T]; S];
    for s in 0..S {
        for t in 0..T {
            for digit in 0..DIGITS {
                sums[s][t][digit] = _mm512_set1_epi32(inputs[t].start[digit]);
            }
        }
    }
    for vector in 0..VECTORS {
        let mut stored = [_mm512_set1_epi32(0); S];
        for s in 0..S {
            stored[s] = codes::<IS_Q8>(blocks[s], vector);
        }
        for t in 0..T {
            // The highest is zero in integers of 16 bits.
            for digit in 0..if IS_EXACT { DIGITS } else { DIGITS - 1 } {
                let input = quad(&inputs[t].digits[digit], vector);
                for s in 0..S {
                    sums[s][t][digit] = _mm512_dpbusd_epi32(sums[s][t][digit], stored[s], input);
                }
            }
        }
    }
    for s in 0..S {
        let scales = &blocks[s][q_code_bytes::<IS_Q8>()..][..Q_SCALE_BYTES];
        // SAFETY: 32 bytes.
        let scales = unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(scales.as_ptr().cast())) };
        for t in 0..T {
            let [low, middle, high] = sums[s][t];
            let low = _mm512_add_epi32(_mm512_slli_epi32::<8>(middle), low);
            // The sum is rounded once.
            let sum = if IS_EXACT {
                let high = _mm512_add_epi32(high, _mm512_srai_epi32::<16>(low));
                let low = _mm512_and_si512(low, _mm512_set1_epi32(0xffff));
                // Both parts are exact in f32.
                let (low, high) = (_mm512_cvtepi32_ps(low), _mm512_cvtepi32_ps(high));
                _mm512_fmadd_ps(high, _mm512_set1_ps(UPPER), low)
            } else {
                _mm512_cvtepi32_ps(low)
            };
            let scales = _mm512_mul_ps(scales, _mm512_set1_ps(inputs[t].scale));
            totals[s][t] = _mm512_fmadd_ps(sum, scales, totals[s][t]);
        }
    }
}

/// A vector of a block's codes, each in a byte.
#[inline]
#[target_feature(enable = "avx512f")]
fn codes<const IS_Q8: bool>(block: &[u8], vector: usize) -> __m512i {
    let stored = if IS_Q8 { vector } else { vector % (VECTORS / 2) };
    let bytes = &block[stored * VECTOR_COLUMNS * ROWS..][..VECTOR_COLUMNS * ROWS];
    // SAFETY: 64 bytes.
    let stored = unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) };
    if IS_Q8 {
        return stored;
    }
    let low = _mm512_set1_epi32(0x0f0f_0f0f);
    if vector < VECTORS / 2 {
        _mm512_and_si512(stored, low)
    } else {
        _mm512_and_si512(_mm512_srli_epi32::<4>(stored), low)
    }
}

/// Four columns of a digit, the same for all rows.
#[inline]
#[target_feature(enable = "avx512f")]
fn quad(digits: &[i8; Q_COLUMNS], vector: usize) -> __m512i {
    let [a, b, c, d] = [0, 1, 2, 3].map(|column| digits[vector * VECTOR_COLUMNS + column]);
    _mm512_set1_epi32(i32::from_le_bytes([a as u8, b as u8, c as u8, d as u8]))
}

/// See `portable::floats`.
#[target_feature(enable = "avx512f")]
pub(super) fn floats<const T: usize>(strip: &[u8], x: [&[f32]; T]) -> [[f32; ROWS]; T] {
    let ahead = stream_ahead();
    let mut totals = [_mm512_setzero_ps(); T];
    for (idx, first) in (0..x[0].len()).step_by(FP8_BLOCK).enumerate() {
        let block = &strip[idx * (FP8_CODE_BYTES + FP8_SCALE_BYTES)..];
        let block = &block[..FP8_CODE_BYTES + FP8_SCALE_BYTES];
        let count = FP8_BLOCK.min(x[0].len() - first);
        let mut sums = [[_mm512_setzero_ps(); 4]; T];
        // A multiple of 8, as `in_dim` is.
        for column in (0..count).step_by(4) {
            if T == 1 {
                super::request(&block[column * ROWS..][..4 * ROWS], ahead);
            }
            for part in 0..4 {
                let weights = e4m3(&block[(column + part) * ROWS..][..ROWS]);
                for t in 0..T {
                    let input = _mm512_set1_ps(x[t][first + column + part]);
                    sums[t][part] = _mm512_fmadd_ps(weights, input, sums[t][part]);
                }
            }
        }
        // SAFETY: the scales' 64 bytes are the block's last.
        let scales = unsafe { _mm512_loadu_ps(block[FP8_CODE_BYTES..].as_ptr().cast()) };
        for t in 0..T {
            let [a, b, c, d] = sums[t];
            let sum = _mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d));
            totals[t] = _mm512_fmadd_ps(sum, scales, totals[t]);
        }
    }
    store(&totals)
}

/// See `portable::e4m3`.
#[inline]
#[target_feature(enable = "avx512f")]
fn e4m3(codes: &[u8]) -> __m512 {
    // SAFETY: the caller's slice has a code for each row.
    let codes = unsafe { _mm_loadu_si128(codes.as_ptr().cast()) };
    let bits = _mm512_slli_epi32::<20>(_mm512_cvtepi8_epi32(codes));
    let bits = _mm512_and_si512(bits, _mm512_set1_epi32(0x87f0_0000_u32 as i32));
    let scale = f32::from_bits((127 + 120) << 23);
    _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(scale))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store<const T: usize>(totals: &[__m512; T]) -> [[f32; ROWS]; T] {
    let mut products = [[0.0; ROWS]; T];
    for t in 0..T {
        // SAFETY: 16 values.
        unsafe { _mm512_storeu_ps(products[t].as_mut_ptr(), totals[t]) };
    }
    products
}
