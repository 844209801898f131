//! The `--logits` file: safetensors with one tensor `logits [positions, vocab] f32`.
//!
//! Rows are written as they arrive; none is kept. The number of rows is known only at the end, so
//! room for the header is reserved first and filled by `finish`. A run that fails before `finish`
//! leaves a file whose header length is zero, which no reader accepts.

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Bytes of the JSON header, padded with spaces. A multiple of 8, so that the data is aligned.
const HEADER_BYTES: usize = 192;

// The longest header: two shape values and one offset of 20 digits each.
const _: () = assert!(HEADER_BYTES.is_multiple_of(8) && HEADER_BYTES >= 80 + 3 * 20);

/// A logits file that is being written.
#[derive(Debug)]
pub struct LogitsFile {
    path: PathBuf,
    writer: BufWriter<File>,
    row_count: u64,
    vocab_size: u64,
    row_bytes: Vec<u8>,
}

impl LogitsFile {
    /// Opens `path` for writing; done before a model is loaded, so that a bad path is seen early.
    pub fn create(path: &Path) -> Result<LogitsFile> {
        let file_error = |source| Error::file(path, source);
        let mut writer = BufWriter::new(File::create(path).map_err(file_error)?);
        writer.write_all(&[0; 8 + HEADER_BYTES]).map_err(file_error)?;
        writer.flush().map_err(file_error)?;
        Ok(LogitsFile {
            path: path.to_owned(),
            writer,
            row_count: 0,
            vocab_size: 0,
            row_bytes: Vec::new(),
        })
    }

    /// Appends the row of the next position. All rows have the same length.
    pub fn push(&mut self, row: &[f32]) -> Result<()> {
        debug_assert!(self.row_count == 0 || self.vocab_size == row.len() as u64);
        self.row_bytes.clear();
        self.row_bytes.extend(row.iter().flat_map(|logit| logit.to_le_bytes()));
        self.vocab_size = row.len() as u64;
        self.row_count += 1;
        self.writer.write_all(&self.row_bytes).map_err(|source| Error::file(&self.path, source))
    }

    /// Writes the header and closes the file.
    pub fn finish(mut self) -> Result<()> {
        let (rows, vocab) = (self.row_count, self.vocab_size);
        let end = rows * vocab * size_of::<f32>() as u64;
        let header = format!(
            r#"{{"logits":{{"dtype":"F32","shape":[{rows},{vocab}],"data_offsets":[0,{end}]}}}}"#
        );
        self.write_header(&header).map_err(|source| Error::file(&self.path, source))
    }

    fn write_header(&mut self, header: &str) -> std::io::Result<()> {
        self.writer.seek(SeekFrom::Start(0))?;
        self.writer.write_all(&(HEADER_BYTES as u64).to_le_bytes())?;
        write!(self.writer, "{header:HEADER_BYTES$}")?;
        self.writer.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_rows_are_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("logits.safetensors");
        let mut file = LogitsFile::create(&path).unwrap();
        let rows = [[1.0f32, -2.5, f32::MIN_POSITIVE], [0.0, 3.25, f32::NEG_INFINITY]];
        for row in &rows {
            file.push(row).unwrap();
        }
        file.finish().unwrap();

        let bytes = std::fs::read(&path).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(tensors.names(), ["logits"]);
        let logits = tensors.tensor("logits").unwrap();
        assert_eq!(logits.dtype(), safetensors::Dtype::F32);
        assert_eq!(logits.shape(), [2, 3]);
        let want: Vec<u8> = rows.iter().flatten().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(logits.data(), want);
    }

    #[test]
    fn longest_header_fits() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("long");
        let mut file = LogitsFile::create(&path).unwrap();
        let max = u64::MAX;
        let header = format!(
            r#"{{"logits":{{"dtype":"F32","shape":[{max},{max}],"data_offsets":[0,{max}]}}}}"#
        );
        assert!(header.len() <= HEADER_BYTES);
        file.write_header(&header).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 8 + HEADER_BYTES as u64);
    }

    #[test]
    fn an_unfinished_file_is_no_safetensors_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("unfinished");
        drop(LogitsFile::create(&path).unwrap());
        let bytes = std::fs::read(&path).unwrap();
        assert!(safetensors::SafeTensors::deserialize(&bytes).is_err());
    }

    #[test]
    fn an_unwritable_path_is_named() {
        let path = Path::new("/nonexistent-directory/logits");
        let error = LogitsFile::create(path).unwrap_err();
        assert!(error.to_string().starts_with("/nonexistent-directory/logits: "), "{error}");
    }
}
