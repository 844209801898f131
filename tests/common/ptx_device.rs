//! The interpreter as a device: the engine drives the shipped PTX as it drives GPUs.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use ptxvm::{Arg, Checks, DeviceId, Module, RunState, View, Vm, VmConfig};
use tilert_mk::driver::{Device, Profile};
use tilert_mk::error::{Error, Result};
use tilert_mk_shared::program::ProgramHeader;
use tilert_mk_shared::task::{Opcode, Task};
use tilert_mk_shared::tile::{
    BLOCK_THREADS, COMPUTE_WARPS, GPU_STEP_TOKENS_MAX, SharedPlan, TASK_WORD, TILE_ROWS_MAX,
};

/// Warp instructions that run between two looks of the host.
const BURST_STEPS: u64 = 20_000;
/// Warp instructions of a run at most; an idle kernel looks at its mailbox for as long as the host is
/// slow.
const STEP_LIMIT: u64 = 2_000_000_000;
/// Bursts after which a kernel that has been told to stop is left as it is.
const STOP_BURSTS: u64 = 500;
/// Where the interpreter puts dynamic shared memory.
const SHARED_FIRST: u32 = 1024;

/// What a run of the interpreter is asked for, and what it leaves.
pub(crate) struct PtxOptions {
    /// PTX text.
    pub(crate) text: String,
    /// GPUs that run the program together.
    pub(crate) devices: u32,
    /// Blocks of all of them.
    pub(crate) workers: u32,
    /// Shared memory of a block.
    pub(crate) shared_bytes: u32,
    /// Seed of the schedule.
    pub(crate) seed: u64,
    /// What to change in the uploaded tasks before the launch.
    pub(crate) edit_tasks: fn(&mut [Task]),
}

/// What the test wants to know afterwards.
#[derive(Default)]
pub(crate) struct Report {
    /// The findings, one line each.
    pub(crate) findings: Vec<String>,
    /// Instructions of single lanes.
    pub(crate) lane_steps: u64,
}

/// Zeroed memory of this process, in whole words of 16 bytes.
type HostMemory = Box<[u128]>;

/// A device of the interpreter.
pub(crate) struct PtxDevice {
    profile: Profile,
    module: Module,
    edit_tasks: fn(&mut [Task]),
    devices: Vec<DeviceId>,
    vm: Arc<Mutex<Vm>>,
    shared: Vec<HostMemory>,
    runner: Option<JoinHandle<()>>,
    /// Calls of the host that wait for the machine.
    host_waits: Arc<AtomicU32>,
    /// Bursts that the kernel may still run.
    bursts_left: Arc<AtomicU64>,
    report: Arc<Mutex<Report>>,
}

impl PtxDevice {
    /// A device for one engine; its findings go to the report when it ends.
    pub(crate) fn new(options: PtxOptions) -> (PtxDevice, Arc<Mutex<Report>>) {
        let module = Module::parse(&options.text).expect("the PTX is understood");
        // A microsecond of the kernel's clock is a thousand steps; deadlines come before the
        // interpreter's own patience ends.
        let mut vm = Vm::new(VmConfig {
            seed: options.seed,
            checks: Checks::ALL,
            stall_steps: 8_000_000,
            ns_per_step: 10,
            step_limit: STEP_LIMIT,
        });
        let devices: Vec<_> =
            (0..options.devices).map(|pe| vm.add_device(&format!("gpu {pe}"))).collect();
        let profile = Profile {
            name: "ptxvm".into(),
            pe_count: options.devices,
            worker_count: options.workers,
            worker_count_max: options.workers,
            step_tokens_max: GPU_STEP_TOKENS_MAX,
            tile_bytes: 1 << 20,
            tile_rows_max: TILE_ROWS_MAX,
            shared_bytes: options.shared_bytes,
            packs_weights: true,
            stamps_values: true,
            takes_pieces: options.text.contains("_in_pieces"),
            polls_per_look: 256,
            host_spins: false,
        };
        let report = Arc::new(Mutex::new(Report::default()));
        let device = PtxDevice {
            profile,
            module,
            edit_tasks: options.edit_tasks,
            devices,
            vm: Arc::new(Mutex::new(vm)),
            shared: Vec::new(),
            runner: None,
            host_waits: Arc::new(AtomicU32::new(0)),
            bursts_left: Arc::new(AtomicU64::new(u64::MAX)),
            report: report.clone(),
        };
        (device, report)
    }

    fn vm(&self) -> std::sync::MutexGuard<'_, Vm> {
        self.host_waits.fetch_add(1, Ordering::AcqRel);
        let vm = self.vm.lock();
        self.host_waits.fetch_sub(1, Ordering::AcqRel);
        vm.expect("no thread of the interpreter has panicked")
    }

    /// Launches the kernel on one device.
    fn launch_on(&self, device: DeviceId, header: &ProgramHeader) -> Result<()> {
        self.edit(header)?;
        let mut vm = self.vm();
        for pair in header.plan.regions().windows(2) {
            let ([(name, first), (_, end)], heap) = ([pair[0], pair[1]], header.heap);
            vm.name_range(heap + first, end - first, name).map_err(wrap)?;
            // What the first device alone uses is no other's.
            let is_used = match name {
                "sequences" | "mailbox_view" => header.first_worker == 0,
                _ => matches!(name, "events" | "stamped"),
            };
            if is_used {
                vm.fill(heap + first, 0, end - first).map_err(wrap)?;
            }
        }
        let ProgramHeader { input_bytes, page_count, page_bytes, .. } = *header;
        let near = SharedPlan { input_bytes, page_count, page_bytes };
        // SAFETY: a plain structure of integers and floats without padding.
        let bytes = unsafe {
            std::slice::from_raw_parts(
                (header as *const ProgramHeader).cast::<u8>(),
                size_of::<ProgramHeader>(),
            )
        };
        let arguments = [Arg::Bytes(bytes.to_vec())];
        vm.launch(
            device,
            &self.module,
            "tilert_mk",
            header.pe_worker_count(),
            BLOCK_THREADS,
            near.shared_bytes(),
            &arguments,
        )
        .map(|_| ())
        .map_err(wrap)
    }

    /// Lets the test change the uploaded tasks.
    fn edit(&self, header: &ProgramHeader) -> Result<()> {
        let mut tasks = vec![Task::new(Opcode::Empty); header.task_count as usize];
        // SAFETY: a task is 128 bytes of integers without padding, and any bytes are one.
        let bytes = unsafe {
            std::slice::from_raw_parts_mut(
                tasks.as_mut_ptr().cast::<u8>(),
                size_of_val(tasks.as_slice()),
            )
        };
        let mut vm = self.vm();
        vm.read(header.tasks, bytes).map_err(wrap)?;
        (self.edit_tasks)(&mut tasks);
        // SAFETY: as above.
        let bytes = unsafe {
            std::slice::from_raw_parts(tasks.as_ptr().cast::<u8>(), size_of_val(tasks.as_slice()))
        };
        vm.write(header.tasks, bytes).map_err(wrap)
    }
}

/// The task that a block runs: its index and its op. The loading warp is ahead of it.
fn task_of(view: &View, tasks: u64) -> Option<String> {
    let (mut word, mut opcode) = ([0; 4], [0; 2]);
    if !view.read_shared(SHARED_FIRST + TASK_WORD, &mut word) {
        return None;
    }
    let task_idx = u32::from_le_bytes(word);
    if !view.read(tasks + u64::from(task_idx) * size_of::<Task>() as u64, &mut opcode) {
        return None;
    }
    let op = Opcode::from_raw(u16::from_le_bytes(opcode)).map_or("no op", Opcode::name);
    let ahead = if view.warp() == COMPUTE_WARPS { "loading ahead of " } else { "" };
    Some(format!("{ahead}task {task_idx} ({op})"))
}

fn wrap(error: ptxvm::VmError) -> Error {
    Error::Device(error.to_string())
}

impl Device for PtxDevice {
    fn profile(&self) -> &Profile {
        &self.profile
    }

    fn place(&mut self, pe: u32, bytes: &[u8]) -> Result<u64> {
        let device = self.devices[pe as usize];
        let mut vm = self.vm();
        let address = vm.alloc(device, "weights", bytes.len() as u64, 256);
        vm.write(address, bytes).map_err(wrap)?;
        vm.set_read_only(address, bytes.len() as u64).map_err(wrap)?;
        Ok(address)
    }

    fn reserve(&mut self, pe: u32, what: &str, bytes: u64) -> Result<u64> {
        // Not filled: the heap's zeros are promised for what `launch` fills, and a read of anything
        // else before it is written is a mistake.
        let device = self.devices[pe as usize];
        Ok(self.vm().alloc(device, what, bytes, 256))
    }

    fn reserve_shared(&mut self, what: &str, bytes: u64) -> Result<u64> {
        let mut memory: HostMemory = vec![0u128; bytes.div_ceil(16) as usize + 8].into();
        let pointer = memory.as_mut_ptr().cast::<u8>();
        // Mailbox words and fault records want cache lines of their own.
        let skip = pointer.align_offset(128);
        self.shared.push(memory);
        // SAFETY: inside the memory just made, which lives as long as the device.
        Ok(unsafe { self.vm().map_host(what, pointer.add(skip), bytes) })
    }

    fn write(&mut self, _pe: u32, address: u64, bytes: &[u8]) -> Result<()> {
        self.vm().write(address, bytes).map_err(wrap)
    }

    fn read(&self, _pe: u32, address: u64, out: &mut [u8]) -> Result<()> {
        self.vm().read(address, out).map_err(wrap)
    }

    fn launch(&mut self, headers: &[ProgramHeader]) -> Result<()> {
        let tasks = headers[0].tasks;
        self.vm().set_annotator(move |view| task_of(view, tasks));
        for (device, header) in self.devices.iter().zip(headers) {
            self.launch_on(*device, header)?;
        }
        let (vm, host_waits) = (self.vm.clone(), self.host_waits.clone());
        let bursts_left = self.bursts_left.clone();
        self.runner = Some(std::thread::spawn(move || {
            while bursts_left.fetch_sub(1, Ordering::Relaxed) > 0 {
                // The lock is not fair, and this thread holds it nearly always: the host goes first.
                while host_waits.load(Ordering::Acquire) > 0 {
                    std::thread::yield_now();
                }
                let state = vm.lock().expect("the device has not panicked").run(BURST_STEPS);
                if state != RunState::Running {
                    break;
                }
            }
        }));
        Ok(())
    }

    fn check(&self) -> Result<()> {
        // One finding is enough: what a broken kernel does after it may take for ever.
        if let Some(finding) = self.vm().findings().first() {
            return Err(Error::Fault(finding.to_string()));
        }
        if self.runner.as_ref().is_some_and(JoinHandle::is_finished) {
            return Err(Error::Fault("the kernel has ended".into()));
        }
        Ok(())
    }

    fn join(&mut self) {
        if let Some(runner) = self.runner.take() {
            // The kernel has been told to stop; a broken one need not obey.
            let is_broken = !self.vm().findings().is_empty();
            let bursts = if is_broken { 0 } else { STOP_BURSTS };
            self.bursts_left.store(bursts, Ordering::Relaxed);
            runner.join().expect("the interpreter has not panicked");
            let mut vm = self.vm();
            vm.expect_finished();
            let mut report = self.report.lock().expect("the test has not panicked");
            report.findings = vm.findings().iter().map(|f| f.to_string()).collect();
            report.lane_steps = vm.lane_steps();
        }
    }

    fn now_ns(&self) -> Option<u64> {
        None
    }
}
