//! Reads the module level of PTX: directives, variables, function heads. Bodies are in `body.rs`.

use crate::ParseError;
use crate::lex::{Tok, Token, lex};
use crate::program::{Code, Function, Module, ParamSlot, Symbol};
use crate::types::{Space, Ty};
use std::collections::HashMap;
use std::sync::Arc;

pub(crate) type Res<T> = Result<T, ParseError>;

/// The parser's place in the tokens and what it has read so far.
pub(crate) struct Parser {
    pub(crate) toks: Vec<Token>,
    pub(crate) at: usize,
    pub(crate) code: Code,
    pub(crate) globals: HashMap<String, u32>,
    pub(crate) function_ids: HashMap<String, u32>,
    /// The source place of the next instruction.
    pub(crate) loc: u32,
    /// Kernels whose bodies are read after all other functions, whose registers come first.
    deferred: Vec<(usize, u32, Params)>,
}

/// The largest variable, in bytes.
const VARIABLE_MAX: u64 = 1 << 30;

type Params = Vec<(String, ParamSlot, u64)>;

/// A declared variable: `.align 4 .b8 name[8]` or `.v2 .f32 name`.
pub(crate) struct Decl {
    pub(crate) name: String,
    pub(crate) ty: Ty,
    pub(crate) bytes: u64,
    pub(crate) align: u64,
    pub(crate) unsized_array: bool,
}

impl Module {
    /// Parses and decodes PTX text. Any unknown instruction, modifier or directive is an error.
    pub fn parse(text: &str) -> Result<Module, ParseError> {
        let toks = lex(text)?;
        let mut parser = Parser {
            toks,
            at: 0,
            code: Code { locs: vec![(0, 0, 0)], ..Code::default() },
            globals: HashMap::new(),
            function_ids: HashMap::new(),
            loc: 0,
            deferred: Vec::new(),
        };
        while parser.at < parser.toks.len() {
            parser.top()?;
        }
        for (at, id, params) in std::mem::take(&mut parser.deferred) {
            parser.at = at;
            crate::body::body(&mut parser, id, params)?;
        }
        crate::link::link(&mut parser.code)?;
        Ok(Module { code: Arc::new(parser.code) })
    }
}

impl Parser {
    pub(crate) fn line(&self) -> u32 {
        let last = self.toks.len().saturating_sub(1);
        self.toks.get(self.at.min(last)).map_or(0, |t| t.line)
    }

    pub(crate) fn err<T>(&self, message: impl Into<String>) -> Res<T> {
        Err(ParseError { line: self.line(), message: message.into() })
    }

    pub(crate) fn peek(&self) -> Option<&Tok> {
        self.toks.get(self.at).map(|t| &t.tok)
    }

    pub(crate) fn next(&mut self) -> Res<Tok> {
        match self.toks.get(self.at) {
            Some(t) => {
                self.at += 1;
                Ok(t.tok.clone())
            }
            None => self.err("the text ends in the middle of a statement"),
        }
    }

    pub(crate) fn is(&self, c: char) -> bool {
        self.peek() == Some(&Tok::Punct(c))
    }

    pub(crate) fn accept(&mut self, c: char) -> bool {
        let hit = self.is(c);
        self.at += usize::from(hit);
        hit
    }

    pub(crate) fn expect(&mut self, c: char) -> Res<()> {
        if self.accept(c) {
            return Ok(());
        }
        let found = self.peek().cloned();
        self.err(format!("expected `{c}`, found {found:?}"))
    }

    pub(crate) fn accept_dot(&mut self, name: &str) -> bool {
        let hit = matches!(self.peek(), Some(Tok::Dot(d)) if d == name);
        self.at += usize::from(hit);
        hit
    }

    pub(crate) fn word(&mut self) -> Res<String> {
        match self.next()? {
            Tok::Word(w) => Ok(w),
            other => {
                self.at -= 1;
                self.err(format!("expected a name, found {other:?}"))
            }
        }
    }

    pub(crate) fn int(&mut self) -> Res<i128> {
        let negative = self.accept('-');
        match self.next()? {
            Tok::Int(n) => Ok(if negative { -n } else { n }),
            other => {
                self.at -= 1;
                self.err(format!("expected a number, found {other:?}"))
            }
        }
    }

    fn skip_to(&mut self, c: char) -> Res<()> {
        while self.next()? != Tok::Punct(c) {}
        Ok(())
    }

    fn top(&mut self) -> Res<()> {
        match self.next()? {
            Tok::Dot(d) => match d.as_str() {
                "version" => self.next().map(|_| ()),
                "address_size" => match self.int()? {
                    64 => Ok(()),
                    n => self.err(format!("address size {n} is not supported, only 64")),
                },
                "target" => {
                    self.code.target = self.word()?;
                    while self.accept(',') {
                        self.word()?;
                    }
                    Ok(())
                }
                "file" | "loc" => self.place(&d),
                "section" => {
                    self.next()?;
                    self.expect('{')?;
                    self.skip_to('}')
                }
                "pragma" | "alias" => self.skip_to(';'),
                "visible" | "weak" | "common" => Ok(()),
                "extern" => self.global(true),
                "global" | "const" | "shared" | "func" | "entry" => {
                    self.at -= 1;
                    self.global(false)
                }
                _ => {
                    self.at -= 1;
                    self.err(format!("unknown directive .{d}"))
                }
            },
            // The end labels of debug sections.
            Tok::Word(_) if self.accept(':') => Ok(()),
            other => {
                self.at -= 1;
                self.err(format!("unexpected {other:?} outside a function"))
            }
        }
    }

    /// `.file N "name"` and `.loc FILE LINE COLUMN`, shared with bodies.
    pub(crate) fn place(&mut self, which: &str) -> Res<()> {
        let file = self.int()? as u32;
        if which == "file" {
            let Tok::Str(name) = self.next()? else { return self.err("expected a file name") };
            while self.accept(',') {
                self.next()?;
            }
            if let Some(Tok::Str(second)) = self.peek().cloned() {
                self.at += 1;
                self.code.files.insert(file, format!("{name}/{second}"));
            } else {
                self.code.files.insert(file, name);
            }
            return Ok(());
        }
        let (line, column) = (self.int()? as u32, self.int()? as u32);
        if self.accept(',') {
            self.word()?;
            self.word()?;
            if self.accept('+') {
                self.int()?;
            }
            self.expect(',')?;
            self.word()?;
            for _ in 0..3 {
                self.int()?;
            }
        }
        while matches!(self.peek(), Some(Tok::Word(w)) if w == "is_stmt" || w == "prologue_end") {
            self.at += 2;
        }
        if line != 0 {
            self.loc = self.code.locs.len() as u32;
            self.code.locs.push((file, line, column));
        }
        Ok(())
    }

    fn global(&mut self, external: bool) -> Res<()> {
        let Tok::Dot(kind) = self.next()? else { return self.err("expected a directive") };
        let space = match kind.as_str() {
            "func" => return self.function(false),
            "entry" => return self.function(true),
            "global" => Space::Global,
            "const" => Space::Const,
            "shared" => Space::Shared,
            _ => return self.err(format!("unknown directive .{kind}")),
        };
        self.variable(space, external, None)?;
        Ok(())
    }

    /// Reads one variable declaration, up to its semicolon, and returns its symbol.
    pub(crate) fn variable(
        &mut self,
        space: Space,
        external: bool,
        owner: Option<u32>,
    ) -> Res<(String, u32)> {
        let decl = self.decl()?;
        let mut symbol = Symbol {
            name: decl.name.clone(),
            space,
            bytes: decl.bytes,
            align: decl.align,
            dynamic: decl.unsized_array && space == Space::Shared,
            owner,
            init: None,
            fixups: Vec::new(),
            offset: 0,
        };
        if self.accept('=') {
            self.initialiser(&decl, &mut symbol)?;
        } else if external && !symbol.dynamic {
            return self.err(format!("the external variable {} is not defined", decl.name));
        }
        self.expect(';')?;
        let id = self.code.symbols.len() as u32;
        self.code.symbols.push(symbol);
        if owner.is_none() {
            self.globals.insert(decl.name.clone(), id);
        }
        Ok((decl.name, id))
    }

    /// Reads `.align N .ty name[dims]` with whatever attributes stand before the type.
    pub(crate) fn decl(&mut self) -> Res<Decl> {
        let (mut align, mut lanes, mut ty) = (None, 1u64, None);
        while let Some(Tok::Dot(d)) = self.peek().cloned() {
            self.at += 1;
            match d.as_str() {
                "align" => align = Some(self.int()? as u64),
                "v2" => lanes = 2,
                "v4" => lanes = 4,
                "v8" => lanes = 8,
                "ptr" | "const" | "global" | "shared" | "local" | "managed" | "reg" => {}
                "attribute" => {
                    self.expect('(')?;
                    self.skip_to(')')?;
                }
                _ => match Ty::parse(&d) {
                    Some(t) => ty = Some(t),
                    None => {
                        self.at -= 1;
                        return self.err(format!("unknown attribute .{d} of a variable"));
                    }
                },
            }
        }
        let Some(ty) = ty else { return self.err("a variable without a type") };
        let name = self.word()?;
        let (mut count, mut unsized_array) = (1u64, false);
        while self.accept('[') {
            if self.accept(']') {
                unsized_array = true;
                count = 0;
                continue;
            }
            count = count.saturating_mul(u64::try_from(self.int()?).unwrap_or(u64::MAX));
            self.expect(']')?;
        }
        let unit = u64::from(ty.bytes()) * lanes;
        let align = align.unwrap_or(unit);
        if !align.is_power_of_two() || align > 1 << 20 {
            return self.err(format!("the alignment {align} of {name} is no power of two"));
        }
        if count > VARIABLE_MAX / unit {
            return self.err(format!("the variable {name} is too large"));
        }
        Ok(Decl { name, ty, bytes: unit * count, align, unsized_array })
    }

    fn initialiser(&mut self, decl: &Decl, symbol: &mut Symbol) -> Res<()> {
        let mut bytes = Vec::new();
        self.initialiser_items(decl.ty, &mut bytes, symbol)?;
        if decl.unsized_array {
            symbol.bytes = bytes.len() as u64;
        }
        if bytes.len() as u64 > symbol.bytes {
            return self.err("the initialiser is longer than the variable");
        }
        bytes.resize(symbol.bytes as usize, 0);
        symbol.init = Some(bytes);
        Ok(())
    }

    fn initialiser_items(&mut self, ty: Ty, out: &mut Vec<u8>, symbol: &mut Symbol) -> Res<()> {
        if self.accept('{') {
            while !self.accept('}') {
                self.initialiser_items(ty, out, symbol)?;
                self.accept(',');
            }
            return Ok(());
        }
        let width = ty.bytes();
        if let Some(Tok::Word(mut name)) = self.peek().cloned() {
            self.at += 1;
            let generic = name == "generic";
            if generic {
                self.expect('(')?;
                name = self.word()?;
                self.expect(')')?;
            }
            let addend = if self.accept('+') || self.is('-') { self.int()? as i64 } else { 0 };
            let Some(&target) = self.globals.get(&name) else {
                return self.err(format!("unknown symbol {name} in an initialiser"));
            };
            symbol.fixups.push((out.len() as u64, target, addend, width, generic));
            out.extend(std::iter::repeat_n(0, width as usize));
            return Ok(());
        }
        let negative = self.accept('-');
        let bits = match self.next()? {
            Tok::Int(n) => (if negative { -n } else { n }) as u64,
            Tok::F32(b) => b.into(),
            Tok::F64(b) => b,
            Tok::Dec(x) if ty == Ty::F32 => (x as f32).to_bits().into(),
            Tok::Dec(x) => x.to_bits(),
            other => return self.err(format!("unexpected {other:?} in an initialiser")),
        };
        out.extend_from_slice(&bits.to_le_bytes()[..width as usize]);
        Ok(())
    }

    /// Reads `(.param .b32 a, .param .b64 b)` and gives each parameter a place in `area`.
    fn params(&mut self, area: &mut u32) -> Res<Params> {
        let mut out = Vec::new();
        self.expect('(')?;
        while !self.accept(')') {
            let in_register = !self.accept_dot("param");
            if in_register {
                return self.err("parameters in registers are not supported");
            }
            let decl = self.decl()?;
            let offset = (u64::from(*area)).next_multiple_of(decl.align) as u32;
            *area = offset + decl.bytes as u32;
            out.push((decl.name, ParamSlot { offset, bytes: decl.bytes as u32 }, decl.align));
            self.accept(',');
        }
        Ok(out)
    }

    /// The number of a function, which may have been declared before.
    fn function_id(&mut self, name: &str, entry: bool) -> u32 {
        if let Some(&id) = self.function_ids.get(name) {
            return id;
        }
        let id = self.code.functions.len() as u32;
        self.function_ids.insert(name.into(), id);
        self.code.functions.push(Function {
            name: name.into(),
            entry,
            defined: false,
            start: 0,
            params: Vec::new(),
            rets: Vec::new(),
            regs: 0,
            local_bytes: 0,
            param_bytes: 0,
            max_threads: None,
            end: 0,
        });
        id
    }

    fn function(&mut self, entry: bool) -> Res<()> {
        let mut area = if entry { 0 } else { self.code.shared_params };
        let rets = if !entry && self.is('(') { self.params(&mut area)? } else { Vec::new() };
        let name = self.word()?;
        let params = if self.is('(') { self.params(&mut area)? } else { Vec::new() };
        let mut max_threads = None;
        while let Some(Tok::Dot(d)) = self.peek().cloned() {
            self.at += 1;
            match d.as_str() {
                "noreturn" | "blocksareclusters" | "explicitcluster" => {}
                "maxntid" | "reqntid" | "minnctapersm" | "maxnreg" | "maxclusterrank"
                | "reqnctapercluster" | "maxnctapersm" => {
                    let mut total = self.int()? as u32;
                    while self.accept(',') {
                        total = total.saturating_mul(self.int()? as u32);
                    }
                    if d == "maxntid" || d == "reqntid" {
                        max_threads = Some(total);
                    }
                }
                "pragma" | "abi_preserve" | "abi_preserve_control" => self.skip_to(';')?,
                _ => {
                    self.at -= 1;
                    return self.err(format!("unknown directive .{d} on a function"));
                }
            }
        }
        let id = self.function_id(&name, entry);
        if !entry {
            self.code.shared_params = area;
        }
        let function = &mut self.code.functions[id as usize];
        function.params = params.iter().map(|p| p.1.clone()).collect();
        function.rets = rets.iter().map(|p| p.1.clone()).collect();
        function.max_threads = max_threads;
        if self.accept(';') {
            return Ok(());
        }
        if self.code.functions[id as usize].defined {
            return self.err(format!("the function {name} is defined twice"));
        }
        let named = rets.into_iter().chain(params).collect();
        if !entry {
            return crate::body::body(self, id, named);
        }
        self.code.functions[id as usize].defined = true;
        self.deferred.push((self.at, id, named));
        let mut depth = 0;
        loop {
            match self.next()? {
                Tok::Punct('{') => depth += 1,
                Tok::Punct('}') if depth == 1 => return Ok(()),
                Tok::Punct('}') => depth -= 1,
                _ => {}
            }
        }
    }
}
