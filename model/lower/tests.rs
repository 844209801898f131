//! How operators are cut and dealt.

use super::*;

const LLAMA_8B: &str = r#"{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 131072}"#;

const QWEN3_0_6B: &str = r#"{"model_type": "qwen3", "hidden_size": 1024,
    "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "max_position_embeddings": 40960, "tie_word_embeddings": true}"#;

fn options(worker_count: u32, tile_bytes: u64) -> LowerOptions {
    LowerOptions {
        worker_count,
        slot_count: 1,
        context_max: 4096,
        step_tokens_max: 8,
        stored_format: WeightFormat::Bf16,
        format: WeightFormat::Bf16,
        precision: Precision::Exact,
        tile_bytes,
        tile_rows_max: SEGMENT_ROWS_MAX,
        is_stamped: false,
        packed_rows: 1,
    }
}

fn lowered(json: &str, worker_count: u32, tile_bytes: u64) -> Program {
    lower(&ModelConfig::parse(json).unwrap(), &options(worker_count, tile_bytes)).unwrap()
}

/// The linear tasks of each stage.
fn stages(program: &Program) -> Vec<Vec<LinearArgs>> {
    let linear: Vec<&Task> =
        program.tasks.iter().filter(|task| task.opcode == Opcode::Linear as u16).collect();
    let by_stage = linear.chunk_by(|a, b| a.signal_event == b.signal_event);
    by_stage.map(|stage| stage.iter().map(|task| LinearArgs::unpack(task)).collect()).collect()
}

/// Weight bytes of each worker.
fn loads(program: &Program) -> Vec<u64> {
    let bytes = |task_idx: &u32| {
        let task = &program.tasks[*task_idx as usize];
        let is_linear = task.opcode == Opcode::Linear as u16;
        if is_linear { LinearArgs::unpack(task).weight_bytes() } else { 0 }
    };
    let queue = |span: &QueueSpan| {
        program.queue_entries[span.first as usize..][..span.count as usize].iter().map(bytes).sum()
    };
    let workers = program.queue_spans.len() - 1;
    program.queue_spans[..workers].iter().map(queue).collect()
}

#[test]
fn many_workers_get_equal_rows_of_every_stage() {
    for worker_count in [132, 148] {
        let program = lowered(LLAMA_8B, worker_count, u64::MAX);
        for stage in stages(&program) {
            assert_eq!(stage.len() as u32, worker_count);
            let rows = stage.iter().map(LinearArgs::row_count);
            let unit = if stage[0].epilogue == Epilogue::SiluMul { 2 } else { 1 };
            let (least, most) = (rows.clone().min().unwrap(), rows.max().unwrap());
            assert!(most - least <= unit, "{least} to {most} rows");
            assert!(most <= SEGMENT_ROWS_MAX);
        }
        // What a stage cannot share evenly, the step does: to within a few rows of the widest.
        let loads = loads(&program);
        let (least, most) = (loads.iter().min().unwrap(), loads.iter().max().unwrap());
        let row_bytes = 14336 * 2;
        // Worker 0 also samples, and attention is dealt to some workers only.
        let other = 128_256 * 4 + ATTENTION_POSITIONS_NOMINAL * 128 * 8;
        println!("{worker_count} workers: {least} to {most} weight bytes each");
        assert!(most - least <= other + 4 * row_bytes, "{least} to {most} bytes");
        assert!(program.dims.task_rows_max <= SEGMENT_ROWS_MAX);
    }
}

#[test]
fn packed_rows_stay_together() {
    let config = ModelConfig::parse(LLAMA_8B).unwrap();
    let options = LowerOptions {
        is_stamped: true,
        packed_rows: 8,
        tile_rows_max: 64,
        ..options(132, u64::MAX)
    };
    let program = lower(&config, &options).unwrap();
    for stage in stages(&program) {
        let rows = stage.iter().map(LinearArgs::row_count);
        let (least, most) = (rows.clone().min().unwrap(), rows.clone().max().unwrap());
        assert!(rows.clone().all(|rows| rows % 8 == 0) && most <= 64);
        assert!(most - least <= 8, "{least} to {most} rows");
        assert_eq!(stage.len() % 132, 0);
    }
}

/// How many of a worker's tasks are wanted.
fn tasks_of(program: &Program, worker: u32, is_wanted: impl Fn(&Task) -> bool) -> usize {
    let span = program.queue_spans[worker as usize];
    let entries = &program.queue_entries[span.first as usize..][..span.count as usize];
    entries.iter().filter(|task_idx| is_wanted(&program.tasks[**task_idx as usize])).count()
}

#[test]
fn attention_has_workers_of_its_own_where_qkv_is_small() {
    for (json, apart) in [(QWEN3_0_6B, 32), (LLAMA_8B, 0)] {
        let config = ModelConfig::parse(json).unwrap();
        let options = LowerOptions {
            is_stamped: true,
            packed_rows: 8,
            tile_rows_max: 64,
            ..options(132, 1 << 20)
        };
        let program = lower(&config, &options).unwrap();
        let is_qkv = |task: &Task| {
            let is_linear = task.opcode == Opcode::Linear as u16;
            is_linear && LinearArgs::unpack(task).y == program.plan.qkv
        };
        let is_first_part = |task: &Task| {
            let is_attention = task.opcode == Opcode::Attention as u16;
            is_attention && AttentionArgs::unpack(task).part_idx < 4
        };
        let without: Vec<u32> =
            (0..132).filter(|worker| tasks_of(&program, *worker, is_qkv) == 0).collect();
        assert_eq!(without, Vec::from_iter(132 - apart..132));
        // In each layer the same one; it keeps tasks of each layer that others wait for.
        let layers = config.layer_count as usize;
        for worker in without {
            assert_eq!(tasks_of(&program, worker, is_first_part), layers);
            let linear = |task: &Task| task.opcode == Opcode::Linear as u16;
            assert!(tasks_of(&program, worker, linear) > 2 * layers);
        }
    }
}

#[test]
fn few_workers_get_tiles_of_the_size_asked_for() {
    let tile_bytes = 128 << 10;
    for worker_count in [1, 2, 3] {
        let program = lowered(QWEN3_0_6B, worker_count, tile_bytes);
        for stage in stages(&program) {
            assert_eq!(stage.len() as u32 % worker_count, 0);
            for args in &stage {
                let bytes = args.weight_bytes();
                assert!((tile_bytes * 3 / 4..=tile_bytes + 4096).contains(&bytes), "{bytes}");
            }
        }
        let loads = loads(&program);
        let spread = loads.iter().max().unwrap() - loads.iter().min().unwrap();
        assert!(spread * 1000 < loads[0], "{loads:?}");
    }
}

#[test]
fn a_tile_may_cross_from_queries_to_keys() {
    let program = lowered(LLAMA_8B, 148, u64::MAX);
    let qkv = &stages(&program)[0];
    let crossing: Vec<_> = qkv
        .iter()
        .filter(|args| args.segments.iter().filter(|s| s.row_count > 0).count() > 1)
        .collect();
    assert_eq!(crossing.len(), 2);
    let [a, b, _] = crossing[0].segments;
    assert_eq!(a.out_first + a.row_count, 4096);
    assert_eq!((b.out_first, b.weights), (4096, 4 << TENSOR_SHIFT));
}

#[test]
fn every_worker_has_a_task() {
    let json = r#"{"model_type": "llama", "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 5,
        "max_position_embeddings": 4096}"#;
    let program = lowered(json, 300, 1);
    let (shared, own) = program.queue_spans.split_last().unwrap();
    assert_eq!((own.len(), shared.count), (300, 0));
    assert!(own.iter().all(|span| span.count > 0));
    assert_eq!(program.names.last().unwrap(), "idle worker 299");
}

#[test]
fn impossible_sizes_are_refused() {
    let config = ModelConfig::parse(QWEN3_0_6B).unwrap();
    let refusal = |edit: fn(&mut LowerOptions)| {
        let mut options = options(2, 1 << 17);
        edit(&mut options);
        lower(&config, &options).unwrap_err().to_string()
    };
    let text = refusal(|o| o.worker_count = 0);
    assert_eq!(
        text,
        "the model cannot be run: the number of workers is 0, which is not in 1 to 2048"
    );
    assert!(refusal(|o| o.worker_count = 5000).contains("workers is 5000"));
    assert!(refusal(|o| o.step_tokens_max = 65).contains("step_tokens_max is 65"));
    assert!(refusal(|o| o.slot_count = u32::MAX).contains("slot_count is 4294967295"));
    assert!(refusal(|o| o.context_max = 0).contains("context_max is 0"));
    assert!(refusal(|o| o.context_max = 40_961).contains("40961 positions exceeds the 40960"));
}

#[test]
fn matrices_of_one_operator_share_their_format() {
    let lowered = |plain: &str| {
        let quantisation = format!(
            r#", "quantization_config": {{"quant_method": "fp8", "weight_block_size": [128, 128],
            "modules_to_not_convert": [{plain}]}}}}"#
        );
        let json = QWEN3_0_6B.trim_end_matches('}').to_owned() + &quantisation;
        lower(&ModelConfig::parse(&json).unwrap(), &options(2, 1 << 17))
    };
    let program = lowered(r#""model.layers.3.mlp.down_proj", "model.layers.4.self_attn""#).unwrap();
    let stages = stages(&program);
    // Four operators a layer.
    for (idx, stage) in stages.iter().enumerate() {
        let is_plain = [3 * 4 + 3, 4 * 4, 4 * 4 + 1, 28 * 4].contains(&idx);
        let format = if is_plain { WeightFormat::Bf16 } else { WeightFormat::Fp8 };
        assert!(stage.iter().all(|args| args.format == format), "stage {idx}");
        // A strip's rows are not cut; gate and up have its halves.
        let unit = if stage[0].epilogue == Epilogue::SiluMul { 8 } else { 16 };
        let is_whole = |args: &LinearArgs| args.segments[0].out_first.is_multiple_of(unit);
        assert!(is_plain || stage.iter().all(is_whole), "stage {idx}");
    }
    // Names count bytes as they are stored: one for each value.
    let [query, rest @ ..] = &stages[0][1].segments;
    assert_eq!(query.weights & ((1 << TENSOR_SHIFT) - 1), u64::from(query.out_first) * 1024);
    assert!(query.out_first > 0 && rest.iter().all(|segment| segment.row_count == 0));
    for (plain, named) in [("k_proj", "k_proj.weight"), ("model.layers.0.mlp.up_proj", "up_proj")] {
        let text = lowered(&format!("{plain:?}")).unwrap_err().to_string();
        assert!(text.contains(named) && text.contains("is FP8 and `model.layers.0"), "{text}");
    }
}
