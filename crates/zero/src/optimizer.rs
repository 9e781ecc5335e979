//! The step: one norm, one decision, one pass over the owned state.
//!
//! The gradient held by a unit is the sum over ranks and micro-batches; the mean, like clipping, is a factor of the
//! fused update. The norm adds squares in f64: within a shard in a fixed order, then shards in unit order, then ranks in
//! rank order, so it does not depend on the stage.

use std::mem::replace;

use half::bf16;
use shardwise_device::DType;
use shardwise_kernels::adamw::{self, AdamW, ComputeCopy};
use shardwise_kernels::norm;

use crate::lane::Pending;
use crate::unit::{GradState, ParamState, Unit};
use crate::{SkipReason, StepOutcome, StepReport, Zero, ZeroError};

/// Keeps a vanishing norm from being divided by.
const NORM_EPS: f64 = 1e-6;

impl Zero {
    /// Updates all trainable parameters from the gradients reduced since the last step, unless these are not finite.
    ///
    /// `scalars` of all ranks are summed on the way (a loss, for example), which saves an exchange.
    ///
    /// # Collective
    /// Every rank calls, after the last micro-batch of every trainable unit was reduced.
    /// # Errors
    /// [`ZeroError::MissingGradient`] if it was not; a failed collective or allocation.
    /// # Source
    /// AdamW (arXiv:1711.05101), clipping as in `torch.nn.utils.clip_grad_norm_`.
    pub fn step(&mut self, lr: f64, scalars: &[f64]) -> Result<StepReport, ZeroError> {
        let mut mine = vec![self.owned_sum_of_squares()?];
        mine.extend_from_slice(scalars);
        let mut sums = self.lane.sum(&mine)?;
        let mean = 1.0 / (self.options.grad_accum_steps * self.group_size) as f64;
        let grad_norm = sums.remove(0).sqrt() * mean;
        if !grad_norm.is_finite() {
            let outcome = StepOutcome::Skipped { reason: SkipReason::NonFiniteGradient };
            return Ok(StepReport { outcome, grad_norm, sums });
        }
        let clip = self.options.clip_grad_norm.map_or(1.0, |max| (max / (grad_norm + NORM_EPS)).min(1.0));
        self.num_steps += 1;
        let hyper = AdamW {
            lr: lr as f32,
            beta1: self.options.adamw.beta1 as f32,
            beta2: self.options.adamw.beta2 as f32,
            eps: self.options.adamw.eps as f32,
            weight_decay: 0.0, // by range
            step: self.num_steps,
        };
        for unit in 0..self.units.len() {
            self.update(unit, &hyper, (mean * clip) as f32)?;
        }
        Ok(StepReport { outcome: StepOutcome::Applied, grad_norm, sums })
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
            let shard = self.units[unit].layout.shard_range(self.group_rank);
            let grad = match &self.units[unit].trained.as_ref().expect("checked above").grad {
                GradState::Full(full) => &full.typed::<f32>()?[shard],
                GradState::Shard(shard) => shard.typed::<f32>()?,
                _ => unreachable!("settled above"),
            };
            total += norm::sum_of_squares_on(self.threads(), grad);
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

    /// Updates one unit's owned range, and completes the compute copy where others own the rest.
    fn update(&mut self, unit: usize, hyper: &AdamW, grad_scale: f32) -> Result<(), ZeroError> {
        let threads = self.threads();
        self.release(unit);
        let Unit { layout, owned, params, trained: Some(trained) } = &mut self.units[unit] else {
            return Ok(());
        };
        let grad = match &trained.grad {
            GradState::Full(full) => &full.typed::<f32>()?[owned.clone()],
            GradState::Shard(shard) => shard.typed::<f32>()?,
            _ => unreachable!("the norm settled every gradient"),
        };
        // The owned range of the compute copy, wherever the copy is.
        let copy = match params {
            ParamState::Resident(full) => full.view_mut().into_range(owned.clone()),
            ParamState::Sharded { shard } => shard.view_mut(),
            _ => {
                // A gather that nobody waited for (stages 1 and 2 complete lazily; stage 3 may have prefetched).
                *params = settled(replace(params, ParamState::Moving))?;
                match params {
                    ParamState::Resident(full) => full.view_mut().into_range(owned.clone()),
                    ParamState::Sharded { shard } | ParamState::Gathered { shard, .. } => shard.view_mut(),
                    ParamState::Moving => return Err(ZeroError::Lost { unit: layout.name.clone() }),
                    _ => unreachable!("settled"),
                }
            }
        };
        let (exp_avg, exp_avg_sq) =
            (trained.exp_avg.typed_mut::<f32>()?, trained.exp_avg_sq.typed_mut::<f32>()?);
        let mut pass = |master: &mut [f32], mut copy: Option<&mut [bf16]>| {
            for (range, weight_decay) in &trained.decay {
                let hyper = AdamW { weight_decay: *weight_decay as f32, ..*hyper };
                let state = adamw::State {
                    grad: &grad[range.clone()],
                    master: &mut master[range.clone()],
                    exp_avg: &mut exp_avg[range.clone()],
                    exp_avg_sq: &mut exp_avg_sq[range.clone()],
                    compute: match &mut copy {
                        Some(copy) => ComputeCopy::Bf16(&mut copy[range.clone()]),
                        None => ComputeCopy::None,
                    },
                };
                adamw::step_on(threads, &hyper, grad_scale, state);
            }
        };
        match &mut trained.master {
            Some(master) => pass(master.typed_mut()?, Some(copy.typed()?)),
            None => pass(copy.typed()?, None),
        }
        if !self.options.stage.shards_optimizer() {
            return Ok(());
        }
        match replace(params, ParamState::Moving) {
            ParamState::Resident(full) => {
                *params = match self.lane.all_gather_in_place(full)? {
                    Pending::Ready(full) => ParamState::Resident(full),
                    Pending::UnderWay(work) => ParamState::Completing(work),
                };
            }
            // Stage 3 gathers what is new at the next use; a copy gathered before the update is old.
            ParamState::Gathered { shard, full } => {
                self.pool.give_back(full);
                *params = ParamState::Sharded { shard };
            }
            other => *params = other,
        }
        Ok(())
    }

    /// The element type of the compute copy.
    pub fn compute_dtype(&self) -> DType {
        self.options.compute
    }
}

fn settled(state: ParamState) -> Result<ParamState, ZeroError> {
    Ok(match state {
        ParamState::Completing(work) => ParamState::Resident(work.wait()?),
        ParamState::Gathering(work) => {
            let (shard, full) = work.wait()?;
            ParamState::Gathered { shard, full }
        }
        other => other,
    })
}
