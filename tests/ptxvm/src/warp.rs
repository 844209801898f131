//! A warp: registers, program counters of its lanes, divergence and reconvergence.
//!
//! Lanes with the same program counter run together. Normally the group with the lowest program
//! counter runs, which reconverges structured code; sometimes, and always after a spin, another
//! group gets a burst, so that every lane makes progress as independent thread scheduling has it.

use crate::program::{Code, Reg, SINK};
use crate::race::bits;

/// Values of one operand for all lanes.
pub(crate) type Lanes = [u64; 32];

/// Why a lane does not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parked {
    No,
    /// At a warp-wide instruction, until the other members come.
    Warp,
    /// In a barrier of the block.
    Barrier(u8),
}

/// `cp.async` bookkeeping of one lane.
#[derive(Clone, Debug, Default)]
pub(crate) struct CopyGroups {
    /// Number of the open group.
    pub(crate) open: u32,
    /// Unfinished copies by group.
    pub(crate) left: Vec<(u32, u32)>,
    /// Counters of finished copies, to be known after a wait, by group.
    pub(crate) done: Vec<(u32, u32)>,
}

pub(crate) struct Warp {
    /// Number among all warps and agents, for clocks.
    pub(crate) id: u32,
    pub(crate) launch: u32,
    /// Block number among all blocks of the machine.
    pub(crate) block: u32,
    pub(crate) index: u32,
    /// Lanes that have not exited.
    pub(crate) alive: u32,
    /// Lanes that run now, and their program counter.
    pub(crate) active: u32,
    pub(crate) pc: u32,
    pub(crate) pcs: [u32; 32],
    pub(crate) parked: [Parked; 32],
    pub(crate) parked_mask: u32,
    /// The lowest program counter of runnable lanes that wait for their turn.
    next_other: u32,
    /// Do not switch to a lower group for now.
    pub(crate) free_run: bool,
    /// The last burst ended in polling.
    pub(crate) spun: bool,
    pub(crate) regs: Vec<Lanes>,
    pub(crate) defined: Vec<u32>,
    pub(crate) carry: u32,
    pub(crate) stack: [Vec<u32>; 32],
    /// Lane-major thread-local memory and call parameters.
    pub(crate) local: Vec<u8>,
    pub(crate) local_init: Vec<bool>,
    pub(crate) local_bytes: usize,
    pub(crate) params: Vec<u8>,
    pub(crate) param_bytes: usize,
    pub(crate) wake_at: u64,
    pub(crate) copies: Vec<CopyGroups>,
    pub(crate) bulk_open: [u32; 32],
    /// Finished bulk stores: lane, group, clock component and its value.
    pub(crate) bulk_done: Vec<(usize, u32, usize, u32)>,
    /// What strong reads saw last, to notice spinning: pc and value.
    pub(crate) last_poll: (u32, u64),
}

impl Warp {
    pub(crate) fn new(code: &Code, entry: usize, ids: [u32; 4], lanes: u32) -> Warp {
        let function = &code.functions[entry];
        let regs = function.regs as usize;
        let local_bytes = (function.local_bytes as usize).next_multiple_of(16);
        let param_bytes = (function.param_bytes as usize).next_multiple_of(16);
        let copies = if code.uses_cp_async { vec![CopyGroups::default(); 32] } else { Vec::new() };
        Warp {
            id: ids[0],
            launch: ids[1],
            block: ids[2],
            index: ids[3],
            alive: lanes,
            active: lanes,
            pc: function.start,
            pcs: [function.start; 32],
            parked: [Parked::No; 32],
            parked_mask: 0,
            next_other: u32::MAX,
            free_run: false,
            spun: false,
            regs: vec![[0; 32]; regs],
            defined: vec![0; regs],
            carry: 0,
            stack: Default::default(),
            local: vec![0; local_bytes * 32],
            local_init: vec![false; local_bytes * 32],
            local_bytes,
            params: vec![0; param_bytes * 32],
            param_bytes,
            wake_at: 0,
            copies,
            bulk_open: [0; 32],
            bulk_done: Vec::new(),
            last_poll: (0, 0),
        }
    }

    /// Writes a register for the lanes of `mask`, cut to its width.
    #[inline]
    pub(crate) fn write(&mut self, reg: Reg, mask: u32, values: &Lanes) {
        if reg.slot == SINK {
            return;
        }
        let cut = crate::types::mask(reg.bytes.into());
        let slot = &mut self.regs[reg.slot as usize];
        if mask == u32::MAX {
            for (to, from) in slot.iter_mut().zip(values) {
                *to = from & cut;
            }
        } else {
            for lane in bits(mask) {
                slot[lane] = values[lane] & cut;
            }
        }
        self.defined[reg.slot as usize] |= mask;
    }

    fn runnable(&self) -> u32 {
        self.alive & !self.parked_mask
    }

    fn group_at(&self, pc: u32) -> u32 {
        bits(self.runnable()).filter(|&l| self.pcs[l] == pc).fold(0, |m, l| m | 1 << l)
    }

    fn update_next(&mut self) {
        let others = self.runnable() & !self.active;
        self.next_other = bits(others).map(|l| self.pcs[l]).min().unwrap_or(u32::MAX);
    }

    /// Writes the program counters of the running lanes back.
    pub(crate) fn save(&mut self) {
        for lane in bits(self.active) {
            self.pcs[lane] = self.pc;
        }
    }

    /// Runs the group at `pc`.
    fn enter(&mut self, pc: u32) {
        self.active = self.group_at(pc);
        self.pc = pc;
        self.update_next();
    }

    /// Picks the group with the lowest program counter; false when no lane can run. The program
    /// counters must have been saved.
    pub(crate) fn regroup(&mut self) -> bool {
        match bits(self.runnable()).map(|l| self.pcs[l]).min() {
            Some(pc) => {
                self.enter(pc);
                true
            }
            None => {
                self.active = 0;
                self.next_other = u32::MAX;
                false
            }
        }
    }

    /// Whether several groups could run.
    pub(crate) fn diverged(&self) -> bool {
        self.next_other != u32::MAX
    }

    /// Runs a group other than the present one, by choice number.
    pub(crate) fn rotate(&mut self, choice: u32) {
        self.save();
        let others = self.runnable() & !self.active;
        let count = others.count_ones();
        if count > 0
            && let Some(lane) = bits(others).nth((choice % count) as usize)
        {
            let pc = self.pcs[lane];
            self.enter(pc);
            self.free_run = true;
        }
    }

    /// Moves the running lanes to the next instruction and merges or switches groups.
    #[inline]
    pub(crate) fn advance(&mut self) {
        self.jump(self.pc + 1);
    }

    /// Moves all running lanes to `pc`.
    #[inline]
    pub(crate) fn jump(&mut self, pc: u32) {
        self.pc = pc;
        if self.next_other == u32::MAX {
            return;
        }
        self.settle();
    }

    fn settle(&mut self) {
        self.save();
        let wanted = if self.free_run { self.pc } else { self.pc.min(self.next_other) };
        self.enter(wanted);
    }

    /// Sends lanes to different places.
    pub(crate) fn scatter(&mut self, targets: impl Fn(usize) -> u32) {
        for lane in bits(self.active) {
            self.pcs[lane] = targets(lane);
        }
        self.free_run = false;
        self.regroup();
    }

    /// Splits off all running lanes but `keep`; they stay at this instruction.
    pub(crate) fn narrow(&mut self, keep: u32) {
        self.save();
        self.narrow_to(keep);
    }

    /// The same when the program counters of the others are set already.
    pub(crate) fn narrow_to(&mut self, keep: u32) {
        self.active = keep;
        self.update_next();
    }

    /// Parks lanes (which must be running) with `pc` as the place where they go on.
    pub(crate) fn park(&mut self, lanes: u32, why: Parked, pc: u32) {
        self.save();
        for lane in bits(lanes) {
            self.parked[lane] = why;
            self.pcs[lane] = pc;
        }
        self.parked_mask |= lanes;
        self.active &= !lanes;
    }

    /// Makes parked lanes runnable.
    pub(crate) fn unpark(&mut self, lanes: u32) {
        for lane in bits(lanes) {
            self.parked[lane] = Parked::No;
        }
        self.parked_mask &= !lanes;
        self.update_next();
    }

    /// Lanes that wait at a warp-wide instruction at one of these places.
    pub(crate) fn waiting_at(&self, is_place: impl Fn(u32) -> bool) -> u32 {
        bits(self.parked_mask)
            .filter(|&l| self.parked[l] == Parked::Warp && is_place(self.pcs[l]))
            .fold(0, |m, l| m | 1 << l)
    }

    /// Moves parked lanes past the instruction at which they wait.
    pub(crate) fn step_over(&mut self, lanes: u32) {
        for lane in bits(lanes) {
            self.pcs[lane] += 1;
        }
    }

    /// Ends lanes that are running.
    pub(crate) fn exit(&mut self, lanes: u32) {
        self.save();
        self.alive &= !lanes;
        self.active &= !lanes;
        self.regroup();
    }
}
