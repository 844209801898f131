//! Memory regions: global allocations of all devices, mapped host memory, and each block's shared
//! memory, with their initialisation maps and shadow state.

use crate::mbarrier::Mbarrier;
use crate::race::{Shadow, SyncVar};
use crate::types::mask;
use rustc_hash::FxHashMap;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

/// Generic addresses of shared memory start here.
pub(crate) const SHARED_WINDOW: u64 = 0x0400_0000_0000;
/// Generic addresses of local memory start here.
pub(crate) const LOCAL_WINDOW: u64 = 0x0500_0000_0000;
/// Generic addresses of kernel parameters start here.
pub(crate) const PARAM_WINDOW: u64 = 0x0600_0000_0000;
/// The size of each window.
pub(crate) const WINDOW: u64 = 1 << 32;
/// Allocations of device `d` start at `GLOBAL_BASE + d * DEVICE_STRIDE`.
pub(crate) const GLOBAL_BASE: u64 = 0x1000_0000_0000;
pub(crate) const DEVICE_STRIDE: u64 = 0x0040_0000_0000;
/// The first shared address of a block; the hardware of sm_90 reserves what is below.
pub(crate) const SHARED_FIRST: u64 = 1024;

enum Data {
    Own(Vec<u8>),
    Host(HostMemory),
}

/// Process memory that other threads of the process use at the same time.
struct HostMemory(*mut u8);

// SAFETY: the pointer is only used for atomic accesses inside the length that `Vm::map_host`'s
// caller promised to keep alive, and those may come from any thread.
unsafe impl Send for HostMemory {}

impl HostMemory {
    /// A pointer to `offset`. Callers have checked it against the region's length.
    fn at(&self, offset: u64) -> *mut u8 {
        self.0.wrapping_add(offset as usize)
    }

    fn load(&self, offset: u64, bytes: u32) -> u64 {
        let p = self.at(offset);
        // SAFETY: in bounds and aligned to `bytes` (`Region::split` cuts at alignment), live by
        // the promise of `map_host`, and only accessed atomically.
        unsafe {
            match bytes {
                1 => AtomicU8::from_ptr(p).load(Ordering::SeqCst).into(),
                2 => AtomicU16::from_ptr(p.cast()).load(Ordering::SeqCst).into(),
                4 => AtomicU32::from_ptr(p.cast()).load(Ordering::SeqCst).into(),
                _ => AtomicU64::from_ptr(p.cast()).load(Ordering::SeqCst),
            }
        }
    }

    fn store(&self, offset: u64, bytes: u32, value: u64) {
        let p = self.at(offset);
        // SAFETY: as in `load`.
        unsafe {
            match bytes {
                1 => AtomicU8::from_ptr(p).store(value as u8, Ordering::SeqCst),
                2 => AtomicU16::from_ptr(p.cast()).store(value as u16, Ordering::SeqCst),
                4 => AtomicU32::from_ptr(p.cast()).store(value as u32, Ordering::SeqCst),
                _ => AtomicU64::from_ptr(p.cast()).store(value, Ordering::SeqCst),
            }
        }
    }

    fn swap_if(&self, offset: u64, bytes: u32, old: u64, new: u64) -> bool {
        let (p, order) = (self.at(offset), Ordering::SeqCst);
        // SAFETY: as in `load`.
        unsafe {
            match bytes {
                2 => AtomicU16::from_ptr(p.cast())
                    .compare_exchange(old as u16, new as u16, order, order)
                    .is_ok(),
                4 => AtomicU32::from_ptr(p.cast())
                    .compare_exchange(old as u32, new as u32, order, order)
                    .is_ok(),
                _ => AtomicU64::from_ptr(p.cast()).compare_exchange(old, new, order, order).is_ok(),
            }
        }
    }
}

/// One contiguous piece of memory.
pub(crate) struct Region {
    pub(crate) name: String,
    pub(crate) base: u64,
    pub(crate) len: u64,
    data: Data,
    /// One bit a byte; empty for host memory, which always counts as written.
    init: Vec<u64>,
    pub(crate) shadow: Shadow,
    pub(crate) sync: FxHashMap<u64, SyncVar>,
    pub(crate) mbarriers: FxHashMap<u64, Mbarrier>,
    /// Names inside the region: offset, length, name.
    pub(crate) names: Vec<(u64, u64, String)>,
    /// Ranges inside the region that nobody may touch: offset and length.
    pub(crate) holes: Vec<(u64, u64)>,
    /// Ranges that only the host writes.
    pub(crate) locked: Vec<(u64, u64)>,
}

impl Region {
    pub(crate) fn new(name: String, base: u64, len: u64) -> Region {
        Region {
            name,
            base,
            len,
            data: Data::Own(vec![0; len as usize]),
            init: vec![0; (len as usize).div_ceil(64)],
            shadow: Shadow::default(),
            sync: FxHashMap::default(),
            mbarriers: FxHashMap::default(),
            names: Vec::new(),
            holes: Vec::new(),
            locked: Vec::new(),
        }
    }

    /// # Safety
    /// `ptr` stays valid for `len` bytes while the region lives, and everybody else accesses it
    /// atomically (or volatile, from outside the language).
    pub(crate) unsafe fn host(name: String, ptr: *mut u8, len: u64) -> Region {
        let mut region = Region::new(name, ptr as u64, 0);
        region.len = len;
        region.data = Data::Host(HostMemory(ptr));
        region
    }

    pub(crate) fn is_host(&self) -> bool {
        matches!(self.data, Data::Host(_))
    }

    /// Whether all of `[offset, offset + bytes)` has been written.
    #[inline]
    pub(crate) fn is_init(&self, offset: u64, bytes: u32) -> bool {
        if self.is_host() {
            return true;
        }
        let (mut at, end) = (offset, offset + u64::from(bytes));
        while at < end {
            let count = (64 - at % 64).min(end - at);
            let wanted = if count == 64 { u64::MAX } else { (1u64 << count) - 1 };
            if self.init[(at / 64) as usize] >> (at % 64) & wanted != wanted {
                return false;
            }
            at += count;
        }
        true
    }

    pub(crate) fn set_init(&mut self, offset: u64, bytes: u64) {
        if self.is_host() {
            return;
        }
        if offset % 64 + bytes <= 64 && bytes < 64 {
            self.init[(offset / 64) as usize] |= ((1u64 << bytes) - 1) << (offset % 64);
            return;
        }
        let mut at = offset;
        let end = offset + bytes;
        while at < end {
            let count = (64 - at % 64).min(end - at);
            let bits = if count == 64 { u64::MAX } else { (1u64 << count) - 1 };
            self.init[(at / 64) as usize] |= bits << (at % 64);
            at += count;
        }
    }

    /// Reads up to eight bytes. The range is in bounds.
    #[inline]
    pub(crate) fn load(&self, offset: u64, bytes: u32) -> u64 {
        match &self.data {
            Data::Own(data) => {
                let at = offset as usize;
                let mut raw = [0; 8];
                raw[..bytes as usize].copy_from_slice(&data[at..at + bytes as usize]);
                u64::from_le_bytes(raw)
            }
            Data::Host(host) => host.load(offset, bytes),
        }
    }

    /// Writes up to eight bytes and says whether that changed anything.
    #[inline]
    pub(crate) fn store(&mut self, offset: u64, bytes: u32, value: u64) -> bool {
        match &mut self.data {
            Data::Own(data) => {
                let at = offset as usize;
                let place = &mut data[at..at + bytes as usize];
                let raw = value.to_le_bytes();
                let changed = *place != raw[..bytes as usize];
                place.copy_from_slice(&raw[..bytes as usize]);
                changed
            }
            Data::Host(host) => {
                let changed = host.load(offset, bytes) != value & mask(bytes);
                host.store(offset, bytes, value);
                changed
            }
        }
    }

    /// Replaces a value by a function of it, atomically also for the host, and returns the old
    /// one and whether it changed.
    pub(crate) fn update(&mut self, at: u64, bytes: u32, f: impl Fn(u64) -> u64) -> (u64, bool) {
        loop {
            let old = self.load(at, bytes);
            let new = f(old) & mask(bytes);
            match &self.data {
                Data::Host(host) if !host.swap_if(at, bytes, old, new) => {}
                Data::Host(_) => return (old, old != new),
                Data::Own(_) => return (old, self.store(at, bytes, new)),
            }
        }
    }

    /// Copies bytes out, in pieces that are aligned for the host.
    pub(crate) fn read(&self, offset: u64, out: &mut [u8]) {
        match &self.data {
            Data::Own(data) => {
                out.copy_from_slice(&data[offset as usize..offset as usize + out.len()]);
            }
            Data::Host(host) => {
                let mut done = 0;
                while done < out.len() {
                    let step = Self::split(self.base + offset + done as u64, out.len() - done);
                    let value = host.load(offset + done as u64, step as u32).to_le_bytes();
                    out[done..done + step].copy_from_slice(&value[..step]);
                    done += step;
                }
            }
        }
    }

    /// Copies bytes in and marks them as written.
    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) {
        match &mut self.data {
            Data::Own(data) => {
                data[offset as usize..offset as usize + bytes.len()].copy_from_slice(bytes);
            }
            Data::Host(host) => {
                let mut done = 0;
                while done < bytes.len() {
                    let step = Self::split(self.base + offset + done as u64, bytes.len() - done);
                    let mut raw = [0; 8];
                    raw[..step].copy_from_slice(&bytes[done..done + step]);
                    host.store(offset + done as u64, step as u32, u64::from_le_bytes(raw));
                    done += step;
                }
            }
        }
        self.set_init(offset, bytes.len() as u64);
    }

    /// The largest aligned access of at most eight bytes at `addr`.
    fn split(addr: u64, left: usize) -> usize {
        [8, 4, 2].into_iter().find(|&n| left >= n && addr.is_multiple_of(n as u64)).unwrap_or(1)
    }

    /// Whether a range touches a hole.
    #[inline]
    pub(crate) fn in_hole(&self, offset: u64, bytes: u64) -> bool {
        touches(&self.holes, offset, bytes)
    }

    /// Whether a range touches memory that only the host writes.
    #[inline]
    pub(crate) fn is_locked(&self, offset: u64, bytes: u64) -> bool {
        touches(&self.locked, offset, bytes)
    }

    /// `name+offset` for messages.
    pub(crate) fn describe(&self, offset: u64) -> String {
        let inner = self.names.iter().find(|n| (n.0..n.0 + n.1).contains(&offset));
        match inner {
            Some((start, _, name)) => format!("{name}+{:#x}", offset - start),
            None => format!("{}+{offset:#x}", self.name),
        }
    }
}

/// Whether a range touches one of a sorted list of ranges that do not overlap.
#[inline]
fn touches(list: &[(u64, u64)], offset: u64, bytes: u64) -> bool {
    if list.is_empty() {
        return false;
    }
    let at = list.partition_point(|h| h.0 < offset + bytes);
    at > 0 && list[at - 1].0 + list[at - 1].1 > offset
}

/// All regions. Global ones are found by address, shared ones by number.
#[derive(Default)]
pub(crate) struct Memory {
    pub(crate) regions: Vec<Region>,
    /// Global regions by base address, sorted.
    order: Vec<(u64, u64, u32)>,
    next: Vec<u64>,
    last: (u64, u64, u32),
}

impl Memory {
    pub(crate) fn add_device(&mut self) {
        self.next.push(GLOBAL_BASE + self.next.len() as u64 * DEVICE_STRIDE);
    }

    /// Adds a global allocation. A gap follows it, so that running off its end is noticed.
    pub(crate) fn alloc(&mut self, device: usize, name: String, len: u64, align: u64) -> u64 {
        let base = self.next[device].next_multiple_of(align.max(256));
        self.next[device] = base + len + 4096;
        self.insert(Region::new(name, base, len));
        base
    }

    pub(crate) fn insert(&mut self, region: Region) -> u32 {
        let id = self.regions.len() as u32;
        let at = self.order.partition_point(|o| o.0 < region.base);
        self.order.insert(at, (region.base, region.len, id));
        self.last = (0, 0, 0);
        self.regions.push(region);
        id
    }

    pub(crate) fn add_shared(&mut self, name: String, len: u64) -> u32 {
        self.regions.push(Region::new(name, SHARED_FIRST, len));
        self.regions.len() as u32 - 1
    }

    /// Gives back what the shared memory of a finished block holds.
    pub(crate) fn drop_shared(&mut self, id: u32) {
        let name = std::mem::take(&mut self.regions[id as usize].name);
        self.regions[id as usize] = Region::new(name, SHARED_FIRST, 0);
    }

    /// The region and offset of a global address with `bytes` bytes in bounds.
    #[inline]
    pub(crate) fn find(&mut self, addr: u64, bytes: u64) -> Option<(u32, u64)> {
        let fits = |(base, len, _): (u64, u64, u32)| {
            addr >= base && addr - base < len && len - (addr - base) >= bytes
        };
        if !fits(self.last) {
            let at = self.order.partition_point(|o| o.0 <= addr);
            let hit = *self.order.get(at.checked_sub(1)?)?;
            if !fits(hit) {
                return None;
            }
            self.last = hit;
        }
        Some((self.last.2, addr - self.last.0))
    }

    /// Where a wild global address lies, in words.
    pub(crate) fn nearest(&self, addr: u64) -> String {
        let at = self.order.partition_point(|o| o.0 <= addr);
        match at.checked_sub(1).map(|i| self.order[i]) {
            Some((base, len, id)) if addr - base < len + (1 << 20) => {
                let name = &self.regions[id as usize].name;
                if addr - base < len {
                    format!("{name}+{:#x}, whose end at {len:#x} it crosses", addr - base)
                } else {
                    format!("{:#x} bytes past the end of {name}", addr - base - len)
                }
            }
            _ => "in no allocation".into(),
        }
    }
}
