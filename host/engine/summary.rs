//! What an open engine costs on this machine.

use tilert_mk_model::lower::Tensor;
use tilert_mk_shared::task::{LinearArgs, Opcode};

use super::Engine;
use super::bind::stored_tensors;
use crate::bandwidth::Probe;
use crate::cli::Summary;
use crate::error::Result;

impl Summary {
    /// The figures of an open engine; probes the memory's read bandwidth.
    pub fn of(engine: &Engine) -> Result<Self> {
        let program = engine.program();
        let regions = program.plan.regions();
        Ok(Self {
            device: engine.device_name().to_owned(),
            workers: engine.worker_count(),
            parameters: engine.parameter_count(),
            weight_bytes: engine.weight_bytes(),
            bytes_per_token: engine.bytes_per_token(),
            task_count: program.tasks.len() as u32,
            event_count: program.event_arrivals.len() as u32,
            stage_count: program.stage_count,
            context_max: engine.context_max(),
            heap_regions: regions.windows(2).map(|w| (w[0].0, w[1].1 - w[0].1)).collect(),
            read_bytes_per_second: if engine.runs_on_host_memory() {
                Probe::new(engine.worker_count())?.measure().best_bytes_per_second
            } else {
                0.0
            },
        })
    }
}

impl Engine {
    /// Whether workers read the memory that the host reads: its bandwidth bounds them.
    pub fn runs_on_host_memory(&self) -> bool {
        self.header().page_count == 0
    }

    /// Weights of the model, each counted once; scales are none.
    pub fn parameter_count(&self) -> u64 {
        let tensors = &self.program.tensors;
        let count = |tensor: &Tensor| tensor.shape.iter().product::<u64>();
        let scales = tensors.iter().filter_map(|tensor| tensor.scales);
        let scale_count: u64 = scales.map(|idx| count(&tensors[idx.0 as usize])).sum();
        tensors.iter().map(count).sum::<u64>() - scale_count
    }

    /// Bytes of all weights, as the checkpoint stores them or in strips with their scales.
    pub fn weight_bytes(&self) -> u64 {
        let in_strips = self.linear().filter(|args| args.format.is_blocked());
        let quantised: u64 = in_strips.map(|args| args.weight_bytes()).sum();
        let kept = stored_tensors(&self.program, false, |_| true);
        let kept = self.program.tensors.iter().zip(kept).filter(|(_, is_kept)| *is_kept);
        let views = kept.filter_map(|(tensor, _)| self.weights.tensor(&tensor.name));
        quantised + views.map(|view| view.data.len() as u64).sum::<u64>()
    }

    /// Bytes of weights that one decoded token reads.
    pub fn bytes_per_token(&self) -> u64 {
        self.linear().map(|args| args.weight_bytes()).sum()
    }

    /// The linear tasks.
    fn linear(&self) -> impl Iterator<Item = LinearArgs> {
        let tasks = self.program.tasks.iter();
        tasks.filter(|task| task.opcode == Opcode::Linear as u16).map(LinearArgs::unpack)
    }
}
