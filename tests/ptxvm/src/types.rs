//! The small vocabularies of PTX: types, state spaces, scopes, orders, rounding, special registers.

/// A fundamental or packed type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub(crate) enum Ty {
    Pred,
    B8,
    B16,
    B32,
    B64,
    B128,
    U8,
    U16,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    F16,
    F16x2,
    Bf16,
    Bf16x2,
    Tf32,
    F32,
    F64,
    E4m3x2,
    E5m2x2,
}

impl Ty {
    /// The type that a modifier such as `u32` names.
    pub(crate) fn parse(text: &str) -> Option<Ty> {
        use Ty::*;
        Some(match text {
            "pred" => Pred,
            "b8" => B8,
            "b16" => B16,
            "b32" => B32,
            "b64" => B64,
            "b128" => B128,
            "u8" => U8,
            "u16" => U16,
            "u32" => U32,
            "u64" => U64,
            "s8" => S8,
            "s16" => S16,
            "s32" => S32,
            "s64" => S64,
            "f16" => F16,
            "f16x2" => F16x2,
            "bf16" => Bf16,
            "bf16x2" => Bf16x2,
            "tf32" => Tf32,
            "f32" => F32,
            "f64" => F64,
            "e4m3x2" => E4m3x2,
            "e5m2x2" => E5m2x2,
            _ => return None,
        })
    }

    /// Size in bytes; a predicate counts as one.
    pub(crate) fn bytes(self) -> u32 {
        use Ty::*;
        match self {
            Pred | B8 | U8 | S8 => 1,
            B16 | U16 | S16 | F16 | Bf16 | E4m3x2 | E5m2x2 => 2,
            B32 | U32 | S32 | F16x2 | Bf16x2 | Tf32 | F32 => 4,
            B64 | U64 | S64 | F64 => 8,
            B128 => 16,
        }
    }

    /// Size in bits.
    pub(crate) fn bits(self) -> u32 {
        self.bytes() * 8
    }

    /// Whether this is a two's complement integer.
    pub(crate) fn signed(self) -> bool {
        matches!(self, Ty::S8 | Ty::S16 | Ty::S32 | Ty::S64)
    }

    /// Whether this is a floating-point type, packed ones included.
    pub(crate) fn float(self) -> bool {
        use Ty::*;
        matches!(self, F16 | F16x2 | Bf16 | Bf16x2 | Tf32 | F32 | F64 | E4m3x2 | E5m2x2)
    }
}

/// The bits of a register of `bytes` bytes.
#[inline]
pub(crate) fn mask(bytes: u32) -> u64 {
    if bytes >= 8 { u64::MAX } else { (1 << (bytes * 8)) - 1 }
}

/// Sign-extends the low `bits` bits of `value`.
#[inline]
pub(crate) fn sext(value: u64, bits: u32) -> i64 {
    let shift = 64 - bits;
    ((value << shift) as i64) >> shift
}

/// A state space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub(crate) enum Space {
    Generic,
    Global,
    Shared,
    Local,
    Const,
    Param,
}

/// The scope of a strong operation. The order is that of inclusion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub(crate) enum Scope {
    Cta,
    Cluster,
    Gpu,
    Sys,
}

/// The memory order of an operation; `volatile` counts as relaxed at system scope.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub(crate) enum Order {
    Weak,
    Relaxed,
    Acquire,
    Release,
    AcqRel,
}

impl Order {
    /// Whether a read with this order acquires.
    pub(crate) fn acquires(self) -> bool {
        matches!(self, Order::Acquire | Order::AcqRel)
    }

    /// Whether a write with this order releases.
    pub(crate) fn releases(self) -> bool {
        matches!(self, Order::Release | Order::AcqRel)
    }
}

/// A rounding mode. The integer modes `.rni` and so on use the same names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub(crate) enum Round {
    Rn,
    Rz,
    Rm,
    Rp,
    Rna,
}

/// A special register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub(crate) enum SReg {
    Tid(u8),
    Ntid(u8),
    Ctaid(u8),
    Nctaid(u8),
    LaneId,
    WarpId,
    NwarpId,
    SmId,
    NsmId,
    GridId,
    Clock,
    ClockHi,
    Clock64,
    GlobalTimer,
    GlobalTimerLo,
    GlobalTimerHi,
    LaneMaskEq,
    LaneMaskLt,
    LaneMaskLe,
    LaneMaskGt,
    LaneMaskGe,
    DynamicSmem,
    TotalSmem,
    WarpSize,
    /// A register that always reads as this number here: `%envreg`, and `%cluster_ctarank` and its
    /// kin for clusters of one block.
    Fixed(u32),
}

impl SReg {
    /// The special register of this name, without the dot part for `x`, `y`, `z`.
    pub(crate) fn parse(name: &str, axis: Option<&str>) -> Option<SReg> {
        let axis_idx = match axis {
            None => None,
            Some("x") => Some(0),
            Some("y") => Some(1),
            Some("z") => Some(2),
            Some(_) => return None,
        };
        if let Some(a) = axis_idx {
            return Some(match name {
                "%tid" => SReg::Tid(a),
                "%ntid" => SReg::Ntid(a),
                "%ctaid" => SReg::Ctaid(a),
                "%nctaid" => SReg::Nctaid(a),
                "%cluster_ctaid" => SReg::Fixed(0),
                "%cluster_nctaid" => SReg::Fixed(1),
                "%clusterid" => SReg::Ctaid(a),
                "%nclusterid" => SReg::Nctaid(a),
                _ => return None,
            });
        }
        Some(match name {
            "%laneid" => SReg::LaneId,
            "%warpid" => SReg::WarpId,
            "%nwarpid" => SReg::NwarpId,
            "%smid" => SReg::SmId,
            "%nsmid" => SReg::NsmId,
            "%gridid" => SReg::GridId,
            "%clock" => SReg::Clock,
            "%clock_hi" => SReg::ClockHi,
            "%clock64" => SReg::Clock64,
            "%globaltimer" => SReg::GlobalTimer,
            "%globaltimer_lo" => SReg::GlobalTimerLo,
            "%globaltimer_hi" => SReg::GlobalTimerHi,
            "%lanemask_eq" => SReg::LaneMaskEq,
            "%lanemask_lt" => SReg::LaneMaskLt,
            "%lanemask_le" => SReg::LaneMaskLe,
            "%lanemask_gt" => SReg::LaneMaskGt,
            "%lanemask_ge" => SReg::LaneMaskGe,
            "%dynamic_smem_size" => SReg::DynamicSmem,
            "%total_smem_size" => SReg::TotalSmem,
            "%is_explicit_cluster" | "%cluster_ctarank" => SReg::Fixed(0),
            "%cluster_nctarank" => SReg::Fixed(1),
            "WARP_SZ" => SReg::WarpSize,
            _ => {
                let n = name.strip_prefix("%envreg")?.parse::<u32>().ok()?;
                if n > 31 {
                    return None;
                }
                SReg::Fixed(0)
            }
        })
    }
}
