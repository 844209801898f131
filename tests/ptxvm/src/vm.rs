//! The machine as its user sees it: devices, memory, launches, runs, findings.

use crate::core::{Core, VmConfig};
use crate::finding::Finding;
use crate::memory::{Region, SHARED_FIRST};
use crate::program::Module;

/// A device of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceId(pub(crate) u32);

/// A launched kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LaunchId(pub(crate) u32);

/// How far the machine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// Every launch has ended.
    Finished,
    /// The steps of this call are used up.
    Running,
    /// Nothing can go on, or the step limit is reached; the findings say who waits where.
    Stuck,
}

/// A kernel argument.
#[derive(Clone, Debug, PartialEq)]
pub enum Arg {
    /// A 32-bit integer.
    U32(u32),
    /// A 64-bit integer or an address.
    U64(u64),
    /// A float.
    F32(f32),
    /// A double.
    F64(f64),
    /// A structure passed by value.
    Bytes(Vec<u8>),
}

impl Arg {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        match self {
            Arg::U32(x) => x.to_le_bytes().to_vec(),
            Arg::U64(x) => x.to_le_bytes().to_vec(),
            Arg::F32(x) => x.to_le_bytes().to_vec(),
            Arg::F64(x) => x.to_le_bytes().to_vec(),
            Arg::Bytes(b) => b.clone(),
        }
    }
}

/// Why a launch or a host access was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VmError {
    /// The module has no such kernel.
    #[error("the module has no kernel {0}")]
    NoEntry(String),
    /// The arguments do not fit the kernel's parameters.
    #[error("{0}")]
    Arguments(String),
    /// The grid or block is empty or too large.
    #[error("{0}")]
    Shape(String),
    /// A host access outside every allocation.
    #[error("{len} bytes at {addr:#x}: {place}")]
    OutOfBounds {
        /// The address.
        addr: u64,
        /// The length.
        len: u64,
        /// Where that is.
        place: String,
    },
}

/// What an annotator may look at: the block concerned, and memory.
pub struct View<'a> {
    core: &'a Core,
    finding: &'a Finding,
}

impl View<'_> {
    /// The number of the launch.
    pub fn launch(&self) -> LaunchId {
        LaunchId(self.finding.launch)
    }

    /// The block in the grid.
    pub fn block(&self) -> u32 {
        self.finding.block
    }

    /// The warp in the block.
    pub fn warp(&self) -> u32 {
        self.finding.warp
    }

    /// The finding to be annotated.
    pub fn finding(&self) -> &Finding {
        self.finding
    }

    /// Reads global memory; false when that is out of bounds.
    pub fn read(&self, addr: u64, out: &mut [u8]) -> bool {
        let inside = |r: &&Region| {
            r.base > SHARED_FIRST
                && addr >= r.base
                && addr - r.base < r.len
                && r.len - (addr - r.base) >= out.len() as u64
        };
        match self.core.memory.regions.iter().find(inside) {
            Some(region) => {
                region.read(addr - region.base, out);
                true
            }
            None => false,
        }
    }

    /// Reads the block's shared memory at a shared address; false when that is out of bounds, or
    /// nothing has written it.
    pub fn read_shared(&self, addr: u32, out: &mut [u8]) -> bool {
        let mine = |b: &&crate::core::Block| {
            b.launch == self.finding.launch && b.index == self.finding.block
        };
        let Some(block) = self.core.blocks.iter().find(mine) else { return false };
        let region = &self.core.memory.regions[block.shared as usize];
        let Some(offset) = u64::from(addr).checked_sub(SHARED_FIRST) else { return false };
        if offset + out.len() as u64 > region.len || !region.is_init(offset, out.len() as u32) {
            return false;
        }
        region.read(offset, out);
        true
    }
}

type Annotator = Box<dyn Fn(&View) -> Option<String> + Send>;

/// A machine.
pub struct Vm {
    core: Core,
    annotator: Option<Annotator>,
}

impl Vm {
    /// A machine without devices.
    pub fn new(config: VmConfig) -> Vm {
        Vm { core: Core::new(config), annotator: None }
    }

    /// Adds a device.
    pub fn add_device(&mut self, name: &str) -> DeviceId {
        self.core.memory.add_device();
        self.core.devices.push(name.into());
        DeviceId(self.core.devices.len() as u32 - 1)
    }

    /// Names each later finding by what the block was doing, as `annotator` can tell from memory.
    pub fn set_annotator(&mut self, annotator: impl Fn(&View) -> Option<String> + Send + 'static) {
        self.annotator = Some(Box::new(annotator));
    }

    /// Allocates memory of a device and returns its address, which is valid on every device. The
    /// bytes read as zero but count as never written.
    pub fn alloc(&mut self, device: DeviceId, name: &str, bytes: u64, align: u64) -> u64 {
        self.core.memory.alloc(device.0 as usize, name.into(), bytes, align)
    }

    /// Makes memory of this process an allocation, at its own address, that counts as written.
    ///
    /// # Safety
    /// `ptr` is valid for `len` bytes while the machine lives, and every other access to it is
    /// atomic (or volatile, from outside the language).
    pub unsafe fn map_host(&mut self, name: &str, ptr: *mut u8, len: u64) -> u64 {
        // SAFETY: the caller promises just what `Region::host` asks for.
        let region = unsafe { Region::host(name.into(), ptr, len) };
        self.core.memory.insert(region);
        ptr as u64
    }

    fn range(&mut self, addr: u64, len: u64) -> Result<(usize, u64), VmError> {
        match self.core.memory.find(addr, len) {
            Some((region, offset)) => Ok((region as usize, offset)),
            None => {
                let place = self.core.memory.nearest(addr);
                Err(VmError::OutOfBounds { addr, len, place })
            }
        }
    }

    /// Writes from the host: the bytes count as written, and as ordered before everything later.
    pub fn write(&mut self, addr: u64, bytes: &[u8]) -> Result<(), VmError> {
        if bytes.is_empty() {
            return Ok(());
        }
        let (region, offset) = self.range(addr, bytes.len() as u64)?;
        let region = &mut self.core.memory.regions[region];
        region.write(offset, bytes);
        region.shadow.clear(offset, bytes.len() as u64);
        self.core.progress();
        Ok(())
    }

    /// Reads from the host.
    pub fn read(&mut self, addr: u64, out: &mut [u8]) -> Result<(), VmError> {
        if out.is_empty() {
            return Ok(());
        }
        let (region, offset) = self.range(addr, out.len() as u64)?;
        self.core.memory.regions[region].read(offset, out);
        Ok(())
    }

    /// Fills memory from the host, as `write` does.
    pub fn fill(&mut self, addr: u64, byte: u8, len: u64) -> Result<(), VmError> {
        self.write(addr, &vec![byte; len as usize])
    }

    /// Names a part of an allocation, for findings.
    pub fn name_range(&mut self, addr: u64, len: u64, name: &str) -> Result<(), VmError> {
        let (region, offset) = self.range(addr, len)?;
        self.core.memory.regions[region].names.push((offset, len, name.into()));
        Ok(())
    }

    /// Forbids a part of an allocation to kernels: the gaps between the buffers of a heap, so that
    /// running off one buffer into the next is noticed.
    pub fn forbid(&mut self, addr: u64, len: u64) -> Result<(), VmError> {
        let (region, offset) = self.range(addr, len)?;
        let holes = &mut self.core.memory.regions[region].holes;
        let at = holes.partition_point(|h| h.0 < offset);
        holes.insert(at, (offset, len));
        Ok(())
    }

    /// Declares that only the host writes a range, such as weights: a kernel's write there is
    /// reported, and its reads cost less.
    pub fn set_read_only(&mut self, addr: u64, len: u64) -> Result<(), VmError> {
        let (region, offset) = self.range(addr, len)?;
        let locked = &mut self.core.memory.regions[region].locked;
        let at = locked.partition_point(|h| h.0 < offset);
        locked.insert(at, (offset, len));
        Ok(())
    }

    /// The address of a module variable on a device, once a kernel of the module was launched.
    pub fn variable(&self, device: DeviceId, module: &Module, name: &str) -> Option<u64> {
        let id = module.code.symbols.iter().position(|s| s.name == name)? as u32;
        let key = (device.0, std::sync::Arc::as_ptr(&module.code) as usize, id);
        self.core.variables.get(&key).copied()
    }

    /// Starts a kernel. All its blocks are resident at once.
    #[allow(clippy::too_many_arguments)]
    pub fn launch(
        &mut self,
        device: DeviceId,
        module: &Module,
        entry: &str,
        grid: u32,
        block: u32,
        dynamic_shared: u32,
        args: &[Arg],
    ) -> Result<LaunchId, VmError> {
        let shape = crate::launch::Shape { device: device.0, grid, block, dynamic_shared };
        self.core.launch(&module.code, entry, shape, args).map(LaunchId)
    }

    /// Runs up to `max_steps` warp instructions. Call it again to go on.
    pub fn run(&mut self, max_steps: u64) -> RunState {
        let end = self.core.steps.saturating_add(max_steps);
        loop {
            let state = self.core.burst(end);
            if self.core.noted < self.core.findings.len() {
                self.annotate();
            }
            if let Some(state) = state {
                return state;
            }
        }
    }

    fn annotate(&mut self) {
        let from = std::mem::replace(&mut self.core.noted, self.core.findings.len());
        let Some(annotator) = &self.annotator else { return };
        for i in from..self.core.findings.len() {
            let view = View { core: &self.core, finding: &self.core.findings[i] };
            let note = annotator(&view);
            self.core.findings[i].note = note;
        }
    }

    /// Reports every block that still runs: call it when all should have ended.
    pub fn expect_finished(&mut self) {
        self.core.report_running();
        self.annotate();
    }

    /// What the checks found so far.
    pub fn findings(&self) -> &[Finding] {
        &self.core.findings
    }

    /// Whether a launch has ended.
    pub fn is_finished(&self, launch: LaunchId) -> bool {
        self.core.launches[launch.0 as usize].blocks_left == 0
    }

    /// Warp instructions executed so far.
    pub fn steps(&self) -> u64 {
        self.core.steps
    }

    /// Lane instructions executed so far.
    pub fn lane_steps(&self) -> u64 {
        self.core.lane_steps
    }

    /// What `%globaltimer` shows.
    pub fn time_ns(&self) -> u64 {
        self.core.time_ns
    }
}
