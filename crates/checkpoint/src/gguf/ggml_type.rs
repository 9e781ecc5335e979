//! Element types of a GGUF file.
//!
//! Most are quantised: a block of numbers shares one or two scales. The sizes of all types are known, so that every
//! file can be checked and listed; [`GgmlType::is_readable`] says which can be turned into numbers.

use std::fmt;

macro_rules! ggml_types {
    ($($variant:ident = $id:literal, $name:literal, $elements:literal, $bytes:literal;)*) => {
        /// The element type of a tensor in a GGUF file.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[allow(missing_docs, non_camel_case_types)] // the names are those of the format
        #[non_exhaustive]
        pub enum GgmlType { $($variant = $id,)* }

        impl GgmlType {
            /// The type that a file writes as `id`.
            pub const fn from_id(id: u32) -> Option<GgmlType> {
                match id { $($id => Some(GgmlType::$variant),)* _ => None }
            }

            /// The name that the format gives it.
            pub const fn name(self) -> &'static str {
                match self { $(GgmlType::$variant => $name,)* }
            }

            /// Elements of one block; 1 if it is not quantised.
            pub const fn block_numel(self) -> usize {
                match self { $(GgmlType::$variant => $elements,)* }
            }

            /// Bytes of one block.
            pub const fn block_bytes(self) -> usize {
                match self { $(GgmlType::$variant => $bytes,)* }
            }
        }

        #[cfg(test)]
        pub(super) const ALL: &[GgmlType] = &[$(GgmlType::$variant,)*];
    };
}

// Numbers that are missing were given to types that no longer exist.
ggml_types! {
    F32 = 0, "F32", 1, 4;
    F16 = 1, "F16", 1, 2;
    Q4_0 = 2, "Q4_0", 32, 18;
    Q4_1 = 3, "Q4_1", 32, 20;
    Q5_0 = 6, "Q5_0", 32, 22;
    Q5_1 = 7, "Q5_1", 32, 24;
    Q8_0 = 8, "Q8_0", 32, 34;
    Q8_1 = 9, "Q8_1", 32, 40;
    Q2_K = 10, "Q2_K", 256, 84;
    Q3_K = 11, "Q3_K", 256, 110;
    Q4_K = 12, "Q4_K", 256, 144;
    Q5_K = 13, "Q5_K", 256, 176;
    Q6_K = 14, "Q6_K", 256, 210;
    Q8_K = 15, "Q8_K", 256, 292;
    Iq2Xxs = 16, "IQ2_XXS", 256, 66;
    Iq2Xs = 17, "IQ2_XS", 256, 74;
    Iq3Xxs = 18, "IQ3_XXS", 256, 98;
    Iq1S = 19, "IQ1_S", 256, 50;
    Iq4Nl = 20, "IQ4_NL", 32, 18;
    Iq3S = 21, "IQ3_S", 256, 110;
    Iq2S = 22, "IQ2_S", 256, 82;
    Iq4Xs = 23, "IQ4_XS", 256, 136;
    I8 = 24, "I8", 1, 1;
    I16 = 25, "I16", 1, 2;
    I32 = 26, "I32", 1, 4;
    I64 = 27, "I64", 1, 8;
    F64 = 28, "F64", 1, 8;
    Iq1M = 29, "IQ1_M", 256, 56;
    Bf16 = 30, "BF16", 1, 2;
    Tq1_0 = 34, "TQ1_0", 256, 54;
    Tq2_0 = 35, "TQ2_0", 256, 66;
    Mxfp4 = 39, "MXFP4", 32, 17;
}

impl GgmlType {
    const READABLE: [GgmlType; 11] = {
        use GgmlType::*;
        [F32, F16, Bf16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K]
    };

    /// Whether elements of this type can be read as `f32`.
    pub fn is_readable(self) -> bool {
        Self::READABLE.contains(&self)
    }

    /// Bytes of a tensor, given its size along each dimension, the one that varies fastest first; `None` if that is
    /// not a whole, addressable number of blocks in each row.
    pub(super) fn tensor_bytes(self, sizes: &[u64]) -> Option<(usize, u64)> {
        let numel = sizes.iter().try_fold(1u64, |numel, &size| numel.checked_mul(size))?;
        let row = sizes.first().copied().unwrap_or(1);
        if numel == 0 || !row.is_multiple_of(self.block_numel() as u64) {
            return None;
        }
        let num_bytes = (numel / self.block_numel() as u64).checked_mul(self.block_bytes() as u64)?;
        // Four bytes of memory for each element must be addressable too.
        let numel = usize::try_from(numel).ok().filter(|numel| numel.checked_mul(4).is_some())?;
        Some((numel, num_bytes))
    }

    pub(super) fn readable_names() -> String {
        Self::READABLE.map(|ggml_type| format!("`{ggml_type}`")).join(", ")
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_are_no_whole_blocks_or_overflow_are_refused() {
        assert_eq!(GgmlType::Q4_1.tensor_bytes(&[64, 3]), Some((192, 120)));
        assert_eq!(GgmlType::F32.tensor_bytes(&[]), Some((1, 4)));
        for sizes in [&[48, 2][..], &[0, 32], &[32, u64::MAX], &[1 << 60, 1 << 3], &[1 << 62]] {
            assert_eq!(GgmlType::Q8_0.tensor_bytes(sizes), None, "{sizes:?}");
        }
    }

    #[test]
    fn numbers_and_types_go_back_and_forth() {
        for &ggml_type in ALL {
            assert_eq!(GgmlType::from_id(ggml_type as u32), Some(ggml_type));
        }
        assert_eq!(GgmlType::from_id(4), None);
    }
}
