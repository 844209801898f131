//! Loading the kernel onto the GPUs of a program, on a thread of its own: on its first start on a
//! kind of GPU the driver assembles the PTX, which takes half a minute, and weights are read
//! meanwhile.

use std::ffi::CStr;
use std::thread::JoinHandle;

use cudarc::driver::result;
use cudarc::driver::sys;

use super::kernels::{self, Purpose};
use super::{Gpu, wrap};
use crate::error::{Error, Result};

/// Name of the kernel in the embedded PTX.
const ENTRY: &CStr = c"tilert_mk";

/// A GPU and its context.
pub(super) struct Target {
    pub(super) gpu: Gpu,
    pub(super) context: sys::CUcontext,
}

// SAFETY: the driver's handles may be used from any thread that makes their context current.
unsafe impl Send for Target {}

/// A module of a context, and the kernel in it.
pub(super) struct Loaded {
    pub(super) module: sys::CUmodule,
    pub(super) kernel: sys::CUfunction,
}

// SAFETY: as for `Target`.
unsafe impl Send for Loaded {}

/// The kernel of all GPUs, on its way.
pub(super) struct Loading(JoinHandle<Result<Vec<Loaded>>>);

impl Loading {
    /// Begins to load the kernel for a purpose. The contexts must outlive `finish`.
    ///
    /// Errors: a GPU that is too old, a build without the kernel.
    pub(super) fn begin(targets: Vec<Target>, purpose: Purpose) -> Result<Loading> {
        let images = targets.iter().map(|target| kernels::image(&target.gpu, purpose));
        let images = images.collect::<Result<Vec<_>>>()?;
        // One after the other: what the driver has assembled for the first it keeps for the others.
        Ok(Loading(std::thread::spawn(move || {
            targets.iter().zip(images).map(|(target, image)| load(target, &image)).collect()
        })))
    }

    /// The kernel on each GPU, in their order, once it is there.
    ///
    /// Errors: what the driver says.
    pub(super) fn finish(self) -> Result<Vec<Loaded>> {
        let panicked =
            |_| Err(Error::Device("the thread that loads the kernel has panicked".into()));
        self.0.join().unwrap_or_else(panicked)
    }
}

fn load(target: &Target, image: &[u8]) -> Result<Loaded> {
    let Target { gpu, context } = target;
    // SAFETY: the context is live, by the contract of `begin`.
    unsafe { result::ctx::set_current(*context) }.map_err(wrap("opening a GPU"))?;
    // SAFETY: PTX text that ends with a NUL, or an assembled kernel.
    let module = unsafe { result::module::load_data(image.as_ptr().cast()) }
        .map_err(wrap("loading the kernel"))?;
    // SAFETY: the module just loaded.
    let kernel = unsafe { result::module::get_function(module, ENTRY.to_owned()) }
        .map_err(wrap("finding the kernel"))?;
    let limit = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    // SAFETY: the function just found.
    unsafe { result::function::set_function_attribute(kernel, limit, gpu.shared_bytes as i32) }
        .map_err(wrap("reserving shared memory"))?;
    Ok(Loaded { module, kernel })
}
