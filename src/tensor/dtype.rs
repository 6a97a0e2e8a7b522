//! Element types of files and tensors, and how parameters are stored.

use super::{narrowed, widened};

/// Element type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// 32-bit IEEE float: the type of all CPU arithmetic.
    F32,
    /// 64-bit IEEE float.
    F64,
    /// 16-bit float with 8 exponent bits.
    Bf16,
    /// 16-bit IEEE float.
    F16,
    /// Unsigned 8-bit integer.
    U8,
    /// Signed 8-bit integer.
    I8,
    /// Signed 16-bit integer.
    I16,
    /// Signed 32-bit integer.
    I32,
    /// Signed 64-bit integer.
    I64,
    /// One byte, 0 or 1.
    Bool,
}

impl DType {
    /// Bytes of one element.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            DType::F64 | DType::I64 => 8,
            DType::F32 | DType::I32 => 4,
            DType::Bf16 | DType::F16 | DType::I16 => 2,
            DType::U8 | DType::I8 | DType::Bool => 1,
        }
    }
}

/// How the filters of convolutions and the activations between operations are stored. All other parameters are f32. The
/// processor computes in f32 whatever is stored; a card multiplies in 16 bits what is stored so, and adds in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Precision {
    /// As they are.
    #[default]
    F32,
    /// Rounded to bf16 (to nearest, ties to even): half the memory. A value moves by 2^-8 of itself at most. What an
    /// operation stores is, to the bit, what the same operation makes of rounded values stored as f32, rounded.
    Bf16,
    /// Rounded to IEEE half floats, on cards that have no bf16: more digits, but values past 65504 are infinite. Not on the
    /// processor.
    F16,
}

impl Precision {
    /// "f32", "bf16" or "f16".
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
            Precision::F16 => "f16",
        }
    }

    /// Bytes of one value.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Precision::F32 => 4,
            Precision::Bf16 | Precision::F16 => 2,
        }
    }

    /// A value as it comes back from storage.
    #[must_use]
    pub fn round(self, value: f32) -> f32 {
        match self {
            Precision::F32 => value,
            Precision::Bf16 => widened(narrowed(value)),
            Precision::F16 => half::f16::from_f32(value).to_f32(),
        }
    }
}
