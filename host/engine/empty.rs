//! Engines of empty tasks, for measuring the runtime itself on any device.

use std::hint::{black_box, spin_loop};
use std::mem::offset_of;
use std::time::{Duration, Instant};

use tilert_mk_device::machine::cpu::Isa;
use tilert_mk_device::machine::cpu::thread::{Idling, Thread};
use tilert_mk_device::worker::{Progress, Worker};
use tilert_mk_model::config::ModelConfig;
use tilert_mk_model::lower::{EmptyShape, lower_empty};
use tilert_mk_model::weights::Dtype;
use tilert_mk_shared::mailbox::Mailbox;

use super::bind::{bytes_of, open_checkpoint, read_config};
use super::{Engine, EngineOptions, Event, LOOKS_PER_CHECK, ModelSource, Request, lower_options};
use crate::driver::Device;
use crate::error::{Error, Result};
use crate::load::DummyWeights;

impl Engine {
    /// Starts workers on a program of empty tasks. It answers requests as a model of `vocab_size`
    /// tokens would whose logits are the same in every step.
    ///
    /// Errors: as `open`.
    pub fn open_empty(
        mut device: Box<dyn Device>,
        options: &EngineOptions,
        shape: &EmptyShape,
        vocab_size: u32,
    ) -> Result<Engine> {
        let source = ModelSource::Embedded;
        let checkpoint = open_checkpoint(&source)?;
        let config = read_config(&source, checkpoint.config_text(), None)?;
        let config = ModelConfig { vocab_size, ..config };
        let dtype = Dtype::Bf16;
        let lower_options = lower_options(&config, device.profile(), options, dtype)?;
        let program = lower_empty(&config, &lower_options, shape)?;
        device.prepare(&program.formats())?;
        let weights = Box::new(DummyWeights::new(&[], 0, &mut |_, _| {})?);
        let mut engine =
            Engine::build(config, program, device, weights, dtype, options, &mut |_, _| {})?;
        engine.prepare()?;
        let address = engine.header().heap + engine.header().plan.logits;
        engine.device.write(0, address, bytes_of(&made_up_logits(vocab_size)))?;
        engine.launch()?;
        Ok(engine)
    }

    /// Submits a request for one token; how long it took until a worker had read the command. The
    /// request is over afterwards.
    ///
    /// Errors: a device that has stopped.
    pub fn react(&mut self) -> Result<Duration> {
        let request = Request::greedy(&[0], 1);
        let begin = Instant::now();
        let _ = self.submit(&request)?;
        let tail = self.word(offset_of!(Mailbox, command_tail)).load_relaxed();
        let head = self.word(offset_of!(Mailbox, command_head));
        let mut looks = 0u32;
        while head.load_acquire() != tail {
            spin_loop();
            looks = looks.wrapping_add(1);
            if looks.is_multiple_of(LOOKS_PER_CHECK) {
                self.check_fault()?;
                // The worker may need this thread's core.
                std::thread::yield_now();
            }
        }
        let reaction = begin.elapsed();
        let mut has_ended = false;
        while !has_ended {
            let is_news = self.poll(&mut |_, event| has_ended = matches!(event, Event::End(_)))?;
            if !is_news {
                std::thread::yield_now();
            }
        }
        Ok(reaction)
    }

    /// Ends the workers of a CPU and claims the tasks of worker 0, `batch` at a time, as that worker
    /// would; `on_batch` hears how long a batch took and breaks off with false.
    ///
    /// Errors: a device whose queues this host does not reach.
    pub fn claim_alone(
        mut self,
        batch: u32,
        on_batch: &mut dyn FnMut(Duration) -> bool,
    ) -> Result<()> {
        if !self.runs_on_host_memory() {
            return Err(Error::Device("the host cannot claim tasks of a GPU".into()));
        }
        self.shut_down();
        let machine = Thread { isa: Isa::detect(), idling: Idling::Yield, clock: self.clock };
        // SAFETY: all workers have been joined, so this is the only one; the engine keeps the memory
        // that the header and its tasks name, and no task is run.
        let worker = unsafe { Worker::new(self.header(), 0, &machine, Progress::NONE) };
        loop {
            let begin = Instant::now();
            for _ in 0..batch {
                let claim = worker.next().map(|(offer, _)| worker.take(&offer));
                let _ = black_box(claim);
            }
            if !on_batch(begin.elapsed()) {
                return Ok(());
            }
        }
    }
}

/// Logits of the only row that steps of one token have, spread over -8 to 8 by a multiplicative hash of the token.
fn made_up_logits(vocab_size: u32) -> Vec<f32> {
    let spread = |token: u32| token.wrapping_mul(0x9e37_79b9) as f32 / u32::MAX as f32;
    (0..vocab_size).map(|token| spread(token) * 16.0 - 8.0).collect()
}
