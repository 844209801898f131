//! What can be wrong with a checkpoint. Every variant prints as one line that names the file and,
//! where there is one, the tensor.

use std::io;
use std::path::PathBuf;

/// Characters of a name from a file that an error message repeats.
const NAME_CHARS_MAX: usize = 120;

/// Why a checkpoint cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file cannot be opened, read or mapped.
    #[error("{path}: {source}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A directory, pipe or device where a file should be.
    #[error("{path} is not a regular file", path = path.display())]
    NotFile {
        /// The path.
        path: PathBuf,
    },
    /// A JSON file larger than any real one.
    #[error("{path} is longer than {bytes_max} bytes", path = path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// The bound.
        bytes_max: u64,
    },
    /// No weights beside the configuration.
    #[error(
        "{dir} has neither model.safetensors nor model.safetensors.index.json",
        dir = dir.display()
    )]
    NoWeights {
        /// The directory.
        dir: PathBuf,
    },
    /// An index that cannot be understood or that points outside its directory.
    #[error("{path} is not a usable index: {reason}", path = path.display())]
    Index {
        /// The index.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A safetensors file whose header cannot be understood.
    #[error("{path} is not a valid safetensors file: {reason}", path = path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A tensor whose description contradicts itself, its neighbours or the file.
    #[error("{path}: tensor `{name}` {reason}", path = path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// A tensor that is needed, or that the index promises, is not there.
    #[error("{path} has no tensor `{name}`", path = path.display())]
    Missing {
        /// The file or the checkpoint's directory.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// A needed tensor's elements are of a type that is not supported.
    #[error(
        "{path}: tensor `{name}` has type {dtype:?}, not F32, F16, BF16 or F8_E4M3",
        path = path.display()
    )]
    Dtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its type.
        dtype: safetensors::Dtype,
    },
    /// A needed tensor has another shape than the configuration says.
    #[error(
        "{path}: tensor `{name}` has shape {found:?}, the configuration needs {expected:?}",
        path = path.display()
    )]
    Shape {
        /// The checkpoint's directory.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Shape in the file.
        found: Vec<u64>,
        /// Shape by the configuration.
        expected: Vec<u64>,
    },
    /// The operating system has no memory for the weights.
    #[error("cannot reserve {byte_count} bytes of memory for weights: {source}")]
    Memory {
        /// Size of the reservation.
        byte_count: u64,
        /// What the operating system said.
        source: io::Error,
    },
    /// The shapes asked for do not fit an address space.
    #[error("the weights up to tensor `{name}` need more bytes than can be addressed")]
    Overflow {
        /// The tensor at which the sum overflowed.
        name: String,
    },
}

impl LoadError {
    /// The error for a file that must exist and does not.
    pub(super) fn missing(path: PathBuf) -> Self {
        Self::File { path, source: io::Error::from(io::ErrorKind::NotFound) }
    }
}

/// A name from a file, without control characters and cut to a length that fits a message.
pub(super) fn shorten(name: &str) -> String {
    let mut text: String = name.chars().take(NAME_CHARS_MAX).flat_map(char::escape_debug).collect();
    if name.chars().nth(NAME_CHARS_MAX).is_some() {
        text.push_str("...");
    }
    text
}
