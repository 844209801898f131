//! Copies what a model needs out of its files into huge pages, once, and lets the files go.

use super::arena::{Arena, Plan};
use super::{Checkpoint, LoadError, Needed};
use std::collections::BTreeSet;

/// Bytes copied between two calls of the progress callback.
const PIECE_BYTES: usize = 16 << 20;

/// Copies the needed tensors in the order of the list and drops the checkpoint with its mappings.
///
/// Units:   `progress` gets bytes copied and bytes to copy; the last call has both equal.
/// Errors:  for a tensor that is missing, of another shape or of an unsupported type, before
///          anything is copied; `Memory`.
/// Cost:    reads and writes every needed byte once; a name that is listed twice is copied once.
pub fn copied(
    checkpoint: Checkpoint,
    needed: &Needed,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Arena, LoadError> {
    let mut plan = Plan::new();
    let mut names = BTreeSet::new();
    let mut bytes_total = 0;
    for (name, shape) in needed {
        if names.insert(name) {
            let view = checkpoint.expect_shape(name, shape)?;
            plan.push(name, view.dtype, shape)?;
            bytes_total += view.data.len() as u64;
        }
    }
    let mut map = plan.map()?;
    let mut bytes_done = 0;
    progress(bytes_done, bytes_total);
    for slot in &plan.slots {
        let source = checkpoint.require(&slot.name)?.data;
        let target = map.get_mut(slot.range.clone()).unwrap_or_default();
        for (to, from) in target.chunks_mut(PIECE_BYTES).zip(source.chunks(PIECE_BYTES)) {
            to.copy_from_slice(from);
            bytes_done += from.len() as u64;
            progress(bytes_done, bytes_total);
        }
    }
    drop(checkpoint);
    plan.finish(map)
}
