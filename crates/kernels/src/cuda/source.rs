//! The sources in the tree, and the kernels each has.

use super::{
    CudaKernelError, column_sums, cubin, dropout, gelu, lamb, layers, norm, optimizer, pack, row_norm, split,
    sum_ranks,
};

/// A text that sources include by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header<'a> {
    /// As in `#include "name"`.
    pub name: &'a str,
    /// CUDA C++.
    pub text: &'a str,
}

/// A text to compile, and what must come out of it.
#[derive(Debug, Clone, Copy)]
pub struct Program<'a> {
    /// Named in the compiler's messages.
    pub name: &'a str,
    /// CUDA C++.
    pub text: &'a str,
    /// What it may include.
    pub headers: &'a [Header<'a>],
    /// The names of kernels that machine code without is refused.
    pub entries: &'a [&'a [&'a str]],
}

impl Program<'_> {
    /// Whether `code` holds all kernels.
    ///
    /// # Errors
    /// [`CudaKernelError::MissingEntry`], [`CudaKernelError::NotCubin`].
    pub(super) fn check(&self, code: &[u8]) -> Result<(), CudaKernelError> {
        let names = cubin::entry_points(code)?;
        match self.entries.iter().copied().flatten().find(|entry| !names.iter().any(|name| name == *entry)) {
            None => Ok(()),
            Some(entry) => {
                Err(CudaKernelError::MissingEntry { program: self.name.into(), entry: (*entry).into() })
            }
        }
    }
}

/// A source in the tree: compiled, loaded and cached as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// Sums of columns.
    ColumnSums,
    /// Cross-entropy and its gradient.
    CrossEntropy,
    /// Cross-entropy over a split vocabulary.
    CrossEntropySplit,
    /// Dropout.
    Dropout,
    /// GELU of a sum with a bias, forward and backward.
    Gelu,
    /// LAMB's passes.
    Lamb,
    /// LayerNorm, forward and backward.
    LayerNorm,
    /// Sums of squares.
    Norm,
    /// Optimizer steps.
    Optimizer,
    /// Casts, scaling and sums of many arrays.
    Pack,
    /// RMS norm, forward and backward.
    RmsNorm,
    /// Rotary positions.
    Rotary,
    /// Sums over ranks.
    SumRanks,
    /// SwiGLU, forward and backward.
    Swiglu,
}

const HEADERS: &[Header<'static>] = &[
    Header { name: "numbers.cuh", text: include_str!("../../cuda/numbers.cuh") },
    Header { name: "reduce.cuh", text: include_str!("../../cuda/reduce.cuh") },
    Header { name: "row_norm.cuh", text: include_str!("../../cuda/row_norm.cuh") },
    Header { name: "softmax.cuh", text: include_str!("../../cuda/softmax.cuh") },
];

impl Source {
    /// All sources.
    pub const ALL: [Source; 14] = [
        Source::ColumnSums,
        Source::CrossEntropy,
        Source::CrossEntropySplit,
        Source::Dropout,
        Source::Gelu,
        Source::Lamb,
        Source::LayerNorm,
        Source::Norm,
        Source::Optimizer,
        Source::Pack,
        Source::RmsNorm,
        Source::Rotary,
        Source::SumRanks,
        Source::Swiglu,
    ];

    /// What is to be compiled.
    pub fn program(self) -> Program<'static> {
        macro_rules! source {
            ($file:literal, $entries:expr) => {
                Program {
                    name: $file,
                    text: include_str!(concat!("../../cuda/", $file)),
                    headers: HEADERS,
                    entries: $entries,
                }
            };
        }
        match self {
            Source::ColumnSums => source!("column_sums.cu", column_sums::ENTRIES),
            Source::CrossEntropy => source!("cross_entropy.cu", layers::CROSS_ENTROPY_ENTRIES),
            Source::CrossEntropySplit => source!("cross_entropy_split.cu", split::ENTRIES),
            Source::Dropout => source!("dropout.cu", dropout::ENTRIES),
            Source::Gelu => source!("gelu.cu", gelu::ENTRIES),
            Source::Lamb => source!("lamb.cu", lamb::ENTRIES),
            Source::LayerNorm => source!("layer_norm.cu", row_norm::LAYER_NORM_ENTRIES),
            Source::Norm => source!("norm.cu", norm::ENTRIES),
            Source::Optimizer => source!("optimizer.cu", optimizer::ENTRIES),
            Source::Pack => source!("pack.cu", pack::ENTRIES),
            Source::RmsNorm => source!("rms_norm.cu", row_norm::RMS_NORM_ENTRIES),
            Source::Rotary => source!("rotary.cu", layers::ROTARY_ENTRIES),
            Source::SumRanks => source!("sum_ranks.cu", sum_ranks::ENTRIES),
            Source::Swiglu => source!("swiglu.cu", layers::SWIGLU_ENTRIES),
        }
    }

    /// The names of its kernels.
    pub fn entries(self) -> impl Iterator<Item = &'static str> {
        self.program().entries.iter().flat_map(|names| names.iter().copied())
    }
}
