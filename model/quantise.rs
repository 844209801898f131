//! Quantisation: matrices in fewer bits than the checkpoint's, and what they then mean.
//!
//! Codes and scales are chosen here and nowhere else; where they lie in memory is `shared/blocks.rs`.
//! A weight becomes its code times its scale, rounded to nearest.

use half::f16;
use tilert_mk_shared::blocks::{FP8_BLOCK, Q_COLUMNS};
use tilert_mk_shared::task::WeightFormat;

/// Largest code of `Q8`.
const Q8_MAX: f32 = 127.0;
/// Smallest code of `Q4`, as a magnitude; the largest is one less.
const Q4_MAX: f32 = 8.0;
/// Largest value of E4M3.
const E4M3_MAX: f32 = 448.0;
/// The E4M3 code of what is no number, but for its sign.
pub const E4M3_NAN: u8 = 0x7f;
/// Below this E4M3 is subnormal: multiples of 2^-9.
const E4M3_NORMAL_MIN: f32 = 1.0 / 64.0;

/// Rounds to the nearest integer, halves to even; for magnitudes up to 2^22.
fn round(value: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (value + SHIFT) - SHIFT
}

/// The value of the largest magnitude, with its sign; not a number if one is not.
fn extreme(values: &[f32]) -> f32 {
    values.iter().fold(
        0.0,
        |most, value| {
            if value.abs() > most.abs() || value.is_nan() { *value } else { most }
        },
    )
}

/// The scale of a block of `Q8` or `Q4`, as stored, and its codes.
///
/// Errors:  none; a scale that is not finite tells of values that are not, or too large.
pub fn quantise_block(format: WeightFormat, values: &[f32], codes: &mut [i8; Q_COLUMNS]) -> f16 {
    let most = extreme(values);
    // With 4 bits, the side of the extreme value gets the code more that there is.
    let (scale, low, high) = match format {
        WeightFormat::Q4 => (most / -Q4_MAX, -Q4_MAX, Q4_MAX - 1.0),
        _ => (most.abs() / Q8_MAX, -Q8_MAX, Q8_MAX),
    };
    let scale = f16::from_f32(scale);
    let stored = scale.to_f32();
    let inverse = if stored == 0.0 { 0.0 } else { 1.0 / stored };
    *codes = [0; Q_COLUMNS];
    for (code, value) in codes.iter_mut().zip(values) {
        *code = round((value * inverse).clamp(low, high)) as i8;
    }
    scale
}

/// The scales of a matrix in `Fp8`: one for each block of 128 rows and 128 columns, row by row.
pub fn fp8_scales(values: &[f32], columns: usize) -> Vec<f32> {
    let scale = |most: f32| most.abs() / E4M3_MAX;
    let mut scales = Vec::new();
    for rows in values.chunks(FP8_BLOCK * columns) {
        let mut most = vec![0.0; columns.div_ceil(FP8_BLOCK)];
        for row in rows.chunks(columns) {
            for (most, block) in most.iter_mut().zip(row.chunks(FP8_BLOCK)) {
                *most = extreme(&[*most, extreme(block)]);
            }
        }
        scales.extend(most.into_iter().map(scale));
    }
    scales
}

/// The E4M3 code of a value of at most 448, rounded to nearest even.
pub fn e4m3_from_f32(value: f32) -> u8 {
    let magnitude = value.abs().min(E4M3_MAX);
    let code = if magnitude < E4M3_NORMAL_MIN {
        round(magnitude * 512.0) as u32
    } else {
        let bits = magnitude.to_bits();
        // To 3 bits of fraction; the exponent's bias is 120 less.
        let rounded = bits + 0x7_ffff + (bits >> 20 & 1);
        (rounded >> 20) - (120 << 3)
    };
    (value.to_bits() >> 24 & 0x80) as u8 | code as u8
}

/// The value of an E4M3 code; not a number for `0x7f` and `0xff`.
pub fn e4m3_to_f32(code: u8) -> f32 {
    let rest = code & 0x7f;
    let magnitude = if rest == E4M3_NAN {
        f32::NAN
    } else if rest < 8 {
        f32::from(rest) / 512.0
    } else {
        f32::from_bits((u32::from(rest) << 20) + (120 << 23))
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// What a matrix of rows of `columns` values means after quantisation: the slow twin of what the
/// engine packs and multiplies.
pub fn dequantised(format: WeightFormat, values: &[f32], columns: usize) -> Vec<f32> {
    match format {
        WeightFormat::Q8 | WeightFormat::Q4 => {
            let blocks = values.chunks(columns).flat_map(|row| row.chunks(Q_COLUMNS));
            let widen = |block: &[f32]| {
                let mut codes = [0; Q_COLUMNS];
                let scale = quantise_block(format, block, &mut codes).to_f32();
                codes[..block.len()].iter().map(|code| f32::from(*code) * scale).collect::<Vec<_>>()
            };
            blocks.flat_map(widen).collect()
        }
        WeightFormat::Fp8 => {
            let scales = fp8_scales(values, columns);
            let block_columns = columns.div_ceil(FP8_BLOCK);
            let widen = |(idx, value): (usize, &f32)| {
                let (row, column) = (idx / columns, idx % columns);
                let scale = scales[row / FP8_BLOCK * block_columns + column / FP8_BLOCK];
                fp8_value(*value, scale)
            };
            values.iter().enumerate().map(widen).collect()
        }
        WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => values.to_vec(),
    }
}

/// The code of a value in a block of this scale.
pub fn fp8_code(value: f32, scale: f32) -> u8 {
    e4m3_from_f32(if scale == 0.0 { 0.0 } else { value / scale })
}

fn fp8_value(value: f32, scale: f32) -> f32 {
    e4m3_to_f32(fp8_code(value, scale)) * scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_codes_are_the_nearest() {
        let finite: Vec<u8> = (0..=0x7eu8).collect();
        for code in &finite {
            assert_eq!(e4m3_from_f32(e4m3_to_f32(*code)), *code);
            assert_eq!(e4m3_from_f32(-e4m3_to_f32(*code)), *code | 0x80);
        }
        assert_eq!((e4m3_to_f32(0x7e), e4m3_to_f32(0x38)), (448.0, 1.0));
        assert!(e4m3_to_f32(0x7f).is_nan() && e4m3_to_f32(0xff).is_nan());
        // Halfway between neighbours the even code wins; nearer ones win whatever they are.
        for pair in finite.windows(2) {
            let (low, high) = (e4m3_to_f32(pair[0]), e4m3_to_f32(pair[1]));
            let middle = (low + high) / 2.0;
            assert_eq!(e4m3_from_f32(middle) & 1, 0, "{middle}");
            assert_eq!(e4m3_from_f32(middle - (high - low) / 64.0), pair[0]);
            assert_eq!(e4m3_from_f32(middle + (high - low) / 64.0), pair[1]);
        }
        assert_eq!(e4m3_from_f32(1e9), 0x7e);
    }

    #[test]
    fn blocks_keep_their_extremes_and_round_the_rest() {
        let values: Vec<f32> = (0..32).map(|i| (i as f32 - 20.0) * 0.01).collect();
        for (format, steps) in [(WeightFormat::Q8, 127.0), (WeightFormat::Q4, 8.0)] {
            let found = dequantised(format, &values, 32);
            for (found, value) in found.iter().zip(&values) {
                // Half a step, and the scale's own rounding to 11 bits.
                let limit = 0.2 / steps / 2.0 + value.abs() / 2048.0;
                assert!((found - value).abs() <= limit * 1.001, "{format:?}: {found} not {value}");
            }
        }
        let mut codes = [1; Q_COLUMNS];
        assert_eq!(quantise_block(WeightFormat::Q8, &[0.0; 32], &mut codes), f16::ZERO);
        assert_eq!(codes, [0; Q_COLUMNS]);
        assert!(!quantise_block(WeightFormat::Q4, &[1.0, f32::NAN, 2.0], &mut codes).is_finite());
    }

    #[test]
    fn fp8_has_a_scale_for_each_block_of_rows_and_columns() {
        let columns = 136;
        let values: Vec<f32> = (0..130 * columns)
            .map(|idx| if idx / columns < 128 { 1.0 } else { 3.0 } * ((idx % 7) as f32 - 3.0))
            .collect();
        let scales = fp8_scales(&values, columns);
        assert_eq!(scales, [3.0, 3.0, 9.0, 9.0].map(|most: f32| most / 448.0));
        for (found, value) in dequantised(WeightFormat::Fp8, &values, columns).iter().zip(&values) {
            assert!((found - value).abs() <= value.abs() / 16.0, "{found} not {value}");
        }
    }
}
