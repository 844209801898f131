//! The PTX that this build embeds, and which of it a GPU runs.

use std::fs::File;

use super::Gpu;
use crate::error::{Error, Result};

/// Environment variable that names a file to use instead of the embedded PTX: other PTX, or what an
/// assembler has made of some.
pub(crate) const KERNEL_VARIABLE: &str = "TILERT_MK_KERNEL";

/// What PTX is for. Each has no more code than it needs: code makes a kernel slower, also where it is not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// One GPU.
    Single,
    /// One GPU with weights in FP8, or in FP8 and others.
    Fp8,
    /// One GPU with weights in integers of 8 or 4 bits.
    Integers,
    /// Several GPUs that run a program together, with weights in any format but integers.
    Peers,
}

/// Embedded PTX.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    /// The lowest compute capability that runs it, for example 90.
    pub capability: u32,
    /// What it is for.
    pub purpose: Purpose,
    /// The text.
    pub text: &'static str,
}

impl Kernel {
    /// Name for people and JSON: the target, and what it is for.
    pub fn name(&self) -> String {
        let suffix = match self.purpose {
            Purpose::Single => "",
            Purpose::Fp8 => "_fp8",
            Purpose::Integers => "_integers",
            Purpose::Peers => "_peers",
        };
        format!("sm_{}{suffix}", self.capability)
    }
}

/// The text of an embedded file.
macro_rules! ptx {
    ($name:literal) => {
        include_str!(concat!(env!("OUT_DIR"), "/tilert_mk_", $name, ".ptx"))
    };
}

/// The embedded PTX, best first; a build without the device toolchain has none.
pub fn kernels() -> impl Iterator<Item = Kernel> {
    [
        (90, Purpose::Single, ptx!("sm_90")),
        (80, Purpose::Single, ptx!("sm_80")),
        (90, Purpose::Fp8, ptx!("sm_90_fp8")),
        (90, Purpose::Integers, ptx!("sm_90_integers")),
        (90, Purpose::Peers, ptx!("sm_90_peers")),
    ]
    .into_iter()
    .map(|(capability, purpose, text)| Kernel { capability, purpose, text })
    .filter(|kernel| !kernel.text.is_empty())
}

/// The compute capability from which kernels take long input rows in pieces.
pub(super) const PIECES_CAPABILITY: u32 = 90;

/// The embedded PTX for a purpose on a GPU of this compute capability.
pub fn fitting_kernel(capability: u32, purpose: Purpose) -> Option<Kernel> {
    kernels().find(|kernel| kernel.capability <= capability && kernel.purpose == purpose)
}

/// What the driver loads for a purpose on a GPU, with a NUL at its end: the file which `TILERT_MK_KERNEL` names,
/// or the best embedded PTX.
///
/// Errors: a file that cannot be read; a build without the kernel; a GPU that is too old.
pub(super) fn image(gpu: &Gpu, purpose: Purpose) -> Result<Vec<u8>> {
    let mut image = match std::env::var_os(KERNEL_VARIABLE) {
        Some(path) => std::fs::read(&path).map_err(|error| Error::file(path, error))?,
        None => embedded(gpu, purpose)?.text.into(),
    };
    // Text ends with it; of other images the driver reads as much as their headers say.
    image.push(0);
    Ok(image)
}

/// Whether there is such an image, without reading it.
///
/// Errors: as `image`.
pub(super) fn check(gpu: &Gpu, purpose: Purpose) -> Result<()> {
    match std::env::var_os(KERNEL_VARIABLE) {
        Some(path) => File::open(&path).map(drop).map_err(|error| Error::file(path, error)),
        None => embedded(gpu, purpose).map(drop),
    }
}

fn embedded(gpu: &Gpu, purpose: Purpose) -> Result<Kernel> {
    fitting_kernel(gpu.capability, purpose).ok_or_else(|| {
        let message = if kernels().next().is_none() {
            "this build has no GPU kernel: it was built without the device toolchain (README)"
        } else {
            match purpose {
                Purpose::Single => "the GPU is too old: compute capability 8.0 is needed",
                Purpose::Fp8 | Purpose::Integers => {
                    "the GPU is too old: quantised weights need compute capability 9.0; use \
                     --device cpu"
                }
                Purpose::Peers => {
                    "the GPU is too old: several together need compute capability 9.0"
                }
            }
        };
        Error::Device(format!("{}: {message}", gpu.name))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tilert_mk_shared::tile::BLOCK_THREADS;

    #[test]
    fn embedded_ptx_is_for_its_chip_and_for_blocks_of_our_size() {
        for kernel in kernels() {
            let target = format!(".target sm_{}\n", kernel.capability);
            for line in [target, format!(".maxntid {BLOCK_THREADS}, 1, 1\n")] {
                assert!(kernel.text.contains(&line), "{line:?} is not in {}", kernel.name());
            }
            // Accesses of other devices' memory need the scope of the system.
            let has_scope = kernel.text.contains("st.relaxed.sys.global.b64");
            assert_eq!(has_scope, kernel.purpose == Purpose::Peers, "{}", kernel.name());
            let widens = kernel.text.contains("fma.rn.bf16x2");
            assert_eq!(widens, kernel.purpose != Purpose::Single, "{}", kernel.name());
        }
    }
}
