//! Completes calls once every function is known.

use crate::ParseError;
use crate::program::{Code, Op};

/// Functions that the CUDA environment supplies and the interpreter plays.
const EXTERNS: [&str; 2] = ["vprintf", "__assertfail"];

/// Fills in where arguments and results of calls go, and turns calls of undefined functions into
/// calls of the environment.
pub(crate) fn link(code: &mut Code) -> Result<(), ParseError> {
    let Code { insts, functions, .. } = code;
    for inst in insts.iter_mut() {
        let fail = |message| Err(ParseError { line: inst.line, message });
        let Op::Call { callee, args, ret } = &mut inst.op else { continue };
        let function = &functions[*callee as usize];
        if function.entry {
            return fail(format!("the kernel {} cannot be called", function.name));
        }
        if !function.defined {
            let name = function.name.clone();
            if !EXTERNS.contains(&name.as_str()) {
                return fail(format!("the external function {name} is not defined"));
            }
            let ret = ret.map(|(_, to, bytes)| (to, bytes));
            inst.op = Op::CallExtern { name, ret };
            continue;
        }
        if args.len() != function.params.len() {
            return fail(format!("{} takes {} arguments", function.name, function.params.len()));
        }
        for (arg, param) in args.iter_mut().zip(&function.params) {
            arg.1 = param.offset;
            arg.2 = arg.2.min(param.bytes);
        }
        if let (Some(ret), Some(slot)) = (ret.as_mut(), function.rets.first()) {
            ret.0 = slot.offset;
            ret.2 = ret.2.min(slot.bytes);
        }
    }
    recursion(code)
}

/// Functions have their registers in fixed places, so none may be active twice.
fn recursion(code: &Code) -> Result<(), ParseError> {
    let calls = |f: usize| {
        let function = &code.functions[f];
        let range = function.start as usize..function.end as usize;
        code.insts[range].iter().filter_map(|inst| match inst.op {
            Op::Call { callee, .. } => Some((callee as usize, inst.line)),
            _ => None,
        })
    };
    let count = code.functions.len();
    for start in 0..count {
        let (mut seen, mut stack) = (vec![false; count], vec![start]);
        while let Some(f) = stack.pop() {
            for (callee, line) in calls(f) {
                if callee == start {
                    let message = format!("{} is recursive", code.functions[start].name);
                    return Err(ParseError { line, message });
                }
                if !std::mem::replace(&mut seen[callee], true) {
                    stack.push(callee);
                }
            }
        }
    }
    Ok(())
}
