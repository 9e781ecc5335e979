//! What gradients are on their way: in which types they are sent and summed, and by what they are divided when.
//!
//! ```text
//! one micro-batch's gradient  x before   rounded once   sum over ranks      stored        the step's factor
//! compute type ─────────────────────────► on the wire ──► f32, rank order ──► in the unit ──► x after
//! ```
//! Stages 0 and 1 with accumulation sum micro-batches first, in the type of the unit's gradient, and send those sums.
//!
//! By default nothing is divided or rounded on the way and the step's factor is the mean. `before` and `after` multiply to
//! the same mean (or sum): dividing early only moves numbers to where the wire's type can hold them. A power of two
//! changes no bit of a number in an exponent range as wide as f32's, so where everything is f32 or bf16 such a
//! division is left to the step. It is carried out for f16, and for all other divisors.
//!
//! One rank sends nothing: its gradients are neither divided nor cast. Where it is the only rank of the run and there is one micro-batch, the
//! gradient that layers made is the sum: it stays in their type, and the step widens it, which is exact.

use shardwise_device::DType;

/// How gradients are summed over micro-batches and ranks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ReductionOptions {
    /// What a unit's gradient is stored in: sums are rounded to it once with each micro-batch, and once over the ranks.
    pub accumulation_dtype: DType,
    /// What gradients are cast to before they are sent; if none, they are sent as they are: one micro-batch's in the
    /// compute type, sums in `accumulation_dtype`. The terms are sent in it; their sum, in stage 0, is sent back as it
    /// is stored.
    pub communication_dtype: Option<DType>,
    /// What gradients are divided by before they are sent.
    pub predivide: Predivide,
    /// What becomes of the ranks' gradients.
    pub op: GradientOp,
}

impl Default for ReductionOptions {
    fn default() -> Self {
        ReductionOptions {
            accumulation_dtype: DType::F32,
            communication_dtype: None,
            predivide: Predivide::By(1.0),
            op: GradientOp::Mean,
        }
    }
}

/// What gradients are divided by before they are sent; the rest of the division comes after.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Predivide {
    /// This number.
    By(f64),
    /// The number of ranks.
    ByNumRanks,
}

/// What becomes of the ranks' gradients. Micro-batches are averaged in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GradientOp {
    /// Their mean.
    Mean,
    /// Their sum, without a division by the number of ranks.
    Sum,
}

/// The options, worked out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Reduction {
    /// Type of the unit's gradient.
    pub sums: DType,
    communication: Option<DType>,
    /// Factor before sending.
    pub before: f32,
    /// Factor of the step.
    pub after: f64,
}

impl Reduction {
    /// For `num_ranks` data-parallel ranks, one of which may be the `only_rank` of the run.
    pub fn new(
        options: &ReductionOptions,
        compute: DType,
        grad_accum_steps: usize,
        num_ranks: usize,
        only_rank: bool,
    ) -> Self {
        let sums = match options.accumulation_dtype {
            DType::F32 if only_rank && grad_accum_steps == 1 => compute,
            dtype => dtype,
        };
        let communication = options.communication_dtype.filter(|_| num_ranks > 1);
        let mean = match options.op {
            GradientOp::Mean => 1.0 / (grad_accum_steps * num_ranks) as f64,
            GradientOp::Sum => 1.0 / grad_accum_steps as f64,
        };
        let before = (1.0 / options.predivide.divisor(num_ranks)) as f32;
        let has_f16 = [sums, communication.unwrap_or(compute)].contains(&DType::F16);
        if num_ranks == 1 || is_power_of_two(before) && !has_f16 {
            return Reduction { sums, communication, before: 1.0, after: mean };
        }
        // Divided by what is multiplied with, after rounding, so that the two cancel.
        Reduction { sums, communication, before, after: mean / f64::from(before) }
    }

    /// The type in which numbers of type `own` are sent.
    pub fn wire(&self, own: DType) -> DType {
        self.communication.unwrap_or(own)
    }

    /// Whether numbers of type `own` are sent as they are.
    pub fn sends_as_is(&self, own: DType) -> bool {
        self.wire(own) == own && self.before == 1.0
    }
}

impl Predivide {
    pub(crate) fn divisor(self, num_ranks: usize) -> f64 {
        match self {
            Predivide::By(factor) => factor,
            Predivide::ByNumRanks => num_ranks as f64,
        }
    }
}

fn is_power_of_two(x: f32) -> bool {
    x.is_normal() && x.to_bits().trailing_zeros() >= f32::MANTISSA_DIGITS - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_factors_are_the_mean_or_the_sum() {
        for num_ranks in [1usize, 2, 3, 7] {
            for predivide in
                [Predivide::By(1.0), Predivide::By(3.0), Predivide::By(0.5), Predivide::ByNumRanks]
            {
                for compute in [DType::F32, DType::F16] {
                    for (op, expected) in [(GradientOp::Mean, 4 * num_ranks), (GradientOp::Sum, 4)] {
                        let options = ReductionOptions { predivide, op, ..ReductionOptions::default() };
                        let reduction = Reduction::new(&options, compute, 4, num_ranks, num_ranks == 1);
                        let product = f64::from(reduction.before) * reduction.after * expected as f64;
                        assert!((product - 1.0).abs() < 1e-15, "{options:?}: {product}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_sum_of_one_gradient_is_kept_as_it_is() {
        let sums = |dtype, accum, only| {
            let options = ReductionOptions { accumulation_dtype: dtype, ..ReductionOptions::default() };
            Reduction::new(&options, DType::Bf16, accum, 1, only).sums
        };
        assert_eq!(sums(DType::F32, 1, true), DType::Bf16);
        assert_eq!(sums(DType::F16, 1, true), DType::F16, "as asked for: it rounds");
        // Micro-batches, and the uses of a table on other pipeline stages, are summed.
        assert_eq!((sums(DType::F32, 2, true), sums(DType::F32, 1, false)), (DType::F32, DType::F32));
    }

    #[test]
    fn only_what_shows_is_done_early() {
        let before = |predivide, compute, communication_dtype, num_ranks| {
            let options = ReductionOptions { predivide, communication_dtype, ..ReductionOptions::default() };
            Reduction::new(&options, compute, 1, num_ranks, num_ranks == 1).before
        };
        assert_eq!(before(Predivide::ByNumRanks, DType::F32, None, 4), 1.0);
        assert_eq!(before(Predivide::ByNumRanks, DType::F16, None, 4), 0.25);
        assert_eq!(before(Predivide::ByNumRanks, DType::F32, Some(DType::F16), 4), 0.25);
        assert_eq!(before(Predivide::ByNumRanks, DType::F16, Some(DType::F32), 4), 1.0);
        assert_eq!(before(Predivide::ByNumRanks, DType::F32, None, 3), 1.0 / 3.0);
        assert_eq!(before(Predivide::By(10.0), DType::Bf16, None, 4), 0.1);
        assert_eq!(before(Predivide::By(10.0), DType::F16, None, 1), 1.0);
        let powers = [1.0, 0.5, 4.0, f32::MIN_POSITIVE].map(is_power_of_two);
        assert_eq!((powers, [0.0, 3.0, f32::INFINITY].map(is_power_of_two)), ([true; 4], [false; 3]));
    }
}
