//! Arithmetic, logic, comparison and selection.

use super::{Ins, Opd};
use crate::num::{float, int};
use crate::parse::Res;
use crate::program::{Alu, BoolOp, Op, Par, Src};
use crate::types::{Round, Ty};

const ZERO: Src = Src::Imm(0);

/// Decodes an arithmetic instruction, or says that this is none.
pub(super) fn decode(ins: &mut Ins) -> Res<Option<Op>> {
    let name = ins.name.clone();
    Ok(Some(match name.as_str() {
        "add" | "sub" | "mul" | "mad" | "fma" | "addc" | "subc" | "madc" => arithmetic(ins)?,
        "mul24" | "mad24" => {
            let high = ins.take("hi");
            if !high && !ins.take("lo") {
                return ins.err(format!("{name} needs .lo or .hi"));
            }
            let mut par = ins.par()?;
            par.sel = if high { 16 } else { 0 };
            let wide = name == "mad24";
            simple(ins, par, if wide { int::mad24 } else { int::mul24 }, 2 + usize::from(wide))?
        }
        "div" | "rem" | "sqrt" | "rcp" | "rsqrt" | "sin" | "cos" | "lg2" | "ex2" | "tanh" => {
            division(ins)?
        }
        "min" | "max" | "abs" | "neg" => extremes(ins)?,
        "setp" | "set" => comparison(ins)?,
        "and" | "or" | "xor" | "not" | "cnot" | "shl" | "shr" | "popc" | "clz" | "brev" | "sad"
        | "copysign" | "testp" | "selp" | "slct" | "lop3" | "shf" | "prmt" | "bfe" | "bfi"
        | "bfind" | "bmsk" | "szext" | "fns" | "dp4a" | "dp2a" => bits(ins)?,
        _ => return Ok(None),
    }))
}

/// An instruction with one destination and `n` sources, all of the instruction's type.
fn simple(ins: &Ins, par: Par, f: Alu, n: usize) -> Res<Op> {
    typed(ins, par, f, &[par.ty; 3][..n])
}

/// The same with a type for each source.
fn typed(ins: &Ins, par: Par, f: Alu, types: &[Ty]) -> Res<Op> {
    ins.count(types.len() + 1)?;
    let mut s = [ZERO; 3];
    for (i, ty) in types.iter().enumerate() {
        s[i] = ins.src(i + 1, *ty)?;
    }
    Ok(Op::Alu { f, par, d: ins.dst(0)?, s })
}

fn arithmetic(ins: &mut Ins) -> Res<Op> {
    let name = ins.name.clone();
    let part = ins.take_of(&["lo", "hi", "wide"]);
    let carry_out = ins.take("cc");
    let carry_in = name.ends_with('c');
    if name == "add" && packed(ins) {
        let par = ins.par()?;
        return simple(ins, par, int::add_halves, 2);
    }
    let par = ins.par()?;
    if carry_in || carry_out {
        let mad = name.starts_with("mad").then_some(part == Some(1));
        let n = if mad.is_some() { 3 } else { 2 };
        ins.count(n + 1)?;
        let mut s = [ZERO; 3];
        for (i, slot) in s.iter_mut().enumerate().take(n) {
            *slot = ins.src(i + 1, par.ty)?;
        }
        let flags = [carry_in, carry_out, name.starts_with("sub")];
        return Ok(Op::Carry { ty: par.ty, d: ins.dst(0)?, s, mad, flags });
    }
    if par.ty.float() {
        if part.is_some() || matches!(par.ty, Ty::Tf32 | Ty::E4m3x2 | Ty::E5m2x2) {
            return ins.err(format!("{name} has no such form for floats"));
        }
        let plain = par.round == Round::Rn && !par.ftz && !par.sat && !par.relu;
        let f32_fast = plain && par.ty == Ty::F32;
        let f64_fast = plain && par.ty == Ty::F64;
        let choose = |fast32: Alu, fast64: Alu, soft: Alu| match (f32_fast, f64_fast) {
            (true, _) => fast32,
            (_, true) => fast64,
            _ => soft,
        };
        return match name.as_str() {
            "add" => simple(ins, par, choose(float::add_f32, float::add_f64, float::add), 2),
            "sub" => simple(ins, par, choose(float::sub_f32, float::sub_f64, float::sub), 2),
            "mul" => simple(ins, par, choose(float::mul_f32, float::mul_f64, float::mul), 2),
            _ => simple(ins, par, choose(float::fma_f32, float::fma_f64, float::fma), 3),
        };
    }
    match (name.as_str(), part, par.sat) {
        ("add", None, sat) => simple(ins, par, if sat { int::add_sat } else { int::add }, 2),
        ("sub", None, sat) => simple(ins, par, if sat { int::sub_sat } else { int::sub }, 2),
        ("mul", Some(0), false) => simple(ins, par, int::mul_lo, 2),
        ("mul", Some(1), false) => simple(ins, par, int::mul_hi, 2),
        ("mul", Some(_), false) => simple(ins, par, int::mul_wide, 2),
        ("mad", Some(0), false) => simple(ins, par, int::mad_lo, 3),
        ("mad", Some(1), sat) => {
            simple(ins, par, if sat { int::mad_hi_sat } else { int::mad_hi }, 3)
        }
        ("mad", Some(2), false) => {
            let wide = if par.ty.bytes() == 2 { Ty::B32 } else { Ty::B64 };
            typed(ins, par, int::mad_wide, &[par.ty, par.ty, wide])
        }
        _ => ins.err(format!("{name} needs .lo, .hi or .wide for integers")),
    }
}

fn division(ins: &mut Ins) -> Res<Op> {
    let name = ins.name.clone();
    let approx = ins.take("approx") | ins.take("full");
    let rounded = ins.mods.iter().any(|m| matches!(m.as_str(), "rn" | "rz" | "rm" | "rp"));
    let par = ins.par()?;
    if !par.ty.float() {
        return match name.as_str() {
            "div" => simple(ins, par, int::div, 2),
            "rem" => simple(ins, par, int::rem, 2),
            _ => ins.err(format!("{name} is for floats")),
        };
    }
    let (f, n): (Alu, usize) = match name.as_str() {
        "div" => (float::div, 2),
        "sqrt" => (float::sqrt, 1),
        "rcp" => (float::rcp, 1),
        "rsqrt" => (float::rsqrt, 1),
        "sin" => (float::sin, 1),
        "cos" => (float::cos, 1),
        "lg2" => (float::lg2, 1),
        "ex2" => (float::ex2, 1),
        "tanh" => (float::tanh, 1),
        _ => return ins.err("rem is for integers"),
    };
    if approx == rounded {
        return ins.err(format!("{name} needs .approx or a rounding mode"));
    }
    simple(ins, par, f, n)
}

/// Replaces a packed 16-bit integer type by the 32-bit type of the same sign.
fn packed(ins: &mut Ins) -> bool {
    let kind = ins.take_of(&["u16x2", "s16x2"]);
    if let Some(kind) = kind {
        ins.mods.push(if kind == 0 { "u32" } else { "s32" }.into());
    }
    kind.is_some()
}

fn extremes(ins: &mut Ins) -> Res<Op> {
    let name = ins.name.clone();
    let packed = packed(ins);
    let mut par = ins.par()?;
    par.sel = u32::from(packed);
    let three = ins.ops.len() == 4;
    let float = par.ty.float();
    match (name.as_str(), float) {
        ("min", true) if three => simple(ins, par, float::min3, 3),
        ("max", true) if three => simple(ins, par, float::max3, 3),
        ("min", true) => simple(ins, par, float::min, 2),
        ("max", true) => simple(ins, par, float::max, 2),
        ("min", false) => simple(ins, par, int::min, 2),
        ("max", false) => simple(ins, par, int::max, 2),
        ("abs", true) => simple(ins, par, float::abs, 1),
        ("neg", true) => simple(ins, par, float::neg, 1),
        ("abs", false) => simple(ins, par, int::abs, 1),
        _ => simple(ins, par, int::neg, 1),
    }
}

const CMPS: [&str; 18] = [
    "eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan",
    "lo", "ls", "hi", "hs",
];

fn comparison(ins: &mut Ins) -> Res<Op> {
    let value = ins.name == "set";
    let Some(code) = ins.take_of(&CMPS) else {
        return ins.err(format!("{} needs a comparison", ins.name));
    };
    let logic = ins.take_of(&["and", "or", "xor"]);
    let ftz = ins.take("ftz");
    let to = if value { ins.ty()? } else { Ty::Pred };
    let from = ins.ty()?;
    // lo, ls, hi, hs are the unsigned comparisons.
    let sel = match code {
        14 => 2,
        15 => 3,
        16 => 4,
        17 => 5,
        c => c as u32,
    };
    if sel > 5 && !from.float() {
        return ins.err("this comparison is for floats");
    }
    if matches!(from, Ty::F16x2 | Ty::Bf16x2) {
        return ins.err(format!("{} of packed halves is not supported", ins.name));
    }
    let with = match logic {
        None => None,
        Some(i) => {
            let (src, not) = ins.pred(3)?;
            Some(([BoolOp::And, BoolOp::Or, BoolOp::Xor][i], src, not))
        }
    };
    ins.count(3 + usize::from(with.is_some()))?;
    let round = Round::Rn;
    let par = Par { ty: to, from, round, ftz, sat: false, relu: false, nan: false, sel };
    let s = [ins.src(1, from)?, ins.src(2, from)?];
    Ok(Op::Setp { par, d: ins.dst(0)?, q: ins.dst2(0)?, s, with, value })
}

fn bits(ins: &mut Ins) -> Res<Op> {
    let name = ins.name.clone();
    let u32s = [Ty::U32; 3];
    match name.as_str() {
        "shf" => {
            let right = ins.take("r");
            if !right && !ins.take("l") {
                return ins.err("shf needs .l or .r");
            }
            let wrap = ins.take("wrap");
            if !wrap && !ins.take("clamp") {
                return ins.err("shf needs .wrap or .clamp");
            }
            let mut par = ins.par()?;
            par.sel = u32::from(right) | u32::from(wrap) << 1;
            typed(ins, par, int::shf, &u32s)
        }
        "prmt" => {
            let mode = ins.take_of(&["f4e", "b4e", "rc8", "ecl", "ecr", "rc16"]);
            let mut par = ins.par()?;
            par.sel = mode.map_or(0, |m| m as u32 + 1);
            typed(ins, par, int::prmt, &u32s)
        }
        "dp4a" | "dp2a" => {
            let high = ins.take("hi");
            if name == "dp2a" && !high && !ins.take("lo") {
                return ins.err("dp2a needs .lo or .hi");
            }
            let mut par = ins.par()?;
            par.from = ins.ty()?;
            par.sel = u32::from(high);
            typed(ins, par, if name == "dp4a" { int::dp4a } else { int::dp2a }, &u32s)
        }
        "testp" => {
            let kinds = ["finite", "infinite", "number", "notanumber", "normal", "subnormal"];
            let Some(kind) = ins.take_of(&kinds) else { return ins.err("testp needs a class") };
            let mut par = ins.par()?;
            par.sel = kind as u32;
            simple(ins, par, float::testp, 1)
        }
        "bmsk" | "szext" => {
            let wrap = ins.take("wrap");
            if !wrap && !ins.take("clamp") {
                return ins.err(format!("{name} needs .clamp or .wrap"));
            }
            let mut par = ins.par()?;
            par.sel = u32::from(wrap);
            let f = if name == "bmsk" { int::bmsk } else { int::szext };
            typed(ins, par, f, &[par.ty, Ty::U32])
        }
        _ => plain_bits(ins, &name),
    }
}

fn plain_bits(ins: &mut Ins, name: &str) -> Res<Op> {
    let shift_amount = ins.take("shiftamt");
    let mut par = ins.par()?;
    par.sel = u32::from(shift_amount);
    let ty = par.ty;
    match name {
        "and" => simple(ins, par, int::and, 2),
        "or" => simple(ins, par, int::or, 2),
        "xor" => simple(ins, par, int::xor, 2),
        "not" => simple(ins, par, int::not, 1),
        "cnot" => simple(ins, par, int::cnot, 1),
        "shl" => typed(ins, par, int::shl, &[ty, Ty::U32]),
        "shr" => typed(ins, par, int::shr, &[ty, Ty::U32]),
        "popc" => simple(ins, par, int::popc, 1),
        "clz" => simple(ins, par, int::clz, 1),
        "brev" => simple(ins, par, int::brev, 1),
        "bfind" => simple(ins, par, int::bfind, 1),
        "sad" => simple(ins, par, int::sad, 3),
        "copysign" => simple(ins, par, float::copysign, 2),
        "bfe" => typed(ins, par, int::bfe, &[ty, Ty::U32, Ty::U32]),
        "fns" => typed(ins, par, int::fns, &[Ty::U32; 3]),
        "selp" => {
            ins.count(4)?;
            let (p, not) = ins.pred(3)?;
            let (a, b) = (ins.src(1, ty)?, ins.src(2, ty)?);
            let s = if not { [b, a, p] } else { [a, b, p] };
            Ok(Op::Alu { f: int::selp, par, d: ins.dst(0)?, s })
        }
        "slct" => {
            let by = ins.ty()?;
            let f = if by == Ty::F32 { float::slct } else { int::slct };
            typed(ins, par, f, &[ty, ty, by])
        }
        "lop3" => {
            let Some(Opd::Int(table)) = ins.ops.get(4) else {
                return ins.err("lop3 needs its table as a number");
            };
            par.sel = *table as u32;
            ins.ops.truncate(4);
            typed(ins, par, int::lop3, &[ty; 3])
        }
        _ => bit_insert(ins, par),
    }
}

/// `bfi` has four sources, so position and length must be numbers or come packed by the executor.
fn bit_insert(ins: &Ins, par: Par) -> Res<Op> {
    ins.count(5)?;
    let s = [ins.src(1, par.ty)?, ins.src(2, par.ty)?];
    Ok(Op::Bfi { par, d: ins.dst(0)?, s, at: ins.src(3, Ty::U32)?, len: ins.src(4, Ty::U32)? })
}
