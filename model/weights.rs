//! Where weights come from, seen from the model: named tensors of raw little-endian elements.
//!
//! Invariant: a view owns nothing and promises nothing about alignment; whoever needs aligned
//! elements checks or copies. The host implements `WeightSource` over files and over dummy data;
//! the model knows neither.

use half::{bf16, f16};
use std::fmt;

use crate::quantise::{e4m3_from_f32, e4m3_to_f32};

/// Element type of a stored weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// The upper half of an `F32`.
    Bf16,
    /// Binary8 with 4 bits of exponent; a weight is such a value times its block's scale.
    F8E4m3,
}

impl Dtype {
    /// Size of an element in bytes.
    pub const fn byte_count(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::F8E4m3 => 1,
        }
    }

    /// The name in a safetensors header.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::F8E4m3 => "F8_E4M3",
        }
    }

    /// Appends one element, rounded to nearest even.
    pub fn append(self, value: f32, bytes: &mut Vec<u8>) {
        match self {
            Self::F32 => bytes.extend(value.to_le_bytes()),
            Self::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
            Self::Bf16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
            Self::F8E4m3 => bytes.push(e4m3_from_f32(value)),
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.name())
    }
}

/// A borrowed tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorView<'a> {
    /// Element type.
    pub dtype: Dtype,
    /// Axes, outermost first; a scalar has none.
    pub shape: &'a [u64],
    /// Elements, row-major, little-endian; `element_count * dtype.byte_count()` bytes, unaligned.
    pub data: &'a [u8],
}

impl TensorView<'_> {
    /// Product of the axes; `None` if it overflows.
    pub fn element_count(&self) -> Option<u64> {
        self.shape.iter().try_fold(1u64, |product, axis| product.checked_mul(*axis))
    }

    /// Whether `data` is exactly as long as `shape` and `dtype` say.
    pub fn is_consistent(&self) -> bool {
        let byte_count = self.element_count().and_then(|n| n.checked_mul(self.dtype.byte_count()));
        byte_count == Some(self.data.len() as u64)
    }

    /// All elements as `f32`, exactly and without scales. A trailing part of an element is ignored.
    pub fn to_f32(&self) -> Vec<f32> {
        let halves = self.data.as_chunks().0.iter();
        match self.dtype {
            Dtype::F32 => {
                let words = self.data.as_chunks().0.iter();
                words.map(|bytes| f32::from_le_bytes(*bytes)).collect()
            }
            Dtype::F16 => halves.map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect(),
            Dtype::Bf16 => halves.map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect(),
            Dtype::F8E4m3 => self.data.iter().map(|code| e4m3_to_f32(*code)).collect(),
        }
    }
}

/// Named tensors, readable for as long as the source lives.
pub trait WeightSource {
    /// The tensor of that name, or `None` if there is none in a supported element type.
    fn tensor(&self, name: &str) -> Option<TensorView<'_>>;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view<'a>(dtype: Dtype, shape: &'a [u64], data: &'a [u8]) -> TensorView<'a> {
        TensorView { dtype, shape, data }
    }

    #[test]
    fn widening_is_exact() {
        let values = [0.0f32, -1.5, 65504.0, f32::INFINITY];
        let single: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let half: Vec<u8> = values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
        assert_eq!(view(Dtype::F32, &[4], &single).to_f32(), values);
        assert_eq!(view(Dtype::F16, &[2, 2], &half).to_f32(), values);
        assert_eq!(view(Dtype::Bf16, &[1], &[0xc0, 0xbf]).to_f32(), [-1.5]);
        assert_eq!(view(Dtype::F8E4m3, &[2], &[0xbc, 0x7e]).to_f32(), [-1.5, 448.0]);
        assert!(view(Dtype::F16, &[1], &[0x00, 0x7e]).to_f32()[0].is_nan());
    }

    #[test]
    fn inconsistent_views_are_noticed() {
        assert!(view(Dtype::F32, &[], &[0; 4]).is_consistent());
        assert!(view(Dtype::Bf16, &[0, 3], &[]).is_consistent());
        assert!(!view(Dtype::F32, &[2], &[0; 4]).is_consistent());
        assert!(!view(Dtype::F32, &[u64::MAX, 2], &[0; 4]).is_consistent());
        assert_eq!(view(Dtype::F32, &[2], &[0; 7]).to_f32(), [0.0]);
    }
}
