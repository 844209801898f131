//! One request from prompt to answer, and what is printed of it.

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;
use tilert_mk_shared::sample::SamplingParams;

use crate::engine::{Engine, Event, FinishReason, Request};
use crate::error::{Error, Result};
use crate::logits_file::LogitsFile;
use crate::metrics::{Metrics, TpotUs, format_us};
use crate::tokenizer::{StopMatcher, TextStream, Tokenizer};

/// A JSON object over several lines, as the figures of `--json` are printed.
pub(super) fn pretty_json(figures: &impl Serialize) -> Result<String> {
    let mut json = serde_json::to_string_pretty(figures)
        .map_err(|error| Error::file("stdout", error.into()))?;
    json.push('\n');
    Ok(json)
}

/// Standard output. A reader that goes away ends the output, not the process.
pub(super) struct Output {
    stdout: io::Stdout,
    is_closed: bool,
    is_inside_line: bool,
}

impl Output {
    pub(super) fn new() -> Output {
        Output { stdout: io::stdout(), is_closed: false, is_inside_line: false }
    }

    /// Writes `text` at once; breaks when nobody reads any more.
    pub(super) fn write(&mut self, text: &str) -> Result<ControlFlow<()>> {
        if self.is_closed {
            return Ok(ControlFlow::Break(()));
        }
        let written = self.stdout.write_all(text.as_bytes()).and_then(|()| self.stdout.flush());
        match written {
            Ok(()) => {
                if let Some(last) = text.chars().next_back() {
                    self.is_inside_line = last != '\n';
                }
                Ok(ControlFlow::Continue(()))
            }
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                self.is_closed = true;
                Ok(ControlFlow::Break(()))
            }
            Err(error) => Err(Error::file("stdout", error)),
        }
    }

    /// Ends the line that was begun, if any.
    pub(super) fn end_line(&mut self) -> Result<()> {
        if self.is_inside_line {
            let _ = self.write("\n")?;
        }
        Ok(())
    }

    /// Whether the reader has gone away.
    pub(super) fn is_closed(&self) -> bool {
        self.is_closed
    }
}

/// A request and what watches it.
pub(super) struct Run<'a> {
    pub(super) prompt: &'a [u32],
    pub(super) max_tokens: u32,
    /// Tokens that end the answer.
    pub(super) stop_ids: &'a [u32],
    /// Texts that end the answer; they need a tokenizer.
    pub(super) stops: &'a [String],
    pub(super) sampling: SamplingParams,
    /// None: the answer's "text" is its token ids.
    pub(super) tokenizer: Option<&'a Tokenizer>,
    pub(super) logits: Option<&'a mut LogitsFile>,
    /// The answer ends when this is set.
    pub(super) cancel: Option<&'a AtomicBool>,
}

/// A finished answer.
pub(super) struct Answer {
    pub(super) ids: Vec<u32>,
    /// Empty without a tokenizer.
    pub(super) text: String,
    pub(super) finish_reason: FinishReason,
    pub(super) metrics: Metrics,
}

/// Receives what is certain of the text; breaks to end the answer.
pub(super) type OnText<'a> = dyn FnMut(&str) -> Result<ControlFlow<()>> + 'a;

/// What grows while the device generates.
struct Progress<'a, 'b> {
    stream: Option<TextStream<'a>>,
    stops: StopMatcher,
    logits: Option<&'a mut LogitsFile>,
    cancel: Option<&'a AtomicBool>,
    on_text: &'b mut OnText<'b>,
    ids: Vec<u32>,
    times_ns: Vec<u64>,
    text: String,
}

impl Progress<'_, '_> {
    fn on_event(&mut self, event: Event<'_>) -> Result<ControlFlow<()>> {
        // Events that were under way when the stop text appeared belong to nobody.
        if self.stops.is_matched() || self.is_cancelled() {
            return Ok(ControlFlow::Break(()));
        }
        match event {
            Event::Token { id, time_ns } => self.on_token(id, time_ns),
            Event::Logits { row, .. } => {
                if let Some(file) = &mut self.logits {
                    file.push(row)?;
                }
                Ok(ControlFlow::Continue(()))
            }
            Event::End(_) | Event::Idle => Ok(ControlFlow::Continue(())),
        }
    }

    fn is_cancelled(&self) -> bool {
        self.cancel.is_some_and(|cancel| cancel.load(Ordering::Relaxed))
    }

    fn on_token(&mut self, id: u32, time_ns: u64) -> Result<ControlFlow<()>> {
        self.ids.push(id);
        self.times_ns.push(time_ns);
        let Some(stream) = &mut self.stream else {
            let space = if self.ids.len() > 1 { " " } else { "" };
            return (self.on_text)(&format!("{space}{id}"));
        };
        let decoded = stream.push(id)?;
        let certain = self.stops.push(&decoded);
        let flow = self.emit(&certain)?;
        Ok(if self.stops.is_matched() { ControlFlow::Break(()) } else { flow })
    }

    fn emit(&mut self, certain: &str) -> Result<ControlFlow<()>> {
        if certain.is_empty() {
            return Ok(ControlFlow::Continue(()));
        }
        self.text.push_str(certain);
        (self.on_text)(certain)
    }

    /// Hands out what was held back; returns whether a stop text ended the answer.
    fn finish(&mut self) -> Result<bool> {
        if let Some(stream) = self.stream.take() {
            let certain = self.stops.push(&stream.finish()?);
            let _ = self.emit(&certain)?;
        }
        let is_matched = self.stops.is_matched();
        let held = std::mem::replace(&mut self.stops, StopMatcher::new(&[])).finish();
        let _ = self.emit(&held)?;
        Ok(is_matched)
    }
}

impl Run<'_> {
    /// Generates the answer; `on_text` gets its text as it becomes certain.
    pub(super) fn generate(self, engine: &mut Engine, on_text: &mut OnText<'_>) -> Result<Answer> {
        let request = Request {
            prompt: self.prompt,
            max_tokens: self.max_tokens,
            stop_ids: self.stop_ids,
            sampling: self.sampling,
            want_logits: self.logits.is_some(),
        };
        let mut progress = Progress {
            stream: self.tokenizer.map(Tokenizer::stream),
            stops: StopMatcher::new(self.stops),
            logits: self.logits,
            cancel: self.cancel,
            on_text,
            ids: Vec::new(),
            times_ns: Vec::new(),
            text: String::new(),
        };
        let mut failure = None;
        let completion = engine.generate(&request, &mut |event| {
            progress.on_event(event).unwrap_or_else(|error| {
                failure.get_or_insert(error);
                ControlFlow::Break(())
            })
        })?;
        if let Some(error) = failure {
            return Err(error);
        }
        let is_matched = progress.finish()?;
        Ok(Answer {
            finish_reason: if is_matched { FinishReason::Stop } else { completion.finish_reason },
            metrics: Metrics::of(completion.submitted_ns, &progress.times_ns),
            ids: progress.ids,
            text: progress.text,
        })
    }
}

/// The object of `--format json`.
#[derive(Serialize)]
struct JsonAnswer<'a> {
    prompt_ids: &'a [u32],
    ids: &'a [u32],
    text: &'a str,
    finish_reason: &'static str,
    ttft_us: Option<f64>,
    tpot_us: TpotUs,
    tokens_per_second: Option<f64>,
    device: &'a str,
    workers: u32,
    seed: u64,
}

impl Answer {
    /// The answer as one line of JSON.
    pub(super) fn to_json(&self, engine: &Engine, prompt: &[u32], seed: u64) -> Result<String> {
        let answer = JsonAnswer {
            prompt_ids: prompt,
            ids: &self.ids,
            text: &self.text,
            finish_reason: self.finish_reason.as_str(),
            ttft_us: self.metrics.ttft_us,
            tpot_us: self.metrics.tpot_us,
            tokens_per_second: self.metrics.tokens_per_second,
            device: engine.device_name(),
            workers: engine.worker_count(),
            seed,
        };
        let mut json =
            serde_json::to_string(&answer).map_err(|error| Error::file("stdout", error.into()))?;
        json.push('\n');
        Ok(json)
    }

    /// One line for people: counts, latency, device.
    pub(super) fn status_line(
        &self,
        engine: &Engine,
        prompt: &[u32],
        sampling: &SamplingParams,
    ) -> String {
        let Metrics { ttft_us, tpot_us, tokens_per_second } = &self.metrics;
        let mut line = format!("{} prompt tokens, {} generated", prompt.len(), self.ids.len());
        if let Some(ttft_us) = ttft_us {
            line.push_str(&format!(", TTFT {}", format_us(*ttft_us)));
        }
        if let (Some(p50), Some(p99), Some(rate)) = (tpot_us.p50, tpot_us.p99, tokens_per_second) {
            let (p50, p99, rate) = (format_us(p50), format_us(p99), format_rate(*rate));
            line.push_str(&format!(", TPOT p50 {p50} p99 {p99} ({rate} tok/s)"));
        }
        let workers = engine.worker_count();
        let plural = if workers == 1 { "" } else { "s" };
        line.push_str(&format!(", {}, {workers} worker{plural}", engine.device_name()));
        if sampling.temperature > 0.0 {
            line.push_str(&format!(", seed {}", sampling.seed));
        }
        line
    }
}

/// Tokens per second for people: `850`, `11.7k`.
fn format_rate(per_second: f64) -> String {
    if per_second < 1000.0 {
        format!("{per_second:.0}")
    } else {
        format!("{:.1}k", per_second / 1e3)
    }
}
