//! The read bandwidth of this machine's memory, for comparison with what decoding reaches.
//!
//! Each thread reads its own part of memory that is far larger than the caches, in huge pages as
//! weights are, several times. Some chips are fastest with one stream of addresses for each core,
//! others with several, so both are tried; a pass is timed from the begin of the first thread to the
//! end of the last.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;

use memmap2::MmapMut;
use serde::Serialize;

use crate::driver::cpu::anonymous;
use crate::error::Result;

/// Bytes that each thread reads in a pass: eight times a large last-level cache.
const PART_BYTES: usize = 256 << 20;
/// Passes of each kind in a measurement.
const PASS_COUNT: usize = 7;
/// Bytes that one turn of the loop reads of each stream: a cache line.
const LINE_BYTES: usize = 64;

/// Read bandwidth of all threads together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Bandwidth {
    /// Of the fastest pass.
    pub(crate) best_bytes_per_second: f64,
    /// Of the median pass, of the kind that is faster.
    pub(crate) median_bytes_per_second: f64,
}

/// Memory to read.
pub(crate) struct Probe {
    map: MmapMut,
}

impl Probe {
    /// Memory for `thread_count` threads.
    ///
    /// Errors: memory that is not there.
    pub(crate) fn new(thread_count: u32) -> Result<Probe> {
        let bytes = PART_BYTES as u64 * u64::from(thread_count);
        let mut map = anonymous("the bandwidth probe", bytes)?;
        map.fill(1);
        Ok(Probe { map })
    }

    /// Measures.
    pub(crate) fn measure(&self) -> Bandwidth {
        let kinds = [self.passes(sum::<1>), self.passes(sum::<4>)];
        let median = |passes: &Vec<f64>| passes.get(PASS_COUNT / 2).copied().unwrap_or(0.0);
        Bandwidth {
            best_bytes_per_second: kinds.iter().flatten().copied().fold(0.0, f64::max),
            median_bytes_per_second: kinds.iter().map(median).fold(0.0, f64::max),
        }
    }

    /// The bandwidths of all passes of one kind, ascending.
    fn passes(&self, sum: fn(&[u8]) -> u64) -> Vec<f64> {
        let parts: Vec<&[u8]> = self.map.chunks_exact(PART_BYTES).collect();
        let barrier = Barrier::new(parts.len());
        let read = |part: &[u8]| {
            let mut times = Vec::with_capacity(PASS_COUNT);
            for _ in 0..PASS_COUNT {
                let _ = barrier.wait();
                let begin = Instant::now();
                black_box(sum(black_box(part)));
                times.push((begin, Instant::now()));
            }
            times
        };
        let times: Vec<Vec<(Instant, Instant)>> = std::thread::scope(|scope| {
            let threads: Vec<_> = parts.iter().map(|part| scope.spawn(|| read(part))).collect();
            // A thread that has panicked has measured nothing.
            threads.into_iter().map(|thread| thread.join().unwrap_or_default()).collect()
        });
        let bandwidth = |pass: usize| {
            let of_pass = || times.iter().filter_map(|times| times.get(pass));
            let begin = of_pass().map(|(begin, _)| *begin).min()?;
            let end = of_pass().map(|(_, end)| *end).max()?;
            Some((PART_BYTES * parts.len()) as f64 / (end - begin).as_secs_f64())
        };
        let mut passes: Vec<f64> = (0..PASS_COUNT).filter_map(bandwidth).collect();
        passes.sort_by(f64::total_cmp);
        passes
    }
}

/// The sum of all words, read in `STREAMS` streams that do not wait for each other.
fn sum<const STREAMS: usize>(part: &[u8]) -> u64 {
    let (lines, _) = part.as_chunks::<LINE_BYTES>();
    let line_count = lines.len() / STREAMS;
    let streams: [&[[u8; LINE_BYTES]]; STREAMS] =
        std::array::from_fn(|stream| &lines[stream * line_count..(stream + 1) * line_count]);
    let mut sums = [[0u64; 2]; STREAMS];
    for line_idx in 0..line_count {
        for (sums, lines) in sums.iter_mut().zip(streams) {
            let (words, _) = lines[line_idx].as_chunks::<8>();
            for (word_idx, word) in words.iter().enumerate() {
                sums[word_idx % 2] = sums[word_idx % 2].wrapping_add(u64::from_ne_bytes(*word));
            }
        }
    }
    sums.as_flattened().iter().fold(0, |total, sum| total.wrapping_add(*sum))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stream_count_reads_every_word_once() {
        let bytes: Vec<u8> = (0..64 * 24u32).map(|i| (i * 37 % 251) as u8).collect();
        let expected = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word));
        let expected = expected.fold(0, u64::wrapping_add);
        assert_eq!([sum::<1>(&bytes), sum::<4>(&bytes)], [expected; 2]);
    }

    #[test]
    fn the_best_is_not_below_the_median() {
        let bandwidth = Probe::new(2).unwrap().measure();
        assert!(bandwidth.median_bytes_per_second > 0.0, "{bandwidth:?}");
        assert!(bandwidth.best_bytes_per_second >= bandwidth.median_bytes_per_second);
    }
}
