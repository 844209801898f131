//! Weights in the order in which a GPU multiplies them (`shared/packed.rs`).

use tilert_mk_model::strips::{StoredRows, integer_row};
use tilert_mk_shared::blocks::{FP8_BLOCK, Q_COLUMNS};
use tilert_mk_shared::packed::{Packing, nibble, spread_e4m3, spread_q8};
use tilert_mk_shared::task::WeightFormat;

/// Columns that stay together.
const QUAD: usize = 4;
/// Bytes of a value.
const VALUE_BYTES: usize = 2;

/// Packs one task's rows into `out`, which is all zeros.
///
/// Errors: the segment of rows whose codes, or scales, are not finite.
pub(super) fn pack(
    packing: &Packing,
    segments: &[StoredRows<'_>],
    out: &mut [u8],
) -> Result<(), usize> {
    match packing.format {
        WeightFormat::Fp8 => pack_fp8(packing, segments, out),
        WeightFormat::Q8 | WeightFormat::Q4 => pack_integers(packing, segments, out),
        _ => {
            pack_bf16(packing, segments, out);
            Ok(())
        }
    }
}

fn pack_bf16(packing: &Packing, segments: &[StoredRows<'_>], out: &mut [u8]) {
    let row_bytes = packing.in_dim as usize * VALUE_BYTES;
    let rows = segments.iter().flat_map(|segment| segment.values.chunks_exact(row_bytes));
    for (row, values) in (0..).zip(rows) {
        for (idx, quad) in (0..).zip(values.chunks_exact(QUAD * VALUE_BYTES)) {
            let (first, second) = quad.split_at(QUAD * VALUE_BYTES / 2);
            let places = packing.place(row, idx * QUAD as u32).map(|place| place as usize);
            out[places[0]..places[0] + first.len()].copy_from_slice(first);
            out[places[1]..places[1] + second.len()].copy_from_slice(second);
        }
    }
}

fn pack_fp8(packing: &Packing, segments: &[StoredRows<'_>], out: &mut [u8]) -> Result<(), usize> {
    let in_dim = packing.in_dim as usize;
    let mut row = 0;
    for (segment_idx, segment) in segments.iter().enumerate() {
        let row_count = segment.values.len() / (in_dim * segment.dtype.byte_count() as usize);
        for idx in 0..row_count {
            let (scales, is_finite) = segment.fp8_row(idx, in_dim, |column, code| {
                let (place, is_second) = packing.code_place(row, column as u32);
                add(out, place, spread_e4m3(code, is_second));
            });
            if !is_finite {
                return Err(segment_idx);
            }
            for (column, scale) in (0..).step_by(FP8_BLOCK).zip(scales) {
                let place = packing.scale_place(row, column) as usize;
                out[place..place + 4].copy_from_slice(&scale.to_le_bytes());
            }
            row += 1;
        }
    }
    Ok(())
}

fn pack_integers(
    packing: &Packing,
    segments: &[StoredRows<'_>],
    out: &mut [u8],
) -> Result<(), usize> {
    let mut row = 0;
    for (segment_idx, segment) in segments.iter().enumerate() {
        let row_bytes = packing.in_dim as usize * segment.dtype.byte_count() as usize;
        for values in segment.values.chunks_exact(row_bytes) {
            let is_finite =
                integer_row(packing.format, segment.dtype, values, |idx, codes, scale| {
                    let first = (idx * Q_COLUMNS) as u32;
                    for (column, code) in (first..).zip(codes) {
                        if packing.format == WeightFormat::Q4 {
                            let (place, shift) = packing.nibble_place(row, column);
                            out[place as usize] |= nibble(*code) << shift;
                        } else {
                            let (place, is_second) = packing.code_place(row, column);
                            add(out, place, spread_q8(*code, is_second));
                        }
                    }
                    let place = packing.scale_place(row, first) as usize;
                    out[place..place + 2].copy_from_slice(&scale.to_le_bytes());
                });
            if !is_finite {
                return Err(segment_idx);
            }
            row += 1;
        }
    }
    Ok(())
}

/// Puts bits beside those that are in two bytes.
fn add(out: &mut [u8], place: u32, bits: u16) {
    for (out, byte) in out[place as usize..].iter_mut().zip(bits.to_le_bytes()) {
        *out |= byte;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tilert_mk_model::weights::Dtype;

    #[test]
    fn packed_rows_are_where_the_packing_says() {
        let rows: Vec<u16> = (0..17 * 72).collect();
        let bytes: Vec<u8> = rows.iter().flat_map(|value| value.to_le_bytes()).collect();
        let (a, b) = bytes.split_at(5 * 72 * VALUE_BYTES);
        let packing = Packing::new(17, 72, WeightFormat::Bf16);
        let segments =
            [a, b].map(|values| StoredRows { dtype: Dtype::Bf16, values, first: 0, scales: &[] });
        let mut out = vec![0; packing.byte_count() as usize];
        assert_eq!(pack(&packing, &segments, &mut out), Ok(()));
        let mut left = out.clone();
        for row in 0..17 {
            for column in (0..72).step_by(QUAD) {
                let value = row * 72 + column;
                for (place, value) in packing.place(row, column).into_iter().zip([value, value + 2])
                {
                    let place = place as usize;
                    let expected = [value as u16, value as u16 + 1].map(u16::to_le_bytes).concat();
                    assert_eq!(out[place..place + 4], expected);
                    left[place..place + 4].fill(0);
                }
            }
        }
        assert!(left.iter().all(|byte| *byte == 0), "padding is zero");
    }
}
