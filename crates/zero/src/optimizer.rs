//! The step: one norm, one decision, one pass over the owned state.
//!
//! The gradient held by a unit is the sum over ranks and micro-batches, times the loss scale; the mean, unscaling and
//! clipping are one factor of the fused update. Squares of f32 numbers and their sums fit f64, so the sum of squares is
//! finite exactly when every element is: all ranks see it and take the same decision. The norm adds squares in f64: within a shard in a fixed order, then shards in unit order, then ranks in
//! rank order, so it does not depend on the stage.

use std::mem::replace;

use shardwise_device::{DType, Slice};
use shardwise_kernels::{convert, norm};

use crate::algorithm::not_negative;
use crate::unit::{GradState, Unit};
use crate::update::Update;
use crate::{
    Divergence, Found, LossScaling, OnNonFinite, SkipReason, StepOutcome, StepReport, Verdict, Zero,
    ZeroError,
};

/// Keeps a vanishing norm from being divided by.
const NORM_EPS: f64 = 1e-6;

impl Zero {
    /// Updates all trainable parameters from the gradients reduced since the last step, unless these are not finite and
    /// are to be skipped. Then no weight, moment or counter of steps moves, and the loss scale may.
    ///
    /// `scalars` of all ranks are summed on the way (a loss, for example), which saves an exchange.
    ///
    /// # Collective
    /// Every rank calls, after the last micro-batch of every trainable unit was reduced.
    /// # Errors
    /// [`ZeroError::MissingGradient`] if it was not; [`ZeroError::WrongOption`] for a learning rate that is negative or not
    /// finite; a failed collective or allocation.
    /// # Source
    /// The kernels' own; clipping as in `torch.nn.utils.clip_grad_norm_`.
    pub fn step(&mut self, lr: f64, scalars: &[f64]) -> Result<StepReport, ZeroError> {
        not_negative("lr", lr)?;
        let mut mine = vec![self.owned_sum_of_squares()?];
        mine.extend_from_slice(scalars);
        let mut sums = self.lane.sum(&mine)?;
        let sum_of_squares = sums.remove(0);
        let scale = self.scaler.scale();
        let unscale = self.reduction.after / scale;
        let grad_norm = sum_of_squares.sqrt() * unscale;
        let outcome = self.decide(sum_of_squares)?;
        let loss_scale = self.options.loss_scaling.map(|_| scale);
        let num_skipped = self.scaler.state().num_skipped;
        let report = StepReport { outcome, grad_norm, loss_scale, num_skipped, sums };
        if !report.outcome.is_applied() {
            return Ok(report);
        }
        let clip = self.options.clip_grad_norm.map_or(1.0, |max| (max / (grad_norm + NORM_EPS)).min(1.0));
        self.num_steps += 1;
        let grad_scale = (unscale * clip) as f32;
        let update = Update { lr, grad_scale, step: self.num_steps, threads: self.threads() };
        for unit in 0..self.units.len() {
            let narrow = self.widen_gradient(unit)?;
            let updated = self.take_gradient(unit, update);
            self.narrow_gradient(unit, narrow);
            updated?;
        }
        self.finish_update(update)?;
        Ok(report)
    }

    /// What this step comes to, and what follows from it for the loss scale.
    fn decide(&mut self, sum_of_squares: f64) -> Result<StepOutcome, ZeroError> {
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
    fn owned_gradient<'a>(&self, unit: &'a Unit) -> Option<Slice<'a>> {
        match &unit.trained.as_ref()?.grad {
            GradState::Full(full) => Some(full.view().range(unit.layout.shard_range(self.group_rank))),
            GradState::Shard(shard) => Some(shard.view()),
            _ => unreachable!("settled before it is looked at"),
        }
    }

    /// Puts an fp32 copy of the owned gradient in the place of one that is kept in 16 bits: the update reads fp32.
    fn widen_gradient(&mut self, unit: usize) -> Result<Option<GradState>, ZeroError> {
        let threads = self.threads();
        let Unit { owned, trained: Some(trained), .. } = &mut self.units[unit] else { return Ok(None) };
        if self.reduction.sums == DType::F32 {
            return Ok(None);
        }
        let mut wide = self.pool.take(DType::F32, owned.len())?;
        let narrow = match &trained.grad {
            GradState::Full(full) => full.view().range(owned.clone()),
            GradState::Shard(shard) => shard.view(),
            _ => unreachable!("the norm settled every gradient"),
        };
        convert::scale_on(threads, narrow, 1.0, wide.view_mut());
        Ok(Some(replace(&mut trained.grad, GradState::Shard(wide))))
    }

    /// Puts back what [`Zero::widen_gradient`] took away.
    fn narrow_gradient(&mut self, unit: usize, narrow: Option<GradState>) {
        if let (Some(narrow), Some(trained)) = (narrow, &mut self.units[unit].trained)
            && let GradState::Shard(wide) = replace(&mut trained.grad, narrow)
        {
            self.pool.give_back(wide);
        }
    }

    /// This rank's part of the squared norm: its shard of every unit, in every stage.
    fn owned_sum_of_squares(&mut self) -> Result<f64, ZeroError> {
        let mut total = 0.0;
        for unit in 0..self.units.len() {
            if self.units[unit].trained.is_none() {
                continue;
            }
            self.settle(unit)?;
            self.take_turn(unit)?;
            let grad = self.owned_gradient(&self.units[unit]).expect("checked above");
            total += norm::sum_of_squares_of(self.threads(), grad);
        }
        Ok(total)
    }

    /// Checks that all micro-batches of the unit were reduced, and begins to count anew.
    fn take_turn(&mut self, unit: usize) -> Result<(), ZeroError> {
        let expected = self.options.grad_accum_steps;
        let Unit { layout, trained: Some(trained), .. } = &mut self.units[unit] else { return Ok(()) };
        match replace(&mut trained.num_reduced, 0) {
            got if got == expected => Ok(()),
            got => Err(ZeroError::MissingGradient { unit: layout.name.clone(), expected, got }),
        }
    }

    /// The element type of the compute copy.
    pub fn compute_dtype(&self) -> DType {
        self.options.compute
    }
}
