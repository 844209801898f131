//! The `--trace` file: Chrome trace JSON, as `ui.perfetto.dev` and `chrome://tracing` read it.
//!
//! One track per worker with three slices a task: staging, wait and run. A worker may stage a task
//! while it still runs the one before; such staging goes to a second track of the worker, since
//! slices of one track must not overlap, and the wait is drawn from the moment the worker is free.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::json;
use tilert_mk_shared::trace::{TRACE_STOLEN, TraceRecord};

use crate::error::{Error, Result};

/// A trace file that is open and still empty.
#[derive(Debug)]
pub struct TraceFile {
    path: PathBuf,
    writer: BufWriter<File>,
}

/// One slice of a track, in nanoseconds.
struct Slice<'a> {
    name: &'a str,
    category: &'static str,
    track: usize,
    start_ns: u64,
    end_ns: u64,
}

impl TraceFile {
    /// Opens `path` for writing; done before a model is loaded, so that a bad path is seen early.
    pub fn create(path: &Path) -> Result<TraceFile> {
        let file = File::create(path).map_err(|source| Error::file(path, source))?;
        Ok(TraceFile { path: path.to_owned(), writer: BufWriter::new(file) })
    }

    /// Writes the records of each worker, in time order, and closes the file.
    pub fn write(
        mut self,
        workers: &[Vec<TraceRecord>],
        task_name: &dyn Fn(u32) -> String,
    ) -> Result<()> {
        write_trace(&mut self.writer, workers, task_name)
            .and_then(|()| self.writer.flush())
            .map_err(|source| Error::file(&self.path, source))
    }
}

/// The worker's own track; the next number is its track for staging ahead.
fn track_of(worker_idx: usize) -> usize {
    2 * worker_idx
}

fn write_trace(
    out: &mut dyn Write,
    workers: &[Vec<TraceRecord>],
    task_name: &dyn Fn(u32) -> String,
) -> std::io::Result<()> {
    let written = |record: &&TraceRecord| record.epoch != 0;
    let records = workers.iter().flatten().filter(written);
    let origin_ns = records.map(|record| record.claimed_ns).min().unwrap_or(0);
    write!(out, r#"{{"displayTimeUnit":"ns","traceEvents":["#)?;
    let process =
        json!({"ph": "M", "pid": 0, "name": "process_name", "args": {"name": "tilert-mk"}});
    write!(out, "\n{process}")?;
    for (worker_idx, records) in workers.iter().enumerate() {
        let track = track_of(worker_idx);
        write_track_name(out, track, &format!("worker {worker_idx}"))?;
        let mut free_ns = 0;
        let mut staged_ahead = false;
        for record in records.iter().filter(written) {
            let name = task_name(record.task_idx);
            let ahead = record.claimed_ns < free_ns;
            staged_ahead |= ahead;
            let slices = [
                Slice {
                    name: "stage",
                    category: "stage",
                    track: track + usize::from(ahead),
                    start_ns: record.claimed_ns,
                    end_ns: record.staged_ns,
                },
                Slice {
                    name: "wait",
                    category: "wait",
                    track,
                    start_ns: record.staged_ns.max(free_ns),
                    end_ns: record.started_ns,
                },
                Slice {
                    name: &name,
                    category: "run",
                    track,
                    start_ns: record.started_ns,
                    end_ns: record.finished_ns,
                },
            ];
            for slice in &slices {
                write_slice(out, slice, origin_ns, record, &name)?;
            }
            free_ns = record.finished_ns;
        }
        if staged_ahead {
            write_track_name(out, track + 1, &format!("worker {worker_idx} staging ahead"))?;
        }
    }
    writeln!(out, "\n]}}")
}

fn write_track_name(out: &mut dyn Write, track: usize, name: &str) -> std::io::Result<()> {
    let name = json!({
        "ph": "M", "pid": 0, "tid": track, "name": "thread_name", "args": {"name": name},
    });
    let order = json!({
        "ph": "M", "pid": 0, "tid": track, "name": "thread_sort_index",
        "args": {"sort_index": track},
    });
    write!(out, ",\n{name},\n{order}")
}

fn write_slice(
    out: &mut dyn Write,
    slice: &Slice<'_>,
    origin_ns: u64,
    record: &TraceRecord,
    task_name: &str,
) -> std::io::Result<()> {
    // The format counts in microseconds and allows fractions.
    let micros = |ns: u64| ns as f64 / 1000.0;
    let event = json!({
        "ph": "X",
        "pid": 0,
        "tid": slice.track,
        "name": slice.name,
        "cat": slice.category,
        "ts": micros(slice.start_ns.saturating_sub(origin_ns)),
        "dur": micros(slice.end_ns.saturating_sub(slice.start_ns)),
        "args": {
            "task": task_name,
            "task_idx": record.task_idx,
            "epoch": record.epoch,
            "stolen": record.flags & TRACE_STOLEN != 0,
        },
    });
    write!(out, ",\n{event}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn record(task_idx: u32, times_ns: [u64; 4], flags: u64) -> TraceRecord {
        let [claimed_ns, staged_ns, started_ns, finished_ns] = times_ns;
        TraceRecord { task_idx, epoch: 9, claimed_ns, staged_ns, started_ns, finished_ns, flags }
    }

    fn trace(workers: &[Vec<TraceRecord>]) -> Vec<Value> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace.json");
        let name = |task_idx| format!("task \"{task_idx}\"");
        TraceFile::create(&path).unwrap().write(workers, &name).unwrap();
        let json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        json["traceEvents"].as_array().unwrap().clone()
    }

    fn slices(events: &[Value], track: u64) -> Vec<(String, f64, f64)> {
        let on_track = events.iter().filter(|e| e["ph"] == "X" && e["tid"] == track);
        on_track
            .map(|e| {
                let number = |key: &str| e[key].as_f64().unwrap();
                (e["name"].as_str().unwrap().to_owned(), number("ts"), number("dur"))
            })
            .collect()
    }

    fn slice(name: &str, ts: f64, dur: f64) -> (String, f64, f64) {
        (name.to_owned(), ts, dur)
    }

    #[test]
    fn every_worker_has_a_track_with_three_slices_a_task() {
        let events = trace(&[
            vec![record(3, [1_000, 1_500, 3_000, 9_250], 0), TraceRecord::default()],
            vec![record(4, [2_000, 2_100, 2_100, 5_000], TRACE_STOLEN)],
        ]);
        let first =
            [slice("stage", 0.0, 0.5), slice("wait", 0.5, 1.5), slice("task \"3\"", 2.0, 6.25)];
        assert_eq!(slices(&events, 0), first);
        assert_eq!(slices(&events, 2).len(), 3);
        let stolen = events.iter().find(|e| e["name"] == "task \"4\"").unwrap();
        assert_eq!(stolen["args"]["stolen"], true);
        assert_eq!(stolen["args"]["epoch"], 9);
        let tracks: Vec<_> = events.iter().filter(|e| e["name"] == "thread_name").collect();
        assert_eq!(tracks.len(), 2);
        assert_eq!(tracks[1]["args"]["name"], "worker 1");
    }

    #[test]
    fn staging_ahead_does_not_overlap_the_run_before() {
        let events = trace(&[vec![
            record(0, [0, 1_000, 2_000, 10_000], 0),
            record(1, [3_000, 4_000, 12_000, 13_000], 0),
        ]]);
        assert_eq!(slices(&events, 1), [slice("stage", 3.0, 1.0)]);
        let own = slices(&events, 0);
        assert_eq!(own[3], slice("wait", 10.0, 2.0));
        for pair in own.windows(2) {
            assert!(pair[0].1 + pair[0].2 <= pair[1].1, "{pair:?}");
        }
    }

    #[test]
    fn no_records_is_a_valid_file() {
        assert_eq!(trace(&[vec![], vec![]]).len(), 5);
    }
}
