//! Binding: a checkpoint's tensors become the addresses in a program's tasks.

use tilert_mk_model::config::ModelConfig;
use tilert_mk_model::lower::{Program, Tensor, named_place};
use tilert_mk_model::weights::{Dtype, TensorView, WeightSource};
use tilert_mk_shared::queue::QueueSpan;
use tilert_mk_shared::task::{LINEAR_WEIGHTS, Task, WeightFormat};
use tilert_mk_shared::trace::TraceRecord;

use super::{EngineOptions, LoadMode, ModelSource, Weights, pack};
use crate::driver::Device;
use crate::error::{Error, Result};
use crate::load::{Checkpoint, copied};

/// The bytes of values without padding.
pub(super) fn bytes_of<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: the values are initialised, and `Plain` types have no padding.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// The same, for writing.
pub(super) fn bytes_of_mut<T: Plain>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: as for `bytes_of`, and any bytes are values of `Plain` types.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

/// A type whose bytes are all its values, and of which any bytes are a value.
///
/// # Safety
/// The type has no padding and no invalid values.
pub(super) unsafe trait Plain {}

// SAFETY: words.
unsafe impl Plain for u32 {}
// SAFETY: words.
unsafe impl Plain for f32 {}
// SAFETY: two words.
unsafe impl Plain for QueueSpan {}
// SAFETY: six words of 8 bytes, the first of them two of 4.
unsafe impl Plain for TraceRecord {}
// SAFETY: its fields fill its 128 bytes: 2 * 2 + 3 * 4 + 10 * 4 + 9 * 8.
unsafe impl Plain for Task {}

pub(super) fn open_checkpoint(source: &ModelSource<'_>) -> Result<Checkpoint> {
    match source {
        ModelSource::Directory(path) => Ok(Checkpoint::open(path)?),
        ModelSource::Embedded => Ok(Checkpoint::from_bytes(
            include_str!("../../model/demo/config.json"),
            include_bytes!("../../model/demo/model.safetensors"),
        )?),
    }
}

/// The model that a config.json, and what goes with it, describes.
pub(super) fn read_config(
    source: &ModelSource<'_>,
    text: &str,
    generation_text: Option<&str>,
) -> Result<ModelConfig> {
    let path = match source {
        ModelSource::Directory(path) => path.join("config.json"),
        ModelSource::Embedded => "embedded config.json".into(),
    };
    let wrap = |source| Error::Config { path: path.clone(), source };
    let mut config = ModelConfig::parse(text).map_err(wrap)?;
    if let Some(text) = generation_text {
        config.override_eos(text).map_err(wrap)?;
    }
    Ok(config)
}

/// The needed weights in memory, each of its expected shape.
pub(super) fn load(
    checkpoint: Checkpoint,
    options: &EngineOptions,
    needed: &[(String, Vec<u64>)],
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Box<dyn WeightSource + Send>> {
    // Quantised weights are a copy in any case.
    let copies = options.load == LoadMode::Copy && options.weights == Weights::Native;
    if copies || !checkpoint.is_aligned() {
        return Ok(Box::new(copied(checkpoint, needed, progress)?));
    }
    for (name, shape) in needed {
        checkpoint.expect_shape(name, shape)?;
    }
    Ok(Box::new(checkpoint))
}

/// The type of the embedding, which is that of all matrices that are not FP8.
///
/// Errors: an embedding that is missing, or FP8 itself.
pub(super) fn table_dtype(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<Dtype> {
    let name = format!("{}.weight", config.architecture.family().names.embedding);
    match checkpoint.require(&name)?.dtype {
        Dtype::F8E4m3 => Err(Error::Request(format!(
            "the tensor {name} is F8_E4M3, not F32, F16 or BF16 as embeddings are"
        ))),
        dtype => Ok(dtype),
    }
}

/// Refuses to bring a checkpoint's FP8 matrices into another format.
///
/// Errors: a format that was asked for.
pub(super) fn check_fp8(weights: Weights) -> Result<()> {
    if weights != Weights::Native {
        let message = "the checkpoint's matrices are FP8 already: --weights native takes them as \
                       they are, and another format needs a checkpoint in f32, f16 or bf16";
        return Err(Error::Usage(message.into()));
    }
    Ok(())
}

pub(super) fn format_of(weights: Dtype) -> WeightFormat {
    match weights {
        Dtype::F32 => WeightFormat::F32,
        Dtype::F16 => WeightFormat::F16,
        Dtype::Bf16 => WeightFormat::Bf16,
        Dtype::F8E4m3 => WeightFormat::Fp8,
    }
}

/// Replaces weight names in tasks by addresses; norms and biases are widened into `vectors`. The tasks as
/// each PE has them: weights are on the PE of the worker that has the task, and a task that is another's
/// has no addresses.
pub(super) fn bind(
    program: &Program,
    weights: &dyn WeightSource,
    device: &mut dyn Device,
    vectors: &mut Vec<Vec<f32>>,
    dtype: Dtype,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Vec<Vec<Task>>> {
    let pe_count = device.profile().pe_count;
    let homes = homes(program, pe_count);
    let packs_bf16 = device.profile().packs_weights;
    let views = views(program, weights, dtype)?;
    let packed = pack::upload(program, &homes, &views, device, progress)?;
    let mut bound = Vec::with_capacity(pe_count as usize);
    for pe in 0..pe_count {
        let mut tasks = program.tasks.clone();
        let is_mine = |task_idx: usize| homes[task_idx] == pe;
        let is_stored = stored_tensors(program, packs_bf16, is_mine);
        let mut bases = Vec::with_capacity(views.len());
        for (view, is_stored) in views.iter().zip(is_stored) {
            bases.push(if !is_stored {
                0
            } else if view.shape.len() == 1 {
                vectors.push(view.to_f32());
                device.place(pe, bytes_of(&vectors[vectors.len() - 1]))?
            } else {
                device.place(pe, view.data)?
            });
        }
        for (task_idx, task) in tasks.iter_mut().enumerate() {
            for reference in &mut task.refs {
                if let Some((index, byte)) = named_place(*reference) {
                    *reference = if is_mine(task_idx) { bases[index] + byte } else { 0 };
                }
            }
        }
        for (task_idx, address) in packed.iter().filter(|(task_idx, _)| is_mine(*task_idx)) {
            // Segments touch in packed weights: the first one's address is that of all.
            tasks[*task_idx].refs[LINEAR_WEIGHTS[0]] = *address;
        }
        bound.push(tasks);
    }
    Ok(bound)
}

/// The PE of each task: that of the worker in whose queue it is.
fn homes(program: &Program, pe_count: u32) -> Vec<u32> {
    let (_, own) = program.queue_spans.split_last().unwrap_or((&QueueSpan::default(), &[]));
    let per_pe = own.len().div_ceil(pe_count as usize).max(1);
    let mut homes = vec![0; program.tasks.len()];
    for (pe, spans) in (0u32..).zip(own.chunks(per_pe)) {
        for span in spans {
            for task_idx in &program.queue_entries[span.first as usize..][..span.count as usize] {
                homes[*task_idx as usize] = pe;
            }
        }
    }
    homes
}

/// The types that each of a program's tensors may have, the usual one first, and why.
fn dtypes(program: &Program, table: Dtype) -> Vec<(Vec<Dtype>, &'static str)> {
    let mut plain = vec![Dtype::F32, Dtype::F16, Dtype::Bf16];
    plain.sort_by_key(|dtype| *dtype != table);
    let of = |tensor: &Tensor| match tensor.shape.len() {
        _ if tensor.scales.is_some() => (vec![Dtype::F8E4m3], "config.json says"),
        0 | 1 => (plain.clone(), "vectors are"),
        _ => (vec![table], "config.json and the embedding say"),
    };
    let mut dtypes: Vec<_> = program.tensors.iter().map(of).collect();
    for scales in program.tensors.iter().filter_map(|tensor| tensor.scales) {
        dtypes[scales.0 as usize] = (vec![Dtype::F32, Dtype::Bf16], "scales are");
    }
    dtypes
}

/// The program's tensors as dummy weights have them.
pub(super) fn dummy_tensors(program: &Program, table: Dtype) -> Vec<(String, Vec<u64>, Dtype)> {
    let dtypes = dtypes(program, table).into_iter().map(|(dtypes, _)| dtypes[0]);
    let tensors = program.tensors.iter().zip(dtypes);
    tensors.map(|(tensor, dtype)| (tensor.name.clone(), tensor.shape.clone(), dtype)).collect()
}

/// The program's tensors.
///
/// Errors: one that is missing, or of another type than it must be.
fn views<'a>(
    program: &Program,
    weights: &'a dyn WeightSource,
    table: Dtype,
) -> Result<Vec<TensorView<'a>>> {
    let view = |(tensor, (dtypes, reason)): (&Tensor, (Vec<Dtype>, &str))| {
        let name = &tensor.name;
        let view = weights
            .tensor(name)
            .ok_or_else(|| Error::Request(format!("the tensor {name} is missing")))?;
        if dtypes.contains(&view.dtype) {
            return Ok(view);
        }
        let expected: Vec<_> = dtypes.iter().map(|dtype| dtype.name()).collect();
        let (found, expected) = (view.dtype.name(), expected.join(" or "));
        Err(Error::Request(format!("the tensor {name} is {found}, not {expected} as {reason}")))
    };
    program.tensors.iter().zip(dtypes(program, table)).map(view).collect()
}

/// Which tensors some task that `counts` wants as the checkpoint stores them, or a vector widened: not
/// matrices that are packed for it (`pack::is_packed`).
pub(super) fn stored_tensors(
    program: &Program,
    packs_bf16: bool,
    counts: impl Fn(usize) -> bool,
) -> Vec<bool> {
    let mut is_stored = vec![false; program.tensors.len()];
    for (_, task) in program.tasks.iter().enumerate().filter(|(idx, _)| counts(*idx)) {
        let is_packed = pack::is_packed(task, packs_bf16);
        for (ref_idx, reference) in task.refs.iter().enumerate() {
            let is_replaced = is_packed && LINEAR_WEIGHTS.contains(&ref_idx);
            if let (false, Some((index, _))) = (is_replaced, named_place(*reference)) {
                is_stored[index] = true;
            }
        }
    }
    is_stored
}
