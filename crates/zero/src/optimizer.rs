//! The step: one norm, one decision, one pass over the owned state.
//!
//! The gradient held by a unit is the sum over ranks and micro-batches, times the loss scale; the mean, unscaling and
//! clipping are one factor of the fused update. Squares of f32 numbers and their sums fit f64, so the sum of squares is
//! finite exactly when every element is: all ranks see it and take the same decision. The norm adds squares in f64: within a shard in a fixed order, then shards in unit order, then ranks of the
//! world in rank order, so it does not depend on the stage. What another rank speaks for is left out.

use std::mem::replace;

use shardwise_device::{Buffer, DType};

use crate::algorithm::{Algorithm, not_negative};
use crate::lane::sum_of;
use crate::unit::{GradState, Trained, Unit};
use crate::update::Update;
use crate::{Optimizer, StepReport, Zero, ZeroError};

/// A gradient in 16 bits while another is in its place: `Trained::grad` and `Trained::offloaded`.
type NarrowGradient = (GradState, Option<Buffer>);

/// Keeps a vanishing norm from being divided by.
const NORM_EPS: f64 = 1e-6;

impl Zero {
    /// Updates all trainable parameters from the gradients reduced since the last step, unless these are not finite and
    /// are to be skipped. Then no weight, moment or counter of steps moves, and the loss scale may.
    ///
    /// `scalars` of all ranks of the world are summed on the way (a loss, for example), which saves an exchange.
    ///
    /// # Collective
    /// Every rank of the world calls, after the last micro-batch of every trainable unit was reduced.
    /// # Errors
    /// [`ZeroError::MissingGradient`] if it was not; [`ZeroError::WrongOption`] for a learning rate that is negative or not
    /// finite; a failed collective or allocation.
    /// # Source
    /// The kernels' own; clipping as in `torch.nn.utils.clip_grad_norm_`.
    pub fn step(&mut self, lr: f64, scalars: &[f64]) -> Result<StepReport, ZeroError> {
        self.step_telling(lr, || Ok(scalars))
    }

    /// [`Zero::step`] with scalars that are asked for once the norm is known: a GPU that has made them has made all else by then.
    ///
    /// # Collective
    /// As [`Zero::step`].
    /// # Errors
    /// As [`Zero::step`], and those of `scalars`.
    pub fn step_telling<S: AsRef<[f64]>, E: From<ZeroError>>(
        &mut self,
        lr: f64,
        scalars: impl FnOnce() -> Result<S, E>,
    ) -> Result<StepReport, E> {
        not_negative("lr", lr)?;
        let mut mine = vec![self.owned_sum_of_squares()?];
        mine.extend_from_slice(scalars()?.as_ref());
        Ok(self.step_with(lr, &mine)?)
    }

    /// The step, given this rank's part of the squared norm and its scalars.
    fn step_with(&mut self, lr: f64, mine: &[f64]) -> Result<StepReport, ZeroError> {
        let mut sums = sum_of(&self.lane.exchange_over_world(mine)?, mine.len());
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
        self.begin_update()?;
        for unit in 0..self.units.len() {
            let narrow = self.widen_gradient(unit)?;
            let updated = self.take_gradient(unit, update);
            self.narrow_gradient(unit, narrow);
            updated?;
        }
        self.finish_update(update)?;
        Ok(report)
    }

    /// Sets the momentum of the steps to come: SGD's, or the decay of the mean of gradients (`beta1`) of Adam, AdamW, Lion
    /// and LAMB. For schedules that move it; the others have none to move.
    ///
    /// # Errors
    /// [`ZeroError::WrongOption`] for a number that is no momentum.
    pub fn set_momentum(&mut self, momentum: f64) -> Result<(), ZeroError> {
        if !(0.0..1.0).contains(&momentum) {
            let (got, expected) = (momentum.to_string(), "at least `0` and below `1`");
            return Err(ZeroError::WrongOption { option: "momentum", got, expected });
        }
        for piece in
            self.units.iter_mut().flat_map(|unit| &mut unit.trained).flat_map(|trained| &mut trained.pieces)
        {
            match &mut piece.settings.algorithm {
                Algorithm::Adam(adam, _) => adam.beta1 = momentum,
                Algorithm::Sgd(sgd) if sgd.momentum != 0.0 => sgd.momentum = momentum,
                Algorithm::Lion(lion) => lion.beta1 = momentum,
                Algorithm::Lamb(lamb) => lamb.beta1 = momentum,
                Algorithm::Sgd(_) | Algorithm::Adagrad(_) | Algorithm::Muon { .. } => {}
            }
        }
        Ok(())
    }

    /// Puts an fp32 copy of the owned gradient in the place of one that is kept in 16 bits, for optimizers whose update reads fp32. The others'
    /// widen it themselves.
    fn widen_gradient(&mut self, unit: usize) -> Result<Option<NarrowGradient>, ZeroError> {
        let optimizer_reads_f32 = matches!(self.options.optimizer, Optimizer::Lamb(_) | Optimizer::Muon(_));
        let Zero { units, tiers, pool, host_pool, .. } = self;
        let Unit { owned, trained: Some(trained), .. } = &mut units[unit] else { return Ok(None) };
        if self.reduction.sums == DType::F32 || !optimizer_reads_f32 {
            return Ok(None);
        }
        let mut wide = host_pool.as_mut().unwrap_or(pool).take(DType::F32, owned.len())?;
        let narrow = trained.settled_gradient(owned, owned.clone());
        tiers.stepper.scale(narrow, 1.0, wide.view_mut())?;
        let Trained { grad, offloaded, .. } = trained;
        Ok(Some((replace(grad, GradState::Shard(wide)), offloaded.take())))
    }

    /// Puts back what [`Zero::widen_gradient`] took away.
    fn narrow_gradient(&mut self, unit: usize, narrow: Option<NarrowGradient>) {
        if let (Some((narrow, offloaded)), Some(trained)) = (narrow, &mut self.units[unit].trained) {
            trained.offloaded = offloaded;
            if let GradState::Shard(wide) = replace(&mut trained.grad, narrow) {
                self.step_pool().give_back(wide);
            }
        }
    }

    /// This rank's part of the squared norm: its shard of every unit, in every stage, as far as it speaks for it.
    fn owned_sum_of_squares(&mut self) -> Result<f64, ZeroError> {
        for unit in 0..self.units.len() {
            if self.units[unit].trained.is_some() {
                self.settle(unit)?;
                self.take_turn(unit)?;
            }
        }
        let mut counted = Vec::new();
        for unit in self.units.iter().filter(|unit| unit.trained.is_some()) {
            let grad = self.owned_gradient(unit).expect("it is trained");
            let is_counted = |slot: usize| self.speaks_for(&unit.layout.slots[slot].param.name);
            if (0..unit.layout.slots.len()).all(is_counted) {
                counted.push(grad);
                continue;
            }
            for fragment in unit.layout.fragments(unit.layout.shard_range(self.group_rank)) {
                if is_counted(fragment.slot) {
                    counted.push(grad.range(fragment.local_range));
                }
            }
        }
        // A GPU is waited for once.
        Ok(self.tiers.stepper.sums_of_squares(&counted)?.into_iter().fold(0.0, |total, sum| total + sum))
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
