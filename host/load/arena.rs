//! One anonymous mapping that holds many tensors, in huge pages where the system gives them.
//!
//! Invariant: tensors lie behind each other in the order of the list, each on a multiple of
//! `TENSOR_ALIGN`, none overlapping; their ranges are inside the mapping. Decoding reads every
//! weight once per token, and reads from 4 KiB pages measured up to 25 % slower.

use super::error::{LoadError, shorten};
use memmap2::{Mmap, MmapMut};
use std::collections::BTreeMap;
use std::ops::Range;
use tilert_mk_model::weights::{Dtype, TensorView, WeightSource};

/// Alignment of every tensor in bytes: a cache line, and the widest vector register.
pub(super) const TENSOR_ALIGN: usize = 64;

/// Where one tensor of an arena lies.
pub(super) struct Slot {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    shape: Vec<u64>,
    pub(super) range: Range<usize>,
}

/// The plan of an arena: slots in order of address.
pub(super) struct Plan {
    pub(super) slots: Vec<Slot>,
    byte_count: usize,
}

impl Plan {
    /// A plan without tensors.
    pub(super) fn new() -> Self {
        Self { slots: Vec::new(), byte_count: 0 }
    }

    /// Reserves room for a tensor behind the others.
    ///
    /// Errors:  `Overflow`.
    pub(super) fn push(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: &[u64],
    ) -> Result<(), LoadError> {
        let overflow = || LoadError::Overflow { name: shorten(name) };
        let bytes = shape.iter().try_fold(dtype.byte_count(), |n, axis| n.checked_mul(*axis));
        let bytes = bytes.and_then(|n| usize::try_from(n).ok()).ok_or_else(overflow)?;
        let start = self.byte_count.checked_next_multiple_of(TENSOR_ALIGN).ok_or_else(overflow)?;
        let end = start.checked_add(bytes).ok_or_else(overflow)?;
        let (name, shape) = (name.to_owned(), shape.to_vec());
        self.slots.push(Slot { name, dtype, shape, range: start..end });
        self.byte_count = end;
        Ok(())
    }

    /// Maps the memory; it reads as zero until it is written.
    ///
    /// Errors:  `Memory`.
    pub(super) fn map(&self) -> Result<MmapMut, LoadError> {
        let memory = |source| LoadError::Memory { byte_count: self.byte_count as u64, source };
        // An empty mapping is not possible everywhere.
        let map = MmapMut::map_anon(self.byte_count.max(1)).map_err(memory)?;
        // Advice only: a kernel without huge pages gives small ones, which are slower, not wrong.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(map)
    }

    /// The arena over the written memory, which becomes read-only.
    ///
    /// Errors:  `Memory`.
    pub(super) fn finish(self, map: MmapMut) -> Result<Arena, LoadError> {
        let byte_count = self.byte_count as u64;
        let map = map.make_read_only();
        let map = map.map_err(|source| LoadError::Memory { byte_count, source })?;
        let slots = self.slots.into_iter().map(|slot| (slot.name.clone(), slot)).collect();
        Ok(Arena { map, slots, byte_count })
    }
}

/// Named tensors in one read-only mapping, each on a multiple of 64 bytes.
pub struct Arena {
    map: Mmap,
    slots: BTreeMap<String, Slot>,
    byte_count: u64,
}

impl Arena {
    /// Size of all tensors with the padding between them, in bytes.
    pub fn byte_count(&self) -> u64 {
        self.byte_count
    }
}

impl WeightSource for Arena {
    fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let slot = self.slots.get(name)?;
        let data = self.map.get(slot.range.clone())?;
        Some(TensorView { dtype: slot.dtype, shape: &slot.shape, data })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_aligned_and_disjoint() {
        let mut plan = Plan::new();
        plan.push("a", Dtype::Bf16, &[3, 11]).unwrap();
        plan.push("b", Dtype::F32, &[]).unwrap();
        plan.push("c", Dtype::F32, &[0]).unwrap();
        plan.push("d", Dtype::F16, &[64]).unwrap();
        let ranges: Vec<_> = plan.slots.iter().map(|slot| slot.range.clone()).collect();
        assert_eq!(ranges, [0..66, 128..132, 192..192, 192..320]);
        let mut map = plan.map().unwrap();
        map[192..320].fill(1);
        let arena = plan.finish(map).unwrap();
        assert_eq!(arena.byte_count(), 320);
        assert_eq!(arena.tensor("d").unwrap().data, [1; 128]);
        let a = arena.tensor("a").unwrap();
        assert_eq!((a.dtype, a.shape, a.is_consistent()), (Dtype::Bf16, &[3, 11][..], true));
        assert!(arena.tensor("b").unwrap().data.as_ptr().addr().is_multiple_of(TENSOR_ALIGN));
        assert!(arena.tensor("e").is_none());
    }

    #[test]
    fn impossible_sizes_are_errors() {
        let mut plan = Plan::new();
        assert!(plan.push("a", Dtype::F32, &[u64::MAX]).is_err());
        assert!(plan.push("a", Dtype::F32, &[1 << 40, 1 << 40]).is_err());
        plan.push("a", Dtype::F32, &[1 << 60]).unwrap();
        plan.push("b", Dtype::F32, &[1 << 60]).unwrap();
        let message = plan.map().unwrap_err().to_string();
        assert!(message.contains("cannot reserve 9223372036854775808 bytes"), "{message}");
        plan.push("c", Dtype::F32, &[1 << 61]).unwrap_err();
        assert!(Plan::new().map().is_ok());
    }
}
