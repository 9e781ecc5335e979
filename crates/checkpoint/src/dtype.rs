//! Element types of a safetensors file.
//!
//! All that the format defines can be listed, so that a checkpoint with a boolean mask or 8-bit tensors opens; only
//! the four wide float types can be read as `f32` or written.

use std::fmt;

use serde::{Deserialize, Serialize};
use shardwise_device::DType;

/// The element type of a tensor in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(missing_docs)] // the names are those of the format
#[non_exhaustive]
pub enum FileDType {
    F64,
    F32,
    F16,
    #[serde(rename = "BF16")]
    Bf16,
    I64,
    I32,
    I16,
    I8,
    U64,
    U32,
    U16,
    U8,
    #[serde(rename = "BOOL")]
    Bool,
    C64,
    #[serde(rename = "F8_E5M2")]
    F8E5M2,
    #[serde(rename = "F8_E4M3")]
    F8E4M3,
    #[serde(rename = "F8_E8M0")]
    F8E8M0,
    #[serde(rename = "F8_E4M3FNUZ")]
    F8E4M3Fnuz,
    #[serde(rename = "F8_E5M2FNUZ")]
    F8E5M2Fnuz,
    #[serde(rename = "F6_E2M3")]
    F6E2M3,
    #[serde(rename = "F6_E3M2")]
    F6E3M2,
    F4,
}

impl FileDType {
    /// Bits of one element; below 8, elements are packed.
    pub const fn size_bits(self) -> usize {
        use FileDType::*;
        match self {
            F64 | I64 | U64 | C64 => 64,
            F32 | I32 | U32 => 32,
            F16 | Bf16 | I16 | U16 => 16,
            I8 | U8 | Bool | F8E5M2 | F8E4M3 | F8E8M0 | F8E4M3Fnuz | F8E5M2Fnuz => 8,
            F6E2M3 | F6E3M2 => 6,
            F4 => 4,
        }
    }

    /// Bytes of `numel` elements; `None` if that overflows or is not a whole number of bytes.
    pub fn num_bytes(self, numel: usize) -> Option<usize> {
        let bits = numel.checked_mul(self.size_bits())?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }

    /// The name in the file.
    pub const fn name(self) -> &'static str {
        use FileDType::*;
        match self {
            F64 => "F64",
            F32 => "F32",
            F16 => "F16",
            Bf16 => "BF16",
            I64 => "I64",
            I32 => "I32",
            I16 => "I16",
            I8 => "I8",
            U64 => "U64",
            U32 => "U32",
            U16 => "U16",
            U8 => "U8",
            Bool => "BOOL",
            C64 => "C64",
            F8E5M2 => "F8_E5M2",
            F8E4M3 => "F8_E4M3",
            F8E8M0 => "F8_E8M0",
            F8E4M3Fnuz => "F8_E4M3FNUZ",
            F8E5M2Fnuz => "F8_E5M2FNUZ",
            F6E2M3 => "F6_E2M3",
            F6E3M2 => "F6_E3M2",
            F4 => "F4",
        }
    }

    /// Whether [`crate::HfReader`] can turn elements of this type into `f32`, and [`crate::HfWriter`] `f32` into it.
    pub const fn is_convertible(self) -> bool {
        matches!(self, FileDType::F64 | FileDType::F32 | FileDType::F16 | FileDType::Bf16)
    }
}

impl fmt::Display for FileDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl From<DType> for FileDType {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => FileDType::F32,
            DType::Bf16 => FileDType::Bf16,
            DType::F16 => FileDType::F16,
            DType::U8 => FileDType::U8,
        }
    }
}

#[cfg(test)]
pub(crate) const ALL: [FileDType; 22] = {
    use FileDType::*;
    [
        F64, F32, F16, Bf16, I64, I32, I16, I8, U64, U32, U16, U8, Bool, C64, F8E5M2, F8E4M3, F8E8M0,
        F8E4M3Fnuz, F8E5M2Fnuz, F6E2M3, F6E3M2, F4,
    ]
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_sizes_are_those_of_the_reference_crate() {
        for dtype in ALL {
            let json = serde_json::to_string(&dtype).unwrap();
            assert_eq!(json, format!("\"{}\"", dtype.name()));
            let reference: safetensors::Dtype = serde_json::from_str(&json).unwrap();
            assert_eq!(dtype.size_bits(), reference.bitsize(), "{dtype}");
        }
    }

    #[test]
    fn packed_elements_must_fill_whole_bytes() {
        assert_eq!(FileDType::F4.num_bytes(3), None);
        assert_eq!(FileDType::F4.num_bytes(4), Some(2));
        assert_eq!(FileDType::F64.num_bytes(usize::MAX / 2), None);
    }
}
