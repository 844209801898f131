//! The sizes that tasks share, from a model and what the engine decides.

use tilert_mk_shared::kv::KvGeometry;
use tilert_mk_shared::limits::ATTENTION_SPLIT_MAX;
use tilert_mk_shared::program::{Dims, SAMPLE_BIN_COUNT};

use super::LowerOptions;
use crate::config::ModelConfig;

/// The sizes that a program's tasks share; those that only the tasks tell are put in later.
pub(super) fn dims(config: &ModelConfig, options: &LowerOptions) -> Dims {
    // Workers may bring rows into another form, also where no prologue does.
    let prologue_dim = config.hidden_dim.max(config.query_dim()).max(config.intermediate_dim);
    Dims {
        hidden_dim: config.hidden_dim,
        intermediate_dim: config.intermediate_dim,
        head_count: config.head_count,
        vocab_size: config.vocab_size,
        rms_norm_eps: config.rms_norm_eps,
        attention_scale: 1.0 / (config.head_dim as f32).sqrt(),
        step_tokens_max: options.step_tokens_max,
        task_rows_max: 1,
        head_task_count: 0,
        late_splits_max: late_splits_max(config, options.is_stamped),
        prologue_dim_max: prologue_dim,
        sample_bin_count: SAMPLE_BIN_COUNT as u32,
        is_stamped: options.is_stamped.into(),
        kv: KvGeometry {
            layer_count: config.layer_count,
            slot_count: options.slot_count,
            kv_head_count: config.kv_head_count,
            context_max: options.context_max,
            head_dim: config.head_dim,
        },
    }
}

/// Splits that are merged by the projection: all, or where stamps let attention do it, as many as it is
/// faster for on an H200: each of its tasks reads them all.
fn late_splits_max(config: &ModelConfig, is_stamped: bool) -> u32 {
    const SPLITS_MAX: u32 = 8;
    const VALUES_MAX: u32 = 16_384;
    let few = (VALUES_MAX / config.query_dim()).clamp(1, SPLITS_MAX);
    if is_stamped { few } else { ATTENTION_SPLIT_MAX }
}
