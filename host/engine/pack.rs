//! Packing: weights of linear tasks in the order and the format in which a device multiplies them.

mod fragments;

use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use tilert_mk_model::lower::{Program, Tensor, named_place};
use tilert_mk_model::quantise::fp8_scales;
use tilert_mk_model::strips::{Quantiser, StoredRows};
use tilert_mk_model::weights::TensorView;
use tilert_mk_shared::packed::Packing;
use tilert_mk_shared::task::{LinearArgs, Opcode, Task, WeightFormat};

use crate::driver::Device;
use crate::error::{Error, Result};

/// Bytes that are packed between two uploads, about.
const BATCH_BYTES: usize = 64 << 20;

/// What a task's weights become.
enum Form {
    /// Bf16 or E4M3 for a GPU.
    Fragments(Packing),
    /// Blocks for a CPU.
    Strips(Quantiser),
}

/// One task's rows and what becomes of them.
struct Piece<'a> {
    task_idx: usize,
    form: Form,
    byte_count: usize,
    segments: Vec<StoredRows<'a>>,
    /// The tensor of each.
    tensors: Vec<usize>,
}

/// Whether a task's weights are packed for it; with `packs_bf16` those in bf16 are.
pub(super) fn is_packed(task: &Task, packs_bf16: bool) -> bool {
    if task.opcode != Opcode::Linear as u16 {
        return false;
    }
    let format = LinearArgs::unpack(task).format;
    format.is_blocked() || packs_bf16 && format == WeightFormat::Bf16
}

/// Packs and uploads the weights of the tasks that want them so (`is_packed`), each to its home, a PE;
/// the tasks' indices and addresses.
///
/// Errors: weights that cannot be quantised, or are no numbers; memory that is not there; what the
/// driver says.
pub(super) fn upload(
    program: &Program,
    homes: &[u32],
    views: &[TensorView<'_>],
    device: &mut dyn Device,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Vec<(usize, u64)>> {
    let (scales, is_gpu) = (scales(program, views), device.profile().packs_weights);
    let tasks = program.tasks.iter().enumerate();
    let packed = tasks.filter(|(_, task)| is_packed(task, is_gpu));
    let pieces = packed.map(|(task_idx, task)| piece(task_idx, task, views, &scales, is_gpu));
    let mut pieces = pieces.collect::<Result<Vec<_>>>()?;
    let home = |piece: &Piece| homes[piece.task_idx];
    pieces.sort_by_key(home);
    let total = bytes_of_all(&pieces);
    let (mut places, mut before) = (Vec::with_capacity(pieces.len()), 0);
    for pieces in pieces.chunk_by(|a, b| home(a) == home(b)) {
        let own = upload_to(program, home(&pieces[0]), pieces, device, &mut |done| {
            progress(before + done, total);
        })?;
        places.extend(own);
        before += bytes_of_all(pieces);
    }
    Ok(places)
}

fn bytes_of_all(pieces: &[Piece<'_>]) -> u64 {
    pieces.iter().map(|piece| piece.byte_count as u64).sum()
}

/// The same for the tasks of one PE; `progress` hears of bytes done.
fn upload_to(
    program: &Program,
    pe: u32,
    pieces: &[Piece<'_>],
    device: &mut dyn Device,
    progress: &mut dyn FnMut(u64),
) -> Result<Vec<(usize, u64)>> {
    let base = device.reserve(pe, "the weights", bytes_of_all(pieces))?;
    let (mut places, mut done) = (Vec::with_capacity(pieces.len()), 0);
    let mut buffer = Vec::new();
    let mut rest = pieces;
    while !rest.is_empty() {
        let mut bytes = 0;
        let mut count = 0;
        while count < rest.len() && (count == 0 || bytes < BATCH_BYTES) {
            let piece = &rest[count];
            places.push((piece.task_idx, base + done + bytes as u64));
            bytes += piece.byte_count;
            count += 1;
        }
        let (batch, after) = rest.split_at(count);
        buffer.clear();
        buffer.resize(bytes, 0);
        pack_all(batch, &mut buffer).map_err(|tensor| not_packed(&program.tensors[tensor]))?;
        device.write(pe, base + done, &buffer)?;
        done += bytes as u64;
        progress(done);
        rest = after;
    }
    Ok(places)
}

/// The error for a tensor with values that cannot be packed.
fn not_packed(tensor: &Tensor) -> Error {
    let name = &tensor.name;
    Error::Request(if tensor.scales.is_some() {
        format!("the tensor {name} has codes, or scales, that are not finite numbers")
    } else {
        format!(
            "the tensor {name} has a weight that is not finite, or too large to be quantised: \
             --weights native keeps it"
        )
    })
}

/// The scales of all matrices of linear tasks, where rows share them; else empty.
fn scales(program: &Program, views: &[TensorView<'_>]) -> Vec<Vec<f32>> {
    let stored = |tensor: &Tensor| tensor.scales.map(|scales| views[scales.0 as usize].to_f32());
    let tensors = program.tensors.iter();
    let mut scales: Vec<_> = tensors.map(|tensor| stored(tensor).unwrap_or_default()).collect();
    if program.format != WeightFormat::Fp8 {
        return scales;
    }
    thread::scope(|scope| {
        let cores = thread::available_parallelism().map_or(1, NonZero::get);
        let share = views.len().div_ceil(cores).max(1);
        for (views, scales) in views.chunks(share).zip(scales.chunks_mut(share)) {
            scope.spawn(move || {
                for (view, scales) in views.iter().zip(scales) {
                    if let [_, columns] = *view.shape {
                        *scales = fp8_scales(&view.to_f32(), columns as usize);
                    }
                }
            });
        }
    });
    scales
}

fn piece<'a>(
    task_idx: usize,
    task: &Task,
    views: &[TensorView<'a>],
    scales: &'a [Vec<f32>],
    is_gpu: bool,
) -> Result<Piece<'a>> {
    let args = LinearArgs::unpack(task);
    let (mut segments, mut tensors) = (Vec::new(), Vec::new());
    for segment in args.segments.iter().filter(|segment| segment.row_count > 0) {
        let rows = named_place(segment.weights).and_then(|(index, at)| {
            let view = views.get(index)?;
            let row_bytes = args.in_dim as usize * view.dtype.byte_count() as usize;
            let len = segment.row_count as usize * row_bytes;
            let values = view.data.get(at as usize..)?.get(..len)?;
            let first = at as usize / row_bytes;
            Some((StoredRows { dtype: view.dtype, values, first, scales: &scales[index] }, index))
        });
        let rows = rows.ok_or_else(|| Error::Request("weights outside a tensor".into()))?;
        segments.push(rows.0);
        tensors.push(rows.1);
    }
    let row_count = args.row_count();
    let quantiser = Quantiser::new(args.format, args.in_dim as usize).filter(|_| !is_gpu);
    let (form, byte_count) = match quantiser {
        Some(quantiser) => {
            let byte_count = quantiser.byte_count(row_count);
            (Form::Strips(quantiser), byte_count)
        }
        None => {
            let packing = Packing::new(row_count, args.in_dim, args.format);
            (Form::Fragments(packing), packing.byte_count() as usize)
        }
    };
    Ok(Piece { task_idx, form, byte_count, segments, tensors })
}

/// Packs a batch into `out`, which is all zeros, on all cores.
///
/// Errors: the first tensor with values that are not finite, or too large for their scale.
fn pack_all(batch: &[Piece<'_>], out: &mut [u8]) -> std::result::Result<(), usize> {
    let cores = thread::available_parallelism().map_or(1, NonZero::get);
    let faulty = AtomicUsize::new(usize::MAX);
    thread::scope(|scope| {
        let mut out = out;
        for share in batch.chunks(batch.len().div_ceil(cores)) {
            let bytes = share.iter().map(|piece| piece.byte_count).sum();
            let (own, after) = out.split_at_mut(bytes);
            out = after;
            let faulty = &faulty;
            scope.spawn(move || {
                let mut own = own;
                for piece in share {
                    let (target, after) = own.split_at_mut(piece.byte_count);
                    if let Err(tensor) = piece.pack(target) {
                        faulty.fetch_min(tensor, Ordering::Relaxed);
                    }
                    own = after;
                }
            });
        }
    });
    match faulty.into_inner() {
        usize::MAX => Ok(()),
        tensor => Err(tensor),
    }
}

impl Piece<'_> {
    /// Packs the rows into `out`, which is all zeros.
    ///
    /// Errors: the tensor of rows that cannot be represented.
    fn pack(&self, out: &mut [u8]) -> std::result::Result<(), usize> {
        let packed = match &self.form {
            Form::Fragments(packing) => fragments::pack(packing, &self.segments, out),
            Form::Strips(quantiser) => quantiser.pack(&self.segments, out),
        };
        packed.map_err(|segment| self.tensors[segment])
    }
}
