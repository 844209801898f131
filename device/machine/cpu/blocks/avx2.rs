//! Bodies of AVX2.

use std::arch::x86_64::{
    __m256, __m256i, _mm_add_epi32, _mm_cvtsi128_si32, _mm_loadl_epi64, _mm_loadu_si128,
    _mm_max_epu32, _mm_set1_epi32, _mm_shuffle_epi32, _mm256_add_epi16, _mm256_add_epi32,
    _mm256_add_ps, _mm256_and_si256, _mm256_castps_si256, _mm256_castsi256_ps,
    _mm256_castsi256_si128, _mm256_cvtepi8_epi16, _mm256_cvtepi8_epi32, _mm256_cvtepi32_ps,
    _mm256_cvtepu8_epi16, _mm256_cvtph_ps, _mm256_cvtps_epi32, _mm256_extracti128_si256,
    _mm256_fmadd_ps, _mm256_hadd_epi32, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_madd_epi16,
    _mm256_maddubs_epi16, _mm256_max_epu32, _mm256_mul_ps, _mm256_packs_epi16, _mm256_packs_epi32,
    _mm256_permute4x64_epi64, _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_epi32,
    _mm256_set1_epi64x, _mm256_set1_ps, _mm256_setzero_ps, _mm256_setzero_si256, _mm256_slli_epi32,
    _mm256_srai_epi32, _mm256_srli_epi16, _mm256_storeu_ps, _mm256_storeu_si256,
};

use super::{
    Digits, FP8_BLOCK, FP8_CODE_BYTES, FP8_SCALE_BYTES, Halves, LOWER_BITS, Q_COLUMNS,
    Q_SCALE_BYTES, Q4_OFFSET, Q8_OFFSET, ROWS, UPPER, exponent, factors, q_code_bytes,
};
use crate::machine::cpu::STREAM_AHEAD;

/// Rows of a vector of sums.
const HALF: usize = ROWS / 2;
/// Columns of a quad.
const QUAD: usize = 4;
/// Quads of a block.
const QUADS: usize = Q_COLUMNS / QUAD;

/// The parts that products with codes of 8 bits take.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn split_halves(values: &[f32; Q_COLUMNS], bits: u32) -> Halves {
    let (integers, scale) = integers_of(values, bits);
    let (mut lows, mut highs) = ([_mm256_setzero_si256(); 4], [_mm256_setzero_si256(); 4]);
    for idx in 0..4 {
        lows[idx] = _mm256_srai_epi32::<16>(_mm256_slli_epi32::<16>(integers[idx]));
        let rounded = _mm256_add_epi32(integers[idx], _mm256_set1_epi32(1 << 15));
        highs[idx] = _mm256_srai_epi32::<16>(rounded);
    }
    let start = [-Q8_OFFSET * total(&lows), -Q8_OFFSET * total(&highs)];
    let mut split =
        Halves { low: [0; Q_COLUMNS], high: bytes(&highs), start, scale, reserved: [0; 5] };
    for half in 0..2 {
        let words = words(lows[2 * half], lows[2 * half + 1]);
        let place = split.low[half * 16..].as_mut_ptr();
        // SAFETY: 16 words.
        unsafe { _mm256_storeu_si256(place.cast(), words) };
    }
    split
}

/// The parts that products with codes of 4 bits take.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn split_digits(values: &[f32; Q_COLUMNS], bits: u32) -> Digits {
    let (mut rest, scale) = integers_of(values, bits);
    let mut split = Digits { digits: [[0; Q_COLUMNS]; 3], start: [0; 3], scale, reserved: [0; 4] };
    for digit in 0..3 {
        let mut digits = [_mm256_setzero_si256(); 4];
        for idx in 0..4 {
            digits[idx] = _mm256_srai_epi32::<24>(_mm256_slli_epi32::<24>(rest[idx]));
            // What is left is a multiple of 256 once the digit, which has a sign, is taken away.
            let rounded = _mm256_add_epi32(rest[idx], _mm256_set1_epi32(128));
            rest[idx] = _mm256_srai_epi32::<8>(rounded);
        }
        split.digits[digit] = bytes(&digits);
        split.start[digit] = -Q4_OFFSET * total(&digits);
    }
    split
}

/// A block's values as integers, and the scale.
#[inline]
#[target_feature(enable = "avx2")]
fn integers_of(values: &[f32; Q_COLUMNS], bits: u32) -> ([__m256i; 4], f32) {
    let mut vectors = [_mm256_setzero_ps(); 4];
    let mut largest = _mm256_setzero_si256();
    for idx in 0..4 {
        // SAFETY: 8 values.
        vectors[idx] = unsafe { _mm256_loadu_ps(values[idx * 8..][..8].as_ptr()) };
        let stored = _mm256_castps_si256(vectors[idx]);
        let magnitude = _mm256_and_si256(stored, _mm256_set1_epi32(0x7fff_ffff));
        largest = _mm256_max_epu32(largest, magnitude);
    }
    let four =
        _mm_max_epu32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256::<1>(largest));
    let two = _mm_max_epu32(four, _mm_shuffle_epi32::<0b01_00_11_10>(four));
    let one = _mm_max_epu32(two, _mm_shuffle_epi32::<0b10_11_00_01>(two));
    let [factor, scale] = factors(exponent(_mm_cvtsi128_si32(one) as u32), bits);
    let mut integers = [_mm256_setzero_si256(); 4];
    for idx in 0..4 {
        integers[idx] = _mm256_cvtps_epi32(_mm256_mul_ps(vectors[idx], _mm256_set1_ps(factor)));
    }
    (integers, scale)
}

/// The sum of all lanes.
#[inline]
#[target_feature(enable = "avx2")]
fn total(vectors: &[__m256i; 4]) -> i32 {
    let [a, b, c, d] = *vectors;
    let eight = _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));
    let four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256::<1>(eight));
    let two = _mm_add_epi32(four, _mm_shuffle_epi32::<0b01_00_11_10>(four));
    _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<0b10_11_00_01>(two)))
}

/// Two vectors of integers that fit as words.
#[inline]
#[target_feature(enable = "avx2")]
fn words(a: __m256i, b: __m256i) -> __m256i {
    _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(a, b))
}

/// Four vectors of integers that fit as bytes.
#[inline]
#[target_feature(enable = "avx2")]
fn bytes(vectors: &[__m256i; 4]) -> [i8; Q_COLUMNS] {
    let [a, b, c, d] = *vectors;
    let packed = _mm256_packs_epi16(words(a, b), words(c, d));
    let packed = _mm256_permute4x64_epi64::<0b11_01_10_00>(packed);
    let mut bytes = [0; Q_COLUMNS];
    // SAFETY: 32 bytes.
    unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), packed) };
    bytes
}

/// Products of a strip of `Q8` with `T` inputs; see `portable::integers`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn halves<const T: usize, const IS_EXACT: bool>(
    strip: &[u8],
    x: [&[Halves]; T],
) -> [[f32; ROWS]; T] {
    const CODE_BYTES: usize = q_code_bytes::<true>();
    let mut totals = [[_mm256_setzero_ps(); 2]; T];
    for idx in 0..x[0].len() {
        let block = &strip[idx * (CODE_BYTES + Q_SCALE_BYTES)..][..CODE_BYTES + Q_SCALE_BYTES];
        if T == 1 {
            super::request(block, STREAM_AHEAD);
        }
        for t in 0..T {
            let x = &x[t][idx];
            let [low, high] = half_sums::<IS_EXACT>(&block[..CODE_BYTES], x);
            for half in 0..2 {
                let sum = exact(low[half], high[half]);
                let scales = scales(&block[CODE_BYTES..], half, x.scale);
                totals[t][half] = _mm256_fmadd_ps(sum, scales, totals[t][half]);
            }
        }
    }
    store(&totals)
}

/// Products of a strip of `Q4` with `T` inputs; see `portable::integers`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn digits<const T: usize, const IS_EXACT: bool>(
    strip: &[u8],
    x: [&[Digits]; T],
) -> [[f32; ROWS]; T] {
    const CODE_BYTES: usize = q_code_bytes::<false>();
    let mut totals = [[_mm256_setzero_ps(); 2]; T];
    for idx in 0..x[0].len() {
        let block = &strip[idx * (CODE_BYTES + Q_SCALE_BYTES)..][..CODE_BYTES + Q_SCALE_BYTES];
        if T == 1 {
            super::request(block, STREAM_AHEAD);
        }
        for t in 0..T {
            let x = &x[t][idx];
            let sums = digit_sums::<IS_EXACT>(&block[..CODE_BYTES], x);
            for half in 0..2 {
                let [low, middle, high] = sums[half];
                let low = _mm256_add_epi32(_mm256_slli_epi32::<8>(middle), low);
                let sum = exact(low, high);
                let scales = scales(&block[CODE_BYTES..], half, x.scale);
                totals[t][half] = _mm256_fmadd_ps(sum, scales, totals[t][half]);
            }
        }
    }
    store(&totals)
}

/// The scales of rows 0 to 7, or of the others, times that of an input.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn scales(stored: &[u8], half: usize, scale: f32) -> __m256 {
    let stored = &stored[2 * HALF * half..][..2 * HALF];
    // SAFETY: 16 bytes.
    let stored = unsafe { _mm_loadu_si128(stored.as_ptr().cast()) };
    _mm256_mul_ps(_mm256_cvtph_ps(stored), _mm256_set1_ps(scale))
}

/// The sums of a block's products with each digit, of rows 0 to 7 and of the others.
///
/// Products of pairs of columns are words: of 8 pairs they are at most 8 * 2 * 15 * 128, which a
/// word holds.
#[inline]
#[target_feature(enable = "avx2")]
fn digit_sums<const IS_EXACT: bool>(codes: &[u8], x: &Digits) -> [[__m256i; 3]; 2] {
    let mut words = [[_mm256_setzero_si256(); 3]; 2];
    let low = _mm256_set1_epi8(0x0f);
    for quad in 0..QUADS / 2 {
        let mut codes_of = [[_mm256_setzero_si256(); 2]; 2];
        for half in 0..2 {
            let bytes = &codes[(2 * quad + half) * QUAD * HALF..][..QUAD * HALF];
            // SAFETY: 32 bytes.
            let stored = unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) };
            codes_of[half][0] = _mm256_and_si256(stored, low);
            codes_of[half][1] = _mm256_and_si256(_mm256_srli_epi16::<4>(stored), low);
        }
        // The highest is zero in integers of 16 bits.
        for digit in 0..if IS_EXACT { 3 } else { 2 } {
            for part in 0..2 {
                let input = quad_of(&x.digits[digit], quad + part * QUADS / 2);
                for half in 0..2 {
                    let products = _mm256_maddubs_epi16(codes_of[half][part], input);
                    words[half][digit] = _mm256_add_epi16(words[half][digit], products);
                }
            }
        }
    }
    let mut sums = words;
    for half in 0..2 {
        for digit in 0..3 {
            let sum = _mm256_madd_epi16(words[half][digit], _mm256_set1_epi16(1));
            sums[half][digit] = _mm256_add_epi32(sum, _mm256_set1_epi32(x.start[digit]));
        }
    }
    sums
}

/// Four columns of a digit, the same for all rows.
#[inline]
#[target_feature(enable = "avx2")]
fn quad_of(digits: &[i8; Q_COLUMNS], quad: usize) -> __m256i {
    let digits = &digits[quad * QUAD..][..QUAD];
    // SAFETY: 4 bytes.
    _mm256_set1_epi32(unsafe { digits.as_ptr().cast::<i32>().read_unaligned() })
}

/// `low + high * 2^16`, rounded once.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn exact(low: __m256i, high: __m256i) -> __m256 {
    // Both parts are exact in f32.
    let high = _mm256_add_epi32(high, _mm256_srai_epi32::<{ LOWER_BITS as i32 }>(low));
    let low = _mm256_and_si256(low, _mm256_set1_epi32((1 << LOWER_BITS) - 1));
    _mm256_fmadd_ps(_mm256_cvtepi32_ps(high), _mm256_set1_ps(UPPER), _mm256_cvtepi32_ps(low))
}

/// The sums of a block's products with each part of the inputs, of rows 0 to 7 and of the others.
#[inline]
#[target_feature(enable = "avx2")]
fn half_sums<const IS_EXACT: bool>(codes: &[u8], x: &Halves) -> [[__m256i; 2]; 2] {
    // Of four rows each, those of the first two columns of quads, and of the last two.
    let mut sums = [[_mm256_setzero_si256(); 4]; 2];
    for quad in 0..QUADS {
        let inputs = inputs(x, quad);
        for rows in 0..4 {
            let bytes = &codes[(4 * quad + rows) * QUAD * HALF / 2..][..QUAD * HALF / 2];
            // SAFETY: 16 bytes.
            let codes = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
            let codes = _mm256_cvtepu8_epi16(codes);
            // The upper part is zero in integers of 16 bits.
            for part in 0..if IS_EXACT { 2 } else { 1 } {
                let products = _mm256_madd_epi16(codes, inputs[part]);
                sums[part][rows] = _mm256_add_epi32(sums[part][rows], products);
            }
        }
    }
    let mut rows = [[_mm256_setzero_si256(); 2]; 2];
    for part in 0..2 {
        let start = _mm256_set1_epi32(x.start[part]);
        for half in 0..2 {
            // Adds neighbours within 128 bits; the middle quarters then change places.
            let pairs = _mm256_hadd_epi32(sums[part][2 * half], sums[part][2 * half + 1]);
            let pairs = _mm256_permute4x64_epi64::<0b11_01_10_00>(pairs);
            rows[part][half] = _mm256_add_epi32(start, pairs);
        }
    }
    rows
}

/// Four columns of each part as words, the same for all rows.
#[inline]
#[target_feature(enable = "avx2")]
fn inputs(x: &Halves, quad: usize) -> [__m256i; 2] {
    let (low, high) = (&x.low[quad * QUAD..][..QUAD], &x.high[quad * QUAD..][..QUAD]);
    // SAFETY: 8 bytes and 4 bytes.
    let (low, high) = unsafe {
        (low.as_ptr().cast::<i64>().read_unaligned(), high.as_ptr().cast::<i32>().read_unaligned())
    };
    [_mm256_set1_epi64x(low), _mm256_cvtepi8_epi16(_mm_set1_epi32(high))]
}

/// See `portable::floats`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn floats<const T: usize>(strip: &[u8], x: [&[f32]; T]) -> [[f32; ROWS]; T] {
    let block_bytes = FP8_CODE_BYTES + FP8_SCALE_BYTES;
    let mut totals = [[_mm256_setzero_ps(); 2]; T];
    for (idx, first) in (0..x[0].len()).step_by(FP8_BLOCK).enumerate() {
        let block = &strip[idx * block_bytes..][..block_bytes];
        if T == 1 {
            super::request(block, STREAM_AHEAD);
        }
        let count = FP8_BLOCK.min(x[0].len() - first);
        for half in 0..2 {
            let scales = &block[FP8_CODE_BYTES + 4 * HALF * half..][..4 * HALF];
            // SAFETY: 32 bytes of the block's scales.
            let scales = unsafe { _mm256_loadu_ps(scales.as_ptr().cast()) };
            for t in 0..T {
                let mut sums = [_mm256_setzero_ps(); 4];
                // A multiple of 8, as `in_dim` is.
                for column in (0..count).step_by(4) {
                    for part in 0..4 {
                        let codes = &block[(column + part) * ROWS + half * HALF..][..HALF];
                        let input = _mm256_set1_ps(x[t][first + column + part]);
                        sums[part] = _mm256_fmadd_ps(e4m3(codes), input, sums[part]);
                    }
                }
                let [a, b, c, d] = sums;
                let sum = _mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d));
                totals[t][half] = _mm256_fmadd_ps(sum, scales, totals[t][half]);
            }
        }
    }
    store(&totals)
}

/// See `portable::e4m3`.
#[inline]
#[target_feature(enable = "avx2")]
fn e4m3(codes: &[u8]) -> __m256 {
    // SAFETY: the caller's slice has a code for each row of a half.
    let codes = unsafe { _mm_loadl_epi64(codes.as_ptr().cast()) };
    let bits = _mm256_slli_epi32::<20>(_mm256_cvtepi8_epi32(codes));
    let bits = _mm256_and_si256(bits, _mm256_set1_epi32(0x87f0_0000_u32 as i32));
    let scale = f32::from_bits((127 + 120) << 23);
    _mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(scale))
}

#[inline]
#[target_feature(enable = "avx2")]
fn store<const T: usize>(totals: &[[__m256; 2]; T]) -> [[f32; ROWS]; T] {
    let mut products = [[0.0; ROWS]; T];
    for t in 0..T {
        for half in 0..2 {
            let place = products[t][half * HALF..].as_mut_ptr();
            // SAFETY: 8 values.
            unsafe { _mm256_storeu_ps(place, totals[t][half]) };
        }
    }
    products
}
