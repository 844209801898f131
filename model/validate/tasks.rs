//! Tasks: every argument inside the model, the heap and the tensors.

use std::collections::HashMap;

use tilert_mk_shared::limits::{ATTENTION_SPLIT_MAX, SEGMENT_ROWS_MAX};
use tilert_mk_shared::program::Dims;
use tilert_mk_shared::task::{
    AttentionArgs, EmbedArgs, Epilogue, LinearArgs, Opcode, Prologue, SampleArgs, Segment, Task,
    TokenRows, WeightFormat,
};

use super::access::{Accesses, Region};
use super::error::{TaskDefect as Defect, ValidateError};
use super::memory::Memory;
use super::{Staging, name, scales};
use crate::lower::{Program, TENSOR_SHIFT, Tensor, named_place};

/// Rows of one tensor that one task uses.
struct Use {
    first: u64,
    end: u64,
}

/// What is known of a program's tasks so far.
struct Checker<'a> {
    program: &'a Program,
    dims: &'a Dims,
    accesses: Accesses,
    /// For each tensor, the rows in use, in the order of the tasks.
    uses: Vec<Vec<Use>>,
    /// For each tensor, whether it is used as a norm.
    norms: Vec<bool>,
    /// For each matrix, the latest task and the output column of its row 0.
    columns: Vec<Option<(u32, u64)>>,
    /// For each layer, the latest attention task.
    attentions: Vec<Option<u32>>,
    prologues: HashMap<u32, u32>,
    /// Key and task of the prologue found last.
    latest_prologue: Option<(u32, u32)>,
    /// Tensors that an embedding looks up.
    tables: Vec<usize>,
    /// For each tensor, whether it is the scales of a matrix.
    scales: Vec<bool>,
}

/// Checks every task and gives its accesses to `memory`.
pub(super) fn check(
    program: &Program,
    staging: &Staging,
    memory: &mut Memory<'_>,
) -> Result<(), ValidateError> {
    let mut checker = Checker {
        program,
        dims: &program.dims,
        accesses: Accesses::default(),
        uses: program.tensors.iter().map(|_| Vec::new()).collect(),
        norms: vec![false; program.tensors.len()],
        columns: vec![None; program.tensors.len()],
        attentions: vec![None; program.dims.kv.layer_count as usize],
        prologues: HashMap::new(),
        latest_prologue: None,
        tables: Vec::new(),
        scales: scales::find(program)?,
    };
    for (task_idx, task) in (0u32..).zip(&program.tasks) {
        checker.accesses.0.clear();
        if let Err(defect) = checker.task(task_idx, task) {
            return Err(ValidateError::Task { task: name(program, task_idx), defect });
        }
        if task.opcode == Opcode::Linear as u16 {
            let args = LinearArgs::unpack(task);
            checker.prologue_key(task_idx, task, &args)?;
            check_staging(program, task_idx, &args, staging)?;
        }
        memory.add(task_idx, &checker.accesses.0);
    }
    checker.check_uses()
}

fn check_staging(
    program: &Program,
    task_idx: u32,
    args: &LinearArgs,
    staging: &Staging,
) -> Result<(), ValidateError> {
    let row_bytes = args.format.row_bytes(args.in_dim);
    let needs = [
        ("one row of weights", row_bytes, staging.row_bytes_max),
        ("weights", args.weight_bytes(), staging.task_bytes_max),
    ];
    for (what, bytes, limit) in needs {
        if bytes > limit {
            let task = name(program, task_idx);
            return Err(ValidateError::Staging { task, what, bytes, limit });
        }
    }
    Ok(())
}

/// A tensor that a reference names, and the offset in it in bytes.
struct Named<'a> {
    tensor_idx: usize,
    tensor: &'a Tensor,
    byte: u64,
}

impl Named<'_> {
    fn misshapen(&self, what: &'static str) -> Defect {
        let shape = self.tensor.shape.clone();
        Defect::Shape { what, tensor: self.tensor.name.clone(), shape }
    }
}

fn same_format(format: WeightFormat, expected: WeightFormat) -> Result<(), Defect> {
    if format == expected { Ok(()) } else { Err(Defect::Format(format)) }
}

impl<'a> Checker<'a> {
    fn task(&mut self, task_idx: u32, task: &Task) -> Result<(), Defect> {
        let opcode = Opcode::from_raw(task.opcode).ok_or(Defect::Opcode(task.opcode))?;
        match opcode {
            Opcode::Linear => return self.linear(task_idx, task),
            Opcode::Attention => return self.attention(task_idx, task),
            Opcode::Embed => return self.embed(task),
            Opcode::Admit => self.accesses.admit(),
            Opcode::Sample => {
                canonical(task, &SampleArgs::unpack(task).pack(), Opcode::Sample)?;
                self.accesses.sample(self.dims);
                return Ok(());
            }
            Opcode::Empty => {}
        }
        canonical(task, &Task::new(opcode), opcode)
    }

    fn embed(&mut self, task: &Task) -> Result<(), Defect> {
        let args = EmbedArgs::unpack(task);
        canonical(task, &args.pack(), Opcode::Embed)?;
        same_format(args.format, self.program.stored_format)?;
        let table = self.tensor("the table", args.table)?;
        let shape = [self.dims.vocab_size, self.dims.hidden_dim].map(u64::from);
        let is_fp8 = table.tensor.scales.is_some();
        if table.tensor.shape != shape || table.byte != 0 || is_fp8 {
            return Err(table.misshapen("the table"));
        }
        self.tables.push(table.tensor_idx);
        begins("hidden", args.hidden, self.program.plan.hidden)?;
        self.accesses.embed(self.dims);
        Ok(())
    }

    fn attention(&mut self, task_idx: u32, task: &Task) -> Result<(), Defect> {
        let args = AttentionArgs::unpack(task);
        canonical(task, &args.pack(), Opcode::Attention)?;
        let kv = &self.dims.kv;
        within("layer_idx", args.layer_idx.into(), 0, u64::from(kv.layer_count) - 1)?;
        within("kv_head_idx", args.kv_head_idx.into(), 0, u64::from(kv.kv_head_count) - 1)?;
        let part_max = u64::from(ATTENTION_SPLIT_MAX);
        within("part_count", args.part_count.into(), 1, part_max)?;
        within("part_idx", args.part_idx.into(), 0, u64::from(args.part_count) - 1)?;
        let group = self.dims.heads_per_kv();
        let expected =
            AttentionArgs::columns_of(group * kv.head_dim, args.part_idx, args.part_count);
        for (value, expected) in args.columns.map(u64::from).into_iter().zip(expected) {
            let expected = expected.into();
            if value != expected {
                return Err(Defect::Dimension { what: "columns", value, expected });
            }
        }
        begins("qkv", args.qkv, self.program.plan.qkv)?;
        let first = self.dims.split_idx(0, args.kv_head_idx * group, 0);
        begins("splits", args.splits, self.program.plan.splits + first * 4)?;
        for (what, norm) in [("query_norm", args.query_norm), ("key_norm", args.key_norm)] {
            if norm != 0 {
                self.vector(what, norm, kv.head_dim.into())?;
            }
        }
        if let Some(Some(other)) = self.attentions.get(args.layer_idx as usize).copied() {
            let known = AttentionArgs::unpack(&self.program.tasks[other as usize]);
            if (known.query_norm, known.key_norm) != (args.query_norm, args.key_norm) {
                return Err(self.disagrees("a head's norm", other));
            }
        }
        self.attentions[args.layer_idx as usize] = Some(task_idx);
        self.accesses.attention(self.dims, &args);
        Ok(())
    }

    fn linear(&mut self, task_idx: u32, task: &Task) -> Result<(), Defect> {
        let args = LinearArgs::unpack(task);
        canonical(task, &args.pack(), Opcode::Linear)?;
        within("in_dim", args.in_dim.into(), 8, self.dims.prologue_dim_max.into())?;
        if !args.in_dim.is_multiple_of(8) {
            return Err(Defect::Segments("in_dim is not a multiple of 8"));
        }
        if args.precision != self.program.precision {
            return Err(Defect::Precision(args.precision));
        }
        self.accesses.read(Region::Step, 0, 1);
        self.input(&args)?;
        self.segments(&args)?;
        let (region, column) = self.output(&args)?;
        for segment in args.segments.iter().filter(|segment| segment.row_count > 0) {
            self.weights(task_idx, &args, segment, column)?;
        }
        let stored = if args.epilogue == Epilogue::SiluMul { 1 } else { args.segments.len() };
        for segment in args.segments[..stored].iter().filter(|segment| segment.row_count > 0) {
            let first = column + u64::from(segment.out_first);
            let end = first + u64::from(segment.row_count);
            if args.epilogue == Epilogue::AddResidual {
                self.accesses.read(region, first, end);
            }
            self.accesses.write(region, first, end);
        }
        if args.leaves_best() {
            let last = u64::from(self.dims.head_task_count).saturating_sub(1);
            within("best_idx", args.best_idx.into(), 0, last)?;
            self.accesses.write(Region::Bests, args.best_idx.into(), u64::from(args.best_idx) + 1);
        }
        Ok(())
    }

    /// The prologue and the input rows.
    fn input(&mut self, args: &LinearArgs) -> Result<(), Defect> {
        let in_dim = u64::from(args.in_dim);
        match args.prologue {
            Prologue::RmsNorm => self.vector("norm_weight", args.norm_weight, in_dim)?,
            _ if args.norm_weight != 0 => return Err(Defect::Stray("a task without a norm")),
            _ => {}
        }
        let plan = &self.program.plan;
        if args.prologue == Prologue::MergeSplits {
            begins("x", args.x, plan.splits)?;
            let expected = u64::from(self.dims.head_count) * u64::from(self.dims.kv.head_dim);
            if in_dim != expected {
                return Err(Defect::Dimension { what: "in_dim", value: in_dim, expected });
            }
            self.accesses.merge(self.dims);
            return Ok(());
        }
        let (region, column, width) = self.locate("x", args.x)?;
        // A norm looks up its rows by token; without one, rows are used in the order of the output.
        let is_suited = match (args.prologue, args.token_rows) {
            (Prologue::None, TokenRows::All) => !matches!(region, Region::Hidden | Region::Logits),
            (Prologue::None, TokenRows::Logits) => false,
            _ => region == Region::Hidden,
        };
        if !is_suited {
            return Err(Defect::Role { what: "x", region });
        }
        let stride = u64::from(args.x_stride);
        if stride != width {
            return Err(Defect::Stride { what: "x_stride", stride, region, width });
        }
        if column + in_dim > width {
            return Err(Defect::Columns { what: "x", end: column + in_dim, region, width });
        }
        self.accesses.read(region, column, column + in_dim);
        Ok(())
    }

    /// What the segments are to each other.
    fn segments(&self, args: &LinearArgs) -> Result<(), Defect> {
        let [a, b, c] = &args.segments;
        let rows = [a, b, c].map(|segment| u64::from(segment.row_count));
        for rows in rows {
            within("row_count", rows, 0, SEGMENT_ROWS_MAX.into())?;
        }
        within("rows of all segments", rows.iter().sum(), 1, self.dims.task_rows_max.into())?;
        let is_unused = |segment: &&Segment| segment.row_count == 0;
        if args.segments.iter().filter(is_unused).any(|unused| *unused != Segment::default()) {
            return Err(Defect::Segments("a segment without rows has other arguments"));
        }
        let pairs = a.row_count == b.row_count && a.out_first == b.out_first && c.row_count == 0;
        if args.epilogue == Epilogue::SiluMul && !pairs {
            return Err(Defect::Segments("gate and up do not have the same rows"));
        }
        if args.leaves_best() && b.row_count != 0 {
            return Err(Defect::Segments("a task that leaves its best has a second segment"));
        }
        Ok(())
    }

    /// Region of the output, and column that `out_first` counts from.
    fn output(&self, args: &LinearArgs) -> Result<(Region, u64), Defect> {
        let (region, column, width) = self.locate("y", args.y)?;
        let is_residual = args.epilogue == Epilogue::AddResidual;
        if (region == Region::Logits) != (args.token_rows == TokenRows::Logits)
            || (region == Region::Hidden) != is_residual
            || (region == Region::Logits) != args.leaves_best()
        {
            return Err(Defect::Role { what: "y", region });
        }
        let stride = u64::from(args.y_stride);
        if stride != width {
            return Err(Defect::Stride { what: "y_stride", stride, region, width });
        }
        for segment in &args.segments {
            let end = column + u64::from(segment.out_first) + u64::from(segment.row_count);
            if end > width {
                return Err(Defect::Columns { what: "y", end, region, width });
            }
        }
        Ok((region, column))
    }

    /// One segment's rows of weights and biases.
    fn weights(
        &mut self,
        task_idx: u32,
        args: &LinearArgs,
        segment: &Segment,
        column: u64,
    ) -> Result<(), Defect> {
        let named = self.tensor("weights", segment.weights)?;
        let &[tensor_rows, tensor_columns] = named.tensor.shape.as_slice() else {
            return Err(named.misshapen("weights"));
        };
        if tensor_columns != u64::from(args.in_dim) {
            return Err(named.misshapen("weights"));
        }
        same_format(args.format, named.tensor.format(self.program.format))?;
        let row_bytes = named.tensor.stored_row_bytes(self.program.stored_format);
        let rows = u64::from(segment.row_count);
        let first = named.byte / row_bytes;
        if !named.byte.is_multiple_of(row_bytes) || first + rows > tensor_rows {
            let (tensor, byte) = (named.tensor.name.clone(), named.byte);
            return Err(Defect::Rows { what: "weights", tensor, byte, rows, tensor_rows });
        }
        let out = column + u64::from(segment.out_first);
        let start = out.wrapping_sub(first);
        let tensor_idx = named.tensor_idx;
        if let Some((other, known)) = self.columns[tensor_idx].replace((task_idx, start)) {
            let tasks = [other, task_idx].map(|idx| &self.program.tasks[idx as usize]);
            let other_args = LinearArgs::unpack(tasks[0]);
            if tasks[0].signal_event != tasks[1].signal_event {
                return Err(self.disagrees("the event signalled", other));
            }
            if known != start {
                return Err(self.disagrees("the column of the matrix's first row", other));
            }
            let is_paired = |known: &Segment| {
                known.weights >> TENSOR_SHIFT != segment.weights >> TENSOR_SHIFT
                    || known.bias >> TENSOR_SHIFT == segment.bias >> TENSOR_SHIFT
            };
            if !other_args.segments.iter().all(is_paired) {
                return Err(self.disagrees("the bias of the matrix", other));
            }
            if operator(&other_args) != operator(args) {
                return Err(self.disagrees("more than the rows of its matrix", other));
            }
        }
        self.uses[tensor_idx].push(Use { first, end: first + rows });
        if segment.bias == 0 {
            return Ok(());
        }
        let bias = self.tensor("bias", segment.bias)?;
        if bias.tensor.shape != [tensor_rows] {
            return Err(bias.misshapen("bias"));
        }
        if bias.byte != first * 4 {
            return Err(Defect::Segments("the bias begins at another row than the weights"));
        }
        let tensor_idx = bias.tensor_idx;
        self.uses[tensor_idx].push(Use { first, end: first + rows });
        Ok(())
    }

    fn disagrees(&self, what: &'static str, other: u32) -> Defect {
        Defect::Disagrees { what, other: name(self.program, other) }
    }

    /// The tensor that a reference names.
    fn tensor(&self, what: &'static str, reference: u64) -> Result<Named<'a>, Defect> {
        let named = named_place(reference).and_then(|(tensor_idx, byte)| {
            Some(Named { tensor_idx, tensor: self.program.tensors.get(tensor_idx)?, byte })
        });
        named.ok_or(Defect::Tensor { what, reference })
    }

    /// A whole vector of `len` values.
    fn vector(&mut self, what: &'static str, reference: u64, len: u64) -> Result<(), Defect> {
        let named = self.tensor(what, reference)?;
        if named.tensor.shape != [len] || named.byte != 0 {
            return Err(named.misshapen(what));
        }
        // Many tasks share a norm, which is no use of its rows by two biases or matrices.
        if !std::mem::replace(&mut self.norms[named.tensor_idx], true) {
            self.uses[named.tensor_idx].push(Use { first: 0, end: len });
        }
        Ok(())
    }

    /// Region, column and width of the row of activations at a heap offset.
    fn locate(&self, what: &'static str, offset: u64) -> Result<(Region, u64, u64), Defect> {
        let plan = &self.program.plan;
        for region in [Region::Hidden, Region::Qkv, Region::Intermediate, Region::Logits] {
            let Some((base, width)) = region.rows(self.dims, plan) else { continue };
            if (base..base + width * 4).contains(&offset) && (offset - base).is_multiple_of(4) {
                return Ok((region, (offset - base) / 4, width));
            }
        }
        Err(Defect::Offset { what, offset })
    }

    /// Tasks with the same key have the same prologue, ready at the same event.
    fn prologue_key(
        &mut self,
        task_idx: u32,
        task: &Task,
        args: &LinearArgs,
    ) -> Result<(), ValidateError> {
        if args.prologue == Prologue::None {
            return Ok(());
        }
        let key = args.prologue_key;
        let other_idx = match self.latest_prologue {
            Some((latest_key, other_idx)) if latest_key == key => other_idx,
            _ => *self.prologues.entry(key).or_insert(task_idx),
        };
        self.latest_prologue = Some((key, other_idx));
        let other = &self.program.tasks[other_idx as usize];
        let is_same = prologue(args) == prologue(&LinearArgs::unpack(other));
        if is_same && task.wait_event == other.wait_event {
            return Ok(());
        }
        let (task, other) = (name(self.program, task_idx), name(self.program, other_idx));
        Err(ValidateError::PrologueKey { task, other })
    }

    /// Each row of each matrix that is multiplied is multiplied once; each vector is used.
    fn check_uses(&mut self) -> Result<(), ValidateError> {
        let tensors = self.program.tensors.iter().zip(&mut self.uses);
        for (tensor_idx, (tensor, uses)) in tensors.enumerate() {
            // No task names a matrix's scales.
            let is_scales = self.scales[tensor_idx];
            let row_count = if is_scales { 0 } else { tensor.shape.first().copied().unwrap_or(0) };
            let fault = |row: u64, count: u64| {
                Err(ValidateError::TensorRow { tensor: tensor.name.clone(), row, count })
            };
            uses.sort_by_key(|rows| rows.first);
            let mut next = 0;
            for rows in uses.iter() {
                if rows.first != next {
                    return if rows.first > next { fault(next, 0) } else { fault(rows.first, 2) };
                }
                next = rows.end;
            }
            // The embedding of a model with its own head is looked up, not multiplied.
            if next != row_count && !(uses.is_empty() && self.tables.contains(&tensor_idx)) {
                return fault(next, 0);
            }
        }
        Ok(())
    }
}

/// What the tiles of one matrix have in common.
fn operator(args: &LinearArgs) -> impl PartialEq + use<> {
    (prologue(args), args.epilogue, args.y, args.y_stride)
}

/// What decides the result of a prologue.
fn prologue(args: &LinearArgs) -> impl PartialEq + use<> {
    (args.prologue, args.token_rows, args.in_dim, args.x, args.x_stride, args.norm_weight)
}

/// Nothing is set that the op does not read.
fn canonical(task: &Task, packed: &Task, opcode: Opcode) -> Result<(), Defect> {
    let is_same =
        (task.flags, &task.words, &task.refs) == (packed.flags, &packed.words, &packed.refs);
    if is_same { Ok(()) } else { Err(Defect::Stray(opcode.name())) }
}

fn within(what: &'static str, value: u64, least: u64, most: u64) -> Result<(), Defect> {
    let is_inside = (least..=most).contains(&value);
    if is_inside { Ok(()) } else { Err(Defect::Bound { what, value, least, most }) }
}

/// A reference that must be a region's first byte.
fn begins(what: &'static str, offset: u64, expected: u64) -> Result<(), Defect> {
    if offset == expected { Ok(()) } else { Err(Defect::Offset { what, offset }) }
}
