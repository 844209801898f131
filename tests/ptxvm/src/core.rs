//! The state of the machine while it runs, apart from the registers of the warp that executes.

use crate::finding::{Finding, FindingKind};
use crate::memory::Memory;
use crate::program::Code;
use crate::race::{Clock, Races};
use crate::warp::Warp;
use rustc_hash::FxHashMap;
use std::sync::Arc;

/// Which checks run.
#[derive(Clone, Copy, Debug)]
pub struct Checks {
    /// Data races and missing proxy fences.
    pub races: bool,
    /// Reads of memory nobody wrote.
    pub uninitialised_memory: bool,
    /// Reads of registers nobody wrote.
    pub uninitialised_registers: bool,
}

impl Checks {
    /// Every check.
    pub const ALL: Checks =
        Checks { races: true, uninitialised_memory: true, uninitialised_registers: true };
    /// Only what stops a kernel on hardware too: bounds, alignment, traps, barriers, hangs.
    pub const NONE: Checks =
        Checks { races: false, uninitialised_memory: false, uninitialised_registers: false };
}

/// How a machine runs.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// Picks the interleaving. Same seed, same run.
    pub seed: u64,
    /// Which checks run.
    pub checks: Checks,
    /// The most warp instructions in all; then what runs is reported.
    pub step_limit: u64,
    /// Warp instructions without any change of memory or barriers after which the machine is
    /// stuck. Reads of mapped host memory suspend this check: the host may yet write.
    pub stall_steps: u64,
    /// How far `%globaltimer` moves with each warp instruction.
    pub ns_per_step: u64,
}

impl Default for VmConfig {
    fn default() -> VmConfig {
        VmConfig {
            seed: 0,
            checks: Checks::ALL,
            step_limit: u64::MAX,
            stall_steps: 2_000_000,
            ns_per_step: 1,
        }
    }
}

/// A deterministic generator (SplitMix64): the schedule must not depend on any library's version.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next()) * n as u128) >> 64) as usize
    }
}

/// A launched kernel.
pub(crate) struct Launch {
    pub(crate) code: Arc<Code>,
    pub(crate) device: u32,
    pub(crate) grid: u32,
    pub(crate) block_threads: u32,
    pub(crate) dynamic_shared: u32,
    pub(crate) total_shared: u32,
    pub(crate) params: Vec<u8>,
    /// Address of each symbol in its own state space.
    pub(crate) symbols: Vec<u64>,
    pub(crate) blocks_left: u32,
}

/// A barrier of a block.
#[derive(Clone, Debug, Default)]
pub(crate) struct Barrier {
    /// Arrived warps (in the block) with their lanes, and whether they wait.
    pub(crate) arrived: Vec<(u32, u32, bool)>,
    pub(crate) threads: u32,
    pub(crate) expected: Option<u32>,
    /// The value of `bar.red`, and where to put it: warp, lanes.
    pub(crate) votes: (u32, u32),
    pub(crate) pc: u32,
    pub(crate) clocks: Vec<(u32, u32)>,
    /// What `bar.arrive` released.
    pub(crate) early: Clock,
}

/// A resident block.
pub(crate) struct Block {
    pub(crate) launch: u32,
    pub(crate) index: u32,
    pub(crate) shared: u32,
    pub(crate) first_warp: u32,
    pub(crate) warp_count: u32,
    /// Clock number of warp 0; the agents follow the warps.
    pub(crate) first_id: u32,
    pub(crate) bulk_agent: u32,
    /// Clock number of the first `cp.async` agent, one for each warp.
    pub(crate) copy_agents: u32,
    pub(crate) alive: Vec<u32>,
    pub(crate) exited_early: bool,
    pub(crate) barriers: Vec<Barrier>,
    pub(crate) agent_lanes: FxHashMap<u64, u32>,
}

/// Everything but the annotator.
pub(crate) struct Core {
    pub(crate) config: VmConfig,
    pub(crate) rng: Rng,
    pub(crate) memory: Memory,
    pub(crate) races: Races,
    pub(crate) devices: Vec<String>,
    pub(crate) launches: Vec<Launch>,
    pub(crate) blocks: Vec<Block>,
    /// Warps by number; one is out while it runs.
    pub(crate) warps: Vec<Option<Box<Warp>>>,
    /// Warps that may run.
    pub(crate) ready: Vec<u32>,
    pub(crate) copies: Vec<crate::exec::copy::Copy>,
    pub(crate) copy_count: u64,
    pub(crate) findings: Vec<Finding>,
    pub(crate) seen: FxHashMap<(FindingKind, u32, u32), usize>,
    /// Findings before this have their notes.
    pub(crate) noted: usize,
    pub(crate) steps: u64,
    pub(crate) lane_steps: u64,
    pub(crate) time_ns: u64,
    pub(crate) progress_at: u64,
    pub(crate) host_read_at: u64,
    /// Plain writes to host memory that no release at system scope has followed, the last of each
    /// lane: (warp, lane) to the warp's counter and the pc.
    pub(crate) host_writes: FxHashMap<(u32, usize), (u32, u32)>,
    pub(crate) stuck: bool,
    /// The warp that the scheduler starves for now.
    pub(crate) slow: u32,
    /// What finished kernels knew: a later launch is ordered after them.
    pub(crate) finished: Clock,
    /// A device's module variables: (device, code address, symbol) to address.
    pub(crate) variables: FxHashMap<(u32, usize, u32), u64>,
    /// Modules whose variables exist stay alive, so that their address is theirs.
    pub(crate) modules: Vec<Arc<Code>>,
    pub(crate) dead_launches: Vec<u32>,
}

impl Core {
    pub(crate) fn new(config: VmConfig) -> Core {
        let races = Races { enabled: config.checks.races, ..Races::default() };
        Core {
            rng: Rng(config.seed ^ 0x5eed),
            config,
            memory: Memory::default(),
            races,
            devices: Vec::new(),
            launches: Vec::new(),
            blocks: Vec::new(),
            warps: Vec::new(),
            ready: Vec::new(),
            copies: Vec::new(),
            copy_count: 0,
            findings: Vec::new(),
            seen: FxHashMap::default(),
            noted: 0,
            steps: 0,
            lane_steps: 0,
            time_ns: 0,
            progress_at: 0,
            host_read_at: 0,
            host_writes: FxHashMap::default(),
            stuck: false,
            slow: u32::MAX,
            finished: Clock::default(),
            variables: FxHashMap::default(),
            modules: Vec::new(),
            dead_launches: Vec::new(),
        }
    }

    pub(crate) fn progress(&mut self) {
        self.progress_at = self.steps;
    }

    /// Reports something about lane `lane` of a warp at `pc`.
    pub(crate) fn report(
        &mut self,
        kind: FindingKind,
        (block, warp, lane, pc): (u32, u32, u32, u32),
        place: Option<String>,
        message: String,
    ) {
        let home = &self.blocks[block as usize];
        let launch = &self.launches[home.launch as usize];
        let module = Arc::as_ptr(&launch.code) as usize;
        let key = (kind, pc, module as u32);
        if let Some(&at) = self.seen.get(&key) {
            self.findings[at].count += 1;
            return;
        }
        self.seen.insert(key, self.findings.len());
        self.findings.push(Finding {
            kind,
            message,
            line: launch.code.insts.get(pc as usize).map_or(0, |i| i.line),
            source: launch.code.source(pc),
            function: launch.code.function_of(pc).to_string(),
            device: self.devices[launch.device as usize].clone(),
            launch: home.launch,
            block: home.index,
            warp,
            lane,
            place,
            note: None,
            count: 1,
        });
    }

    /// The same, for the warp that executes.
    pub(crate) fn blame(&mut self, kind: FindingKind, warp: &Warp, lane: usize, message: String) {
        self.report(kind, (warp.block, warp.index, lane as u32, warp.pc), None, message);
    }
}
