//! One GPU of a program: its context, memory and kernel.

use std::ffi::c_void;
use std::time::{Duration, Instant};

use cudarc::driver::result::{self, DriverError, device, primary_ctx, stream};
use cudarc::driver::sys;
use tilert_mk_shared::program::ProgramHeader;
use tilert_mk_shared::tile::{BLOCK_THREADS, PAGE_BYTES, SharedPlan};

use super::module::{Loaded, Target};
use super::{Gpu, wrap};
use crate::driver::survey::reaches;
use crate::error::{Error, Result};

/// Bytes of one upload: the driver stages pageable memory in pieces of about this size.
const UPLOAD_BYTES: usize = 64 << 20;
/// How long a kernel that has been told to stop may take.
const STOP_TIME_MAX: Duration = Duration::from_secs(10);

/// One GPU.
pub(super) struct Pe {
    pub(super) gpu: Gpu,
    context: sys::CUcontext,
    device: sys::CUdevice,
    loaded: Option<Loaded>,
    kernel_stream: sys::CUstream,
    copy_stream: sys::CUstream,
    memory: Vec<sys::CUdeviceptr>,
    is_launched: bool,
}

impl Pe {
    /// Opens a GPU.
    ///
    /// Errors: a GPU that has too little shared memory; what the driver says.
    pub(super) fn open(gpu: Gpu) -> Result<Pe> {
        if SharedPlan::new(gpu.shared_bytes, 0, PAGE_BYTES).is_none() {
            let bytes = gpu.shared_bytes;
            return Err(Error::Device(format!("{}: {bytes} bytes of shared memory", gpu.name)));
        }
        let device = device::get(gpu.ordinal).map_err(wrap("opening a GPU"))?;
        // SAFETY: a handle that the driver gave.
        let context = unsafe { primary_ctx::retain(device) }.map_err(wrap("opening a GPU"))?;
        // SAFETY: the context just made.
        unsafe { result::ctx::set_current(context) }.map_err(wrap("opening a GPU"))?;
        let new_stream =
            || stream::create(stream::StreamKind::NonBlocking).map_err(wrap("making a stream"));
        let (kernel_stream, copy_stream) = (new_stream()?, new_stream()?);
        Ok(Pe {
            gpu,
            context,
            device,
            loaded: None,
            kernel_stream,
            copy_stream,
            memory: Vec::new(),
            is_launched: false,
        })
    }

    /// Where its kernel is to be loaded.
    pub(super) fn target(&self) -> Target {
        Target { gpu: self.gpu.clone(), context: self.context }
    }

    /// Takes its kernel.
    pub(super) fn take(&mut self, loaded: Loaded) {
        self.loaded = Some(loaded);
    }

    /// Maps the memory of `other`, what it has and what it is going to have.
    ///
    /// Errors: GPUs that do not reach each other.
    pub(super) fn map(&self, other: &Pe) -> Result<()> {
        let (from, to) = (self.gpu.ordinal, other.gpu.ordinal);
        if !reaches(from, to) {
            return Err(Error::Device(format!(
                "cuda:{from} does not reach the memory of cuda:{to}; use --devices 1"
            )));
        }
        self.make_current()?;
        // SAFETY: two live contexts of different devices.
        match unsafe { sys::cuCtxEnablePeerAccess(other.context, 0) } {
            // Contexts are the primary ones, which another device of this process may have linked.
            sys::CUresult::CUDA_SUCCESS | sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => {
                Ok(())
            }
            error => Err(wrap("linking GPUs")(DriverError(error))),
        }
    }

    pub(super) fn make_current(&self) -> Result<()> {
        // SAFETY: the context lives as long as the device.
        unsafe { result::ctx::set_current(self.context) }.map_err(wrap("using a GPU"))
    }

    /// Memory that is not filled.
    pub(super) fn allocate(&mut self, what: &str, bytes: u64) -> Result<u64> {
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

    /// Zeroed memory.
    pub(super) fn reserve(&mut self, what: &str, bytes: u64) -> Result<u64> {
        let address = self.allocate(what, bytes)?;
        // SAFETY: the memory just allocated.
        unsafe { result::memset_d8_sync(address, 0, bytes as usize) }.map_err(wrap(what))?;
        Ok(address)
    }

    pub(super) fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.make_current()?;
        for (piece, offset) in bytes.chunks(UPLOAD_BYTES).zip((0u64..).step_by(UPLOAD_BYTES)) {
            // SAFETY: an address of this device with room for all of `bytes`.
            unsafe { result::memcpy_htod_sync(address + offset, piece) }
                .map_err(wrap("copying to a GPU"))?;
        }
        Ok(())
    }

    pub(super) fn read(&self, address: u64, out: &mut [u8]) -> Result<()> {
        self.make_current()?;
        // SAFETY: an address of this device; the copy is complete before `out` is looked at.
        unsafe { result::memcpy_dtoh_async(out, address, self.copy_stream) }
            .map_err(wrap("copying from a GPU"))?;
        // SAFETY: this device's own stream.
        unsafe { stream::synchronize(self.copy_stream) }.map_err(wrap("copying from a GPU"))
    }

    pub(super) fn launch(&mut self, header: &ProgramHeader) -> Result<()> {
        let Some(Loaded { kernel, .. }) = self.loaded else {
            return Err(Error::Device("the kernel is not loaded".into()));
        };
        self.make_current()?;
        let mut header = *header;
        let mut arguments = [(&raw mut header).cast::<c_void>()];
        let (grid, block) = ((header.pe_worker_count(), 1, 1), (BLOCK_THREADS, 1, 1));
        let ProgramHeader { page_count, page_bytes, input_bytes, .. } = header;
        let bytes = SharedPlan { page_count, page_bytes, input_bytes }.shared_bytes();
        let launch: unsafe fn(_, _, _, _, _, &mut [*mut c_void]) -> _ = if self.gpu.is_cooperative {
            result::launch_cooperative_kernel
        } else {
            result::launch_kernel
        };
        // SAFETY: the kernel takes one header; the engine keeps all memory until `join`.
        let launched =
            unsafe { launch(kernel, grid, block, bytes, self.kernel_stream, &mut arguments) };
        launched.map_err(wrap("launching the kernel"))?;
        self.is_launched = true;
        Ok(())
    }

    pub(super) fn check(&self) -> Result<()> {
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

    pub(super) fn join(&mut self) {
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
}

impl Drop for Pe {
    fn drop(&mut self) {
        if self.make_current().is_err() {
            return;
        }
        // Errors have nobody to go to here, and the process frees what is left.
        for address in self.memory.drain(..) {
            // SAFETY: allocated by `allocate`; `CudaDevice` has joined all kernels.
            let _ = unsafe { result::free_sync(address) };
        }
        // SAFETY: handles that this device made and that nothing uses any more.
        unsafe {
            let _ = stream::destroy(self.kernel_stream);
            let _ = stream::destroy(self.copy_stream);
            if let Some(Loaded { module, .. }) = self.loaded.take() {
                let _ = result::module::unload(module);
            }
            let _ = primary_ctx::release(self.device);
        }
    }
}
