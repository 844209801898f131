//! An interpreter for PTX that finds races, uninitialised reads and hangs.
//!
//! [`Module::parse`] reads PTX text as rustc, clang and nvcc emit it. A [`Vm`] has devices with
//! memory, launches kernels of modules, and runs them under a seeded scheduler: the same seed
//! gives the same run. While it runs it checks every access, barrier and copy, and keeps what is
//! wrong as [`Finding`]s. `README.md` beside this crate says what the checks mean.
//!
//! ```
//! use ptxvm::{Arg, Module, RunState, Vm, VmConfig};
//! let module = Module::parse(
//!     ".version 8.0 .target sm_90 .address_size 64
//!      .visible .entry store(.param .u64 p) {
//!        .reg .b64 %rd<2>; .reg .b32 %r<2>;
//!        ld.param.u64 %rd1, [p];
//!        mov.u32 %r1, %tid.x;
//!        mad.wide.u32 %rd1, %r1, 4, %rd1;
//!        st.global.u32 [%rd1], %r1;
//!        ret; }",
//! )?;
//! let mut vm = Vm::new(VmConfig::default());
//! let gpu = vm.add_device("gpu0");
//! let out = vm.alloc(gpu, "out", 256, 16);
//! vm.launch(gpu, &module, "store", 1, 64, 0, &[Arg::U64(out)])?;
//! assert_eq!(vm.run(u64::MAX), RunState::Finished);
//! assert!(vm.findings().is_empty());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod body;
mod clock;
mod core;
mod decode;
mod exec;
mod finding;
mod launch;
mod lex;
mod link;
mod mbarrier;
mod memory;
mod num;
mod parse;
mod program;
mod race;
mod sched;
mod shadow;
mod types;
mod vm;
mod warp;

pub use crate::core::{Checks, VmConfig};
pub use finding::{Finding, FindingKind};
pub use program::Module;
pub use vm::{Arg, DeviceId, LaunchId, RunState, View, Vm, VmError};

/// Text that is not PTX, or not PTX that this interpreter knows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {message}")]
pub struct ParseError {
    /// The line, from 1.
    pub line: u32,
    /// What is wrong.
    pub message: String,
}
