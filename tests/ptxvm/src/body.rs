//! Reads function bodies: registers, variables, labels, statements and their operands.

use crate::ParseError;
use crate::decode::{Ins, Opd};
use crate::lex::Tok;
use crate::parse::{Parser, Res};
use crate::program::{Inst, Op, ParamSlot, Reg, SINK, Src, Symbol};
use crate::types::{SReg, Space, Ty};
use std::collections::HashMap;

/// Addresses of call parameters start here; a kernel's own parameters are below.
pub(crate) const LANE_PARAMS: u64 = 1 << 31;

/// The most local or call-parameter bytes of a thread.
const AREA_MAX: u64 = 1 << 22;

/// The most registers in one declaration.
const REGISTERS_MAX: i128 = 1 << 20;

#[derive(Default)]
struct Block {
    parent: usize,
    regs: HashMap<String, Reg>,
    symbols: HashMap<String, u32>,
    labels: HashMap<String, u32>,
    tables: HashMap<String, Vec<String>>,
}

struct Body<'a> {
    parser: &'a mut Parser,
    function: u32,
    entry: bool,
    blocks: Vec<Block>,
    current: usize,
    next_slot: u32,
    local_bytes: u64,
    param_bytes: u64,
    /// Branches to be resolved at the end: pc, block, label or table.
    branches: Vec<(u32, usize, String)>,
    /// The last label read, in case a `.branchtargets` follows it.
    last_label: String,
}

/// Reads the body of a function whose `{` has not been consumed yet. `named` are its parameters.
pub(crate) fn body(parser: &mut Parser, id: u32, named: Vec<(String, ParamSlot, u64)>) -> Res<()> {
    let entry = parser.code.functions[id as usize].entry;
    let code = &parser.code;
    let mut b = Body {
        function: id,
        entry,
        blocks: vec![Block::default()],
        current: 0,
        next_slot: code.shared_regs,
        local_bytes: code.shared_local.into(),
        param_bytes: code.shared_params.into(),
        branches: Vec::new(),
        last_label: String::new(),
        parser,
    };
    b.parser.loc = 0;
    for (name, slot, align) in named {
        let base = if entry { 0 } else { LANE_PARAMS };
        b.symbol(name, Space::Param, slot.bytes.into(), align, base + u64::from(slot.offset));
    }
    b.parser.code.functions[id as usize].defined = true;
    b.parser.code.functions[id as usize].start = b.parser.code.insts.len() as u32;
    b.parser.expect('{')?;
    let mut depth = 1;
    while depth > 0 {
        depth = b.statement(depth)?;
    }
    b.finish()
}

impl Body<'_> {
    fn finish(mut self) -> Res<()> {
        // Falling off the end returns.
        self.push(None, Op::Ret);
        for (pc, block, label) in std::mem::take(&mut self.branches) {
            let line = self.parser.code.insts[pc as usize].line;
            let missing = |name: &str| ParseError { line, message: format!("no label {name}") };
            let find = |name: &str| self.find(block, |b| b.labels.get(name).copied());
            let resolved = match &self.parser.code.insts[pc as usize].op {
                Op::Bra { .. } => Op::Bra { target: find(&label).ok_or_else(|| missing(&label))? },
                Op::BrxIdx { index, .. } => {
                    let names = self.find(block, |b| b.tables.get(&label).cloned());
                    let names = names.ok_or_else(|| missing(&label))?;
                    let targets = names.iter().map(|n| find(n).ok_or_else(|| missing(n)));
                    Op::BrxIdx { index: *index, targets: targets.collect::<Res<_>>()? }
                }
                other => other.clone(),
            };
            self.parser.code.insts[pc as usize].op = resolved;
        }
        let code = &mut self.parser.code;
        let function = &mut code.functions[self.function as usize];
        function.end = code.insts.len() as u32;
        function.regs = self.next_slot;
        function.local_bytes = self.local_bytes as u32;
        function.param_bytes = self.param_bytes as u32;
        if !self.entry {
            code.shared_regs = self.next_slot;
            code.shared_local = self.local_bytes as u32;
            code.shared_params = self.param_bytes as u32;
        }
        Ok(())
    }

    fn find<T>(&self, mut block: usize, pick: impl Fn(&Block) -> Option<T>) -> Option<T> {
        loop {
            if let Some(hit) = pick(&self.blocks[block]) {
                return Some(hit);
            }
            if block == 0 {
                return None;
            }
            block = self.blocks[block].parent;
        }
    }

    fn push(&mut self, guard: Option<(Reg, bool)>, op: Op) {
        let line = self.parser.line();
        let loc = self.parser.loc;
        self.parser.code.insts.push(Inst { guard, op, line, loc });
    }

    fn symbol(&mut self, name: String, space: Space, bytes: u64, align: u64, offset: u64) -> u32 {
        let id = self.parser.code.symbols.len() as u32;
        self.parser.code.symbols.push(Symbol {
            name: name.clone(),
            space,
            bytes,
            align,
            dynamic: false,
            owner: Some(self.function),
            init: None,
            fixups: Vec::new(),
            offset,
        });
        self.blocks[self.current].symbols.insert(name, id);
        id
    }

    /// Reads one statement and returns the brace depth after it.
    fn statement(&mut self, depth: u32) -> Res<u32> {
        if self.parser.accept('{') {
            self.blocks.push(Block { parent: self.current, ..Block::default() });
            self.current = self.blocks.len() - 1;
            return Ok(depth + 1);
        }
        if self.parser.accept('}') {
            self.current = self.blocks[self.current].parent;
            return Ok(depth - 1);
        }
        if self.parser.accept(';') {
            return Ok(depth);
        }
        if let Some(Tok::Dot(d)) = self.parser.peek().cloned() {
            self.parser.at += 1;
            self.directive(&d)?;
            return Ok(depth);
        }
        let labelled = self.parser.toks.get(self.parser.at + 1).map(|t| &t.tok);
        if labelled == Some(&Tok::Punct(':')) {
            let name = self.parser.word()?;
            self.parser.expect(':')?;
            let pc = self.parser.code.insts.len() as u32;
            self.last_label.clone_from(&name);
            if self.blocks[self.current].labels.insert(name.clone(), pc).is_some() {
                return self.parser.err(format!("the label {name} is defined twice"));
            }
            return Ok(depth);
        }
        self.instruction()?;
        Ok(depth)
    }

    fn directive(&mut self, d: &str) -> Res<()> {
        match d {
            "loc" | "file" => self.parser.place(d),
            "reg" => self.registers(),
            "shared" => {
                let (name, id) = self.parser.variable(Space::Shared, false, Some(self.function))?;
                self.blocks[self.current].symbols.insert(name, id);
                Ok(())
            }
            "global" | "const" => {
                let (name, id) = self.parser.variable(Space::Global, false, Some(self.function))?;
                self.blocks[self.current].symbols.insert(name, id);
                Ok(())
            }
            "local" | "param" => {
                let decl = self.parser.decl()?;
                let (space, base) =
                    if d == "local" { (Space::Local, 0) } else { (Space::Param, LANE_PARAMS) };
                let area = if d == "local" { &mut self.local_bytes } else { &mut self.param_bytes };
                let offset = area.next_multiple_of(decl.align);
                *area = offset + decl.bytes;
                if *area > AREA_MAX {
                    let message = format!("the .{d} variables of the function are too large");
                    return self.parser.err(message);
                }
                self.symbol(decl.name, space, decl.bytes, decl.align, base + offset);
                self.parser.expect(';')
            }
            "branchtargets" => {
                let mut names = vec![self.parser.word()?];
                while self.parser.accept(',') {
                    names.push(self.parser.word()?);
                }
                let label = self.last_label.clone();
                self.blocks[self.current].tables.insert(label, names);
                self.parser.expect(';')
            }
            "pragma" => {
                while self.parser.next()? != Tok::Punct(';') {}
                Ok(())
            }
            _ => {
                self.parser.at -= 1;
                self.parser.err(format!("unknown directive .{d} in a function"))
            }
        }
    }

    fn registers(&mut self) -> Res<()> {
        let Tok::Dot(name) = self.parser.next()? else {
            return self.parser.err("expected a type after .reg");
        };
        let Some(ty) = Ty::parse(&name) else {
            return self.parser.err(format!("unknown register type .{name}"));
        };
        loop {
            let name = self.parser.word()?;
            let mut names = vec![name.clone()];
            if self.parser.accept('<') {
                let count = self.parser.int()?;
                self.parser.expect('>')?;
                if !(0..=REGISTERS_MAX).contains(&count) {
                    return self.parser.err(format!("{count} registers are too many"));
                }
                names = (0..count).map(|i| format!("{name}{i}")).collect();
            }
            for name in names {
                let reg = Reg { slot: self.next_slot, bytes: ty.bytes() as u8 };
                self.next_slot += if ty == Ty::B128 { 2 } else { 1 };
                self.blocks[self.current].regs.insert(name, reg);
            }
            if !self.parser.accept(',') {
                return self.parser.expect(';');
            }
        }
    }

    fn instruction(&mut self) -> Res<()> {
        let mut guard = None;
        if self.parser.accept('@') {
            let negated = self.parser.accept('!');
            let name = self.parser.word()?;
            let Some(reg) = self.find(self.current, |b| b.regs.get(&name).copied()) else {
                return self.parser.err(format!("unknown predicate {name}"));
            };
            guard = Some((reg, negated));
        }
        let line = self.parser.line();
        let name = self.parser.word()?;
        let mut mods = Vec::new();
        while let Some(Tok::Dot(d)) = self.parser.peek().cloned() {
            self.parser.at += 1;
            mods.push(d);
        }
        let pc = self.parser.code.insts.len() as u32;
        let op = match name.as_str() {
            "call" => self.call()?,
            "bra" => {
                let label = self.parser.word()?;
                self.branches.push((pc, self.current, label));
                mods.retain(|m| m != "uni");
                if let Some(m) = mods.first() {
                    return self.parser.err(format!("unknown modifier .{m} of bra"));
                }
                Op::Bra { target: 0 }
            }
            "brx" => {
                let index = self.operand()?;
                self.parser.expect(',')?;
                let table = self.parser.word()?;
                self.branches.push((pc, self.current, table));
                let Opd::Reg(reg) = index else {
                    return self.parser.err("brx.idx needs a register");
                };
                Op::BrxIdx { index: Src::Reg(reg), targets: Vec::new() }
            }
            _ => {
                let mut ops = Vec::new();
                while !self.parser.is(';') {
                    ops.push(self.operand()?);
                    if !self.parser.accept(',') {
                        break;
                    }
                }
                crate::decode::decode(&mut Ins { name, mods, ops, line })?
            }
        };
        if matches!(op, Op::CpAsync { .. }) {
            self.parser.code.uses_cp_async = true;
        }
        self.push(guard, op);
        if let Some(last) = self.parser.code.insts.last_mut() {
            last.line = line;
        }
        self.parser.expect(';')
    }

    /// One operand, in the form that the decoder understands.
    fn operand(&mut self) -> Res<Opd> {
        if self.parser.accept('[') {
            let base = self.operand()?;
            let mut offset = 0;
            while self.parser.accept('+') || self.parser.is('-') {
                offset += self.parser.int()? as i64;
            }
            if self.parser.is(',') {
                return self.parser.err("tensor coordinates are not supported");
            }
            self.parser.expect(']')?;
            return Ok(Opd::Mem(Box::new(base), offset));
        }
        if self.parser.accept('{') {
            let mut items = Vec::new();
            while !self.parser.accept('}') {
                items.push(self.operand()?);
                self.parser.accept(',');
            }
            return Ok(Opd::Vec(items));
        }
        if self.parser.accept('!') {
            return Ok(Opd::Not(Box::new(self.operand()?)));
        }
        let negative = self.parser.accept('-');
        match self.parser.next()? {
            Tok::Int(n) => Ok(Opd::Int(if negative { -n } else { n })),
            Tok::F32(bits) => Ok(Opd::F32(bits ^ if negative { 1 << 31 } else { 0 })),
            Tok::F64(bits) => Ok(Opd::F64(bits ^ if negative { 1 << 63 } else { 0 })),
            Tok::Dec(x) => Ok(Opd::Dec(if negative { -x } else { x })),
            Tok::Word(name) if !negative => self.named(name),
            other => {
                self.parser.at -= 1;
                self.parser.err(format!("unexpected {other:?} in an operand"))
            }
        }
    }

    fn named(&mut self, name: String) -> Res<Opd> {
        if let Some(reg) = self.find(self.current, |b| b.regs.get(&name).copied()) {
            if self.parser.accept('|') {
                let second = self.operand()?;
                return Ok(Opd::Pair(Box::new(Opd::Reg(reg)), Box::new(second)));
            }
            return Ok(Opd::Reg(reg));
        }
        if name == "_" {
            let sink = Opd::Reg(Reg { slot: SINK, bytes: 8 });
            if self.parser.accept('|') {
                let second = self.operand()?;
                return Ok(Opd::Pair(Box::new(sink), Box::new(second)));
            }
            return Ok(sink);
        }
        if name.starts_with('%') || name == "WARP_SZ" {
            let axis = match self.parser.peek().cloned() {
                Some(Tok::Dot(d)) => {
                    self.parser.at += 1;
                    Some(d)
                }
                _ => None,
            };
            return match SReg::parse(&name, axis.as_deref()) {
                Some(s) => Ok(Opd::Special(s)),
                None => {
                    self.parser.at -= 1;
                    self.parser.err(format!("unknown register {name}"))
                }
            };
        }
        let local = self.find(self.current, |b| b.symbols.get(&name).copied());
        let Some(id) = local.or_else(|| self.parser.globals.get(&name).copied()) else {
            return self.parser.err(format!("unknown name {name}"));
        };
        let symbol = &self.parser.code.symbols[id as usize];
        // Addresses inside the thread's own areas are known now; the others at launch.
        let fixed = matches!(symbol.space, Space::Param | Space::Local).then_some(symbol.offset);
        let mut offset = 0;
        if self.parser.is('+')
            && !matches!(
                self.parser.toks.get(self.parser.at + 1).map(|t| &t.tok),
                Some(Tok::Word(_))
            )
        {
            self.parser.accept('+');
            offset = self.parser.int()? as i64;
        }
        Ok(match fixed {
            Some(at) => Opd::Int(i128::from(at) + i128::from(offset)),
            None => Opd::Sym(id, offset),
        })
    }

    fn call_params(&mut self) -> Res<Vec<(u32, u32)>> {
        let mut out = Vec::new();
        self.parser.expect('(')?;
        while !self.parser.accept(')') {
            let name = self.parser.word()?;
            let symbol = self.find(self.current, |b| b.symbols.get(&name).copied());
            let Some(id) = symbol else {
                return self.parser.err(format!("the call argument {name} is not a .param"));
            };
            let symbol = &self.parser.code.symbols[id as usize];
            out.push(((symbol.offset - LANE_PARAMS) as u32, symbol.bytes as u32));
            self.parser.accept(',');
        }
        Ok(out)
    }

    fn call(&mut self) -> Res<Op> {
        let mut ret = None;
        if self.parser.is('(') {
            ret = self.call_params()?.first().copied();
            self.parser.expect(',')?;
        }
        let name = self.parser.word()?;
        let Some(&callee) = self.parser.function_ids.get(&name) else {
            self.parser.at -= 1;
            return self.parser.err(format!("{name} is not a function (no indirect calls)"));
        };
        let mut args = Vec::new();
        if self.parser.accept(',') && self.parser.is('(') {
            args = self.call_params()?;
        }
        let args = args.into_iter().map(|(from, bytes)| (from, 0, bytes)).collect();
        Ok(Op::Call { callee, args, ret: ret.map(|(to, bytes)| (0, to, bytes)) })
    }
}
