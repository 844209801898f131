//! What the NVIDIA driver says of itself and of the links between GPUs.

use cudarc::driver::result::device;
use cudarc::driver::sys;

use super::cuda::{Gpu, driver_version, gpus};
use crate::error::Result;

/// The driver and the GPUs that it shows.
#[derive(Clone, Debug)]
pub struct Survey {
    /// The newest CUDA version that the driver speaks, for example 12080.
    pub cuda_version: u32,
    /// The GPUs, each with the ordinals of those whose memory it can reach.
    pub gpus: Vec<(Gpu, Vec<i32>)>,
}

/// Asks the driver.
///
/// Errors: no driver, or one that does not start.
pub fn survey() -> Result<Survey> {
    let gpus = gpus()?;
    let cuda_version = driver_version()?;
    let ordinals: Vec<i32> = gpus.iter().map(|gpu| gpu.ordinal).collect();
    let with_peers = gpus.into_iter().map(|gpu| {
        let others = ordinals.iter().copied().filter(|other| *other != gpu.ordinal);
        let peers = others.filter(|other| reaches(gpu.ordinal, *other)).collect();
        (gpu, peers)
    });
    Ok(Survey { cuda_version, gpus: with_peers.collect() })
}

/// Whether the GPU `from` can map the memory of the GPU `to`; not if the driver does not answer.
pub(super) fn reaches(from: i32, to: i32) -> bool {
    let (Ok(from), Ok(to)) = (device::get(from), device::get(to)) else { return false };
    let mut can_access = 0;
    // SAFETY: two handles that the driver gave; it writes one integer.
    let asked = unsafe { sys::cuDeviceCanAccessPeer(&mut can_access, from, to) }.result();
    asked.is_ok() && can_access != 0
}
