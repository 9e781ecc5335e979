//! Elements on the wire.
//!
//! With Ψ padded elements and N ranks, a reduce-scatter or an all-gather of everything sends (N-1)/N Ψ from each rank.
//!
//! | stage | a step without accumulation |
//! |---|---|
//! | 0 | reduce-scatter and all-gather of gradients: 2Ψ |
//! | 1, 2 | reduce-scatter of gradients, all-gather of parameters: 2Ψ |
//! | 3 | reduce-scatter of gradients, all-gather of parameters for forward and again for backward: 3Ψ |
//!
//! # Source
//! ZeRO (arXiv:1910.02054) section 7.

use crate::ZeroStage;
use crate::layout::UnitLayout;

/// Elements that each rank sends in one step.
///
/// `num_gathers` of a unit is how often a micro-batch uses it in forward and backward: 2, or 4 if two layers share it.
pub fn step_elements(
    units: &[UnitLayout],
    stage: ZeroStage,
    grad_accum_steps: usize,
    num_gathers: impl Fn(&UnitLayout) -> usize,
) -> usize {
    let per_unit = |unit: &UnitLayout| {
        let sent = unit.padded_numel - unit.shard_numel();
        let reduces =
            usize::from(unit.trainable) * if stage.shards_gradients() { grad_accum_steps } else { 1 };
        let gathers = if stage.shards_parameters() {
            num_gathers(unit) * grad_accum_steps
        } else {
            usize::from(unit.trainable)
        };
        sent * (reduces + gathers)
    };
    units.iter().map(per_unit).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::param::{Init, ParamSpec};

    #[test]
    fn the_papers_table() {
        for n in [1usize, 2, 4, 8] {
            let param = ParamSpec::new("l", "w", &[1 << 20], Init::Zeros);
            let units = [UnitLayout::new("l", true, vec![param], n)];
            let psi = 1 << 20;
            for (stage, times) in ZeroStage::ALL.into_iter().zip([2, 2, 2, 3]) {
                assert_eq!(step_elements(&units, stage, 1, |_| 2), times * psi * (n - 1) / n);
            }
        }
    }
}
