//! Turns an instruction's name, modifiers and operands into an `Op`. Every modifier must be
//! consumed: what is left over is an error.

mod alu;
mod cvt;
mod mem;
mod sync;

use crate::ParseError;
use crate::parse::Res;
use crate::program::{Addr, Op, Par, Reg, SINK, Src};
use crate::types::{Round, SReg, Scope, Space, Ty, mask};

/// An operand before the instruction's types are known.
#[derive(Clone, Debug)]
pub(crate) enum Opd {
    Reg(Reg),
    Int(i128),
    F32(u32),
    F64(u64),
    Dec(f64),
    Special(SReg),
    Sym(u32, i64),
    Vec(Vec<Opd>),
    Mem(Box<Opd>, i64),
    Pair(Box<Opd>, Box<Opd>),
    Not(Box<Opd>),
}

/// An instruction as written.
pub(crate) struct Ins {
    pub(crate) name: String,
    pub(crate) mods: Vec<String>,
    pub(crate) ops: Vec<Opd>,
    pub(crate) line: u32,
}

/// Decodes one instruction.
pub(crate) fn decode(ins: &mut Ins) -> Res<Op> {
    let handlers = [alu::decode, cvt::decode, mem::decode, sync::decode];
    for handler in handlers {
        if let Some(op) = handler(ins)? {
            if let Some(m) = ins.mods.first() {
                return ins.err(format!("unknown or misplaced modifier .{m} of {}", ins.name));
            }
            return Ok(op);
        }
    }
    ins.err(format!("unknown instruction {}", ins.name))
}

impl Ins {
    pub(crate) fn err<T>(&self, message: impl Into<String>) -> Res<T> {
        Err(ParseError { line: self.line, message: message.into() })
    }

    /// Consumes a modifier if it is there.
    fn take(&mut self, name: &str) -> bool {
        let hit = self.mods.iter().position(|m| m == name);
        if let Some(i) = hit {
            self.mods.remove(i);
        }
        hit.is_some()
    }

    /// Consumes the first of several modifiers that is there and says which one it was.
    fn take_of(&mut self, names: &[&str]) -> Option<usize> {
        let (at, which) = self
            .mods
            .iter()
            .enumerate()
            .find_map(|(i, m)| Some((i, names.iter().position(|n| n == m)?)))?;
        self.mods.remove(at);
        Some(which)
    }

    fn ty_opt(&mut self) -> Option<Ty> {
        let at = self.mods.iter().position(|m| Ty::parse(m).is_some())?;
        Ty::parse(&self.mods.remove(at))
    }

    fn ty(&mut self) -> Res<Ty> {
        match self.ty_opt() {
            Some(ty) => Ok(ty),
            None => self.err(format!("{} needs a type", self.name)),
        }
    }

    fn round(&mut self) -> Option<Round> {
        let which = self.take_of(&["rn", "rz", "rm", "rp", "rna"])?;
        Some([Round::Rn, Round::Rz, Round::Rm, Round::Rp, Round::Rna][which])
    }

    fn scope(&mut self) -> Option<Scope> {
        let which = self.take_of(&["cta", "cluster", "gpu", "sys", "gl"])?;
        Some([Scope::Cta, Scope::Cluster, Scope::Gpu, Scope::Sys, Scope::Gpu][which])
    }

    fn space(&mut self) -> Space {
        let names = [
            "global",
            "shared",
            "shared::cta",
            "shared::cluster",
            "local",
            "const",
            "param",
            "param::entry",
            "param::func",
        ];
        match self.take_of(&names) {
            None => Space::Generic,
            Some(0) => Space::Global,
            Some(1..=3) => Space::Shared,
            Some(4) => Space::Local,
            Some(5) => Space::Const,
            Some(_) => Space::Param,
        }
    }

    /// Reads the flags that arithmetic instructions share; the type must be next.
    fn par(&mut self) -> Res<Par> {
        let round = self.round();
        let ftz = self.take("ftz");
        let sat = self.take("sat") || self.take("satfinite");
        let relu = self.take("relu");
        let nan = self.take("NaN");
        let ty = self.ty()?;
        let round = round.unwrap_or(Round::Rn);
        Ok(Par { ty, from: ty, round, ftz, sat, relu, nan, sel: 0 })
    }

    fn count(&self, wanted: usize) -> Res<()> {
        if self.ops.len() == wanted {
            return Ok(());
        }
        self.err(format!("{} takes {wanted} operands, not {}", self.name, self.ops.len()))
    }

    fn dst(&self, i: usize) -> Res<Reg> {
        match self.ops.get(i) {
            Some(Opd::Reg(r)) => Ok(*r),
            Some(Opd::Pair(a, _)) => match **a {
                Opd::Reg(r) => Ok(r),
                _ => self.err("the destination is not a register"),
            },
            _ => self.err(format!("operand {} of {} is not a register", i + 1, self.name)),
        }
    }

    /// The second destination of `d|p`.
    fn dst2(&self, i: usize) -> Res<Reg> {
        match self.ops.get(i) {
            Some(Opd::Pair(_, b)) => match **b {
                Opd::Reg(r) => Ok(r),
                _ => self.err("the second destination is not a register"),
            },
            _ => Ok(sink()),
        }
    }

    fn src(&self, i: usize, ty: Ty) -> Res<Src> {
        match self.ops.get(i) {
            Some(opd) => self.value(opd, ty),
            None => self.err(format!("{} lacks operand {}", self.name, i + 1)),
        }
    }

    fn value(&self, opd: &Opd, ty: Ty) -> Res<Src> {
        Ok(match opd {
            Opd::Reg(r) if r.slot == SINK => return self.err("`_` cannot be read"),
            Opd::Reg(r) => Src::Reg(*r),
            Opd::Int(n) if ty.float() && matches!(ty, Ty::F32) => {
                Src::Imm(u64::from((*n as f32).to_bits()))
            }
            Opd::Int(n) if ty == Ty::F64 => Src::Imm((*n as f64).to_bits()),
            Opd::Int(n) => Src::Imm(*n as u64 & mask(ty.bytes().max(4))),
            Opd::F32(bits) => Src::Imm((*bits).into()),
            Opd::F64(bits) if ty == Ty::F32 => {
                Src::Imm((f64::from_bits(*bits) as f32).to_bits().into())
            }
            Opd::F64(bits) => Src::Imm(*bits),
            Opd::Dec(x) if matches!(ty, Ty::F32 | Ty::B32) => {
                Src::Imm((*x as f32).to_bits().into())
            }
            Opd::Dec(x) => Src::Imm(x.to_bits()),
            Opd::Special(s) => Src::Special(*s),
            Opd::Sym(id, offset) => Src::Sym(*id, *offset),
            Opd::Vec(v) if v.len() == 1 => return self.value(&v[0], ty),
            _ => return self.err(format!("operand of {} is not a value", self.name)),
        })
    }

    /// A predicate source and whether it is negated.
    fn pred(&self, i: usize) -> Res<(Src, bool)> {
        match self.ops.get(i) {
            Some(Opd::Not(inner)) => Ok((self.value(inner, Ty::Pred)?, true)),
            Some(opd) => Ok((self.value(opd, Ty::Pred)?, false)),
            None => self.err(format!("{} lacks operand {}", self.name, i + 1)),
        }
    }

    fn addr(&self, i: usize) -> Res<Addr> {
        match self.ops.get(i) {
            Some(Opd::Mem(base, offset)) => {
                Ok(Addr { base: self.value(base, Ty::B64)?, offset: *offset })
            }
            _ => self.err(format!("operand {} of {} is not an address", i + 1, self.name)),
        }
    }

    fn dst_list(&self, i: usize) -> Res<Vec<Reg>> {
        match self.ops.get(i) {
            Some(Opd::Vec(items)) => items
                .iter()
                .map(|o| match o {
                    Opd::Reg(r) => Ok(*r),
                    _ => self.err("a vector of registers is needed"),
                })
                .collect(),
            _ => Ok(vec![self.dst(i)?]),
        }
    }

    fn src_list(&self, i: usize, ty: Ty) -> Res<Vec<Src>> {
        match self.ops.get(i) {
            Some(Opd::Vec(items)) => items.iter().map(|o| self.value(o, ty)).collect(),
            _ => Ok(vec![self.src(i, ty)?]),
        }
    }
}

/// The register `_`.
pub(crate) fn sink() -> Reg {
    Reg { slot: SINK, bytes: 8 }
}
