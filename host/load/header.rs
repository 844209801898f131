//! The header of a safetensors file: which tensor lies where.
//!
//! Format: 8 bytes little-endian length, that many bytes of JSON, then the data. The types are
//! those of the `safetensors` crate. Its own `read_metadata` (0.6.2) adds untrusted offsets without
//! a check for overflow and does not say which tensor is wrong, so the same rules are checked here,
//! with names; a test compares the two verdicts. Stricter than the crate: no name may occur twice.
//! Source: the format section of the safetensors README; every byte of data has exactly one owner.

use super::error::{LoadError, shorten};
use safetensors::tensor::TensorInfo;
use serde::de::{self, MapAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;
use tilert_mk_model::weights::Dtype;

/// Bytes before the JSON text.
const LENGTH_BYTES: usize = 8;
/// Longest JSON text accepted; 100,000 tensors need about half of it.
const HEADER_BYTES_MAX: u64 = 32 << 20;

/// One tensor of a file.
#[derive(Debug)]
pub(super) struct Entry {
    /// Element type, `None` if it is not supported.
    pub(super) dtype: Option<Dtype>,
    /// Element type as the file says.
    pub(super) stored_dtype: safetensors::Dtype,
    /// Axes, outermost first.
    pub(super) shape: Vec<u64>,
    /// Where its elements are, from the start of the file.
    pub(super) range: Range<usize>,
}

/// All tensors of a file, with ranges that lie inside `bytes` and fit their shapes.
///
/// Errors:  `Header` or `Tensor`.
pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<Vec<(String, Entry)>, LoadError> {
    let refuse = |reason: String| LoadError::Header { path: path.to_owned(), reason };
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(refuse(format!("it has only {} bytes", bytes.len())));
    };
    let length = u64::from_le_bytes(*length);
    if length > HEADER_BYTES_MAX {
        let bound = "more than the accepted";
        return Err(refuse(format!("a header of {length} bytes, {bound} {HEADER_BYTES_MAX}")));
    }
    // Below 2^25, so the cast is exact.
    let Some((text, data)) = rest.split_at_checked(length as usize) else {
        let left = rest.len();
        return Err(refuse(format!("a header of {length} bytes, but only {left} follow")));
    };
    let malformed =
        |reason: &dyn fmt::Display| refuse(format!("the header is malformed: {reason}"));
    let json = std::str::from_utf8(text).map_err(|error| malformed(&error))?;
    let Header(mut tensors) = serde_json::from_str(json).map_err(|error| malformed(&error))?;
    // Order of offsets; an empty tensor comes before the one that begins at the same place.
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let data_start = LENGTH_BYTES + text.len();
    let mut entries = Vec::with_capacity(tensors.len());
    let mut end = 0;
    for (name, info) in tensors {
        match place(&info, end, data.len()) {
            Ok(next) => end = next,
            Err(reason) => {
                let name = shorten(&name);
                return Err(LoadError::Tensor { path: path.to_owned(), name, reason });
            }
        }
        entries.push((name, entry(info, data_start)));
    }
    if end != data.len() {
        let extra = data.len() - end;
        return Err(refuse(format!("{extra} bytes at its end belong to no tensor")));
    }
    Ok(entries)
}

/// Checks one tensor against the end of the one before; gives its own end, which is in the file.
fn place(info: &TensorInfo, previous_end: usize, data_bytes: usize) -> Result<usize, String> {
    let (start, end) = info.data_offsets;
    if end < start {
        return Err(format!("ends at byte {end}, before its start {start}"));
    }
    if end > data_bytes {
        return Err(format!("ends at byte {end} of the data, of which there are {data_bytes}"));
    }
    if start < previous_end {
        return Err(format!(
            "starts at byte {start}, inside the tensor that ends at {previous_end}"
        ));
    }
    if start > previous_end {
        return Err(format!("starts at byte {start}, after a gap that begins at {previous_end}"));
    }
    let bit_count =
        info.shape.iter().try_fold(info.dtype.bitsize(), |n, axis| n.checked_mul(*axis));
    if bit_count.is_none_or(|bits| bits % 8 != 0 || bits / 8 != end - start) {
        let (byte_count, shape) = (end - start, &info.shape);
        // A hostile header may list very many axes.
        let shape = shorten(&format!("{shape:?}"));
        let dtype = info.dtype;
        return Err(format!("has {byte_count} bytes, which do not fit {dtype:?} {shape}"));
    }
    Ok(end)
}

/// The entry of a checked tensor. The sums are positions in the file, so they cannot overflow.
fn entry(info: TensorInfo, data_start: usize) -> Entry {
    let (start, end) = info.data_offsets;
    let dtype = match info.dtype {
        safetensors::Dtype::F32 => Some(Dtype::F32),
        safetensors::Dtype::F16 => Some(Dtype::F16),
        safetensors::Dtype::BF16 => Some(Dtype::Bf16),
        safetensors::Dtype::F8_E4M3 => Some(Dtype::F8E4m3),
        _ => None,
    };
    Entry {
        dtype,
        stored_dtype: info.dtype,
        shape: info.shape.into_iter().map(|axis| axis as u64).collect(),
        range: data_start + start..data_start + end,
    }
}

/// The JSON object: tensors by name, and metadata that nothing here needs.
struct Header(Vec<(String, TensorInfo)>);

impl<'de> de::Deserialize<'de> for Header {
    fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// Reads the object entry by entry, so that an error can name the tensor.
struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut tensors: BTreeMap<String, TensorInfo> = BTreeMap::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<Option<BTreeMap<String, String>>>()?;
                continue;
            }
            let named = |error: A::Error| {
                de::Error::custom(format!("tensor `{}`: {error}", shorten(&name)))
            };
            let info = map.next_value().map_err(named)?;
            if tensors.contains_key(&name) {
                return Err(named(de::Error::custom("it is described twice")));
            }
            tensors.insert(name, info);
        }
        Ok(Header(tensors.into_iter().collect()))
    }
}
