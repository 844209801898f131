//! NVIDIA GPUs as a device: one block of the persistent kernel for each worker.
//!
//! The driver library is loaded when it is first needed, so one binary runs with and without a GPU.
//! Weights and heaps are plain allocations; the mailbox is pinned host memory that all GPUs map at the
//! same address. A kernel runs on a stream of its own, so that copies pass beside it. Several GPUs run a
//! program together: each maps the memory of the others, and has a kernel and a heap of its own.

mod kernels;
mod module;
mod pe;

use std::ffi::c_void;

use cudarc::driver::result::{self, DriverError, device};
use cudarc::driver::sys;
use sys::CUdevice_attribute_enum as Attribute;
use tilert_mk_shared::limits::PE_COUNT_MAX;
use tilert_mk_shared::program::ProgramHeader;
use tilert_mk_shared::task::WeightFormat;
use tilert_mk_shared::tile::{GPU_STEP_TOKENS_MAX, TILE_ROWS_MAX};

pub(crate) use self::kernels::KERNEL_VARIABLE;
pub use self::kernels::{Kernel, Purpose, fitting_kernel, kernels};
use self::module::Loading;
use self::pe::Pe;
use super::{Device, Profile};
use crate::error::{Error, Result};

/// Polls of an event between two looks at the host's memory, some 10 ms. Looks of all blocks come one after
/// the other, 100 us for those of an H200: each 256 polls, they kept a block that was waited for from
/// its next poll.
const POLLS_PER_LOOK: u32 = 16_384;
/// The first CUDA version whose drivers read the embedded PTX, of version 8.0.
const DRIVER_VERSION_MIN: u32 = 12_000;
/// Weight bytes of a linear task at most: what `TILE_ROWS_MAX` leaves.
const TILE_BYTES: u64 = 1 << 20;

/// What was found of a GPU.
#[derive(Clone, Debug)]
pub struct Gpu {
    /// The driver's number for it.
    pub ordinal: i32,
    /// Its name.
    pub name: String,
    /// Compute capability, for example 90.
    pub capability: u32,
    /// Multiprocessors.
    pub sm_count: u32,
    /// Shared memory that one block may have.
    pub shared_bytes: u32,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Whether blocks can be launched together or not at all.
    pub is_cooperative: bool,
}

/// GPUs of this machine that run a program together, mostly one.
pub struct CudaDevice {
    profile: Profile,
    pes: Vec<Pe>,
    /// The kernel, until it is launched.
    loading: Option<Loading>,
    shared_memory: Vec<*mut c_void>,
}

// SAFETY: the driver's handles may be used from any thread that makes the context current, which
// every method does first; the device is used by one thread at a time, through `&mut`.
unsafe impl Send for CudaDevice {}

fn wrap(what: &str) -> impl Fn(DriverError) -> Error {
    move |error| Error::Device(format!("{what}: {error}"))
}

/// The newest CUDA version that the driver speaks, for example 12080.
///
/// Errors: a driver that does not answer.
pub(super) fn driver_version() -> Result<u32> {
    let mut version = 0;
    // SAFETY: the caller has started the driver, which writes one integer.
    unsafe { sys::cuDriverGetVersion(&mut version) }
        .result()
        .map_err(wrap("asking the NVIDIA driver"))?;
    Ok(version.max(0) as u32)
}

/// The GPUs of this machine.
///
/// Errors: no driver, or one that does not start.
pub fn gpus() -> Result<Vec<Gpu>> {
    // SAFETY: looks for the driver's library.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::Device(
            "no NVIDIA driver: libcuda.so.1 was not found; use --device cpu".into(),
        ));
    }
    result::init().map_err(wrap("starting the NVIDIA driver"))?;
    let count = device::get_count().map_err(wrap("counting GPUs"))?;
    (0..count).map(describe).collect()
}

fn describe(ordinal: i32) -> Result<Gpu> {
    let handle = device::get(ordinal).map_err(wrap("opening a GPU"))?;
    let attribute = |which| {
        // SAFETY: a handle that the driver gave.
        unsafe { device::get_attribute(handle, which) }
            .map(|value| value as u32)
            .map_err(wrap("asking a GPU"))
    };
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    Ok(Gpu {
        ordinal,
        name: device::get_name(handle).map_err(wrap("asking a GPU"))?,
        capability: major * 10 + minor,
        sm_count: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        // SAFETY: a handle that the driver gave.
        memory_bytes: unsafe { device::total_mem(handle) }.map_err(wrap("asking a GPU"))? as u64,
        is_cooperative: attribute(Attribute::CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH)? != 0,
    })
}

impl CudaDevice {
    /// Opens the first `count` GPUs.
    ///
    /// Errors: no driver, or one that is too old; too few GPUs, ones that differ or do not reach each other,
    /// that are too old or have too little shared memory; a build without the kernel.
    pub fn open(count: u32) -> Result<CudaDevice> {
        let found = gpus()?;
        if driver_version()? < DRIVER_VERSION_MIN {
            return Err(Error::Device("the NVIDIA driver is older than CUDA 12".into()));
        }
        if found.is_empty() {
            return Err(Error::Device("the NVIDIA driver sees no GPU; use --device cpu".into()));
        }
        if count as usize > found.len().min(PE_COUNT_MAX) {
            let (limit, what) = (found.len().min(PE_COUNT_MAX), "GPUs can be used");
            return Err(Error::Usage(format!("--devices {count}: {limit} {what}")));
        }
        let mut pes = Vec::new();
        for gpu in found.into_iter().take(count.max(1) as usize) {
            // Before weights are looked at: another device may take the place of one without a kernel.
            kernels::check(&gpu, purpose(count, &[])?)?;
            pes.push(Pe::open(gpu)?);
        }
        let first = pes[0].gpu.clone();
        for pe in &pes {
            if (pe.gpu.sm_count, pe.gpu.shared_bytes) != (first.sm_count, first.shared_bytes) {
                let (a, b) = (&first.name, &pe.gpu.name);
                return Err(Error::Device(format!("GPUs that differ: {a} and {b}")));
            }
            for other in pes.iter().filter(|other| other.gpu.ordinal != pe.gpu.ordinal) {
                pe.map(other)?;
            }
        }
        let ordinals: Vec<String> = pes.iter().map(|pe| pe.gpu.ordinal.to_string()).collect();
        Ok(CudaDevice {
            profile: Profile {
                name: format!("cuda:{} {}", ordinals.join(","), first.name),
                pe_count: pes.len() as u32,
                worker_count: first.sm_count * pes.len() as u32,
                worker_count_max: first.sm_count * pes.len() as u32,
                step_tokens_max: GPU_STEP_TOKENS_MAX,
                tile_bytes: TILE_BYTES,
                tile_rows_max: TILE_ROWS_MAX,
                shared_bytes: first.shared_bytes,
                packs_weights: true,
                stamps_values: true,
                takes_pieces: first.capability >= kernels::PIECES_CAPABILITY,
                polls_per_look: POLLS_PER_LOOK,
                host_spins: true,
            },
            pes,
            loading: None,
            shared_memory: Vec::new(),
        })
    }

    /// Waits for the kernel, if it is on its way.
    fn finish_loading(&mut self) -> Result<()> {
        let Some(loading) = self.loading.take() else { return Ok(()) };
        for (pe, loaded) in self.pes.iter_mut().zip(loading.finish()?) {
            pe.take(loaded);
        }
        Ok(())
    }
}

/// What a kernel is for that runs programs of so many GPUs with linear tasks in these formats.
///
/// Errors: a program for which there is no kernel.
fn purpose(count: u32, formats: &[WeightFormat]) -> Result<Purpose> {
    let is_integer = |format: &WeightFormat| matches!(format, WeightFormat::Q8 | WeightFormat::Q4);
    match (count > 1, formats.iter().any(is_integer)) {
        (true, true) => {
            let message = format!("--devices {count}: --weights q8 and q4 need one device");
            Err(Error::Usage(message))
        }
        (true, false) => Ok(Purpose::Peers),
        (false, true) => Ok(Purpose::Integers),
        (false, false) if formats.contains(&WeightFormat::Fp8) => Ok(Purpose::Fp8),
        (false, false) => Ok(Purpose::Single),
    }
}

impl Device for CudaDevice {
    fn profile(&self) -> &Profile {
        &self.profile
    }

    fn prepare(&mut self, formats: &[WeightFormat]) -> Result<()> {
        let targets = self.pes.iter().map(Pe::target).collect();
        let purpose = purpose(self.pes.len() as u32, formats)?;
        // The contexts live until this device is dropped, which waits for the kernel first.
        self.loading = Some(Loading::begin(targets, purpose)?);
        Ok(())
    }

    fn place(&mut self, pe: u32, bytes: &[u8]) -> Result<u64> {
        let pe = &mut self.pes[pe as usize];
        let address = pe.allocate("weights", bytes.len() as u64)?;
        pe.write(address, bytes)?;
        Ok(address)
    }

    fn reserve(&mut self, pe: u32, what: &str, bytes: u64) -> Result<u64> {
        self.pes[pe as usize].reserve(what, bytes)
    }

    fn reserve_shared(&mut self, what: &str, bytes: u64) -> Result<u64> {
        self.pes[0].make_current()?;
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: fresh memory; with unified addressing all GPUs have it at the same address.
        let pointer = unsafe { result::malloc_host(bytes as usize, flags) }.map_err(wrap(what))?;
        self.shared_memory.push(pointer);
        // SAFETY: `bytes` bytes that nobody else knows yet.
        unsafe { std::ptr::write_bytes(pointer.cast::<u8>(), 0, bytes as usize) };
        Ok(pointer as u64)
    }

    fn write(&mut self, pe: u32, address: u64, bytes: &[u8]) -> Result<()> {
        self.pes[pe as usize].write(address, bytes)
    }

    fn read(&self, pe: u32, address: u64, out: &mut [u8]) -> Result<()> {
        self.pes[pe as usize].read(address, out)
    }

    fn launch(&mut self, headers: &[ProgramHeader]) -> Result<()> {
        self.finish_loading()?;
        self.pes.iter_mut().zip(headers).try_for_each(|(pe, header)| pe.launch(header))
    }

    fn check(&self) -> Result<()> {
        self.pes.iter().try_for_each(Pe::check)
    }

    fn join(&mut self) {
        self.pes.iter_mut().for_each(Pe::join);
    }

    fn now_ns(&self) -> Option<u64> {
        None
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        // All kernels: each stores in the memory of the others.
        self.join();
        // What never ran is unloaded with the GPUs, and its error has nobody to go to.
        let _ = self.finish_loading();
        if self.pes[0].make_current().is_err() {
            return;
        }
        for pointer in self.shared_memory.drain(..) {
            // SAFETY: allocated by `reserve_shared`, and the kernels have ended. Errors have nobody to go
            // to, and the process frees what is left.
            let _ = unsafe { result::free_host(pointer) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_has_the_kernel_that_its_formats_need() {
        use WeightFormat::{Bf16, F32, Fp8, Q4, Q8};
        let of = |count, formats: &[_]| purpose(count, formats).ok();
        for (formats, expected) in [
            (vec![], Purpose::Single),
            (vec![F32, Bf16], Purpose::Single),
            (vec![Bf16, Fp8], Purpose::Fp8),
            (vec![Q8], Purpose::Integers),
            (vec![Q4], Purpose::Integers),
        ] {
            assert_eq!(of(1, &formats), Some(expected), "{formats:?}");
            let is_integer = expected == Purpose::Integers;
            assert_eq!(of(2, &formats), (!is_integer).then_some(Purpose::Peers), "{formats:?}");
        }
    }
}
