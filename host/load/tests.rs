//! Whole checkpoints: the golden ones, and one broken in every way that comes to mind.

use super::*;
use std::fs;
use tempfile::TempDir;
use tilert_mk_model::config::ModelConfig;
use tilert_mk_model::weights::Dtype;

/// A safetensors file: header text, then data.
pub(super) fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

/// The header entry of one tensor.
pub(super) fn tensor(name: &str, dtype: &str, shape: &[u64], offsets: [u64; 2]) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":{offsets:?}}}"#)
}

/// Two tensors, `a` of four f32 and `b` of two i64, and metadata.
pub(super) fn good_file() -> Vec<u8> {
    let (a, b) = (tensor("a", "F32", &[2, 2], [0, 16]), tensor("b", "I64", &[2], [16, 32]));
    let data: Vec<u8> = (0..32).collect();
    file(&format!(r#"{{"__metadata__":{{"format":"pt"}},{a},{b}}}"#), &data)
}

/// A directory with these files.
fn directory(files: &[(&str, &[u8])]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

fn error(files: &[(&str, &[u8])]) -> String {
    let message = Checkpoint::open(directory(files).path()).err().unwrap().to_string();
    assert!(!message.contains('\n'), "{message}");
    message
}

/// The error for a directory with these weights.
fn weights_error(weights: &[u8]) -> String {
    error(&[("config.json", b"{}"), ("model.safetensors", weights)])
}

#[test]
fn golden_checkpoints_open() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    for family in ["llama", "smollm2", "qwen3", "qwen3_yarn"] {
        for (variant, dtype) in [("f32", Dtype::F32), ("bf16", Dtype::Bf16)] {
            let checkpoint = Checkpoint::open(&golden.join(family).join(variant)).unwrap();
            let config = ModelConfig::parse(checkpoint.config_text()).unwrap();
            assert_eq!(checkpoint.generation_config_text(), None);
            let shape = [u64::from(config.vocab_size), u64::from(config.hidden_dim)];
            let view = checkpoint.expect_shape("model.embed_tokens.weight", &shape).unwrap();
            assert!(view.dtype == dtype && view.is_consistent());
            assert!(checkpoint.is_aligned());
            let needed: Vec<_> = checkpoint.names().map(str::to_owned).collect();
            let needed: Vec<(String, Vec<u64>)> = needed
                .into_iter()
                .map(|name| (name.clone(), checkpoint.require(&name).unwrap().shape.to_vec()))
                .collect();
            let before: Vec<_> =
                needed.iter().map(|(n, _)| checkpoint.require(n).unwrap().to_f32()).collect();
            let mut calls = Vec::new();
            let mut progress = |done, total| calls.push((done, total));
            let arena = copied(checkpoint, &needed, &mut progress).unwrap();
            for ((name, shape), before) in needed.iter().zip(before) {
                let view = arena.tensor(name).unwrap();
                assert_eq!((view.shape, view.to_f32()), (&shape[..], before));
                assert_eq!(view.data.as_ptr().addr() % arena::TENSOR_ALIGN, 0);
            }
            let (done, total) = *calls.last().unwrap();
            assert!(done == total && calls[0] == (0, total) && calls.is_sorted());
        }
    }
}

#[test]
fn unsupported_types_matter_only_where_they_are_needed() {
    let weights = good_file();
    let generation: &[u8] = b"{\"eos_token_id\": 2}";
    let dir = directory(&[
        ("config.json", b"{}"),
        ("generation_config.json", generation),
        ("model.safetensors", &weights),
    ]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.generation_config_text().map(str::as_bytes), Some(generation));
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(checkpoint.tensor("a").unwrap().data, (0..16).collect::<Vec<u8>>());
    assert!(checkpoint.tensor("b").is_none());
    let message = |result: Result<TensorView<'_>, LoadError>| result.unwrap_err().to_string();
    let path = dir.path().display().to_string();
    let dtype =
        format!("{path}/model.safetensors: tensor `b` has type I64, not F32, F16, BF16 or F8_E4M3");
    assert_eq!(message(checkpoint.require("b")), dtype);
    assert_eq!(message(checkpoint.require("c")), format!("{path} has no tensor `c`"));
    let shape = message(checkpoint.expect_shape("a", &[4]));
    let expected = "tensor `a` has shape [2, 2], the configuration needs [4]";
    assert_eq!(shape, format!("{path}: {expected}"));
    let needed = |name: &str| [(name.to_owned(), vec![2])];
    assert!(copied(checkpoint, &needed("b"), &mut |_, _| ()).is_err());
}

#[test]
fn missing_files_are_named() {
    let nowhere = Checkpoint::open(Path::new("/nonexistent")).err().unwrap().to_string();
    assert!(nowhere.starts_with("/nonexistent/config.json: "), "{nowhere}");
    assert!(error(&[]).contains("config.json: "));
    let text = error(&[("config.json", b"{}")]);
    assert!(text.contains("has neither model.safetensors nor model.safetensors.index.json"));
    assert!(error(&[("config.json", &[0xff])]).contains("config.json: "));
    let dir = directory(&[("config.json", b"{}")]);
    fs::create_dir(dir.path().join("model.safetensors")).unwrap();
    let text = Checkpoint::open(dir.path()).err().unwrap().to_string();
    assert!(text.ends_with("model.safetensors is not a regular file"), "{text}");
}

#[test]
fn overlong_text_is_refused() {
    let dir = directory(&[]);
    let config = File::create(dir.path().join("config.json")).unwrap();
    config.set_len(TEXT_BYTES_MAX + 1).unwrap();
    let text = Checkpoint::open(dir.path()).err().unwrap().to_string();
    assert!(text.contains("config.json is longer than 33554432 bytes"), "{text}");
}

#[test]
fn broken_headers_are_named() {
    let good = good_file();
    let with_length = |length: u64| [&length.to_le_bytes(), &good[8..]].concat();
    for (weights, expected) in [
        (vec![], "it has only 0 bytes"),
        (good[..7].to_vec(), "it has only 7 bytes"),
        (good[..8].to_vec(), "but only 0 follow"),
        (good[..40].to_vec(), "but only 32 follow"),
        (with_length(1 << 20), "a header of 1048576 bytes, but only"),
        (with_length(u64::MAX), "more than the accepted 33554432"),
        (with_length(0), "the header is malformed: EOF"),
        (with_length(20), "the header is malformed: "),
        (file("not json", &[]), "the header is malformed: expected"),
        (file("[]", &[]), "expected an object of tensors"),
        (file("{} {}", &[]), "trailing characters"),
        (file("{\"\u{0}\":1}", &[]), "the header is malformed: control character"),
        (file(r#"{"a":1}"#, &[]), "tensor `a`: invalid type"),
        (file(r#"{"a":{"dtype":"F3"}}"#, &[]), "tensor `a`: unknown variant `F3`"),
        (file("{}", &[0; 3]), "3 bytes at its end belong to no tensor"),
        ([&good[..], &[0]].concat(), "1 bytes at its end belong to no tensor"),
    ] {
        let message = weights_error(&weights);
        assert!(
            message.contains("model.safetensors is not a valid safetensors file: "),
            "{message}"
        );
        assert!(message.contains(expected), "{message:?} does not contain {expected:?}");
    }
}

#[test]
fn broken_tensors_are_named() {
    let f32s = |shape: &[u64], offsets| tensor("b", "F32", shape, offsets);
    let huge = u64::MAX;
    for (second, expected) in [
        (f32s(&[2], [12, 20]), "starts at byte 12, inside the tensor that ends at 16"),
        (f32s(&[2], [20, 28]), "starts at byte 20, after a gap that begins at 16"),
        (f32s(&[2], [24, 16]), "ends at byte 16, before its start 24"),
        (f32s(&[8], [16, 48]), "ends at byte 48 of the data, of which there are 32"),
        (f32s(&[huge], [16, huge]), "ends at byte 18446744073709551615"),
        (f32s(&[2], [16, 32]), "has 16 bytes, which do not fit F32 [2]"),
        (f32s(&[huge, huge], [16, 32]), "which do not fit F32 [18446744073709551615, "),
        (f32s(&[1 << 62, 4, 4], [16, 16]), "has 0 bytes, which do not fit F32"),
        (tensor("b", "F4", &[3], [16, 17]), "has 1 bytes, which do not fit F4 [3]"),
    ] {
        let first = tensor("a", "F32", &[4], [0, 16]);
        let message = weights_error(&file(&format!("{{{first},{second}}}"), &[0; 32]));
        assert!(message.contains("model.safetensors: tensor `b` "), "{message}");
        assert!(message.contains(expected), "{message:?} does not contain {expected:?}");
    }
}

#[test]
fn offsets_whose_sum_wraps_are_refused() {
    // Eight tensors that end just below 2^64: adding the header's length would wrap.
    let item = |i: u64| {
        let (start, end) = (i << 61, (i + 1).checked_mul(1 << 61).unwrap_or(u64::MAX - 7));
        tensor(&format!("t{i}"), "U8", &[end - start], [start, end])
    };
    let items: Vec<_> = (0..8).map(item).collect();
    let message = weights_error(&file(&format!("{{{}}}", items.join(",")), &[]));
    assert!(message.contains("tensor `t0` ends at byte 2305843009213693952"), "{message}");
}

#[test]
fn truncated_files_are_refused_at_every_length() {
    let good = good_file();
    for length in 0..good.len() {
        weights_error(&good[..length]);
    }
}

#[test]
fn shards_are_joined_and_checked() {
    let first = file(&format!("{{{}}}", tensor("a", "F32", &[1], [0, 4])), &[1; 4]);
    let second = file(&format!("{{{}}}", tensor("b", "F16", &[1], [0, 2])), &[2; 2]);
    let open = |map: &str, files: &[(&str, &[u8])]| {
        let index = format!(r#"{{"weight_map": {{{map}}}}}"#);
        let fixed: [(&str, &[u8]); 2] =
            [("config.json", b"{}"), ("model.safetensors.index.json", index.as_bytes())];
        let dir = directory(&[&fixed, files].concat());
        Checkpoint::open(dir.path()).map_err(|error| error.to_string())
    };
    let files: [(&str, &[u8]); 2] = [("x", &first), ("y", &second)];
    let both = open(r#""a": "x", "b": "y""#, &files).unwrap();
    assert_eq!(both.tensor("a").unwrap().data, [1; 4]);
    assert_eq!(both.tensor("b").unwrap().data, [2; 2]);
    // What the index does not list is not part of the checkpoint.
    assert!(open(r#""a": "x""#, &files).unwrap().tensor("b").is_none());
    let error = |map: &str, files| open(map, files).err().unwrap();
    assert!(error(r#""a": "x", "b": "x""#, &files).ends_with("/x has no tensor `b`"));
    assert!(error(r#""a": "x", "b": "y""#, &files[..1]).contains("/y: "));
    assert!(error(r#""a": "../x""#, &files).contains("tensor `a` is in `../x`; only names"));
    assert!(error(r#""a": 3"#, &files).contains("index.json is not a usable index: "));
}

#[test]
fn embedded_checkpoints_need_no_alignment() {
    // One byte after an aligned start, so that `a` is misaligned whatever the header's length is.
    let mut bytes = vec![0; 8];
    let offset =
        (0..4).find(|offset| (bytes.as_ptr().addr() + offset + good_file().len() - 32) % 4 == 1);
    bytes.truncate(offset.unwrap_or(0));
    bytes.extend(good_file());
    let leaked: &'static [u8] = Vec::leak(bytes);
    let data = leaked.len() - 32;
    let aligned_by = leaked[data..].as_ptr().addr() % 4;
    let start = leaked.len() - good_file().len();
    let checkpoint = Checkpoint::from_bytes("{}", &leaked[start..]).unwrap();
    assert_eq!(checkpoint.config_text(), "{}");
    assert_eq!(checkpoint.is_aligned(), aligned_by == 0);
    let needed = [("a".to_owned(), vec![2, 2]), ("a".to_owned(), vec![2, 2])];
    let arena = copied(checkpoint, &needed, &mut |_, _| ()).unwrap();
    assert_eq!(arena.byte_count(), 16);
    assert_eq!(arena.tensor("a").unwrap().data, (0..16).collect::<Vec<u8>>());
    assert!(Checkpoint::from_bytes("{}", b"").is_err());
}
