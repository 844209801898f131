//! `tilert-mk inspect`: what a model costs on this machine.

use clap::Args;
use serde::{Serialize, Serializer};

use super::ModelArgs;
use super::output::{Output, pretty_json};
use crate::error::Result;

#[derive(Args, Debug)]
pub(super) struct InspectArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Sizes of a model and of its program, and the speed of the memory under them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Device, for example `cpu`.
    pub device: String,
    /// Workers of the device.
    pub workers: u32,
    /// Weights of the model, each counted once.
    pub parameters: u64,
    /// Bytes of all weights as they are looked up and multiplied.
    pub weight_bytes: u64,
    /// Bytes of weights that one decoded token reads.
    pub bytes_per_token: u64,
    /// Tasks of a decode step.
    pub task_count: u32,
    /// Events of a decode step.
    pub event_count: u32,
    /// Longest chain of tasks of a decode step that wait for one another.
    pub stage_count: u32,
    /// Positions of the KV cache.
    pub context_max: u32,
    /// Regions of the heap and their bytes.
    #[serde(serialize_with = "as_map")]
    pub heap_regions: Vec<(&'static str, u64)>,
    /// Read bandwidth that all workers together reach on this machine.
    pub read_bytes_per_second: f64,
}

fn as_map<S: Serializer>(
    regions: &[(&'static str, u64)],
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_map(regions.iter().copied())
}

/// A summary with the figures that follow from it.
#[derive(Serialize)]
struct JsonSummary<'a> {
    #[serde(flatten)]
    summary: &'a Summary,
    heap_bytes: u64,
    floor_us_per_token: Option<f64>,
}

impl Summary {
    /// Bytes of the whole heap.
    pub fn heap_bytes(&self) -> u64 {
        self.heap_regions.iter().map(|(_, bytes)| bytes).sum()
    }

    /// Time below which no token can be decoded: its bytes over the bandwidth. None without a
    /// measured bandwidth.
    pub fn floor_us_per_token(&self) -> Option<f64> {
        let is_known = self.read_bytes_per_second > 0.0;
        is_known.then(|| self.bytes_per_token as f64 * 1e6 / self.read_bytes_per_second)
    }

    /// One JSON object with all figures.
    fn to_json(&self) -> Result<String> {
        let summary = JsonSummary {
            summary: self,
            heap_bytes: self.heap_bytes(),
            floor_us_per_token: self.floor_us_per_token(),
        };
        pretty_json(&summary)
    }

    /// A table for people.
    fn to_text(&self) -> String {
        let workers = self.workers;
        let mut rows = vec![
            ("device".to_owned(), format!("{}, {workers} workers", self.device)),
            ("parameters".to_owned(), format_count(self.parameters)),
            ("weights".to_owned(), format_bytes(self.weight_bytes)),
            ("read per token".to_owned(), format_bytes(self.bytes_per_token)),
            ("tasks per step".to_owned(), self.task_count.to_string()),
            ("events per step".to_owned(), self.event_count.to_string()),
            ("dependent stages".to_owned(), self.stage_count.to_string()),
            ("context".to_owned(), format!("{} positions", self.context_max)),
            ("heap".to_owned(), format_bytes(self.heap_bytes())),
        ];
        let regions = self.heap_regions.iter();
        rows.extend(regions.map(|(name, bytes)| (format!("  {name}"), format_bytes(*bytes))));
        let bandwidth = format!("{:.2} GB/s", self.read_bytes_per_second / 1e9);
        rows.push(("read bandwidth".to_owned(), bandwidth));
        let floor = self.floor_us_per_token();
        let floor = floor.map_or("unknown".to_owned(), |us| format!("{us:.1} µs per token"));
        rows.push(("bandwidth floor".to_owned(), floor));
        let width = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        rows.iter().map(|(name, value)| format!("{name:width$}  {value}\n")).collect()
    }
}

/// A count for people, with the exact number: `1.49 M (1488896)`.
fn format_count(count: u64) -> String {
    match count {
        0..1_000 => count.to_string(),
        1_000..1_000_000 => format!("{:.2} k ({count})", count as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.2} M ({count})", count as f64 / 1e6),
        _ => format!("{:.2} B ({count})", count as f64 / 1e9),
    }
}

/// Bytes for people, in powers of ten as bandwidth is.
pub(super) fn format_bytes(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{:.2} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.2} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

/// Runs the subcommand.
pub(super) fn run(args: &InspectArgs) -> Result<()> {
    let engine = args.model.open(&args.model.engine_options())?;
    let summary = Summary::of(&engine)?;
    let text = if args.json { summary.to_json()? } else { summary.to_text() };
    Output::new().write(&text).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary() -> Summary {
        Summary {
            device: "cpu".into(),
            workers: 2,
            parameters: 1_488_896,
            weight_bytes: 2_977_792,
            bytes_per_token: 2_000_000,
            task_count: 120,
            event_count: 31,
            stage_count: 32,
            context_max: 1024,
            heap_regions: vec![("kv", 3_145_728), ("activations", 512)],
            read_bytes_per_second: 2e10,
        }
    }

    #[test]
    fn text_shows_every_figure() {
        let text = summary().to_text();
        for shown in [
            "1.49 M (1488896)",
            "2.98 MB",
            "2.00 MB",
            "120",
            "31",
            "32",
            "  kv",
            "512 B",
            "3.15 MB",
            "20.00 GB/s",
            "100.0 µs per token",
        ] {
            assert!(text.contains(shown), "{shown} is not in\n{text}");
        }
    }

    #[test]
    fn json_has_the_derived_figures() {
        let json: serde_json::Value = serde_json::from_str(&summary().to_json().unwrap()).unwrap();
        assert_eq!(json["floor_us_per_token"], 100.0);
        assert_eq!(json["heap_bytes"], 3_146_240);
        assert_eq!(json["heap_regions"]["kv"], 3_145_728);
        assert_eq!(json["task_count"], 120);
    }

    #[test]
    fn no_bandwidth_is_no_floor() {
        let unknown = Summary { read_bytes_per_second: 0.0, ..summary() };
        assert_eq!(unknown.floor_us_per_token(), None);
        assert!(unknown.to_text().contains("unknown"));
    }
}
