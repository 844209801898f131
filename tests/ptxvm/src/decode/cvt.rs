//! Moves and conversions.

use super::{Ins, Opd};
use crate::num::{cvt, int};
use crate::parse::Res;
use crate::program::{Alu, Op, Par, Src};
use crate::types::{Round, Space, Ty};

/// Decodes a move or conversion, or says that this is none.
pub(super) fn decode(ins: &mut Ins) -> Res<Option<Op>> {
    Ok(Some(match ins.name.as_str() {
        "mov" => mov(ins)?,
        "cvt" => convert(ins)?,
        "cvta" => {
            let to = ins.take("to");
            let space = ins.space();
            let ty = ins.ty()?;
            ins.count(2)?;
            if ty.bytes() != 8 || space == Space::Generic {
                return ins.err("cvta needs a state space and a 64-bit type");
            }
            Op::Cvta { d: ins.dst(0)?, s: ins.src(1, ty)?, space, to }
        }
        "isspacep" => {
            let space = ins.space();
            ins.count(2)?;
            Op::Isspacep { d: ins.dst(0)?, s: ins.src(1, Ty::B64)?, space }
        }
        _ => return Ok(None),
    }))
}

fn alu(ins: &Ins, par: Par, f: Alu, s: [Src; 3]) -> Res<Op> {
    Ok(Op::Alu { f, par, d: ins.dst(0)?, s })
}

fn mov(ins: &mut Ins) -> Res<Op> {
    let par = ins.par()?;
    ins.count(2)?;
    let bits = par.ty.bits();
    match (&ins.ops[0], &ins.ops[1]) {
        (Opd::Vec(parts), _) | (_, Opd::Vec(parts)) if parts.is_empty() => {
            ins.err("an empty vector")
        }
        (Opd::Vec(parts), _) => {
            let width = bits / parts.len() as u32;
            Ok(Op::Unpack { d: ins.dst_list(0)?, s: ins.src(1, par.ty)?, bits: width })
        }
        (_, Opd::Vec(parts)) => {
            let width = bits / parts.len() as u32;
            Ok(Op::Pack { d: ins.dst(0)?, s: ins.src_list(1, par.ty)?, bits: width })
        }
        _ if bits == 128 => Ok(Op::Mov128 { d: ins.dst(0)?, s: ins.src(1, par.ty)? }),
        _ => alu(ins, par, int::mov, [ins.src(1, par.ty)?, Src::Imm(0), Src::Imm(0)]),
    }
}

fn convert(ins: &mut Ins) -> Res<Op> {
    if ins.take("pack") {
        return pack(ins);
    }
    let integral = ins.take_of(&["rni", "rzi", "rmi", "rpi"]);
    let satfinite = ins.take("satfinite");
    let round = ins.round();
    let (ftz, sat, relu) = (ins.take("ftz"), ins.take("sat"), ins.take("relu"));
    let (ty, from) = (ins.ty()?, ins.ty()?);
    let modes = [Round::Rn, Round::Rz, Round::Rm, Round::Rp];
    let mode = integral.map(|i| modes[i]).or(round);
    let sel = u32::from(integral.is_some()) | u32::from(satfinite) << 1;
    let round = mode.unwrap_or(Round::Rn);
    let par = Par { ty, from, round, ftz, sat, relu, nan: false, sel };
    let packed = matches!(ty, Ty::F16x2 | Ty::Bf16x2 | Ty::E4m3x2 | Ty::E5m2x2);
    if packed && from == Ty::F32 {
        ins.count(3)?;
        return alu(ins, par, cvt::pair_f32, [ins.src(1, from)?, ins.src(2, from)?, Src::Imm(0)]);
    }
    ins.count(2)?;
    let s = [ins.src(1, from)?, Src::Imm(0), Src::Imm(0)];
    if packed || matches!(from, Ty::F16x2 | Ty::Bf16x2 | Ty::E4m3x2 | Ty::E5m2x2) {
        let small = |t| matches!(t, Ty::E4m3x2 | Ty::E5m2x2);
        if !packed || small(ty) == small(from) {
            return ins.err("no such conversion between packed types");
        }
        return alu(ins, par, cvt::pair_pair, s);
    }
    if ty == Ty::Tf32 {
        return alu(ins, par, cvt::tf32, s);
    }
    let plain = !ftz && !sat && !relu;
    let f: Alu = match (ty.float(), from.float()) {
        (false, false) => cvt::int_int,
        (false, true) => {
            if integral.is_none() {
                return ins.err("a conversion to an integer needs .rni, .rzi, .rmi or .rpi");
            }
            cvt::int_float
        }
        (true, false) => {
            if mode.is_none() {
                return ins.err("a conversion from an integer needs a rounding mode");
            }
            let fast = plain && round == Round::Rn && ty == Ty::F32;
            match from {
                Ty::S32 if fast => cvt::f32_s32,
                Ty::U32 if fast => cvt::f32_u32,
                _ => cvt::float_int,
            }
        }
        (true, true) => {
            let narrows = ty.bytes() < from.bytes() || (ty.bytes() == 2 && ty != from);
            if narrows && mode.is_none() {
                return ins.err("a narrowing conversion needs a rounding mode");
            }
            match (ty, from) {
                (Ty::F32, Ty::Bf16) if plain => cvt::f32_bf16,
                (Ty::F32, Ty::F16) if plain => cvt::f32_f16,
                (Ty::F16 | Ty::Bf16, Ty::F32)
                    if plain && round == Round::Rn && !satfinite && integral.is_none() =>
                {
                    cvt::half_f32
                }
                _ => cvt::float_float,
            }
        }
    };
    alu(ins, par, f, s)
}

fn pack(ins: &mut Ins) -> Res<Op> {
    if !ins.take("sat") {
        return ins.err("cvt.pack needs .sat");
    }
    let (ty, from) = (ins.ty()?, ins.ty()?);
    let three = ins.ops.len() == 4;
    if three {
        ins.take("b32");
    }
    let round = Round::Rn;
    let par = Par { ty, from, round, ftz: false, sat: true, relu: false, nan: false, sel: 0 };
    let c = if three { ins.src(3, Ty::B32)? } else { Src::Imm(0) };
    alu(ins, par, cvt::pack_sat, [ins.src(1, from)?, ins.src(2, from)?, c])
}
