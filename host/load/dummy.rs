//! Weights that are made up, for `--load dummy`: the speed of a model without its files.
//!
//! Invariant: a tensor's values depend on seed, name, element type and position only, never on the
//! other tensors or on the number of threads. They are small enough that activations stay finite.

use super::LoadError;
use super::arena::{Arena, Plan};
use std::collections::BTreeSet;
use std::sync::Arc;
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
/// The same of the codes of FP8, as far as they reach; scales make `SPREAD` of it.
const CODE_SPREAD: f32 = 448.0;

/// Tensors filled with pseudo-random values.
pub struct DummyWeights(Arena);

impl DummyWeights {
    /// Makes the listed tensors of name, shape and type: norm weights near 1, all else uniform with
    /// deviation 0.02, matrices in FP8 with their scales. `progress` hears of bytes done and in all.
    ///
    /// Errors:  `Overflow`, `Memory`.
    /// Cost:    writes every byte once, on up to `THREAD_COUNT_MAX` threads; 560 MiB of bf16 took
    ///          0.51 s on two cores.
    pub fn new(
        needed: &[(String, Vec<u64>, Dtype)],
        seed: u64,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, LoadError> {
        let mut plan = Plan::new();
        let mut names = BTreeSet::new();
        for (name, shape, dtype) in needed {
            if names.insert(name) {
                plan.push(name, *dtype, shape)?;
            }
        }
        let mut map = plan.map()?;
        let mut pieces = pieces(&plan, &mut map, seed);
        fill_all(&mut pieces, progress);
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
    values: Arc<Values>,
}

/// The distinct values of a distribution, as stored elements.
struct Values {
    dtype: Dtype,
    /// Centre, and half the width.
    range: [f32; 2],
    elements: Vec<u8>,
}

impl Values {
    /// Values of a type, evenly spaced over a range.
    fn new(dtype: Dtype, range: [f32; 2]) -> Values {
        let [centre, spread] = range;
        let mut elements = Vec::new();
        for i in 0..VALUE_COUNT {
            let unit = (2 * i + 1) as f32 / VALUE_COUNT as f32 - 1.0;
            dtype.append(centre + spread * unit, &mut elements);
        }
        Values { dtype, range, elements }
    }

    /// Fills `bytes` with elements chosen by the numbers of a stream.
    fn fill(&self, bytes: &mut [u8], stream: u64) {
        match self.dtype {
            Dtype::F32 => fill::<4>(bytes, &self.elements, stream),
            Dtype::F16 | Dtype::Bf16 => fill::<2>(bytes, &self.elements, stream),
            Dtype::F8E4m3 => fill::<1>(bytes, &self.elements, stream),
        }
    }
}

/// Centre and half the width of a tensor's distribution.
fn range(name: &str, dtype: Dtype) -> [f32; 2] {
    if name.ends_with("_scale_inv") {
        [SPREAD / CODE_SPREAD, 0.0]
    } else if dtype == Dtype::F8E4m3 {
        [0.0, CODE_SPREAD]
    } else if name.contains("norm") && name.ends_with(".weight") {
        [1.0, NORM_SPREAD]
    } else {
        [0.0, SPREAD]
    }
}

/// Cuts the memory of all tensors into pieces, in order of address.
fn pieces<'a>(plan: &Plan, map: &'a mut [u8], seed: u64) -> Vec<Piece<'a>> {
    let (mut pieces, mut known): (Vec<_>, Vec<Arc<Values>>) = (Vec::new(), Vec::new());
    let (mut rest, mut position) = (map, 0);
    for slot in &plan.slots {
        // Slots ascend and lie inside the map, so both cuts are in bounds; else nothing is left.
        let (_, behind) =
            rest.split_at_mut_checked(slot.range.start - position).unwrap_or_default();
        let (tensor, behind) = behind.split_at_mut_checked(slot.range.len()).unwrap_or_default();
        (rest, position) = (behind, slot.range.end);
        let (dtype, range) = (slot.dtype, range(&slot.name, slot.dtype));
        let is_same = |values: &Arc<Values>| (values.dtype, values.range) == (dtype, range);
        let idx = known.iter().position(is_same).unwrap_or(known.len());
        if idx == known.len() {
            known.push(Arc::new(Values::new(dtype, range)));
        }
        let name_key = slot.name.bytes().fold(mix(seed), |key, byte| mix(key ^ u64::from(byte)));
        for (piece_idx, bytes) in (0u64..).zip(tensor.chunks_mut(PIECE_BYTES)) {
            let (stream, values) = (mix(name_key ^ piece_idx), known[idx].clone());
            pieces.push(Piece { bytes, stream, values });
        }
    }
    pieces
}

/// Fills all pieces, on several threads.
fn fill_all(pieces: &mut [Piece<'_>], progress: &mut dyn FnMut(u64, u64)) {
    let fill_share = |pieces: &mut [Piece<'_>]| {
        for Piece { bytes, stream, values } in pieces {
            values.fill(bytes, *stream);
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

/// Fills `bytes` with `VALUE_COUNT` elements chosen by the numbers of a stream, four from each.
fn fill<const N: usize>(bytes: &mut [u8], elements: &[u8], mut stream: u64) {
    let Some(values) = elements.as_chunks::<N>().0.first_chunk::<VALUE_COUNT>() else { return };
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

    fn needed(dtype: Dtype) -> Vec<(String, Vec<u64>, Dtype)> {
        let shapes = [("m.weight", vec![700, 1001]), ("x_norm.weight", vec![5000])];
        shapes.into_iter().map(|(name, shape)| (name.to_owned(), shape, dtype)).collect()
    }

    fn statistics(values: &[f32]) -> (f64, f64) {
        let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len() as f64;
        let square = |v: &f32| (f64::from(*v) - mean).powi(2);
        (mean, (values.iter().map(square).sum::<f64>() / values.len() as f64).sqrt())
    }

    #[test]
    fn values_have_the_promised_distribution() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let weights = DummyWeights::new(&needed(dtype), 1, &mut |_, _| ()).unwrap();
            let matrix = weights.tensor("m.weight").unwrap();
            assert!(matrix.is_consistent() && matrix.dtype == dtype);
            let (mean, deviation) = statistics(&matrix.to_f32());
            assert!(mean.abs() < 1e-4 && (deviation - 0.02).abs() < 1e-4, "{mean} {deviation}");
            let norm = weights.tensor("x_norm.weight").unwrap().to_f32();
            assert!(norm.iter().all(|v| (0.94..=1.06).contains(v)));
        }
    }

    #[test]
    fn fp8_has_the_same_deviation_with_its_scales() {
        let needed = [
            ("m.weight".to_owned(), vec![700, 1001], Dtype::F8E4m3),
            ("m.weight_scale_inv".to_owned(), vec![6, 8], Dtype::F32),
        ];
        let weights = DummyWeights::new(&needed, 1, &mut |_, _| ()).unwrap();
        let scales = weights.tensor("m.weight_scale_inv").unwrap().to_f32();
        assert!(scales.iter().all(|scale| *scale == scales[0]));
        let codes = weights.tensor("m.weight").unwrap().to_f32();
        let values: Vec<f32> = codes.iter().map(|code| code * scales[0]).collect();
        let (mean, deviation) = statistics(&values);
        assert!(mean.abs() < 1e-4 && (deviation - 0.02).abs() < 1e-4, "{mean} {deviation}");
    }

    #[test]
    fn values_depend_on_seed_and_name_only() {
        let make = |needed: &[(String, Vec<u64>, Dtype)], seed| {
            DummyWeights::new(needed, seed, &mut |_, _| ()).unwrap()
        };
        let mut list = needed(Dtype::Bf16);
        let first = make(&list, 7);
        list.push(("y.weight".to_owned(), vec![700, 1001], Dtype::Bf16));
        list.reverse();
        let second = make(&list, 7);
        assert_eq!(first.tensor("m.weight"), second.tensor("m.weight"));
        let data = |weights: &DummyWeights, name| weights.tensor(name).unwrap().data.to_vec();
        assert_ne!(data(&second, "m.weight"), data(&second, "y.weight"));
        assert_ne!(data(&first, "m.weight"), data(&make(&needed(Dtype::Bf16), 8), "m.weight"));
        // No piece repeats the one before.
        let bytes = data(&first, "m.weight");
        assert_ne!(bytes[..1000], bytes[PIECE_BYTES..PIECE_BYTES + 1000]);
    }

    #[test]
    fn nothing_needed_is_no_error() {
        assert_eq!(DummyWeights::new(&[], 0, &mut |_, _| ()).unwrap().byte_count(), 0);
    }
}
