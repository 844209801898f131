//! Loads, stores, atomics, prefetches and the matrix instructions.

use super::Ins;
use crate::parse::Res;
use crate::program::{Access, AtomOp, MmaShape, Op, Reg, Src};
use crate::types::{Order, Scope, Space, Ty};

/// Cache hints: they never change a result.
const HINTS: [&str; 24] = [
    "ca",
    "cg",
    "cs",
    "lu",
    "cv",
    "wb",
    "wt",
    "L1::evict_normal",
    "L1::evict_unchanged",
    "L1::evict_first",
    "L1::evict_last",
    "L1::no_allocate",
    "L2::evict_normal",
    "L2::evict_first",
    "L2::evict_last",
    "L2::64B",
    "L2::128B",
    "L2::256B",
    "level::eviction_priority",
    "evict_first",
    "evict_last",
    "evict_normal",
    "L2::evict_unchanged",
    "L1",
];

/// Decodes a memory instruction, or says that this is none.
pub(super) fn decode(ins: &mut Ins) -> Res<Option<Op>> {
    Ok(Some(match ins.name.as_str() {
        "ld" | "ldu" => load(ins)?,
        "st" => store(ins)?,
        "atom" | "red" => atomic(ins)?,
        "prefetch" | "prefetchu" => {
            ins.space();
            let levels = ["L1", "L2", "L2::evict_last", "L2::evict_normal"];
            if ins.take_of(&levels).is_none() {
                return ins.err("prefetch needs .L1 or .L2");
            }
            ins.addr(0)?;
            Op::Nop
        }
        "applypriority" | "discard" => {
            ins.space();
            ins.take_of(&["L2::evict_normal", "L2"]);
            ins.addr(0)?;
            ins.count(2)?;
            Op::Nop
        }
        "createpolicy" => policy(ins)?,
        "ldmatrix" | "stmatrix" => matrix(ins)?,
        "mma" => mma(ins)?,
        _ => return Ok(None),
    }))
}

fn policy(ins: &mut Ins) -> Res<Op> {
    if ins.take_of(&["fractional", "range", "cvt"]).is_none() {
        return ins.err("unknown form of createpolicy");
    }
    ins.take("global");
    let known =
        ["L2", "L2::evict_last", "L2::evict_normal", "L2::evict_first", "L2::evict_unchanged"];
    while ins.take_of(&known).is_some() {}
    ins.ty()?;
    Ok(Op::Createpolicy { d: ins.dst(0)? })
}

/// Reads order, scope, space and hints; the type comes last.
fn access(ins: &mut Ins) -> Res<(Access, bool)> {
    let volatile = ins.take("volatile");
    let mmio = ins.take("mmio");
    let orders = ["weak", "relaxed", "acquire", "release", "acq_rel"];
    let order = ins.take_of(&orders);
    let scope = ins.scope();
    let space = ins.space();
    let hinted = ins.take("L2::cache_hint");
    while ins.take_of(&HINTS).is_some() {}
    let order = match order {
        None | Some(0) if volatile => Order::Relaxed,
        None | Some(0) => Order::Weak,
        Some(1) => Order::Relaxed,
        Some(2) => Order::Acquire,
        Some(3) => Order::Release,
        Some(_) => Order::AcqRel,
    };
    if order != Order::Weak && scope.is_none() && !volatile {
        return ins.err("a strong access needs a scope");
    }
    if mmio && scope != Some(Scope::Sys) {
        return ins.err("an .mmio access is .relaxed.sys");
    }
    let scope = if volatile { Scope::Sys } else { scope.unwrap_or(Scope::Cta) };
    Ok((Access { ty: Ty::B32, space, order, scope, nc: false }, hinted))
}

fn vector(ins: &mut Ins) -> usize {
    ins.take_of(&["v2", "v4", "v8"]).map_or(1, |i| 2 << i)
}

fn load(ins: &mut Ins) -> Res<Op> {
    let nc = ins.take("nc");
    let (mut acc, hinted) = access(ins)?;
    acc.nc = nc;
    if acc.order.releases() || acc.order == Order::AcqRel {
        return ins.err("a load cannot release");
    }
    let count = vector(ins);
    acc.ty = ins.ty()?;
    ins.count(2 + usize::from(hinted))?;
    let mut d = ins.dst_list(0)?;
    if d.len() != count {
        return ins.err(format!("{count} registers are needed, not {}", d.len()));
    }
    if acc.ty == Ty::B128 {
        // Two halves, each a register slot of its own.
        let half = |r: &Reg, i| Reg { slot: r.slot + i, bytes: 8 };
        d = d.iter().flat_map(|r| [half(r, 0), half(r, 1)]).collect();
        acc.ty = Ty::B64;
    }
    Ok(Op::Ld { acc, addr: ins.addr(1)?, d })
}

fn store(ins: &mut Ins) -> Res<Op> {
    let (mut acc, hinted) = access(ins)?;
    if acc.order.acquires() {
        return ins.err("a store cannot acquire");
    }
    let count = vector(ins);
    acc.ty = ins.ty()?;
    ins.count(2 + usize::from(hinted))?;
    let mut s = ins.src_list(1, acc.ty)?;
    if s.len() != count {
        return ins.err(format!("{count} values are needed, not {}", s.len()));
    }
    if acc.ty == Ty::B128 {
        let half = |s: &Src, i| match s {
            Src::Reg(r) => Src::Reg(Reg { slot: r.slot + i, bytes: 8 }),
            other => *other,
        };
        s = s.iter().flat_map(|s| [half(s, 0), half(s, 1)]).collect();
        acc.ty = Ty::B64;
    }
    Ok(Op::St { acc, addr: ins.addr(0)?, s })
}

fn atomic(ins: &mut Ins) -> Res<Op> {
    let red = ins.name == "red";
    let names = ["exch", "cas", "add", "inc", "dec", "min", "max", "and", "or", "xor"];
    let Some(which) = ins.take_of(&names) else {
        return ins.err(format!("{} needs an operation", ins.name));
    };
    let op = [
        AtomOp::Exch,
        AtomOp::Cas,
        AtomOp::Add,
        AtomOp::Inc,
        AtomOp::Dec,
        AtomOp::Min,
        AtomOp::Max,
        AtomOp::And,
        AtomOp::Or,
        AtomOp::Xor,
    ][which];
    let explicit = ins.mods.iter().any(|m| matches!(m.as_str(), "cta" | "cluster" | "gpu" | "sys"));
    if !explicit {
        ins.mods.insert(0, "gpu".into());
    }
    ins.take("noftz");
    let (mut acc, hinted) = access(ins)?;
    if acc.order == Order::Weak {
        acc.order = Order::Relaxed;
    }
    if vector(ins) != 1 {
        return ins.err("vector atomics are not supported");
    }
    acc.ty = ins.ty()?;
    let known = matches!(acc.ty.bytes(), 2 | 4 | 8);
    let float_ok = !acc.ty.float() || matches!(op, AtomOp::Add | AtomOp::Min | AtomOp::Max);
    if !known || !float_ok {
        return ins.err(format!("{} has no such form", ins.name));
    }
    let first = usize::from(!red);
    let values = 1 + usize::from(op == AtomOp::Cas);
    ins.count(first + 1 + values + usize::from(hinted))?;
    let d = if red { None } else { Some(ins.dst(0)?) };
    let b = ins.src(first + 1, acc.ty)?;
    let c = if values == 2 { ins.src(first + 2, acc.ty)? } else { Src::Imm(0) };
    Ok(Op::Atom { op, acc, addr: ins.addr(first)?, d, s: [b, c] })
}

fn matrix(ins: &mut Ins) -> Res<Op> {
    if !ins.take("sync") || !ins.take("aligned") || !ins.take("m8n8") {
        return ins.err(format!("{} needs .sync.aligned.m8n8", ins.name));
    }
    let Some(which) = ins.take_of(&["x1", "x2", "x4"]) else {
        return ins.err(format!("{} needs .x1, .x2 or .x4", ins.name));
    };
    let trans = ins.take("trans");
    let space = ins.space();
    if ins.ty()? != Ty::B16 || !matches!(space, Space::Shared | Space::Generic) {
        return ins.err(format!("{} is for .shared.b16", ins.name));
    }
    ins.count(2)?;
    let count = 1 << which;
    if ins.name == "ldmatrix" {
        let d = ins.dst_list(0)?;
        if d.len() != count {
            return ins.err(format!("{count} registers are needed"));
        }
        return Ok(Op::Ldmatrix { addr: ins.addr(1)?, d, trans });
    }
    let s = ins.src_list(1, Ty::B32)?;
    if s.len() != count {
        return ins.err(format!("{count} registers are needed"));
    }
    Ok(Op::Stmatrix { addr: ins.addr(0)?, s, trans })
}

fn mma(ins: &mut Ins) -> Res<Op> {
    if !ins.take("sync") || !ins.take("aligned") || !ins.take("row") || !ins.take("col") {
        return ins.err("mma needs .sync.aligned, .row and .col");
    }
    let Some(which) = ins.take_of(&["m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32"]) else {
        return ins.err("this shape of mma is not supported");
    };
    let k = 4 << which;
    let sat = ins.take("satfinite");
    let (d, a, b, c) = (ins.ty()?, ins.ty()?, ins.ty()?, ins.ty()?);
    let half = matches!(a, Ty::F16 | Ty::Bf16) && matches!(k, 8 | 16);
    let known = match a {
        Ty::F16 => half && b == a && matches!(d, Ty::F32 | Ty::F16) && c == d,
        Ty::Bf16 => half && b == a && d == Ty::F32 && c == d,
        Ty::Tf32 => matches!(k, 4 | 8) && b == a && d == Ty::F32 && c == d,
        Ty::S8 | Ty::U8 => {
            matches!(k, 16 | 32) && matches!(b, Ty::S8 | Ty::U8) && d == Ty::S32 && c == d
        }
        _ => false,
    };
    if !known || (sat && d != Ty::S32) {
        return ins.err("this combination of mma types is not supported");
    }
    ins.count(4)?;
    let lists = (ins.dst_list(0)?, ins.src_list(1, a)?, ins.src_list(2, b)?, ins.src_list(3, c)?);
    let a_regs = (16 * k * a.bytes() as usize) / 128;
    let b_regs = (8 * k * a.bytes() as usize) / 128;
    let d_regs = if d == Ty::F16 { 2 } else { 4 };
    let wanted = [d_regs, a_regs, b_regs, d_regs];
    if [lists.0.len(), lists.1.len(), lists.2.len(), lists.3.len()] != wanted {
        return ins.err("wrong number of registers in a fragment of mma");
    }
    let shape = MmaShape { k: k as u32, a, b, d, sat };
    Ok(Op::Mma { shape, d: lists.0, a: lists.1, b: lists.2, c: lists.3 })
}
