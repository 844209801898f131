//! Small checkpoints with matrices in FP8, made of the golden ones.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Dtype as FileDtype, TensorView as FileView};
use serde_json::{Value, json};
use tempfile::TempDir;
use tilert_mk::load::Checkpoint;
use tilert_mk_model::quantise::{fp8_code, fp8_scales};
use tilert_mk_model::weights::{Dtype, TensorView, WeightSource};

/// Rows and columns of a block.
pub(crate) const BLOCK: usize = 128;

/// A tensor of a file.
#[derive(Clone)]
pub(crate) struct Stored {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Vec<u8>,
}

impl Stored {
    pub(crate) fn values(&self) -> Vec<f32> {
        let shape: Vec<u64> = self.shape.iter().map(|axis| *axis as u64).collect();
        TensorView { dtype: self.dtype, shape: &shape, data: &self.data }.to_f32()
    }

    fn file_view(&self) -> FileView<'_> {
        let dtype = match self.dtype {
            Dtype::F32 => FileDtype::F32,
            Dtype::F16 => FileDtype::F16,
            Dtype::Bf16 => FileDtype::BF16,
            Dtype::F8E4m3 => FileDtype::F8_E4M3,
        };
        FileView::new(dtype, self.shape.clone(), &self.data).expect("bytes that fit the shape")
    }

    /// The same values as another type, rounded.
    pub(crate) fn cast(&self, dtype: Dtype) -> Stored {
        let mut data = Vec::new();
        self.values().into_iter().for_each(|value| dtype.append(value, &mut data));
        Stored { dtype, shape: self.shape.clone(), data }
    }
}

/// A checkpoint that is not written yet.
#[derive(Clone)]
pub(crate) struct Files {
    pub(crate) config: Value,
    pub(crate) tensors: BTreeMap<String, Stored>,
}

impl Files {
    /// A golden checkpoint.
    pub(crate) fn golden(name: &str) -> Files {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        let stored = Checkpoint::open(&path).expect("a golden checkpoint");
        let tensor = |name: &str| {
            let TensorView { dtype, shape, data } = stored.tensor(name).expect("a supported type");
            let shape = shape.iter().map(|axis| *axis as usize).collect();
            (name.to_owned(), Stored { dtype, shape, data: data.to_vec() })
        };
        let config = serde_json::from_str(stored.config_text()).expect("JSON");
        Files { config, tensors: stored.names().map(tensor).collect() }
    }

    /// The same in FP8 with scales of a type, but for the embedding, the head and the modules in
    /// whose names a word of `plain` is.
    pub(crate) fn in_fp8(mut self, scales_dtype: Dtype, plain: &[&str]) -> Files {
        let is_layer = |name: &String| name.ends_with("_proj.weight");
        let names: Vec<_> = self.tensors.keys().filter(|name| is_layer(name)).cloned().collect();
        let (names, kept): (Vec<_>, Vec<_>) =
            names.into_iter().partition(|name| !plain.iter().any(|word| name.contains(word)));
        for name in names {
            self.convert(&name, scales_dtype);
        }
        let modules: Vec<_> = kept.iter().map(|name| name.trim_end_matches(".weight")).collect();
        self.config["quantization_config"] = json!({"activation_scheme": "dynamic",
            "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": modules});
        self
    }

    /// Replaces a matrix by codes and scales.
    pub(crate) fn convert(&mut self, name: &str, scales_dtype: Dtype) {
        let matrix = &self.tensors[name];
        let (values, &[rows, columns]) = (matrix.values(), &matrix.shape[..]) else {
            panic!("{name} is no matrix");
        };
        let shape = vec![rows.div_ceil(BLOCK), columns.div_ceil(BLOCK)];
        let data = fp8_scales(&values, columns).iter().flat_map(|s| s.to_le_bytes()).collect();
        let scales = Stored { dtype: Dtype::F32, shape, data }.cast(scales_dtype);
        let (known, per_row) = (scales.values(), columns.div_ceil(BLOCK));
        let code = |(idx, value): (usize, &f32)| {
            let (row, column) = (idx / columns, idx % columns);
            fp8_code(*value, known[row / BLOCK * per_row + column / BLOCK])
        };
        let codes = values.iter().enumerate().map(code).collect();
        let codes = Stored { dtype: Dtype::F8E4m3, shape: vec![rows, columns], data: codes };
        self.tensors.insert(name.to_owned(), codes);
        self.tensors.insert(scales_name(name), scales);
    }

    /// Writes the checkpoint to a new folder.
    pub(crate) fn write(&self) -> TempDir {
        let folder = tempfile::tempdir().expect("a temporary folder");
        self.write_config(folder.path());
        let views = self.tensors.iter().map(|(name, tensor)| (name, tensor.file_view()));
        let path = folder.path().join("model.safetensors");
        safetensors::serialize_to_file(views, None, &path).expect("the file can be written");
        folder
    }

    /// Writes its config.json alone.
    pub(crate) fn write_config(&self, folder: &Path) {
        let text = self.config.to_string();
        std::fs::write(folder.join("config.json"), text).expect("the file can be written");
    }
}

/// The name of a matrix's scales.
pub(crate) fn scales_name(matrix: &str) -> String {
    format!("{matrix}_scale_inv")
}
