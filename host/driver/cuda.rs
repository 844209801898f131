//! An NVIDIA GPU as a device: one block of the persistent kernel for each worker.
//!
//! The driver library is loaded when it is first needed, so one binary runs with and without a GPU.
//! Weights and the heap are plain allocations; the mailbox is pinned host memory that the GPU maps
//! at the same address. The kernel runs on a stream of its own, so that copies pass beside it.

use std::ffi::{CString, c_void};
use std::time::{Duration, Instant};

use cudarc::driver::result::{self, DriverError, device, primary_ctx, stream};
use cudarc::driver::sys;
use sys::CUdevice_attribute_enum as Attribute;
use tilert_mk_shared::program::ProgramHeader;
use tilert_mk_shared::tile::{BLOCK_THREADS, GPU_STEP_TOKENS_MAX, SharedPlan, TILE_ROWS_MAX};

use super::{Device, Profile};
use crate::error::{Error, Result};

/// Name of the kernel in the embedded PTX.
const ENTRY: &str = "tilert_mk";
/// Environment variable that names PTX to use instead of the embedded one.
pub(crate) const KERNEL_VARIABLE: &str = "TILERT_MK_KERNEL";
/// Polls of an event between two looks at the host's memory, some 10 ms. Looks of all blocks come one after
/// the other, 100 us for those of an H200: each 256 polls, they kept a block that was waited for from
/// its next poll.
const POLLS_PER_LOOK: u32 = 16_384;
/// Weight bytes of a linear task at most: what `TILE_ROWS_MAX` leaves.
const TILE_BYTES: u64 = 1 << 20;
/// Bytes of one upload: the driver stages pageable memory in pieces of about this size.
const UPLOAD_BYTES: usize = 64 << 20;
/// How long a kernel that has been told to stop may take.
const STOP_TIME_MAX: Duration = Duration::from_secs(10);

/// The embedded PTX and the lowest compute capability that runs it, best first; empty texts are left
/// out.
pub fn kernels() -> impl Iterator<Item = (u32, &'static str)> {
    [
        (90, include_str!(concat!(env!("OUT_DIR"), "/tilert_mk_sm_90.ptx"))),
        (80, include_str!(concat!(env!("OUT_DIR"), "/tilert_mk_sm_80.ptx"))),
    ]
    .into_iter()
    .filter(|(_, text)| !text.is_empty())
}

/// The embedded PTX for a GPU of this compute capability, and the capability it was made for.
pub fn fitting_kernel(capability: u32) -> Option<(u32, &'static str)> {
    kernels().find(|(lowest, _)| *lowest <= capability)
}

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

/// One GPU of this machine.
pub struct CudaDevice {
    profile: Profile,
    gpu: Gpu,
    context: sys::CUcontext,
    device: sys::CUdevice,
    module: sys::CUmodule,
    kernel: sys::CUfunction,
    kernel_stream: sys::CUstream,
    copy_stream: sys::CUstream,
    memory: Vec<sys::CUdeviceptr>,
    shared_memory: Vec<*mut c_void>,
    is_launched: bool,
}

// SAFETY: the driver's handles may be used from any thread that makes the context current, which
// every method does first; the device is used by one thread at a time, through `&mut`.
unsafe impl Send for CudaDevice {}

fn wrap(what: &str) -> impl Fn(DriverError) -> Error {
    move |error| Error::Device(format!("{what}: {error}"))
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

/// The PTX for a GPU: that of the file which `TILERT_MK_KERNEL` names, or the best embedded one.
fn kernel_text(gpu: &Gpu) -> Result<String> {
    if let Some(path) = std::env::var_os(KERNEL_VARIABLE) {
        return std::fs::read_to_string(&path).map_err(|error| Error::file(path, error));
    }
    fitting_kernel(gpu.capability).map(|(_, text)| text.to_owned()).ok_or_else(|| {
        let message = if kernels().next().is_none() {
            "this build has no GPU kernel: it was built without the device toolchain (README)"
        } else {
            "the GPU is too old: compute capability 8.0 is needed"
        };
        Error::Device(format!("{}: {message}", gpu.name))
    })
}

impl CudaDevice {
    /// Opens the GPU `ordinal` and loads the kernel.
    ///
    /// Errors: no driver, no such GPU, one that is too old or has too little shared memory, a build
    /// without the kernel.
    pub fn open(ordinal: i32) -> Result<CudaDevice> {
        let gpu = gpus()?.into_iter().find(|gpu| gpu.ordinal == ordinal).ok_or_else(|| {
            Error::Device("the NVIDIA driver sees no GPU; use --device cpu".into())
        })?;
        let text = kernel_text(&gpu)?;
        if SharedPlan::new(gpu.shared_bytes, 0).is_none() {
            let bytes = gpu.shared_bytes;
            return Err(Error::Device(format!("{}: {bytes} bytes of shared memory", gpu.name)));
        }
        let device = device::get(ordinal).map_err(wrap("opening a GPU"))?;
        // SAFETY: a handle that the driver gave.
        let context = unsafe { primary_ctx::retain(device) }.map_err(wrap("opening a GPU"))?;
        // SAFETY: the context just made.
        unsafe { result::ctx::set_current(context) }.map_err(wrap("opening a GPU"))?;
        let image = CString::new(text).map_err(|_| Error::Device("a NUL in the PTX".into()))?;
        // SAFETY: PTX text that ends with a NUL.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) }
            .map_err(wrap("loading the kernel (is the driver older than CUDA 12?)"))?;
        let entry = CString::new(ENTRY).map_err(|_| Error::Device("a NUL in a name".into()))?;
        // SAFETY: the module just loaded.
        let kernel = unsafe { result::module::get_function(module, entry) }
            .map_err(wrap("finding the kernel"))?;
        let limit = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function just found.
        unsafe { result::function::set_function_attribute(kernel, limit, gpu.shared_bytes as i32) }
            .map_err(wrap("reserving shared memory"))?;
        let new_stream =
            || stream::create(stream::StreamKind::NonBlocking).map_err(wrap("making a stream"));
        Ok(CudaDevice {
            profile: Profile {
                name: format!("cuda:{ordinal} {}", gpu.name),
                worker_count: gpu.sm_count,
                worker_count_max: gpu.sm_count,
                step_tokens_max: GPU_STEP_TOKENS_MAX,
                tile_bytes: TILE_BYTES,
                tile_rows_max: TILE_ROWS_MAX,
                shared_bytes: gpu.shared_bytes,
                packs_weights: true,
                stamps_values: true,
                polls_per_look: POLLS_PER_LOOK,
                host_spins: true,
            },
            gpu,
            context,
            device,
            module,
            kernel,
            kernel_stream: new_stream()?,
            copy_stream: new_stream()?,
            memory: Vec::new(),
            shared_memory: Vec::new(),
            is_launched: false,
        })
    }

    fn make_current(&self) -> Result<()> {
        // SAFETY: the context lives as long as the device.
        unsafe { result::ctx::set_current(self.context) }.map_err(wrap("using a GPU"))
    }

    fn allocate(&mut self, what: &str, bytes: u64) -> Result<u64> {
        self.make_current()?;
        // SAFETY: fresh memory; who writes and reads it is the program's matter.
        let address = unsafe { result::malloc_sync(bytes.max(16) as usize) }.map_err(|error| {
            let total = self.gpu.memory_bytes >> 20;
            let needed = bytes >> 20;
            Error::Device(format!("{needed} MiB for {what} on a GPU of {total} MiB: {error}"))
        })?;
        self.memory.push(address);
        Ok(address)
    }
}

impl Device for CudaDevice {
    fn profile(&self) -> &Profile {
        &self.profile
    }

    fn place(&mut self, bytes: &[u8]) -> Result<u64> {
        let address = self.allocate("weights", bytes.len() as u64)?;
        self.write(address, bytes)?;
        Ok(address)
    }

    fn reserve(&mut self, what: &str, bytes: u64) -> Result<u64> {
        let address = self.allocate(what, bytes)?;
        // SAFETY: the memory just allocated.
        unsafe { result::memset_d8_sync(address, 0, bytes as usize) }.map_err(wrap(what))?;
        Ok(address)
    }

    fn reserve_shared(&mut self, what: &str, bytes: u64) -> Result<u64> {
        self.make_current()?;
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: fresh memory; with unified addressing the GPU has it at the same address.
        let pointer = unsafe { result::malloc_host(bytes as usize, flags) }.map_err(wrap(what))?;
        self.shared_memory.push(pointer);
        // SAFETY: `bytes` bytes that nobody else knows yet.
        unsafe { std::ptr::write_bytes(pointer.cast::<u8>(), 0, bytes as usize) };
        Ok(pointer as u64)
    }

    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<()> {
        self.make_current()?;
        for (piece, offset) in bytes.chunks(UPLOAD_BYTES).zip((0u64..).step_by(UPLOAD_BYTES)) {
            // SAFETY: an address of this device with room for all of `bytes`.
            unsafe { result::memcpy_htod_sync(address + offset, piece) }
                .map_err(wrap("copying to a GPU"))?;
        }
        Ok(())
    }

    fn read(&self, address: u64, out: &mut [u8]) -> Result<()> {
        self.make_current()?;
        // SAFETY: an address of this device; the copy is complete before `out` is looked at.
        unsafe { result::memcpy_dtoh_async(out, address, self.copy_stream) }
            .map_err(wrap("copying from a GPU"))?;
        // SAFETY: this device's own stream.
        unsafe { stream::synchronize(self.copy_stream) }.map_err(wrap("copying from a GPU"))
    }

    fn launch(&mut self, header: &ProgramHeader) -> Result<()> {
        self.make_current()?;
        let mut header = *header;
        let mut arguments = [(&raw mut header).cast::<c_void>()];
        let (grid, block) = ((header.worker_count, 1, 1), (BLOCK_THREADS, 1, 1));
        let (page_count, input_bytes) = (header.page_count, header.input_bytes);
        let bytes = SharedPlan { page_count, input_bytes }.shared_bytes();
        let launch: unsafe fn(_, _, _, _, _, &mut [*mut c_void]) -> _ = if self.gpu.is_cooperative {
            result::launch_cooperative_kernel
        } else {
            result::launch_kernel
        };
        // SAFETY: the kernel takes one header; the engine keeps all memory until `join`.
        let launched =
            unsafe { launch(self.kernel, grid, block, bytes, self.kernel_stream, &mut arguments) };
        launched.map_err(wrap("launching the kernel"))?;
        self.is_launched = true;
        Ok(())
    }

    fn check(&self) -> Result<()> {
        self.make_current()?;
        // SAFETY: this device's own stream.
        match unsafe { sys::cuStreamQuery(self.kernel_stream) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(()),
            sys::CUresult::CUDA_SUCCESS => {
                Err(Error::Fault("the kernel has ended without a fault record".into()))
            }
            error => Err(Error::Fault(format!("the kernel has failed: {}", DriverError(error)))),
        }
    }

    fn join(&mut self) {
        if !std::mem::take(&mut self.is_launched) || self.make_current().is_err() {
            return;
        }
        let begin = Instant::now();
        // SAFETY: this device's own stream.
        while unsafe { sys::cuStreamQuery(self.kernel_stream) }
            == sys::CUresult::CUDA_ERROR_NOT_READY
        {
            if begin.elapsed() > STOP_TIME_MAX {
                return;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    fn now_ns(&self) -> Option<u64> {
        None
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        self.join();
        if self.make_current().is_err() {
            return;
        }
        // Errors have nobody to go to here, and the process frees what is left.
        for address in self.memory.drain(..) {
            // SAFETY: allocated by `allocate`, and the kernel has ended.
            let _ = unsafe { result::free_sync(address) };
        }
        for pointer in self.shared_memory.drain(..) {
            // SAFETY: allocated by `reserve_shared`, and the kernel has ended.
            let _ = unsafe { result::free_host(pointer) };
        }
        // SAFETY: handles that this device made and that nothing uses any more.
        unsafe {
            let _ = stream::destroy(self.kernel_stream);
            let _ = stream::destroy(self.copy_stream);
            let _ = result::module::unload(self.module);
            let _ = primary_ctx::release(self.device);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn embedded_ptx_is_for_its_chip_and_for_blocks_of_our_size() {
        for (capability, text) in kernels() {
            for line in
                [format!(".target sm_{capability}\n"), format!(".maxntid {BLOCK_THREADS}, 1, 1\n")]
            {
                assert!(text.contains(&line), "{line:?} is not in the PTX for sm_{capability}");
            }
        }
    }
}
