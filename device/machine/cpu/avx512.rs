//! Products of many tokens on AVX-512.
//!
//! Sums of four rows with four tokens are 16 vectors, which the 32 registers hold; as plain arrays,
//! which the other primitives use, the compiler keeps that many in memory. The order of additions
//! is that of `lanes`, lane by lane and in the fold, so the bits are the same.

use std::arch::x86_64::{
    __m512, _mm512_add_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_permutex2var_ps,
    _mm512_setr_epi32, _mm512_setzero_ps, _mm512_shuffle_f32x4, _mm512_shuffle_ps,
    _mm512_storeu_ps,
};

use super::lanes::{LANES, Lanes, Stored, load};

/// Rows, and tokens, of a block.
pub(super) const SIDE: usize = 4;

/// Products of four rows with four inputs, `[row, input]`; all of one length. As many bytes as it
/// reads of `w` are requested from `ahead` on.
#[inline]
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
pub(super) fn dots<W: Stored>(
    w: [&[W]; SIDE],
    x: [&[f32]; SIDE],
    ahead: Option<*const W>,
) -> Lanes {
    let len = x[0].len();
    let whole = len - len % LANES;
    let mut sums = [[_mm512_setzero_ps(); SIDE]; SIDE];
    let mut at = 0;
    while at < whole {
        if let Some(ahead) = ahead {
            let bytes = (SIDE * LANES * size_of::<W>()) as u64;
            super::prefetch(ahead.wrapping_add(at * SIDE) as u64, bytes);
        }
        let inputs = x.map(|x| vector(&load(&x[at..at + LANES])));
        for r in 0..SIDE {
            let weights = vector(&load(&w[r][at..at + LANES]));
            for t in 0..SIDE {
                sums[r][t] = _mm512_fmadd_ps(weights, inputs[t], sums[r][t]);
            }
        }
        at += LANES;
    }
    if whole < len {
        let inputs = x.map(|x| vector(&load(&x[whole..len])));
        let weights = w.map(|w| vector(&load(&w[whole..len])));
        for r in 0..SIDE {
            for t in 0..SIDE {
                sums[r][t] = _mm512_fmadd_ps(weights[r], inputs[t], sums[r][t]);
            }
        }
    }
    fold(&sums)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn vector(lanes: &Lanes) -> __m512 {
    // SAFETY: an array of 16 values is what is read.
    unsafe { _mm512_loadu_ps(lanes.as_ptr()) }
}

/// Folds the lanes of 16 vectors at once: the upper half of each onto the lower, then quarters,
/// eighths and the last two.
#[inline]
#[target_feature(enable = "avx512f")]
fn fold(sums: &[[__m512; SIDE]; SIDE]) -> Lanes {
    let sum = |idx: usize| sums[idx / SIDE][idx % SIDE];
    let halves: [__m512; 8] = std::array::from_fn(|i| {
        let (a, b) = (sum(i), sum(i + 8));
        _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xEE>(a, b))
    });
    let low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
    let high = _mm512_setr_epi32(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    let quarters: [__m512; 4] = std::array::from_fn(|i| {
        let (a, b) = (halves[i], halves[i + 4]);
        _mm512_add_ps(_mm512_permutex2var_ps(a, low, b), _mm512_permutex2var_ps(a, high, b))
    });
    let pairs: [__m512; 2] = std::array::from_fn(|i| {
        let (a, b) = (quarters[i], quarters[i + 2]);
        _mm512_add_ps(_mm512_shuffle_ps::<0x44>(a, b), _mm512_shuffle_ps::<0xEE>(a, b))
    });
    let [a, b] = pairs;
    let ends = _mm512_add_ps(_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xDD>(a, b));
    let ends = _mm512_shuffle_ps::<0xD8>(ends, ends);
    let mut folded = [0.0; LANES];
    // SAFETY: an array of 16 values is what is written.
    unsafe { _mm512_storeu_ps(folded.as_mut_ptr(), ends) };
    folded
}
