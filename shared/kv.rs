//! Geometry of the KV cache and of attention over it.
//!
//! The cache is `[layer_count, slot_count, kv_head_count, 2, context_max, head_dim] f32`; index 2 is
//! keys (after RoPE), then values. Attention over a sequence is cut into splits: who a position belongs
//! to depends on the position alone, so a token's result is the same in every step width and in any
//! company, and tasks that have different splits share no position.

use crate::limits::{ATTENTION_BLOCK, ATTENTION_SPLIT_MAX};

/// Shape of a KV cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct KvGeometry {
    /// Layers of the model.
    pub layer_count: u32,
    /// Sequences that can be resident.
    pub slot_count: u32,
    /// KV heads of a layer.
    pub kv_head_count: u32,
    /// Positions kept for a sequence.
    pub context_max: u32,
    /// Values in a key or value.
    pub head_dim: u32,
}

impl KvGeometry {
    /// Values kept for one head of one sequence, keys or values alone.
    #[inline]
    pub const fn plane_values(&self) -> u64 {
        self.context_max as u64 * self.head_dim as u64
    }

    /// Index of the first key value of `(layer, slot, kv_head)`; the values follow one plane later.
    #[inline]
    pub const fn key_idx(&self, layer_idx: u32, slot: u32, kv_head_idx: u32) -> u64 {
        let row = layer_idx as u64 * self.slot_count as u64 + slot as u64;
        (row * self.kv_head_count as u64 + kv_head_idx as u64) * 2 * self.plane_values()
    }

    /// Values in the whole cache.
    #[inline]
    pub const fn value_count(&self) -> u64 {
        self.key_idx(self.layer_count, 0, 0)
    }
}

/// The attention split to which a position belongs: blocks of `ATTENTION_BLOCK` positions are dealt
/// to `ATTENTION_SPLIT_MAX` splits in turns.
#[inline]
pub const fn attention_split(position: u32) -> u32 {
    position / ATTENTION_BLOCK % ATTENTION_SPLIT_MAX
}

/// Number of attention splits, the first ones, that have positions for a query at `position`.
#[inline]
pub const fn attention_split_count(position: u32) -> u32 {
    let blocks = position / ATTENTION_BLOCK + 1;
    if blocks < ATTENTION_SPLIT_MAX { blocks } else { ATTENTION_SPLIT_MAX }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_with_positions_come_first() {
        for position in (0..5000).chain([65_535, 65_536, 131_071, 1_000_000]) {
            let count = attention_split_count(position);
            assert!(attention_split(position) < count && count <= ATTENTION_SPLIT_MAX);
            assert_eq!((0..=position).map(attention_split).max(), Some(count - 1));
        }
    }

    #[test]
    fn planes_do_not_overlap() {
        let kv = KvGeometry {
            layer_count: 3,
            slot_count: 2,
            kv_head_count: 5,
            context_max: 7,
            head_dim: 8,
        };
        assert_eq!(kv.key_idx(0, 0, 1) - kv.key_idx(0, 0, 0), 2 * kv.plane_values());
        assert_eq!(kv.value_count(), 3 * 2 * 5 * 2 * 7 * 8);
    }
}
