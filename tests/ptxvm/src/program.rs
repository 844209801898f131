//! The decoded form of a module: what the parser produces and the executor reads.

use crate::types::{Order, Round, SReg, Scope, Space, Ty};
use std::collections::HashMap;
use std::sync::Arc;

/// A register: its slot in the warp's register file and its width. `_` has the slot `SINK`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reg {
    pub(crate) slot: u32,
    pub(crate) bytes: u8,
}

/// The slot of `_`, which throws away what is written to it.
pub(crate) const SINK: u32 = u32::MAX;

/// A source operand.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Src {
    Reg(Reg),
    Imm(u64),
    Special(SReg),
    /// The address of symbol `.0` in its own state space plus an offset.
    Sym(u32, i64),
}

/// A memory address: base plus a constant.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Addr {
    pub(crate) base: Src,
    pub(crate) offset: i64,
}

/// Everything that shapes an arithmetic instruction besides its operands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Par {
    pub(crate) ty: Ty,
    /// The source type of a conversion or `set`.
    pub(crate) from: Ty,
    pub(crate) round: Round,
    pub(crate) ftz: bool,
    pub(crate) sat: bool,
    pub(crate) relu: bool,
    pub(crate) nan: bool,
    /// A variant number: the table of `lop3`, the mode of `prmt`, the comparison of `setp`.
    pub(crate) sel: u32,
}

/// An arithmetic function of up to three operands.
pub(crate) type Alu = fn(&Par, u64, u64, u64) -> u64;

/// How predicates are combined by `setp` and `set`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum BoolOp {
    And,
    Or,
    Xor,
}

/// The operation of `atom` and `red`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AtomOp {
    Exch,
    Cas,
    Add,
    Inc,
    Dec,
    Min,
    Max,
    And,
    Or,
    Xor,
}

/// The modifiers of a load, store or atomic.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Access {
    pub(crate) ty: Ty,
    pub(crate) space: Space,
    pub(crate) order: Order,
    pub(crate) scope: Scope,
    /// Through the non-coherent cache.
    pub(crate) nc: bool,
}

/// How `shfl` picks the source lane.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Shfl {
    Up,
    Down,
    Bfly,
    Idx,
}

/// How `vote` combines.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Vote {
    All,
    Any,
    Uni,
    Ballot,
}

/// What a named-barrier instruction does.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Bar {
    Sync,
    Arrive,
    /// `red.popc`, `red.and`, `red.or` with the predicate and whether it is negated.
    Red(Option<BoolOp>, Src, bool),
}

/// What an `mbarrier` instruction does.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Mbar {
    Init(Src),
    Inval,
    /// Arrive with a count, having first raised the expected bytes when `tx` is given.
    Arrive {
        count: Src,
        tx: Option<Src>,
        drop: bool,
        release: bool,
    },
    ExpectTx(Src),
    CompleteTx(Src),
    /// Test a phase: by the token of an arrive, or by parity. `try_wait` does the same, since
    /// how long it suspends is open.
    Test {
        phase: Src,
        parity: bool,
        acquire: bool,
    },
    PendingCount(Src),
}

/// The element layout of an `mma.sync`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MmaShape {
    pub(crate) k: u32,
    pub(crate) a: Ty,
    pub(crate) b: Ty,
    pub(crate) d: Ty,
    pub(crate) sat: bool,
}

/// A decoded operation.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Alu {
        f: Alu,
        par: Par,
        d: Reg,
        s: [Src; 3],
    },
    Bfi {
        par: Par,
        d: Reg,
        s: [Src; 2],
        at: Src,
        len: Src,
    },
    /// Add or subtract with carry; `flags` are: carry in, carry out, subtract.
    Carry {
        ty: Ty,
        d: Reg,
        s: [Src; 3],
        mad: Option<bool>,
        flags: [bool; 3],
    },
    /// Comparison into one or two predicates, or into a value (`set`).
    Setp {
        par: Par,
        d: Reg,
        q: Reg,
        s: [Src; 2],
        with: Option<(BoolOp, Src, bool)>,
        value: bool,
    },
    Pack {
        d: Reg,
        s: Vec<Src>,
        bits: u32,
    },
    Unpack {
        d: Vec<Reg>,
        s: Src,
        bits: u32,
    },
    /// 128-bit move between register pairs.
    Mov128 {
        d: Reg,
        s: Src,
    },
    Cvta {
        d: Reg,
        s: Src,
        space: Space,
        to: bool,
    },
    Isspacep {
        d: Reg,
        s: Src,
        space: Space,
    },
    Ld {
        acc: Access,
        addr: Addr,
        d: Vec<Reg>,
    },
    St {
        acc: Access,
        addr: Addr,
        s: Vec<Src>,
    },
    Atom {
        op: AtomOp,
        acc: Access,
        addr: Addr,
        d: Option<Reg>,
        s: [Src; 2],
    },
    Fence {
        acquire: bool,
        release: bool,
        scope: Scope,
    },
    FenceProxy,
    /// Prefetches, discards and cache policies: checked for nothing, without effect.
    Nop,
    Createpolicy {
        d: Reg,
    },
    Bar {
        kind: Bar,
        id: Src,
        count: Option<Src>,
        d: Reg,
        aligned: bool,
    },
    WarpSync {
        members: Src,
    },
    Shfl {
        mode: Shfl,
        d: Reg,
        p: Reg,
        s: [Src; 4],
    },
    Vote {
        mode: Vote,
        d: Reg,
        s: Src,
        not: bool,
        members: Src,
    },
    Match {
        all: bool,
        bytes: u32,
        d: Reg,
        p: Reg,
        s: Src,
        members: Src,
    },
    Redux {
        f: Alu,
        par: Par,
        d: Reg,
        s: Src,
        members: Src,
    },
    Elect {
        d: Reg,
        p: Reg,
        members: Src,
    },
    ActiveMask {
        d: Reg,
    },
    Mbarrier {
        op: Mbar,
        space: Space,
        addr: Addr,
        d: Reg,
    },
    /// `cp.async`: destination, source, size, optional number of source bytes (the rest is zero).
    CpAsync {
        dst: Addr,
        src: Addr,
        bytes: u32,
        take: Option<Src>,
        ignore: Option<(Src, bool)>,
    },
    CpCommit,
    CpWait {
        pending: Option<u32>,
    },
    CpMbarArrive {
        addr: Addr,
        noinc: bool,
    },
    BulkLoad {
        dst: Addr,
        src: Addr,
        bytes: Src,
        mbar: Addr,
    },
    BulkStore {
        dst: Addr,
        src: Addr,
        bytes: Src,
    },
    BulkCommit,
    BulkWait {
        pending: u32,
    },
    Mapa {
        d: Reg,
        s: Src,
        rank: Src,
    },
    Ldmatrix {
        addr: Addr,
        d: Vec<Reg>,
        trans: bool,
    },
    Stmatrix {
        addr: Addr,
        s: Vec<Src>,
        trans: bool,
    },
    Mma {
        shape: MmaShape,
        d: Vec<Reg>,
        a: Vec<Src>,
        b: Vec<Src>,
        c: Vec<Src>,
    },
    Nanosleep {
        ns: Src,
    },
    Bra {
        target: u32,
    },
    BrxIdx {
        index: Src,
        targets: Vec<u32>,
    },
    Call {
        callee: u32,
        args: Vec<(u32, u32, u32)>,
        ret: Option<(u32, u32, u32)>,
    },
    /// A call of a function that the host environment provides.
    CallExtern {
        name: String,
        ret: Option<(u32, u32)>,
    },
    Ret,
    Exit,
    Trap,
    Brkpt,
}

/// One instruction.
#[derive(Clone, Debug)]
pub(crate) struct Inst {
    /// The guard predicate and whether it is negated.
    pub(crate) guard: Option<(Reg, bool)>,
    pub(crate) op: Op,
    pub(crate) line: u32,
    /// Index into `Code::locs`, or 0 for none.
    pub(crate) loc: u32,
}

/// A named variable in memory.
#[derive(Clone, Debug)]
pub(crate) struct Symbol {
    pub(crate) name: String,
    pub(crate) space: Space,
    pub(crate) bytes: u64,
    pub(crate) align: u64,
    /// `.extern .shared`: starts where the static shared memory ends.
    pub(crate) dynamic: bool,
    /// The function that owns it; `None` at module level.
    pub(crate) owner: Option<u32>,
    pub(crate) init: Option<Vec<u8>>,
    /// Places in `init` that take the address of another symbol: offset, symbol, addend, width,
    /// generic.
    pub(crate) fixups: Vec<(u64, u32, i64, u32, bool)>,
    /// For local, parameter and call-parameter variables: the offset in the thread's area.
    pub(crate) offset: u64,
}

/// A parameter of a function: name and place in the parameter area.
#[derive(Clone, Debug)]
pub(crate) struct ParamSlot {
    pub(crate) offset: u32,
    pub(crate) bytes: u32,
}

/// A function or kernel.
#[derive(Clone, Debug)]
pub(crate) struct Function {
    pub(crate) name: String,
    pub(crate) entry: bool,
    pub(crate) defined: bool,
    pub(crate) start: u32,
    pub(crate) params: Vec<ParamSlot>,
    pub(crate) rets: Vec<ParamSlot>,
    pub(crate) regs: u32,
    pub(crate) local_bytes: u32,
    pub(crate) param_bytes: u32,
    pub(crate) max_threads: Option<u32>,
    /// Code range, for finding a function from a pc.
    pub(crate) end: u32,
}

/// The whole decoded module.
#[derive(Debug, Default)]
pub(crate) struct Code {
    pub(crate) insts: Vec<Inst>,
    pub(crate) functions: Vec<Function>,
    pub(crate) symbols: Vec<Symbol>,
    /// Files by number.
    pub(crate) files: HashMap<u32, String>,
    /// Source places: file, line, column. Number 0 is a placeholder.
    pub(crate) locs: Vec<(u32, u32, u32)>,
    /// Whether any thread-level `cp.async` occurs, which needs clocks of its own.
    pub(crate) uses_cp_async: bool,
    pub(crate) target: String,
    /// Registers, local bytes and parameter bytes that non-entry functions occupy together.
    pub(crate) shared_regs: u32,
    pub(crate) shared_local: u32,
    pub(crate) shared_params: u32,
}

/// A parsed PTX module. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Module {
    pub(crate) code: Arc<Code>,
}

impl Module {
    /// The names of the kernels, in the order of the text.
    pub fn entries(&self) -> Vec<&str> {
        let kernels = self.code.functions.iter().filter(|f| f.entry && f.defined);
        kernels.map(|f| f.name.as_str()).collect()
    }

    /// The `.target` of the module, such as `sm_90`.
    pub fn target(&self) -> &str {
        &self.code.target
    }

    /// The number and sizes in bytes of the parameters of a kernel.
    pub fn params(&self, entry: &str) -> Option<Vec<u32>> {
        let function = self.code.functions.iter().find(|f| f.entry && f.name == entry)?;
        Some(function.params.iter().map(|p| p.bytes).collect())
    }
}

impl Code {
    /// The source place of an instruction as `file:line`, where the PTX says so.
    pub(crate) fn source(&self, pc: u32) -> Option<String> {
        let inst = self.insts.get(pc as usize)?;
        let (file, line, _) = *self.locs.get(inst.loc as usize)?;
        if line == 0 {
            return None;
        }
        let name = self.files.get(&file).map_or("?", |s| s.as_str());
        Some(format!("{name}:{line}"))
    }

    /// The function that holds `pc`.
    pub(crate) fn function_of(&self, pc: u32) -> &str {
        let hit = self.functions.iter().find(|f| f.defined && (f.start..f.end).contains(&pc));
        hit.map_or("?", |f| &f.name)
    }
}
