//! Packing: bf16 weights of linear tasks in the order in which a GPU multiplies them.

use std::num::NonZero;
use std::thread;

use tilert_mk_model::lower::named_place;
use tilert_mk_model::weights::TensorView;
use tilert_mk_shared::packed::Packing;
use tilert_mk_shared::task::{LinearArgs, Opcode, Task};

use crate::driver::Device;
use crate::error::{Error, Result};

/// Bytes that are packed between two uploads, about.
const BATCH_BYTES: usize = 64 << 20;
/// Columns that stay together.
const QUAD: usize = 4;
/// Bytes of a value.
const VALUE_BYTES: usize = 2;

/// One task's rows and where they go.
struct Piece<'a> {
    packing: Packing,
    /// Rows of each segment, as the checkpoint stores them.
    segments: Vec<&'a [u8]>,
}

/// Packs and uploads the weights of all linear tasks; the tasks' indices and addresses.
///
/// Errors: memory that is not there; what the driver says.
pub(super) fn upload(
    tasks: &[Task],
    views: &[TensorView<'_>],
    device: &mut dyn Device,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Vec<(usize, u64)>> {
    let linear = tasks.iter().enumerate().filter(|(_, t)| t.opcode == Opcode::Linear as u16);
    let pieces = linear.map(|(task_idx, task)| Ok((task_idx, piece(task, views)?)));
    let pieces = pieces.collect::<Result<Vec<_>>>()?;
    let total = pieces.iter().map(|(_, piece)| u64::from(piece.packing.byte_count())).sum();
    let base = device.reserve("the weights", total)?;
    let (mut places, mut done) = (Vec::with_capacity(pieces.len()), 0);
    let mut buffer = Vec::new();
    let mut rest = pieces.as_slice();
    while !rest.is_empty() {
        let mut bytes = 0;
        let mut count = 0;
        while count < rest.len() && (count == 0 || bytes < BATCH_BYTES) {
            let (task_idx, piece) = &rest[count];
            places.push((*task_idx, base + done + bytes as u64));
            bytes += piece.packing.byte_count() as usize;
            count += 1;
        }
        let (batch, after) = rest.split_at(count);
        buffer.clear();
        buffer.resize(bytes, 0);
        pack_all(batch, &mut buffer);
        device.write(base + done, &buffer)?;
        done += bytes as u64;
        progress(done, total);
        rest = after;
    }
    Ok(places)
}

fn piece<'a>(task: &Task, views: &[TensorView<'a>]) -> Result<Piece<'a>> {
    let args = LinearArgs::unpack(task);
    let mut segments = Vec::new();
    for segment in args.segments.iter().filter(|segment| segment.row_count > 0) {
        let len = segment.row_count as usize * args.in_dim as usize * VALUE_BYTES;
        let rows = named_place(segment.weights)
            .and_then(|(index, first)| views.get(index)?.data.get(first as usize..)?.get(..len));
        segments.push(rows.ok_or_else(|| Error::Request("weights outside a tensor".into()))?);
    }
    Ok(Piece { packing: Packing::new(args.row_count(), args.in_dim), segments })
}

/// Packs a batch into `out`, which is all zeros, on all cores.
fn pack_all(batch: &[(usize, Piece<'_>)], out: &mut [u8]) {
    let cores = thread::available_parallelism().map_or(1, NonZero::get);
    thread::scope(|scope| {
        let mut out = out;
        for share in batch.chunks(batch.len().div_ceil(cores)) {
            let bytes = share.iter().map(|(_, piece)| piece.packing.byte_count() as usize).sum();
            let (own, after) = out.split_at_mut(bytes);
            out = after;
            scope.spawn(move || {
                let mut own = own;
                for (_, piece) in share {
                    let (target, after) = own.split_at_mut(piece.packing.byte_count() as usize);
                    pack(piece, target);
                    own = after;
                }
            });
        }
    });
}

/// Packs one task's rows into `out`, which is all zeros.
fn pack(piece: &Piece<'_>, out: &mut [u8]) {
    let row_bytes = piece.packing.in_dim as usize * VALUE_BYTES;
    let rows = piece.segments.iter().flat_map(|segment| segment.chunks_exact(row_bytes));
    for (row, values) in (0..).zip(rows) {
        for (idx, quad) in (0..).zip(values.chunks_exact(QUAD * VALUE_BYTES)) {
            let (first, second) = quad.split_at(QUAD * VALUE_BYTES / 2);
            let places = piece.packing.place(row, idx * QUAD as u32).map(|place| place as usize);
            out[places[0]..places[0] + first.len()].copy_from_slice(first);
            out[places[1]..places[1] + second.len()].copy_from_slice(second);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_rows_are_where_the_packing_says() {
        let rows: Vec<u16> = (0..17 * 72).collect();
        let bytes: Vec<u8> = rows.iter().flat_map(|value| value.to_le_bytes()).collect();
        let (a, b) = bytes.split_at(5 * 72 * VALUE_BYTES);
        let piece = Piece { packing: Packing::new(17, 72), segments: vec![a, b] };
        let mut out = vec![0; piece.packing.byte_count() as usize];
        pack(&piece, &mut out);
        let mut left = out.clone();
        for row in 0..17 {
            for column in (0..72).step_by(QUAD) {
                let value = row * 72 + column;
                for (place, value) in
                    piece.packing.place(row, column).into_iter().zip([value, value + 2])
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
