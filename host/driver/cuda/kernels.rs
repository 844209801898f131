//! The PTX that this build embeds, and which of it a GPU runs.

use super::Gpu;
use crate::error::{Error, Result};

/// Environment variable that names PTX to use instead of the embedded one.
pub(crate) const KERNEL_VARIABLE: &str = "TILERT_MK_KERNEL";

/// Embedded PTX.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    /// The lowest compute capability that runs it, for example 90.
    pub capability: u32,
    /// Whether it is for several GPUs that run a program together.
    pub has_peers: bool,
    /// The text.
    pub text: &'static str,
}

impl Kernel {
    /// Name for people and JSON: the target, and whether it is for several GPUs.
    pub fn name(&self) -> String {
        let suffix = if self.has_peers { "_peers" } else { "" };
        format!("sm_{}{suffix}", self.capability)
    }
}

/// The embedded PTX, best first; a build without the device toolchain has none.
pub fn kernels() -> impl Iterator<Item = Kernel> {
    [
        (90, false, include_str!(concat!(env!("OUT_DIR"), "/tilert_mk_sm_90.ptx"))),
        (80, false, include_str!(concat!(env!("OUT_DIR"), "/tilert_mk_sm_80.ptx"))),
        (90, true, include_str!(concat!(env!("OUT_DIR"), "/tilert_mk_sm_90_peers.ptx"))),
    ]
    .into_iter()
    .map(|(capability, has_peers, text)| Kernel { capability, has_peers, text })
    .filter(|kernel| !kernel.text.is_empty())
}

/// The embedded PTX for GPUs of this compute capability, one or several.
pub fn fitting_kernel(capability: u32, has_peers: bool) -> Option<Kernel> {
    kernels().find(|kernel| kernel.capability <= capability && kernel.has_peers == has_peers)
}

/// The PTX for a GPU, alone or one of several: that of the file which `TILERT_MK_KERNEL` names, or the
/// best embedded one.
///
/// Errors: a file that cannot be read; a build without the kernel; a GPU that is too old.
pub(super) fn kernel_text(gpu: &Gpu, has_peers: bool) -> Result<String> {
    if let Some(path) = std::env::var_os(KERNEL_VARIABLE) {
        return std::fs::read_to_string(&path).map_err(|error| Error::file(path, error));
    }
    let kernel = fitting_kernel(gpu.capability, has_peers);
    kernel.map(|kernel| kernel.text.to_owned()).ok_or_else(|| {
        let message = if kernels().next().is_none() {
            "this build has no GPU kernel: it was built without the device toolchain (README)"
        } else if has_peers {
            "the GPU is too old: several together need compute capability 9.0"
        } else {
            "the GPU is too old: compute capability 8.0 is needed"
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
            assert_eq!(has_scope, kernel.has_peers, "{}", kernel.name());
        }
    }
}
