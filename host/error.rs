//! Operating errors: what went wrong, with which value, and what to do.

use std::path::PathBuf;

/// An error that a user can cause or meet. Each prints as one line.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A flag or argument that makes no sense; the process exits with 2.
    #[error("{0}")]
    Usage(String),
    /// A file that cannot be read or written.
    #[error("{path}: {source}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A `config.json` that does not describe a supported model.
    #[error("{path}: {source}", path = path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: tilert_mk_model::config::ConfigError,
    },
    /// A checkpoint that cannot be loaded.
    #[error(transparent)]
    Load(#[from] crate::load::LoadError),
    /// A model that cannot be lowered to a program.
    #[error(transparent)]
    Lower(#[from] tilert_mk_model::lower::LowerError),
    /// A tokenizer or chat template that cannot be used.
    #[error("{path}: {message}", path = path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A device that cannot be used.
    #[error("{0}")]
    Device(String),
    /// A request that cannot be served; the engine stays usable.
    #[error("{0}")]
    Request(String),
    /// A device that stopped on a fault.
    #[error("{0}")]
    Fault(String),
}

impl Error {
    /// The exit code of a process that ends with this error.
    pub fn exit_code(&self) -> u8 {
        if matches!(self, Error::Usage(_)) { 2 } else { 1 }
    }

    /// A file error for `path`.
    pub fn file(path: impl Into<PathBuf>, source: std::io::Error) -> Error {
        Error::File { path: path.into(), source }
    }
}

/// Result of most host functions.
pub type Result<T> = std::result::Result<T, Error>;
