//! Starts kernels and ends blocks.

use crate::core::{Block, Core, Launch};
use crate::finding::FindingKind;
use crate::memory::SHARED_FIRST;
use crate::program::Code;
use crate::race::{Home, bits};
use crate::types::Space;
use crate::vm::{Arg, VmError};
use crate::warp::Warp;
use rustc_hash::FxHashMap;
use std::sync::Arc;

/// Where and how large.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) device: u32,
    pub(crate) grid: u32,
    pub(crate) block: u32,
    pub(crate) dynamic_shared: u32,
}

/// Static shared memory of a launch: size, dynamic start, and names.
type SharedLayout = (u64, Vec<(u64, u64, String)>);

impl Core {
    pub(crate) fn launch(
        &mut self,
        code: &Arc<Code>,
        entry: &str,
        shape: Shape,
        args: &[Arg],
    ) -> Result<u32, VmError> {
        let found = code.functions.iter().position(|f| f.entry && f.defined && f.name == entry);
        let id = found.ok_or_else(|| VmError::NoEntry(entry.into()))?;
        let max = code.functions[id].max_threads.unwrap_or(1024);
        if shape.grid == 0 || shape.block == 0 || shape.block > max.min(1024) {
            return Err(VmError::Shape(format!(
                "a grid of {} blocks of {} threads; the kernel allows 1 to {max} threads",
                shape.grid, shape.block
            )));
        }
        let params = parameters(code, id, args)?;
        self.variables_of(code, shape.device);
        let number = self.launches.len() as u32;
        let mut symbols = vec![0; code.symbols.len()];
        for (i, symbol) in code.symbols.iter().enumerate() {
            let key = (shape.device, Arc::as_ptr(code) as usize, i as u32);
            symbols[i] = self.variables.get(&key).copied().unwrap_or(symbol.offset);
        }
        let (fixed, names) = layout_shared(code, id as u32, shape.dynamic_shared, &mut symbols);
        self.launches.push(Launch {
            code: code.clone(),
            device: shape.device,
            grid: shape.grid,
            block_threads: shape.block,
            dynamic_shared: shape.dynamic_shared,
            total_shared: fixed as u32 + shape.dynamic_shared,
            params,
            symbols,
            blocks_left: shape.grid,
        });
        for index in 0..shape.grid {
            self.add_block(id, number, index, fixed, names.clone());
        }
        self.progress();
        Ok(number)
    }

    /// Creates the global and constant variables of a module on a device, once.
    fn variables_of(&mut self, code: &Arc<Code>, device: u32) {
        let module = Arc::as_ptr(code) as usize;
        if !self.modules.iter().any(|m| Arc::ptr_eq(m, code)) {
            self.modules.push(code.clone());
        }
        let global = |s: &crate::program::Symbol| matches!(s.space, Space::Global | Space::Const);
        let mut fresh = Vec::new();
        for (i, symbol) in code.symbols.iter().enumerate().filter(|s| global(s.1)) {
            let key = (device, module, i as u32);
            if !self.variables.contains_key(&key) {
                let name = symbol.name.clone();
                let addr = self.memory.alloc(device as usize, name, symbol.bytes, symbol.align);
                self.variables.insert(key, addr);
                fresh.push((i, addr));
            }
        }
        for (i, addr) in fresh {
            let symbol = &code.symbols[i];
            let mut bytes = symbol.init.clone().unwrap_or_default();
            bytes.resize(symbol.bytes as usize, 0);
            for &(at, target, addend, width, _) in &symbol.fixups {
                let base = self.variables.get(&(device, module, target)).copied().unwrap_or(0);
                let value = base.wrapping_add(addend as u64).to_le_bytes();
                let at = at as usize;
                bytes[at..at + width as usize].copy_from_slice(&value[..width as usize]);
            }
            if let Some((region, offset)) = self.memory.find(addr, bytes.len() as u64) {
                self.memory.regions[region as usize].write(offset, &bytes);
            }
        }
    }

    fn add_block(
        &mut self,
        entry: usize,
        launch: u32,
        index: u32,
        fixed: u64,
        names: Vec<(u64, u64, String)>,
    ) {
        let l = &self.launches[launch as usize];
        let (code, device, threads) = (l.code.clone(), l.device, l.block_threads);
        let len = fixed + u64::from(l.dynamic_shared);
        let shared = self.memory.add_shared(format!("shared memory of block {index}"), len);
        self.memory.regions[shared as usize].names = names;
        let block = self.blocks.len() as u32;
        let first_warp = self.warps.len() as u32;
        let warp_count = threads.div_ceil(32);
        let home = |warp| Home { device, block, warp };
        let start = self.finished.clone();
        let mut alive = Vec::new();
        let mut first_id = 0;
        for warp in 0..warp_count {
            let id = self.races.add_warp(home(Some(warp)), &start);
            if warp == 0 {
                first_id = id;
            }
            let lanes = (threads - warp * 32).min(32);
            let mask = if lanes == 32 { u32::MAX } else { (1 << lanes) - 1 };
            alive.push(mask);
            let warp = Warp::new(&code, entry, [id, launch, block, warp], mask);
            self.ready.push(self.warps.len() as u32);
            self.warps.push(Some(Box::new(warp)));
        }
        let bulk_agent = self.races.add_warp(home(None), &start);
        let agents = if code.uses_cp_async { warp_count } else { 0 };
        for _ in 0..agents {
            self.races.add_warp(home(None), &start);
        }
        self.blocks.push(Block {
            launch,
            index,
            shared,
            first_warp,
            warp_count,
            first_id,
            bulk_agent,
            copy_agents: bulk_agent + 1,
            alive,
            exited_early: false,
            barriers: Vec::new(),
            agent_lanes: FxHashMap::default(),
        });
    }

    /// After a warp ended: ends its block when it was the last.
    pub(crate) fn finish_warp(&mut self, block: u32) {
        let b = &self.blocks[block as usize];
        if b.alive.iter().any(|&a| a != 0) {
            return;
        }
        let (launch, shared, first_id, warps) = (b.launch, b.shared, b.first_id, b.warp_count);
        self.launches[launch as usize].blocks_left -= 1;
        if self.races.enabled {
            for warp in first_id..first_id + warps {
                for lane in bits(u32::MAX) {
                    let clock = self.races.snapshot(warp, lane);
                    self.finished.join(&clock);
                }
            }
        }
        let dead = self.dead_launches.contains(&launch);
        if let Some(copy) = self.copies.iter().find(|c| c.block == block)
            && !dead
        {
            let at = (block, 0, 0, copy.pc);
            let message = "the block ends with this asynchronous copy still under way".into();
            self.report(FindingKind::Mbarrier, at, None, message);
        }
        self.drain_copies(block);
        self.memory.drop_shared(shared);
    }
}

fn parameters(code: &Code, entry: usize, args: &[Arg]) -> Result<Vec<u8>, VmError> {
    let slots = &code.functions[entry].params;
    if slots.len() != args.len() {
        let name = &code.functions[entry].name;
        let (wanted, given) = (slots.len(), args.len());
        return Err(VmError::Arguments(format!("{name} takes {wanted} arguments, not {given}")));
    }
    let end = slots.last().map_or(0, |s| s.offset + s.bytes);
    let mut params = vec![0; end as usize];
    for (i, (slot, arg)) in slots.iter().zip(args).enumerate() {
        let bytes = arg.bytes();
        if bytes.len() != slot.bytes as usize {
            return Err(VmError::Arguments(format!(
                "argument {i} has {} bytes where the kernel wants {}",
                bytes.len(),
                slot.bytes
            )));
        }
        let at = slot.offset as usize;
        params[at..at + bytes.len()].copy_from_slice(&bytes);
    }
    Ok(params)
}

/// Gives shared variables their addresses: static ones first, then the dynamic array.
fn layout_shared(code: &Code, entry: u32, dynamic: u32, symbols: &mut [u64]) -> SharedLayout {
    let mut end = 0u64;
    let mut names = Vec::new();
    let mine =
        |owner: Option<u32>| owner.is_none_or(|f| f == entry || !code.functions[f as usize].entry);
    let shared = || code.symbols.iter().enumerate().filter(|(_, s)| s.space == Space::Shared);
    for (i, symbol) in shared().filter(|(_, s)| !s.dynamic && mine(s.owner)) {
        let at = (SHARED_FIRST + end).next_multiple_of(symbol.align) - SHARED_FIRST;
        symbols[i] = SHARED_FIRST + at;
        end = at + symbol.bytes;
        names.push((at, symbol.bytes, symbol.name.clone()));
    }
    let align = shared().filter(|(_, s)| s.dynamic).map(|(_, s)| s.align).max().unwrap_or(1);
    let fixed = (SHARED_FIRST + end).next_multiple_of(align) - SHARED_FIRST;
    for (i, symbol) in shared().filter(|(_, s)| s.dynamic) {
        symbols[i] = SHARED_FIRST + fixed;
        names.push((fixed, dynamic.into(), symbol.name.clone()));
    }
    (fixed, names)
}
