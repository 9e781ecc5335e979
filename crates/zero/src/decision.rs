//! What becomes of a step: applied, skipped, or the end.
//!
//! All ranks of the world know the sum of squares of the whole gradient, to the bit, and keep the same [`LossScaler`]: so they decide
//! alike without asking each other. Only a step that is not applied costs an exchange, to find out whose gradient
//! it was.
//!
//! [`LossScaler`]: crate::LossScaler

use shardwise_device::{Place, Slice};
use shardwise_kernels::norm;

use crate::unit::Unit;
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

    /// The first parameter, in the order of the catalogue, whose gradient is not finite on some rank. One exchange, which only a
    /// step that is not applied pays.
    fn first_non_finite(&self) -> Result<SkipReason, ZeroError> {
        let catalogue = &self.placement.catalogue;
        let places = self.placement.places();
        let mut fragments = Vec::new();
        for unit in &self.units {
            let Some(grad) = self.owned_gradient(unit) else { continue };
            // Gaps and padding are zeros that are never written, so an element that is not finite belongs to a parameter.
            for fragment in unit.layout.fragments(unit.layout.shard_range(self.group_rank)) {
                let place = places[unit.layout.slots[fragment.slot].param.name.as_str()];
                fragments.push((place, grad.range(fragment.local_range)));
            }
        }
        fragments.sort_by_key(|(place, _)| *place);
        let is_bad = |values: Slice<'_>| match values.place() {
            Place::Cpu => Ok(!norm::all_finite_of(self.threads(), values)),
            // The sum is finite if every element is.
            _ => Ok::<_, ZeroError>(!self.tiers.stepper.sums_of_squares(&[values])?[0].is_finite()),
        };
        let mut mine = f64::INFINITY;
        for (place, values) in fragments {
            if is_bad(values)? {
                mine = place as f64;
                break;
            }
        }
        let ranks = self.lane.exchange_over_world(&[mine])?;
        let first = ranks.iter().map(|rank| rank[0]).fold(f64::INFINITY, f64::min);
        let (unit, param) = catalogue.get(first as usize).expect("a sum is finite if every term is").clone();
        Ok(SkipReason::NonFiniteGradient { unit, param })
    }

    /// This rank's shard of a settled gradient, in every stage; none of a frozen unit.
    pub(crate) fn owned_gradient<'a>(&self, unit: &'a Unit) -> Option<Slice<'a>> {
        let range = unit.layout.shard_range(self.group_rank);
        Some(unit.trained.as_ref()?.settled_gradient(&unit.owned, range))
    }
}
