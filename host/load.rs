//! Checkpoints: a directory of `config.json` and safetensors files, or both embedded in the binary.
//!
//! Invariant: after `open` every tensor's bytes lie inside its file, do not overlap, and fit its
//! shape; nothing in a file can cause a panic or an allocation that the file's own size does not
//! bound. Files are mapped, not read; `copied` moves what is needed into huge pages, `DummyWeights`
//! makes weights up. Knows names and shapes, not networks.
//!
//! Residual risk: a process that truncates a mapped file later makes reads fault (SIGBUS); one that
//! writes to it changes weights under the engine. `copied` ends both when it returns.

mod arena;
mod copy;
mod dummy;
mod error;
mod header;
mod index;

pub use arena::Arena;
pub use copy::copied;
pub use dummy::DummyWeights;
pub use error::LoadError;

use error::shorten;
use header::Entry;
use memmap2::Mmap;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use tilert_mk_model::weights::{TensorView, WeightSource};

/// Largest `config.json`, `generation_config.json` and index accepted, in bytes.
const TEXT_BYTES_MAX: u64 = 32 << 20;

/// Name and shape (outermost axis first) of each tensor that a model needs.
pub type Needed = [(String, Vec<u64>)];

/// The bytes of one safetensors file.
enum Bytes {
    Static(&'static [u8]),
    Mapped(Mmap),
}

/// One safetensors file.
struct Shard {
    path: PathBuf,
    bytes: Bytes,
}

impl Shard {
    /// Maps a file.
    fn map(path: PathBuf) -> Result<Self, LoadError> {
        let file = open_file(&path)?;
        // SAFETY: the map is read-only and private to this `Shard`; nothing in this process writes
        // the file. Another process could: that is the residual risk in the head of this file.
        let map = unsafe { Mmap::map(&file) };
        match map {
            Ok(map) => Ok(Self { path, bytes: Bytes::Mapped(map) }),
            Err(source) => Err(LoadError::File { path, source }),
        }
    }

    fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Static(bytes) => bytes,
            Bytes::Mapped(map) => map,
        }
    }
}

/// A tensor and the shard it is in.
struct Place {
    shard_idx: usize,
    entry: Entry,
}

/// An opened checkpoint.
pub struct Checkpoint {
    /// The directory, or a made-up name for an embedded checkpoint.
    path: PathBuf,
    config: Cow<'static, str>,
    generation_config: Option<String>,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Place>,
}

impl Checkpoint {
    /// Opens `config.json`, `generation_config.json` if there is one, and `model.safetensors` or,
    /// without that, the files named by `model.safetensors.index.json`.
    ///
    /// Errors:  `LoadError` for the first file that is missing, unreadable or malformed.
    /// Cost:    maps the files and reads their headers; no weight is touched.
    pub fn open(dir: &Path) -> Result<Self, LoadError> {
        let config_path = dir.join("config.json");
        let config = read_text(&config_path)?.ok_or_else(|| LoadError::missing(config_path))?;
        let mut checkpoint = Self {
            path: dir.to_owned(),
            config: Cow::Owned(config),
            generation_config: read_text(&dir.join("generation_config.json"))?,
            shards: Vec::new(),
            tensors: BTreeMap::new(),
        };
        let single = dir.join("model.safetensors");
        let index_path = dir.join("model.safetensors.index.json");
        if single.exists() {
            checkpoint.add_shard(Shard::map(single)?, |_| true)?;
        } else if let Some(text) = read_text(&index_path)? {
            let index = index::parse(&index_path, &text)?;
            for (file_name, names) in &index {
                let path = dir.join(file_name);
                checkpoint.add_shard(Shard::map(path.clone())?, |name| names.contains(name))?;
                if let Some(name) = names.iter().find(|n| !checkpoint.tensors.contains_key(*n)) {
                    return Err(LoadError::Missing { path, name: shorten(name) });
                }
            }
        } else {
            return Err(LoadError::NoWeights { dir: dir.to_owned() });
        }
        Ok(checkpoint)
    }

    /// A checkpoint that is part of the binary: the text of `config.json`, one safetensors file.
    ///
    /// Errors:  `LoadError` for a malformed file.
    pub fn from_bytes(config: &'static str, weights: &'static [u8]) -> Result<Self, LoadError> {
        let mut checkpoint = Self {
            path: PathBuf::from("(embedded)"),
            config: Cow::Borrowed(config),
            generation_config: None,
            shards: Vec::new(),
            tensors: BTreeMap::new(),
        };
        let path = PathBuf::from("(embedded)/model.safetensors");
        checkpoint.add_shard(Shard { path, bytes: Bytes::Static(weights) }, |_| true)?;
        Ok(checkpoint)
    }

    /// Takes those tensors of a file that are `wanted`.
    fn add_shard(&mut self, shard: Shard, wanted: impl Fn(&str) -> bool) -> Result<(), LoadError> {
        let shard_idx = self.shards.len();
        for (name, entry) in header::parse(&shard.path, shard.bytes())? {
            if wanted(&name) {
                self.tensors.insert(name, Place { shard_idx, entry });
            }
        }
        self.shards.push(shard);
        Ok(())
    }

    /// Text of `config.json`.
    pub fn config_text(&self) -> &str {
        &self.config
    }

    /// Text of `generation_config.json`, if there is one.
    pub fn generation_config_text(&self) -> Option<&str> {
        self.generation_config.as_deref()
    }

    /// Names of all tensors, of supported and other types, in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The tensor of that name.
    ///
    /// Errors:  `Missing`, or `Dtype` if its elements are not F32, F16, BF16 or F8_E4M3.
    pub fn require(&self, name: &str) -> Result<TensorView<'_>, LoadError> {
        let missing = || LoadError::Missing { path: self.path.clone(), name: shorten(name) };
        let place = self.tensors.get(name).ok_or_else(missing)?;
        let shard = self.shards.get(place.shard_idx).ok_or_else(missing)?;
        let Entry { dtype, stored_dtype, shape, range } = &place.entry;
        let Some(dtype) = *dtype else {
            let (path, dtype) = (shard.path.clone(), *stored_dtype);
            return Err(LoadError::Dtype { path, name: shorten(name), dtype });
        };
        let data = shard.bytes().get(range.clone()).ok_or_else(missing)?;
        Ok(TensorView { dtype, shape, data })
    }

    /// The tensor of that name, if it has this shape.
    ///
    /// Errors:  as `require`, and `Shape`.
    pub fn expect_shape(&self, name: &str, shape: &[u64]) -> Result<TensorView<'_>, LoadError> {
        let view = self.require(name)?;
        if view.shape == shape {
            return Ok(view);
        }
        Err(LoadError::Shape {
            path: self.path.clone(),
            name: shorten(name),
            found: view.shape.to_vec(),
            expected: shape.to_vec(),
        })
    }

    /// Whether every tensor of a supported type starts at a multiple of its element's size, so that
    /// its bytes may be viewed as elements in place. If not, use `copied`, which aligns everything.
    pub fn is_aligned(&self) -> bool {
        self.tensors.keys().filter_map(|name| self.tensor(name)).all(|view| {
            let address = view.data.as_ptr().addr() as u64;
            view.data.is_empty() || address.is_multiple_of(view.dtype.byte_count())
        })
    }
}

impl WeightSource for Checkpoint {
    fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        self.require(name).ok()
    }
}

/// Opens a regular file, or a link to one.
fn open_file(path: &Path) -> Result<File, LoadError> {
    let file_error = |source| LoadError::File { path: path.to_owned(), source };
    // Asked before `open`, which would wait for a writer if this were a pipe.
    if !std::fs::metadata(path).map_err(file_error)?.is_file() {
        return Err(LoadError::NotFile { path: path.to_owned() });
    }
    File::open(path).map_err(file_error)
}

/// The text of a file of bounded size; `None` if there is no such file.
fn read_text(path: &Path) -> Result<Option<String>, LoadError> {
    let file = match open_file(path) {
        Ok(file) => file,
        Err(LoadError::File { source, .. }) if source.kind() == ErrorKind::NotFound => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let mut text = String::new();
    match file.take(TEXT_BYTES_MAX + 1).read_to_string(&mut text) {
        Ok(byte_count) if byte_count as u64 > TEXT_BYTES_MAX => {
            Err(LoadError::TooLong { path: path.to_owned(), bytes_max: TEXT_BYTES_MAX })
        }
        Ok(_) => Ok(Some(text)),
        Err(source) => Err(LoadError::File { path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
