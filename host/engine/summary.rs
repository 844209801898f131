//! What an open engine costs on this machine.

use std::time::Instant;

use tilert_mk_model::lower::Program;
use tilert_mk_shared::task::{LinearArgs, Opcode};

use super::Engine;
use crate::cli::Summary;
use crate::driver::cpu::anonymous;
use crate::error::Result;

impl Summary {
    /// The figures of an open engine; probes the memory's read bandwidth.
    pub fn of(engine: &Engine) -> Result<Self> {
        let program = engine.program();
        let parameters = program.tensors.iter().map(|t| t.shape.iter().product::<u64>()).sum();
        let weight_bytes = program
            .tensors
            .iter()
            .filter_map(|t| engine.weights.tensor(&t.name))
            .map(|view| view.data.len() as u64)
            .sum();
        let regions = program.plan.regions();
        Ok(Self {
            device: engine.device_name().to_owned(),
            workers: engine.worker_count(),
            parameters,
            weight_bytes,
            bytes_per_token: bytes_per_token(program),
            task_count: program.tasks.len() as u32,
            event_count: program.event_arrivals.len() as u32,
            stage_count: program.stage_count,
            context_max: engine.context_max(),
            heap_regions: regions.windows(2).map(|w| (w[0].0, w[1].1 - w[0].1)).collect(),
            read_bytes_per_second: if engine.device_name() == "cpu" {
                read_bandwidth(engine.worker_count())?
            } else {
                0.0
            },
        })
    }
}

/// Bytes a second that `thread_count` threads read together, the best of three passes.
fn read_bandwidth(thread_count: u32) -> Result<f64> {
    const PROBE_BYTES: u64 = 256 << 20;
    let mut map = anonymous("the bandwidth probe", PROBE_BYTES * u64::from(thread_count))?;
    map.fill(1);
    let mut best = 0.0f64;
    for _ in 0..3 {
        let begin = Instant::now();
        std::thread::scope(|scope| {
            for part in map.chunks(PROBE_BYTES as usize) {
                scope.spawn(move || {
                    let sum = part.chunks_exact(8).fold(0u64, |sum, bytes| {
                        sum.wrapping_add(bytes.try_into().map_or(0, u64::from_ne_bytes))
                    });
                    std::hint::black_box(sum)
                });
            }
        });
        best = best.max(map.len() as f64 / begin.elapsed().as_secs_f64());
    }
    Ok(best)
}

/// Weight bytes that one decoded token reads.
fn bytes_per_token(program: &Program) -> u64 {
    let linear = program.tasks.iter().filter(|task| task.opcode == Opcode::Linear as u16);
    linear.map(|task| LinearArgs::unpack(task).weight_bytes()).sum()
}
