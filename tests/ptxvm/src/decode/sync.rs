//! Barriers, fences, warp-wide instructions, asynchronous copies and control.

use super::{Ins, Opd, sink};
use crate::num::int;
use crate::parse::Res;
use crate::program::{Alu, Bar, BoolOp, Mbar, Op, Shfl, Src, Vote};
use crate::types::{Scope, Space, Ty};

/// Decodes a synchronising or control instruction, or says that this is none.
pub(super) fn decode(ins: &mut Ins) -> Res<Option<Op>> {
    Ok(Some(match ins.name.as_str() {
        "fence" => fence(ins)?,
        "membar" => match ins.scope() {
            Some(scope) => Op::Fence { acquire: true, release: true, scope },
            None => return ins.err("membar needs a scope"),
        },
        "bar" | "barrier" => barrier(ins)?,
        "shfl" | "vote" | "match" | "redux" | "elect" | "activemask" => warp_wide(ins)?,
        "mbarrier" => mbarrier(ins)?,
        "cp" => copy(ins)?,
        "mapa" => {
            ins.space();
            let ty = ins.ty()?;
            Op::Mapa { d: ins.dst(0)?, s: ins.src(1, ty)?, rank: ins.src(2, Ty::U32)? }
        }
        "nanosleep" => {
            ins.ty()?;
            Op::Nanosleep { ns: ins.src(0, Ty::U32)? }
        }
        "griddepcontrol" => {
            if ins.take_of(&["launch_dependents", "wait"]).is_none() {
                return ins.err("unknown form of griddepcontrol");
            }
            Op::Nop
        }
        "setmaxnreg" => {
            ins.take_of(&["inc", "dec"]);
            ins.take("sync");
            ins.take("aligned");
            ins.ty()?;
            Op::Nop
        }
        "pmevent" => {
            ins.take("mask");
            Op::Nop
        }
        "ret" => {
            ins.take("uni");
            Op::Ret
        }
        "exit" => Op::Exit,
        "trap" => Op::Trap,
        "brkpt" => Op::Brkpt,
        _ => return Ok(None),
    }))
}

fn fence(ins: &mut Ins) -> Res<Op> {
    if ins.take("proxy") {
        if ins.take("async") || ins.take("async::generic") {
            ins.space();
            return Ok(Op::FenceProxy);
        }
        if ins.take("alias") {
            return Ok(Op::Nop);
        }
        return ins.err("unknown form of fence.proxy");
    }
    if ins.take("mbarrier_init") {
        ins.take("release");
        ins.take("cluster");
        // The engine's own accesses to the object need no fence here, so what remains is this.
        return Ok(Op::Fence { acquire: false, release: true, scope: Scope::Cluster });
    }
    let kind = ins.take_of(&["sc", "acq_rel", "acquire", "release"]);
    let Some(scope) = ins.scope() else { return ins.err("fence needs a scope") };
    let (acquire, release) = (kind != Some(3), kind != Some(2));
    Ok(Op::Fence { acquire, release, scope })
}

fn barrier(ins: &mut Ins) -> Res<Op> {
    if ins.take("warp") {
        ins.take("sync");
        return Ok(Op::WarpSync { members: ins.src(0, Ty::U32)? });
    }
    if ins.name == "barrier" && ins.take("cluster") {
        // A cluster is one block here, so waiting for it is waiting for the block.
        ins.take_of(&["acquire", "release", "relaxed"]);
        ins.take("aligned");
        if ins.take("arrive") {
            return Ok(Op::Nop);
        }
        ins.take("wait");
        let id = Src::Imm(16);
        return Ok(Op::Bar { kind: Bar::Sync, id, count: None, d: sink(), aligned: false });
    }
    ins.take("cta");
    let aligned = ins.take("aligned") || ins.name == "bar";
    if ins.take("red") {
        let how = ins.take_of(&["popc", "and", "or"]);
        ins.ty()?;
        let n = ins.ops.len();
        if !(3..=4).contains(&n) {
            return ins.err("bar.red takes three or four operands");
        }
        let (p, not) = ins.pred(n - 1)?;
        let logic = match how {
            Some(0) => None,
            Some(1) => Some(BoolOp::And),
            Some(_) => Some(BoolOp::Or),
            None => return ins.err("bar.red needs .popc, .and or .or"),
        };
        let count = if n == 4 { Some(ins.src(2, Ty::U32)?) } else { None };
        let kind = Bar::Red(logic, p, not);
        return Ok(Op::Bar { kind, id: ins.src(1, Ty::U32)?, count, d: ins.dst(0)?, aligned });
    }
    let kind = match ins.take_of(&["sync", "arrive"]) {
        Some(0) => Bar::Sync,
        Some(_) => Bar::Arrive,
        None => return ins.err("unknown form of barrier"),
    };
    let count = if ins.ops.len() > 1 { Some(ins.src(1, Ty::U32)?) } else { None };
    if count.is_none() && matches!(kind, Bar::Arrive) {
        return ins.err("bar.arrive needs a thread count");
    }
    Ok(Op::Bar { kind, id: ins.src(0, Ty::U32)?, count, d: sink(), aligned })
}

fn warp_wide(ins: &mut Ins) -> Res<Op> {
    let name = ins.name.clone();
    if name == "activemask" {
        ins.ty()?;
        return Ok(Op::ActiveMask { d: ins.dst(0)? });
    }
    if !ins.take("sync") {
        return ins.err(format!("{name} needs .sync"));
    }
    match name.as_str() {
        "shfl" => {
            let modes = [Shfl::Up, Shfl::Down, Shfl::Bfly, Shfl::Idx];
            let Some(which) = ins.take_of(&["up", "down", "bfly", "idx"]) else {
                return ins.err("shfl needs a mode");
            };
            ins.ty()?;
            ins.count(5)?;
            let mut s = [Src::Imm(0); 4];
            for (i, slot) in s.iter_mut().enumerate() {
                *slot = ins.src(i + 1, Ty::B32)?;
            }
            Ok(Op::Shfl { mode: modes[which], d: ins.dst(0)?, p: ins.dst2(0)?, s })
        }
        "vote" => {
            let modes = [Vote::All, Vote::Any, Vote::Uni, Vote::Ballot];
            let Some(which) = ins.take_of(&["all", "any", "uni", "ballot"]) else {
                return ins.err("vote needs a mode");
            };
            ins.ty()?;
            ins.count(3)?;
            let (s, not) = ins.pred(1)?;
            let members = ins.src(2, Ty::B32)?;
            Ok(Op::Vote { mode: modes[which], d: ins.dst(0)?, s, not, members })
        }
        "match" => {
            let all = ins.take("all");
            ins.take("any");
            let ty = ins.ty()?;
            ins.count(3)?;
            let (s, members) = (ins.src(1, ty)?, ins.src(2, Ty::B32)?);
            Ok(Op::Match { all, bytes: ty.bytes(), d: ins.dst(0)?, p: ins.dst2(0)?, s, members })
        }
        "redux" => {
            let fs: [Alu; 6] = [int::add, int::min, int::max, int::and, int::or, int::xor];
            let Some(which) = ins.take_of(&["add", "min", "max", "and", "or", "xor"]) else {
                return ins.err("redux needs an operation");
            };
            let par = ins.par()?;
            ins.count(3)?;
            let members = ins.src(2, Ty::B32)?;
            Ok(Op::Redux { f: fs[which], par, d: ins.dst(0)?, s: ins.src(1, par.ty)?, members })
        }
        _ => {
            ins.count(2)?;
            Ok(Op::Elect { d: ins.dst(0)?, p: ins.dst2(0)?, members: ins.src(1, Ty::B32)? })
        }
    }
}

fn mbarrier(ins: &mut Ins) -> Res<Op> {
    let kinds = [
        "init",
        "inval",
        "arrive",
        "arrive_drop",
        "expect_tx",
        "complete_tx",
        "test_wait",
        "try_wait",
        "pending_count",
    ];
    let Some(kind) = ins.take_of(&kinds) else { return ins.err("unknown form of mbarrier") };
    let raises_tx = kind != 4 && ins.take("expect_tx");
    ins.take("noComplete");
    let parity = ins.take("parity");
    let relaxed = ins.take("relaxed");
    ins.take_of(&["release", "acquire"]);
    match ins.scope() {
        None | Some(Scope::Cta | Scope::Cluster) => {}
        Some(_) => return ins.err("mbarrier scopes are .cta and .cluster"),
    }
    let space = ins.space();
    if kind != 8 && !matches!(space, Space::Shared | Space::Generic) {
        return ins.err("an mbarrier is in shared memory");
    }
    ins.ty_opt();
    let has_state = matches!(kind, 2 | 3) && !matches!(ins.ops.first(), Some(Opd::Mem(..)));
    let at = usize::from(has_state || matches!(kind, 6 | 7));
    let d = if at == 1 { ins.dst(0)? } else { sink() };
    if kind == 8 {
        let op = Mbar::PendingCount(ins.src(1, Ty::B64)?);
        let addr = crate::program::Addr { base: Src::Imm(0), offset: 0 };
        return Ok(Op::Mbarrier { op, space, addr, d: ins.dst(0)? });
    }
    let addr = ins.addr(at)?;
    let next = |ins: &Ins| ins.src(at + 1, Ty::U32);
    let op = match kind {
        0 => Mbar::Init(next(ins)?),
        1 => Mbar::Inval,
        2 | 3 => {
            let (mut count, mut tx) = (Src::Imm(1), None);
            if raises_tx {
                tx = Some(next(ins)?);
            } else if ins.ops.len() > at + 1 {
                count = next(ins)?;
            }
            Mbar::Arrive { count, tx, drop: kind == 3, release: !relaxed }
        }
        4 => Mbar::ExpectTx(next(ins)?),
        5 => Mbar::CompleteTx(next(ins)?),
        _ => Mbar::Test {
            phase: ins.src(at + 1, if parity { Ty::U32 } else { Ty::B64 })?,
            parity,
            acquire: !relaxed,
        },
    };
    Ok(Op::Mbarrier { op, space, addr, d })
}

fn copy(ins: &mut Ins) -> Res<Op> {
    if !ins.take("async") {
        return ins.err("unknown form of cp");
    }
    let bulk = ins.take("bulk");
    if ins.take("commit_group") {
        return Ok(if bulk { Op::BulkCommit } else { Op::CpCommit });
    }
    if ins.take("wait_all") {
        return Ok(Op::CpWait { pending: None });
    }
    if ins.take("wait_group") {
        // `.read` only promises less.
        ins.take("read");
        let Some(Opd::Int(n)) = ins.ops.first() else {
            return ins.err("wait_group needs a number");
        };
        let pending = *n as u32;
        return Ok(if bulk {
            Op::BulkWait { pending }
        } else {
            Op::CpWait { pending: Some(pending) }
        });
    }
    if ins.take("mbarrier") {
        ins.take("arrive");
        let noinc = ins.take("noinc");
        ins.space();
        ins.ty()?;
        return Ok(Op::CpMbarArrive { addr: ins.addr(0)?, noinc });
    }
    let hinted = ins.take("L2::cache_hint");
    if bulk { bulk_copy(ins, hinted) } else { small_copy(ins, hinted) }
}

fn small_copy(ins: &mut Ins, hinted: bool) -> Res<Op> {
    let bypass = ins.take("cg");
    if !bypass && !ins.take("ca") {
        return ins.err("cp.async needs .ca or .cg");
    }
    if !(ins.take("shared") || ins.take("shared::cta")) || !ins.take("global") {
        return ins.err("cp.async copies from .global to .shared");
    }
    ins.take_of(&["L2::64B", "L2::128B", "L2::256B"]);
    let Some(Opd::Int(bytes)) = ins.ops.get(2).cloned() else {
        return ins.err("cp.async needs its size as a number");
    };
    if !(matches!(bytes, 4 | 8 | 16) && (!bypass || bytes == 16)) {
        return ins.err(format!("cp.async cannot copy {bytes} bytes"));
    }
    let (mut take, mut ignore) = (None, None);
    if ins.ops.len() > 3 + usize::from(hinted) {
        if ins.ops.len() == 4 && is_pred(&ins.ops[3]) {
            ignore = Some(ins.pred(3)?);
        } else {
            take = Some(ins.src(3, Ty::U32)?);
        }
    }
    let (dst, src) = (ins.addr(0)?, ins.addr(1)?);
    Ok(Op::CpAsync { dst, src, bytes: bytes as u32, take, ignore })
}

fn is_pred(opd: &Opd) -> bool {
    match opd {
        Opd::Not(_) => true,
        Opd::Reg(r) => r.bytes == 1,
        _ => false,
    }
}

fn bulk_copy(ins: &mut Ins, hinted: bool) -> Res<Op> {
    let extra = usize::from(hinted);
    if ins.take("prefetch") {
        if !ins.take("L2") || !ins.take("global") {
            return ins.err("cp.async.bulk.prefetch is .L2.global");
        }
        ins.count(2 + extra)?;
        return Ok(Op::Nop);
    }
    let to = ins.take_of(&["shared::cluster", "shared::cta", "global"]);
    let from = ins.take_of(&["global", "shared::cta"]);
    match (to, from) {
        (Some(0 | 1), Some(0)) => {
            if !ins.take("mbarrier::complete_tx::bytes") {
                return ins.err("this copy needs .mbarrier::complete_tx::bytes");
            }
            ins.count(4 + extra)?;
            let (dst, src, mbar) = (ins.addr(0)?, ins.addr(1)?, ins.addr(3)?);
            Ok(Op::BulkLoad { dst, src, bytes: ins.src(2, Ty::U32)?, mbar })
        }
        (Some(2), Some(1)) => {
            if !ins.take("bulk_group") {
                return ins.err("this copy needs .bulk_group");
            }
            ins.count(3 + extra)?;
            let (dst, src) = (ins.addr(0)?, ins.addr(1)?);
            Ok(Op::BulkStore { dst, src, bytes: ins.src(2, Ty::U32)? })
        }
        _ => ins.err("this direction of cp.async.bulk is not supported"),
    }
}
