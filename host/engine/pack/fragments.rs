//! Bf16 and E4M3 weights in the order in which a GPU multiplies them (`shared/packed.rs`).

use tilert_mk_model::strips::StoredRows;
use tilert_mk_shared::blocks::FP8_BLOCK;
use tilert_mk_shared::packed::{Packing, spread_code};

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
    if packing.is_fp8 {
        return pack_fp8(packing, segments, out);
    }
    pack_bf16(packing, segments, out);
    Ok(())
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
                let bytes = spread_code(code, is_second).to_le_bytes();
                for (out, byte) in out[place as usize..].iter_mut().zip(bytes) {
                    *out |= byte;
                }
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

#[cfg(test)]
mod tests {
    use super::*;
    use tilert_mk_model::weights::Dtype;
    use tilert_mk_shared::task::WeightFormat;

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
