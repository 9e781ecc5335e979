//! What becomes of a step: applied, skipped, or the end.
//!
//! All ranks know the sum of squares of the whole gradient, to the bit, and keep the same [`LossScaler`]: so they decide
//! alike without asking each other. Only a step that is not applied costs an exchange, to find out whose gradient
//! it was.
//!
//! [`LossScaler`]: crate::LossScaler

use shardwise_device::Slice;
use shardwise_kernels::norm;

use crate::unit::{GradState, Unit};
use crate::{Divergence, Found, LossScaling, OnNonFinite, SkipReason, StepOutcome, Verdict, Zero, ZeroError};

impl Zero {
    /// What this step comes to, and what follows from it for the loss scale.
    pub(crate) fn decide(&mut self, sum_of_squares: f64) -> Result<StepOutcome, ZeroError> {
        let max_consecutive = match self.options.on_non_finite {
            OnNonFinite::Skip { max_consecutive } if !sum_of_squares.is_finite() => max_consecutive,
            _ => {
                let Verdict::GoOn = self.scaler.update(Found::Finite) else {
                    unreachable!("the scale is lowered by overflows only")
                };
                return Ok(StepOutcome::Applied);
            }
        };
        let reason = self.first_non_finite()?;
        let scale = self.scaler.scale();
        let verdict = self.scaler.update(Found::NonFinite);
        let last_applied_step = self.scaler.last_applied_step();
        let num_skipped = self.scaler.state().num_consecutive_skips;
        let is_dynamic = matches!(self.options.loss_scaling, Some(LossScaling::Dynamic(_)));
        let error = match verdict {
            Verdict::AtMinimum => Divergence::LossScaleAtMinimum { reason, scale, last_applied_step },
            Verdict::GoOn if !is_dynamic && num_skipped >= max_consecutive => {
                Divergence::TooManySkips { reason, num_skipped, last_applied_step }
            }
            Verdict::GoOn => return Ok(StepOutcome::Skipped { reason }),
        };
        Ok(StepOutcome::Diverged { error })
    }

    /// The first parameter, in the order of units, whose gradient is not finite on some rank. One exchange, which only a
    /// step that is not applied pays.
    fn first_non_finite(&self) -> Result<SkipReason, ZeroError> {
        const NONE: [f64; 2] = [f64::INFINITY; 2];
        let own = |(index, unit): (usize, &Unit)| {
            let grad = self.owned_gradient(unit)?;
            let shard = unit.layout.shard_range(self.group_rank);
            let is_bad = |range| !norm::all_finite_of(self.threads(), grad.range(range));
            let found = unit.layout.fragments(shard).into_iter().find(|f| is_bad(f.local_range.clone()))?;
            Some([index as f64, found.slot as f64])
        };
        let mine = self.units.iter().enumerate().find_map(own).unwrap_or(NONE);
        let ranks = self.lane.exchange(&mine)?;
        let first = ranks.iter().min_by(|a, b| a[0].total_cmp(&b[0]).then(a[1].total_cmp(&b[1])));
        let first = first.expect("a group has a rank");
        // Gaps and padding are zeros that are never written, so an element that is not finite belongs to a parameter.
        let layout = &self.units[first[0] as usize].layout;
        let param = layout.slots[first[1] as usize].param.name.clone();
        Ok(SkipReason::NonFiniteGradient { unit: layout.name.clone(), param })
    }

    /// This rank's shard of a settled gradient, in every stage; none of a frozen unit.
    pub(crate) fn owned_gradient<'a>(&self, unit: &'a Unit) -> Option<Slice<'a>> {
        match &unit.trained.as_ref()?.grad {
            GradState::Full(full) => Some(full.view().range(unit.layout.shard_range(self.group_rank))),
            GradState::Shard(shard) => Some(shard.view()),
            _ => unreachable!("settled before it is looked at"),
        }
    }
}
