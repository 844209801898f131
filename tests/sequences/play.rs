//! Runs planned requests on an engine and keeps all that comes out.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tilert_mk::engine::{
    DeviceKind, Engine, EngineOptions, Event, FinishReason, ModelSource, Request, Weights,
};
use tilert_mk_shared::sample::SamplingParams;

/// After this a request that has not ended is a failure: hundreds of times what one takes.
const DEADLINE: Duration = Duration::from_secs(60);
const POLL_SLEEP: Duration = Duration::from_micros(20);

/// A golden checkpoint.
pub(crate) fn checkpoint(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// A checkpoint on the CPU.
pub(crate) fn open(path: &Path, workers: u32, slots: u32, step_tokens: u32) -> Engine {
    open_with(path, workers, slots, step_tokens, Weights::Native)
}

/// The same with quantised weights.
pub(crate) fn open_with(
    path: &Path,
    workers: u32,
    slots: u32,
    step_tokens: u32,
    weights: Weights,
) -> Engine {
    let options = EngineOptions {
        workers: Some(workers),
        max_context: Some(256),
        slots,
        step_tokens,
        weights,
        ..EngineOptions::default()
    };
    let device = DeviceKind::Cpu.open(1, false).expect("the CPU is there");
    Engine::open(ModelSource::Directory(path), device, &options, &mut |_, _| {})
        .expect("the checkpoint can be opened")
}

/// A request and when it starts and is given up.
#[derive(Clone)]
pub(crate) struct Plan {
    pub(crate) prompt: Vec<u32>,
    pub(crate) max_tokens: u32,
    pub(crate) sampling: SamplingParams,
    /// Outputs of the engine before it is submitted.
    pub(crate) starts_at: usize,
    /// Tokens after which it is cancelled.
    pub(crate) cancelled_at: Option<usize>,
    pub(crate) want_logits: bool,
}

impl Plan {
    /// A greedy request of some length, each `key` with another prompt; starts at once.
    pub(crate) fn new(key: u32, prompt_count: u32, max_tokens: u32) -> Plan {
        Plan {
            prompt: (0..prompt_count).map(|i| 3 + (key * 101 + i * i * 7 + i * 29) % 250).collect(),
            max_tokens,
            sampling: SamplingParams::GREEDY,
            starts_at: 0,
            cancelled_at: None,
            want_logits: true,
        }
    }

    pub(crate) fn request(&self) -> Request<'_> {
        Request {
            prompt: &self.prompt,
            max_tokens: self.max_tokens,
            stop_ids: &[],
            sampling: self.sampling,
            want_logits: self.want_logits,
        }
    }
}

/// What came of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Answer {
    pub(crate) ids: Vec<u32>,
    /// The bits of each position's logits.
    pub(crate) rows: Vec<Vec<u32>>,
    pub(crate) end: Option<FinishReason>,
}

impl Answer {
    pub(crate) fn take(&mut self, event: Event<'_>) {
        assert_eq!(self.end, None, "nothing follows the end");
        match event {
            Event::Token { id, .. } => self.ids.push(id),
            Event::Logits { position, row } => {
                assert_eq!(position as usize, self.rows.len(), "positions come in order");
                self.rows.push(row.iter().map(|value| value.to_bits()).collect());
            }
            Event::End(reason) => self.end = Some(reason),
            Event::Idle => {}
        }
    }
}

/// Runs all plans to their ends, in as many slots as the engine has.
pub(crate) fn play(engine: &mut Engine, slots: u32, plans: &[Plan]) -> Vec<Answer> {
    let begin = Instant::now();
    let mut answers = vec![Answer::default(); plans.len()];
    let mut is_cancelled = vec![false; plans.len()];
    let mut plan_of_slot: Vec<Option<usize>> = vec![None; slots as usize];
    let (mut waiting, mut output_count): (Vec<usize>, usize) = ((0..plans.len()).collect(), 0);
    while answers.iter().any(|answer| answer.end.is_none()) {
        assert!(begin.elapsed() < DEADLINE, "no end after {output_count} outputs");
        // A plan that waits for outputs which nobody will make starts when all else has ended.
        let is_idle = plan_of_slot.iter().all(Option::is_none);
        waiting.retain(|&idx| {
            let is_due = plans[idx].starts_at <= output_count || is_idle;
            if !is_due || plan_of_slot.iter().all(Option::is_some) {
                return true;
            }
            let slot = engine.submit(&plans[idx].request()).expect("a slot is free");
            assert_eq!(plan_of_slot[slot as usize].replace(idx), None, "slot {slot} was free");
            false
        });
        let is_news = engine
            .poll(&mut |slot, event| {
                let slot = &mut plan_of_slot[slot as usize];
                let answer = &mut answers[slot.expect("outputs belong to a request")];
                answer.take(event);
                if answer.end.is_some() {
                    *slot = None;
                }
            })
            .expect("the device runs");
        output_count += usize::from(is_news);
        for (slot, idx) in plan_of_slot.iter().enumerate() {
            let Some(idx) = *idx else { continue };
            let is_due = plans[idx].cancelled_at.is_some_and(|n| answers[idx].ids.len() >= n);
            if is_due && !is_cancelled[idx] {
                is_cancelled[idx] = true;
                engine.cancel(slot as u32);
            }
        }
        if !is_news {
            std::thread::sleep(POLL_SLEEP);
        }
    }
    answers
}

/// The answer to a plan on an engine that has one slot and one worker, and runs nothing else.
pub(crate) fn alone(path: &Path, plan: &Plan) -> Answer {
    play(&mut open(path, 1, 1, 64), 1, std::slice::from_ref(plan)).remove(0)
}
