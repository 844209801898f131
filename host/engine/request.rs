//! What callers say to an engine and hear from it.

use std::path::Path;

use tilert_mk_shared::limits::{STEP_TOKENS_MAX, WAIT_NS_MAX};
use tilert_mk_shared::sample::SamplingParams;

use crate::driver::Device;
use crate::driver::cpu::CpuDevice;
use crate::driver::cuda::CudaDevice;
use crate::error::{Error, Result};

/// Where a model comes from.
pub enum ModelSource<'a> {
    /// The demo model in the binary.
    Embedded,
    /// A checkpoint directory.
    Directory(&'a Path),
}

/// Which device runs the program.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum DeviceKind {
    /// The first GPU that can run the kernel, or else the CPU.
    Auto,
    /// One thread for each worker.
    Cpu,
    /// NVIDIA GPUs, from the first on: one block for each worker.
    Cuda,
}

impl DeviceKind {
    /// Opens the device, or `count` of them that run a program together; with `polls_busily`, workers of a
    /// CPU never give up their cores.
    ///
    /// Errors: a GPU that was asked for by name and cannot be used; several devices that are not GPUs.
    pub fn open(self, count: u32, polls_busily: bool) -> Result<Box<dyn Device>> {
        match self {
            DeviceKind::Cpu if count > 1 => {
                let message = format!("--devices {count} needs --device cuda: a CPU is one device");
                Err(Error::Usage(message))
            }
            DeviceKind::Cpu => Ok(Box::new(CpuDevice::new(polls_busily))),
            DeviceKind::Auto if count == 1 => match CudaDevice::open(count) {
                Ok(device) => Ok(Box::new(device)),
                Err(_) => Ok(Box::new(CpuDevice::new(polls_busily))),
            },
            // No CPU takes the place of several.
            DeviceKind::Auto | DeviceKind::Cuda => Ok(Box::new(CudaDevice::open(count)?)),
        }
    }
}

/// How weights come into memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum LoadMode {
    /// Used in place from the mapped file, on the CPU; uploaded from it, on a GPU.
    Map,
    /// Copied once into huge pages.
    Copy,
    /// Random values in the shapes of config.json, for benchmarks.
    Dummy,
}

/// In which format matrices are multiplied.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Weights {
    /// As the checkpoint stores them.
    Native,
    /// 8-bit floating point (E4M3) with a scale for each 128 x 128 values.
    Fp8,
    /// 8-bit integers with a scale for each 32 values of a row.
    Q8,
    /// 4-bit integers with a scale for each 32 values of a row.
    Q4,
}

/// How products are computed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Compute {
    /// Activations as they are: f32, or on the CPU integers of 24 bits beside q8 and q4 weights.
    Exact,
    /// Activations rounded to bf16, or to integers of 16 bits beside quantised weights.
    Bf16,
}

/// What the user decides about an engine.
pub struct EngineOptions {
    /// Workers; what the device prefers if none.
    pub workers: Option<u32>,
    /// Positions per sequence; at most 4096 of the model's if none.
    pub max_context: Option<u32>,
    /// Sequences resident at once.
    pub slots: u32,
    /// Tokens of a step at most, from 1 to `STEP_TOKENS_MAX`; fewer where the device has a limit.
    pub step_tokens: u32,
    /// Where weights are kept.
    pub load: LoadMode,
    /// Format of the matrices.
    pub weights: Weights,
    /// Precision.
    pub compute: Compute,
    /// Steps that the trace keeps; 0 for no trace.
    pub trace_steps: u32,
    /// Time after which a wait inside a step is a fault.
    pub wait_ns_max: u64,
}

impl Default for EngineOptions {
    fn default() -> Self {
        EngineOptions {
            workers: None,
            max_context: None,
            slots: 1,
            step_tokens: STEP_TOKENS_MAX,
            load: LoadMode::Map,
            weights: Weights::Native,
            compute: Compute::Exact,
            trace_steps: 0,
            wait_ns_max: WAIT_NS_MAX,
        }
    }
}

/// One request.
pub struct Request<'a> {
    /// Token ids.
    pub prompt: &'a [u32],
    /// Tokens to generate at most.
    pub max_tokens: u32,
    /// Tokens that end the answer.
    pub stop_ids: &'a [u32],
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Whether `Event::Logits` is wanted for each position.
    pub want_logits: bool,
}

impl<'a> Request<'a> {
    /// The most likely tokens after `prompt`, `max_tokens` of them whatever they are.
    pub fn greedy(prompt: &'a [u32], max_tokens: u32) -> Request<'a> {
        let sampling = SamplingParams::GREEDY;
        Request { prompt, max_tokens, stop_ids: &[], sampling, want_logits: false }
    }
}

/// What happens while requests run.
pub enum Event<'a> {
    /// A token was generated, at `time_ns` of the engine's clock.
    Token {
        /// The token.
        id: u32,
        /// When.
        time_ns: u64,
    },
    /// The logits of a position, in order of positions.
    Logits {
        /// The position.
        position: u32,
        /// `[vocab_size]`.
        row: &'a [f32],
    },
    /// The answer is complete; its slot is free.
    End(FinishReason),
    /// Nothing for a while.
    Idle,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// `max_tokens` were generated.
    Length,
    /// A stop id was generated.
    Stop,
    /// The caller ended it.
    Cancelled,
    /// The logits of this position were not numbers.
    NotANumber {
        /// The position.
        position: u32,
    },
}

impl FinishReason {
    /// The word for JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            FinishReason::Length => "length",
            FinishReason::Stop => "stop",
            FinishReason::Cancelled => "cancelled",
            FinishReason::NotANumber { .. } => "not-a-number",
        }
    }
}

/// A finished answer.
pub struct Completion {
    /// The generated tokens.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// When it was submitted, on the engine's clock.
    pub submitted_ns: u64,
    /// When each token was generated.
    pub token_times_ns: Vec<u64>,
}
