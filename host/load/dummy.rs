//! Weights that are made up, for `--load dummy`: the speed of a model without its files.
//!
//! Invariant: a tensor's values depend on seed, name, element type and position only, never on the
//! other tensors or on the number of threads. They are small enough that activations stay finite.

use super::arena::{Arena, Plan};
use super::{LoadError, Needed};
use std::collections::BTreeSet;
use std::thread;
use tilert_mk_model::weights::{Dtype, TensorView, WeightSource};

/// Bytes that one stream of random numbers fills.
const PIECE_BYTES: usize = 1 << 20;
/// Pieces that are filled between two reports of progress.
const BATCH_PIECES: usize = 256;
/// Most threads that fill memory; two saturate what page faults allow on small machines.
const THREAD_COUNT_MAX: usize = 8;
/// Distinct values of a tensor. Their encodings stay in the first-level cache.
const VALUE_COUNT: usize = 1 << 12;
/// Half the width of the uniform distribution of norm weights around 1.
const NORM_SPREAD: f32 = 0.05;
/// Half the width of the uniform distribution of all others around 0: deviation 0.02 times sqrt(3).
const SPREAD: f32 = 0.034_641_016;

/// Tensors filled with pseudo-random values.
pub struct DummyWeights(Arena);

impl DummyWeights {
    /// Makes the listed tensors: norm weights near 1, all else uniform with deviation 0.02.
    /// `progress` hears of bytes done and in all.
    ///
    /// Errors:  `Overflow`, `Memory`.
    /// Cost:    writes every byte once, on up to `THREAD_COUNT_MAX` threads; 560 MiB of bf16 took
    ///          0.51 s on two cores.
    pub fn new(
        needed: &Needed,
        dtype: Dtype,
        seed: u64,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, LoadError> {
        let mut plan = Plan::new();
        let mut names = BTreeSet::new();
        for (name, shape) in needed {
            if names.insert(name) {
                plan.push(name, dtype, shape)?;
            }
        }
        let mut map = plan.map()?;
        let mut pieces = pieces(&plan, &mut map, seed);
        let fill_all = match dtype {
            Dtype::F32 => fill_all::<4>,
            Dtype::F16 | Dtype::Bf16 => fill_all::<2>,
        };
        fill_all(&mut pieces, dtype, progress);
        drop(pieces);
        Ok(Self(plan.finish(map)?))
    }

    /// Size of all tensors with the padding between them, in bytes.
    pub fn byte_count(&self) -> u64 {
        self.0.byte_count()
    }
}

impl WeightSource for DummyWeights {
    fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        self.0.tensor(name)
    }
}

/// A part of a tensor, filled from its own stream.
struct Piece<'a> {
    bytes: &'a mut [u8],
    stream: u64,
    is_norm: bool,
}

/// Cuts the memory of all tensors into pieces, in order of address.
fn pieces<'a>(plan: &Plan, map: &'a mut [u8], seed: u64) -> Vec<Piece<'a>> {
    let mut pieces = Vec::new();
    let (mut rest, mut position) = (map, 0);
    for slot in &plan.slots {
        // Slots ascend and lie inside the map, so both cuts are in bounds; else nothing is left.
        let (_, behind) =
            rest.split_at_mut_checked(slot.range.start - position).unwrap_or_default();
        let (tensor, behind) = behind.split_at_mut_checked(slot.range.len()).unwrap_or_default();
        (rest, position) = (behind, slot.range.end);
        let is_norm = slot.name.contains("norm") && slot.name.ends_with(".weight");
        let name_key = slot.name.bytes().fold(mix(seed), |key, byte| mix(key ^ u64::from(byte)));
        for (piece_idx, bytes) in (0u64..).zip(tensor.chunks_mut(PIECE_BYTES)) {
            pieces.push(Piece { bytes, stream: mix(name_key ^ piece_idx), is_norm });
        }
    }
    pieces
}

/// Fills all pieces, on several threads; `N` is the size of an element in bytes.
fn fill_all<const N: usize>(
    pieces: &mut [Piece<'_>],
    dtype: Dtype,
    progress: &mut dyn FnMut(u64, u64),
) {
    let norm = encodings::<N>(dtype, 1.0, NORM_SPREAD);
    let other = encodings::<N>(dtype, 0.0, SPREAD);
    let fill_share = |pieces: &mut [Piece<'_>]| {
        for piece in pieces {
            fill(piece.bytes, if piece.is_norm { &norm } else { &other }, piece.stream);
        }
    };
    let byte_count = |pieces: &[Piece<'_>]| pieces.iter().map(|p| p.bytes.len() as u64).sum();
    let thread_count = thread::available_parallelism().map_or(1, usize::from);
    let (total, mut done): (u64, u64) = (byte_count(pieces), 0);
    for batch in pieces.chunks_mut(BATCH_PIECES) {
        let share = batch.len().div_ceil(thread_count.min(THREAD_COUNT_MAX));
        thread::scope(|scope| {
            for pieces in batch.chunks_mut(share) {
                scope.spawn(|| fill_share(pieces));
            }
        });
        done += byte_count(batch);
        progress(done, total);
    }
}

/// The values of the distribution, evenly spaced over centre +- spread, as stored elements.
fn encodings<const N: usize>(dtype: Dtype, centre: f32, spread: f32) -> [[u8; N]; VALUE_COUNT] {
    std::array::from_fn(|i| {
        let unit = (2 * i + 1) as f32 / VALUE_COUNT as f32 - 1.0;
        let mut bytes = Vec::with_capacity(N);
        dtype.append(centre + spread * unit, &mut bytes);
        bytes.first_chunk().copied().unwrap_or([0; N])
    })
}

/// Fills `bytes` with elements chosen by the numbers of a stream, four from each.
fn fill<const N: usize>(bytes: &mut [u8], values: &[[u8; N]; VALUE_COUNT], mut stream: u64) {
    for group in bytes.as_chunks_mut::<N>().0.chunks_mut(4) {
        stream = stream.wrapping_add(GOLDEN);
        let mut bits = mix(stream);
        for element in group {
            *element = values[bits as usize % VALUE_COUNT];
            bits >>= 16;
        }
    }
}

/// 2^64 divided by the golden ratio: the step of the counter.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Scrambles a counter into a random number. Source: SplitMix64, Steele, Lea and Flood 2014.
fn mix(counter: u64) -> u64 {
    let z = (counter ^ (counter >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn needed() -> Vec<(String, Vec<u64>)> {
        let shapes = [("m.weight", vec![700, 1001]), ("x_norm.weight", vec![5000])];
        shapes.into_iter().map(|(name, shape)| (name.to_owned(), shape)).collect()
    }

    fn statistics(values: &[f32]) -> (f64, f64) {
        let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len() as f64;
        let square = |v: &f32| (f64::from(*v) - mean).powi(2);
        (mean, (values.iter().map(square).sum::<f64>() / values.len() as f64).sqrt())
    }

    #[test]
    fn values_have_the_promised_distribution() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let weights = DummyWeights::new(&needed(), dtype, 1, &mut |_, _| ()).unwrap();
            let matrix = weights.tensor("m.weight").unwrap();
            assert!(matrix.is_consistent() && matrix.dtype == dtype);
            let (mean, deviation) = statistics(&matrix.to_f32());
            assert!(mean.abs() < 1e-4 && (deviation - 0.02).abs() < 1e-4, "{mean} {deviation}");
            let norm = weights.tensor("x_norm.weight").unwrap().to_f32();
            assert!(norm.iter().all(|v| (0.94..=1.06).contains(v)));
        }
    }

    #[test]
    fn values_depend_on_seed_and_name_only() {
        let make = |needed: &Needed, seed| {
            DummyWeights::new(needed, Dtype::Bf16, seed, &mut |_, _| ()).unwrap()
        };
        let mut list = needed();
        let first = make(&list, 7);
        list.push(("y.weight".to_owned(), vec![700, 1001]));
        list.reverse();
        let second = make(&list, 7);
        assert_eq!(first.tensor("m.weight"), second.tensor("m.weight"));
        let data = |weights: &DummyWeights, name| weights.tensor(name).unwrap().data.to_vec();
        assert_ne!(data(&second, "m.weight"), data(&second, "y.weight"));
        assert_ne!(data(&first, "m.weight"), data(&make(&needed(), 8), "m.weight"));
        // No piece repeats the one before.
        let bytes = data(&first, "m.weight");
        assert_ne!(bytes[..1000], bytes[PIECE_BYTES..PIECE_BYTES + 1000]);
    }

    #[test]
    fn nothing_needed_is_no_error() {
        assert_eq!(DummyWeights::new(&[], Dtype::F32, 0, &mut |_, _| ()).unwrap().byte_count(), 0);
    }
}
