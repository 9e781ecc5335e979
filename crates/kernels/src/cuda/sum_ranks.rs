//! Sums over ranks on a device, in the order of the ranks.

use super::launch::Sealed;
use super::{DevicePtr, FloatType, Launch, LaunchPlan, Params, Source};

/// Sums of numbers of each type that are written as f32.
const WIDE: [&str; 3] = ["sum_ranks_f32_to_f32", "sum_ranks_bf16_to_f32", "sum_ranks_f16_to_f32"];
/// ... and as what they are.
const SAME: [&str; 3] = ["sum_ranks_f32_to_f32", "sum_ranks_bf16_to_bf16", "sum_ranks_f16_to_f16"];
pub(super) const ENTRIES: &[&[&str]] = &[&WIDE, &[SAME[1], SAME[2]]];

/// `sum = terms[0] + terms[1] + ...`, added in that order in f32 and rounded once, as [`crate::reduce::sum_in_order`].
///
/// # Shapes
/// - `terms`: `[num_terms, numel]`, rows `stride` elements apart, of the launch's type
/// - `sum`: `[numel]`, of that type or f32; apart from the terms
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct SumRanks {
    /// Read.
    pub terms: DevicePtr,
    /// Written.
    pub sum: DevicePtr,
    /// Elements from the begin of a term to that of the next.
    pub stride: u64,
    /// Elements of a term.
    pub numel: u64,
    /// At least one.
    pub num_terms: u32,
}

/// What the sum is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SumType {
    /// f32.
    F32,
    /// The type of the terms.
    Same,
}

impl SumRanks {
    /// The call for terms of type `terms`.
    ///
    /// # Panics
    /// If there is no term.
    pub fn launch(self, terms: FloatType, sum: SumType) -> Launch<Self> {
        assert!(self.num_terms > 0, "a sum has at least one term");
        let names = match sum {
            SumType::F32 => WIDE,
            SumType::Same => SAME,
        };
        let per_thread = match sum {
            SumType::F32 => FloatType::F32.vector_numel(),
            SumType::Same => terms.vector_numel(),
        };
        let plan = LaunchPlan::elements(self.numel, per_thread);
        Launch::new(Source::SumRanks, terms.pick(names), plan, self)
    }
}

impl Sealed for SumRanks {}
impl Params for SumRanks {}
