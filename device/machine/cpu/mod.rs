//! Tile primitives of the CPU machine.
//!
//! One source, compiled for AVX-512, for AVX2 and for any x86 or other chip, and chosen at run time.
//! All sums run over 32 lanes with fused multiply-adds and are folded in one order, so the three
//! give the same bits, and a row's product does not depend on how rows and tokens are blocked.

#[cfg(target_arch = "x86_64")]
mod amx;
// Its loops count: closures have no instruction set of their own.
#[cfg(target_arch = "x86_64")]
#[allow(clippy::needless_range_loop)]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod blocks;
pub mod counter;
mod inputs;
mod lanes;
mod sampling;
pub mod thread;

use super::Rows;
use super::best::Best;
use super::memory::Span;
pub use inputs::InputForm;
use tilert_mk_shared::task::WeightFormat;

/// Instruction sets that the primitives are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512 as below, and tiles that multiply bf16 (AMX).
    Amx,
    /// AVX-512F with FMA and F16C.
    Avx512,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// What every chip of the target has.
    Portable,
}

impl Isa {
    /// The widest instruction set of this machine.
    pub fn detect() -> Isa {
        #[cfg(target_arch = "x86_64")]
        {
            let has_fma = std::arch::is_x86_feature_detected!("fma")
                && std::arch::is_x86_feature_detected!("f16c")
                && std::arch::is_x86_feature_detected!("avx2");
            if has_fma && std::arch::is_x86_feature_detected!("avx512f") {
                return if amx::is_usable() { Isa::Amx } else { Isa::Avx512 };
            }
            if has_fma {
                return Isa::Avx2;
            }
        }
        Isa::Portable
    }

    /// Whether its vectors multiply bf16 values.
    pub fn multiplies_bf16(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self == Isa::Avx512 && std::arch::is_x86_feature_detected!("avx512bf16");
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// Lets the system give this thread now what it gives at first use: room for tiles.
    pub fn warm_up(self) {
        #[cfg(target_arch = "x86_64")]
        if self == Isa::Amx {
            // SAFETY: `Isa` values come from `detect` or are checked with `is_supported`.
            unsafe { amx::touch() };
        }
    }

    /// Whether this machine can run it.
    pub fn is_supported(self) -> bool {
        match Isa::detect() {
            Isa::Amx => true,
            Isa::Avx512 => self != Isa::Amx,
            Isa::Avx2 => matches!(self, Isa::Avx2 | Isa::Portable),
            Isa::Portable => self == Isa::Portable,
        }
    }
}

/// Defines a primitive that runs its body compiled for the chosen instruction set, or those of AVX2
/// and of AVX-512.
macro_rules! primitive {
    ($(#[$doc:meta])* $name:ident($($arg:ident: $type:ty),*) $(-> $out:ty)? = $body:path) => {
        primitive! {
            $(#[$doc])* $name($($arg: $type),*) $(-> $out)? = $body, $body, $body
        }
    };
    (
        $(#[$doc:meta])* $name:ident($($arg:ident: $type:ty),*) $(-> $out:ty)?
            = $body:path, $eight:path, $sixteen:path
    ) => {
        $(#[$doc])*
        fn $name(isa: Isa, $($arg: $type),*) $(-> $out)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx2,fma,f16c")]
                fn avx512($($arg: $type),*) $(-> $out)? { $sixteen($($arg),*) }
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2($($arg: $type),*) $(-> $out)? { $eight($($arg),*) }
                match isa {
                    // SAFETY: `Isa` values come from `detect` or are checked with `is_supported`.
                    Isa::Amx | Isa::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    Isa::Portable => {}
                }
            }
            let _ = isa;
            $body($($arg),*)
        }
    };
}

/// A matrix of weights: `[row_count, in_dim]` at an address.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    /// Address of the first value.
    pub address: u64,
    /// How values are stored.
    pub format: WeightFormat,
    /// How the inputs that they are multiplied by are stored.
    pub inputs: InputForm,
    /// Rows.
    pub row_count: usize,
    /// Values in a row; a multiple of 8.
    pub in_dim: usize,
}

primitive! {
    /// `y[token, out_first + row] = matrix[row] · x[token]`.
    matmul(matrix: Matrix, x: Rows, token_count: usize, y: Rows, out_first: usize)
        = lanes::matmul, avx2::matmul, avx512::matmul
}
primitive! {
    /// `out = weight * x / sqrt(mean(x^2) + eps)`; all of one length.
    rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) = lanes::rms_norm
}
primitive! {
    /// Half-split RoPE in place: pairs `(x[i], x[i + n/2])`.
    rope(x: &mut [f32], cos: &[f32], sin: &[f32]) = lanes::rope
}
primitive! {
    /// `gate = silu(gate) * up`.
    silu_mul(gate: &mut [f32], up: &[f32]) = lanes::silu_mul
}
/// Queries that `attend` takes at most: the keys and values of a block go through the first level of cache once for
/// all of them.
const ATTEND_QUERIES_MAX: usize = 16;

/// A rotated query and what `attend` does for it.
#[derive(Clone, Copy)]
struct Query {
    /// Its `dim` values.
    values: Span<f32>,
    /// Positions from the split's first to the query's own, those of other splits between them counted.
    count: usize,
    /// Gets the weighted sum of values, `dim` of them, then the largest score and the sum of weights.
    out: Span<f32>,
}

primitive! {
    /// Queries of consecutive tokens against the positions of a split, `[positions, dim]` from its first to the last
    /// query's own. All of them end in the same block.
    attend(queries: &[Query], keys: &[f32], values: &[f32], scale: f32)
        = lanes::attend, lanes::attend, avx512::attend::attend
}
primitive! {
    /// What splits of one query are together: rows of `out.len()` weighted values, their largest score and their
    /// sum of weights, `stride` apart.
    merge(splits: &[f32], stride: usize, out: &mut [f32]) = lanes::merge
}
primitive! {
    /// `to = from` rounded to bf16; may be the same memory.
    round(from: Span<f32>, to: Span<f32>) = inputs::round
}
primitive! {
    /// The same, in half of the memory.
    pack(from: Span<f32>, to: Span<f32>) = inputs::pack
}
primitive! {
    /// `out += x * scale`.
    add_scaled(out: &mut [f32], x: &[f32], scale: f32) = lanes::add_scaled
}
primitive! {
    /// Converts stored weights, from value `first` of the table at `address`.
    widen(address: u64, format: WeightFormat, first: u64, out: &mut [f32]) = lanes::widen
}
primitive! {
    /// The best of values whose indices begin at `first`.
    best_of(first: u32, values: &[f32]) -> Best = sampling::best_of
}
primitive! {
    /// `weights = e^((logits - largest) / temperature) * one`, rounded down; no logit is above `largest`.
    weigh(logits: &[f32], largest: f32, temperature: f32, one: f32, weights: &mut [u64])
        = sampling::weigh
}
primitive! {
    /// `e^x`, within 2 units in the last place; 0 below -87.
    exp(x: f32) -> f32 = lanes::exp
}

/// Weight bytes between those that are multiplied for one token and those that are requested, on chips and for formats
/// that gain by it.
const STREAM_AHEAD: usize = 8 << 10;

/// Requests a row that is about to be written, so that no other core has it any more; a hint.
fn expect(row: Span<f32>) {
    let bytes = (row.len() * size_of::<f32>()) as u64;
    #[cfg(target_arch = "x86_64")]
    request::<{ std::arch::x86_64::_MM_HINT_ET0 }>(row.address(), bytes);
    #[cfg(not(target_arch = "x86_64"))]
    let _ = bytes;
}

/// Requests `bytes` at `address` into the second-level cache; a hint that may name any address.
pub fn prefetch(address: u64, bytes: u64) {
    #[cfg(target_arch = "x86_64")]
    request::<{ std::arch::x86_64::_MM_HINT_T1 }>(address, bytes);
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (address, bytes);
}

/// Requests the lines of `bytes` at `address`.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn request<const HINT: i32>(address: u64, bytes: u64) {
    for line in (0..bytes).step_by(64) {
        let pointer = (address as *const i8).wrapping_add(line as usize);
        // SAFETY: a prefetch never faults, whatever the address.
        unsafe { std::arch::x86_64::_mm_prefetch::<HINT>(pointer) };
    }
}
