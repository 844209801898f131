//! The PTX that this build embeds, and which of it a GPU runs.

use super::Gpu;
use crate::error::{Error, Result};

/// Environment variable that names PTX to use instead of the embedded one.
pub(crate) const KERNEL_VARIABLE: &str = "TILERT_MK_KERNEL";

/// What PTX is for. Each has no more code than it needs: code makes a kernel slower, also where it is not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// One GPU.
    Single,
    /// One GPU with weights in FP8.
    Fp8,
    /// Several GPUs that run a program together, with weights in any format that a GPU has.
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
            Purpose::Peers => "_peers",
        };
        format!("sm_{}{suffix}", self.capability)
    }
}

/// The embedded PTX, best first; a build without the device toolchain has none.
pub fn kernels() -> impl Iterator<Item = Kernel> {
    [
        (90, Purpose::Single, include_str!(concat!(env!("OUT_DIR"), "/tilert_mk_sm_90.ptx"))),
        (80, Purpose::Single, include_str!(concat!(env!("OUT_DIR"), "/tilert_mk_sm_80.ptx"))),
        (90, Purpose::Fp8, include_str!(concat!(env!("OUT_DIR"), "/tilert_mk_sm_90_fp8.ptx"))),
        (90, Purpose::Peers, include_str!(concat!(env!("OUT_DIR"), "/tilert_mk_sm_90_peers.ptx"))),
    ]
    .into_iter()
    .map(|(capability, purpose, text)| Kernel { capability, purpose, text })
    .filter(|kernel| !kernel.text.is_empty())
}

/// The embedded PTX for a purpose on a GPU of this compute capability.
pub fn fitting_kernel(capability: u32, purpose: Purpose) -> Option<Kernel> {
    kernels().find(|kernel| kernel.capability <= capability && kernel.purpose == purpose)
}

/// The PTX for a purpose on a GPU: that of the file which `TILERT_MK_KERNEL` names, or the
/// best embedded one.
///
/// Errors: a file that cannot be read; a build without the kernel; a GPU that is too old.
pub(super) fn kernel_text(gpu: &Gpu, purpose: Purpose) -> Result<String> {
    if let Some(path) = std::env::var_os(KERNEL_VARIABLE) {
        return std::fs::read_to_string(&path).map_err(|error| Error::file(path, error));
    }
    let kernel = fitting_kernel(gpu.capability, purpose);
    kernel.map(|kernel| kernel.text.to_owned()).ok_or_else(|| {
        let message = if kernels().next().is_none() {
            "this build has no GPU kernel: it was built without the device toolchain (README)"
        } else {
            match purpose {
                Purpose::Single => "the GPU is too old: compute capability 8.0 is needed",
                Purpose::Fp8 => "the GPU is too old: --weights fp8 needs compute capability 9.0",
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
