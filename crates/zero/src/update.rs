//! The update: from a unit's gradient to its new parameters.
//!
//! ```text
//! element by element    each piece in one pass                                          | complete the copy
//! Muon                  momentum | all-gather (fp32) | orthogonalize own matrices, apply | complete the copy
//! LAMB                  moments and norms, of all units | exchange norms | apply          | complete the copy
//! ```
//!
//! Ranks orthogonalize the matrices of which they own a part: all get the same bits from the same numbers, and a matrix
//! that straddles shards is computed more than once rather than sent. LAMB's norms have a file of their own (`lamb.rs`).

use std::mem::replace;
use std::ops::Range;

use half::{bf16, f16};
use shardwise_device::{Buffer, DType, DeviceError, Slice, SliceMut};
use shardwise_kernels::optimizer::{
    Adagrad, Adam, ComputeCopy, Lion, Muon, Noise, Sgd, States, Tensors, orthogonalize_on,
};
use shardwise_kernels::processor::StepSlices;
use shardwise_kernels::{Processor, Threads};

use crate::algorithm::Algorithm;
use crate::lane::Pending;
use crate::pieces::{Piece, State};
use crate::tiers::Tiers;
use crate::unit::{GradState, ParamState, Trained, Unit};
use crate::{Optimizer, StatePrecision, Zero, ZeroError};

/// What all pieces are told in one step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Update {
    pub lr: f64,
    /// Unscaling, mean and clipping.
    pub grad_scale: f32,
    /// From 1.
    pub step: u64,
    pub threads: Threads,
}

impl Zero {
    /// Takes in one unit's gradient, and updates its parameters unless the optimizer must see all units first.
    pub(crate) fn take_gradient(&mut self, unit: usize, update: Update) -> Result<(), ZeroError> {
        self.release(unit);
        if self.units[unit].trained.is_none() {
            return Ok(());
        }
        let directions = self.muon_directions(unit, update)?;
        let states = self.options.states;
        let Zero { units, tiers, norms, .. } = self;
        let Unit { layout, owned, params, trained: Some(trained), .. } = &mut units[unit] else {
            unreachable!("checked above")
        };
        let stepper = tiers.stepper.clone();
        let copy = params.owned_copy(&layout.name, owned.clone())?;
        let mut target = Target::new(tiers, copy, &trained.pieces)?;
        for i in 0..trained.pieces.len() {
            let range = trained.pieces[i].range.clone();
            let slot = &layout.slots[trained.pieces[i].slot];
            let noise = match states {
                StatePrecision::F32 => None,
                StatePrecision::Bf16 { seed } => {
                    // By parameter: units of replicas may differ.
                    let first = owned.start + range.start - slot.offset;
                    Some(Noise::new(seed, &slot.param.name, update.step, first as u64))
                }
            };
            let at = owned.start + range.start..owned.start + range.end;
            let Trained { master, grad, offloaded, pieces, .. } = &mut *trained;
            let piece = &mut pieces[i];
            let grad = match (piece.settings.algorithm, &directions) {
                (Algorithm::Muon { .. }, Some(directions)) => directions.view().range(at),
                _ => settled_gradient(offloaded, grad, owned, at),
            };
            let (master, compute) = target.master_and_copy(master, range);
            let norms = norms.as_mut().map(|table| table.place(unit, piece));
            piece.take_gradient(
                &stepper,
                update,
                noise,
                &slot.param.shape,
                Moved { grad, master, compute, norms },
            )?;
        }
        match self.options.optimizer {
            // It has moved nothing yet.
            Optimizer::Lamb(_) => {}
            _ => target.finish(trained.master.as_ref())?,
        }
        if let Some(directions) = directions {
            self.step_pool().give_back(directions);
        }
        match self.options.optimizer {
            Optimizer::Lamb(_) => Ok(()),
            _ => self.complete(unit),
        }
    }

    /// The orthogonal directions of a unit's matrices, where this rank owns a part of them; nothing if it has no matrices.
    fn muon_directions(&mut self, unit: usize, update: Update) -> Result<Option<Buffer>, ZeroError> {
        let Zero { units, options, pool, host_pool, lane, .. } = self;
        let pool = host_pool.as_mut().unwrap_or(pool);
        let Unit { layout, owned, trained: Some(trained), .. } = &mut units[unit] else { return Ok(None) };
        let is_matrix = |slot: &shardwise_plan::layout::ParamSlot| {
            matches!(options.settings(&slot.param).algorithm, Algorithm::Muon { .. })
        };
        // Asked of the layout, as every rank must join the all-gather.
        if !layout.slots.iter().any(is_matrix) {
            return Ok(None);
        }
        let Trained { grad, offloaded, pieces, .. } = &mut *trained;
        let grad = settled_gradient(offloaded, grad, owned, owned.clone()).typed::<f32>()?;
        let mut full = pool.take(DType::F32, owned.len())?;
        let values = full.typed_mut::<f32>()?;
        values.fill(0.0);
        for piece in pieces {
            let range = piece.range.clone();
            piece.take_momentum(update, &grad[range.clone()], &mut values[range])?;
        }
        if options.stage.shards_optimizer() {
            let whole = pool.take(DType::F32, layout.padded_numel)?;
            let (shard, whole) = lane.all_gather(full, whole)?.wait()?;
            pool.give_back(shard);
            full = whole;
        }
        let values = full.typed_mut::<f32>()?;
        let mut last = None;
        for piece in &trained.pieces {
            let Algorithm::Muon { num_steps, .. } = piece.settings.algorithm else { continue };
            if last.replace(piece.slot) != Some(piece.slot) {
                let slot = &layout.slots[piece.slot];
                let (shape, matrix) = ([slot.param.shape[0], slot.param.shape[1]], &mut values[slot.range()]);
                orthogonalize_on(update.threads, shape, num_steps as usize, matrix);
            }
        }
        Ok(Some(full))
    }

    /// Completes the compute copy where others own the rest of it.
    pub(crate) fn complete(&mut self, unit: usize) -> Result<(), ZeroError> {
        if !self.options.stage.shards_optimizer() {
            return Ok(());
        }
        let params = &mut self.units[unit].params;
        match replace(params, ParamState::Moving) {
            ParamState::Resident(full) => {
                *params = match self.lane.all_gather_in_place(full)? {
                    Pending::Ready(full) => ParamState::Resident(full),
                    under_way => ParamState::Completing(under_way),
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
}

impl Piece {
    pub(crate) fn lr(&self, update: Update) -> f64 {
        update.lr * self.settings.lr_scale
    }

    /// Moves this piece, or just the moments where the norms of whole parameters are needed first. The `grad` of Muon
    /// is the direction.
    fn take_gradient(
        &mut self,
        stepper: &Processor,
        update: Update,
        noise: Option<Noise>,
        shape: &[usize],
        moved: Moved<'_>,
    ) -> Result<(), ZeroError> {
        let (lr, weight_decay) = (self.lr(update), self.settings.weight_decay);
        let Update { grad_scale, step, threads, .. } = update;
        match self.settings.algorithm {
            Algorithm::Adam(adam, decay) => {
                let (beta1, beta2, eps) = (adam.beta1, adam.beta2, adam.eps);
                let bias_correction = adam.bias_correction;
                let adam = Adam { lr, beta1, beta2, eps, weight_decay, decay, bias_correction, step };
                stepper.adam(&adam, grad_scale, moved.with(&mut self.states, noise))?;
            }
            Algorithm::Sgd(sgd) => {
                let (momentum, dampening, direction) = (sgd.momentum, sgd.dampening, sgd.direction);
                let sgd = Sgd { lr, momentum, dampening, weight_decay, direction, step };
                match self.states.is_empty() {
                    true => stepper.plain_sgd(&sgd, grad_scale, moved.with(&mut self.states, None))?,
                    false => stepper.sgd(&sgd, grad_scale, moved.with(&mut self.states, noise))?,
                }
            }
            Algorithm::Adagrad(adagrad) => {
                let (lr_decay, eps) = (adagrad.lr_decay, adagrad.eps);
                let adagrad = Adagrad { lr, lr_decay, eps, weight_decay, step };
                stepper.adagrad(&adagrad, grad_scale, moved.with(&mut self.states, noise))?;
            }
            Algorithm::Lion(lion) => {
                let (beta1, beta2) = (lion.beta1, lion.beta2);
                let lion = Lion { lr, beta1, beta2, weight_decay };
                stepper.lion(&lion, grad_scale, moved.with(&mut self.states, noise))?;
            }
            Algorithm::Lamb(_) => self.take_moments(stepper, update, moved)?,
            Algorithm::Muon { momentum, direction, .. } => {
                let muon = Muon { lr, momentum, direction, weight_decay };
                let Moved { grad, master, compute, .. } = moved;
                let (grad, master) = (grad.typed()?, master.typed()?);
                let tensors = Tensors {
                    grad: grad.into(),
                    master,
                    states: States::F32([]),
                    compute: compute_copy(compute)?,
                };
                muon.apply_on(threads, [shape[0], shape[1]], tensors);
            }
        }
        Ok(())
    }

    /// Muon's first pass; nothing for others.
    fn take_momentum(&mut self, update: Update, grad: &[f32], out: &mut [f32]) -> Result<(), DeviceError> {
        let Algorithm::Muon { momentum, direction, .. } = self.settings.algorithm else { return Ok(()) };
        let muon =
            Muon { lr: self.lr(update), momentum, direction, weight_decay: self.settings.weight_decay };
        let buffer = self.states[0].values.typed_mut()?;
        muon.momentum_on(update.threads, update.grad_scale, grad, buffer, out);
        Ok(())
    }
}

/// What a step reads and moves of one piece.
pub(crate) struct Moved<'a> {
    pub grad: Slice<'a>,
    pub master: SliceMut<'a>,
    /// Where the 16-bit copy goes, if there is one.
    compute: Option<SliceMut<'a>>,
    /// Where LAMB's norms go.
    pub norms: Option<SliceMut<'a>>,
}

impl<'a> Moved<'a> {
    fn with<const K: usize>(self, states: &'a mut [State], noise: Option<Noise>) -> StepSlices<'a, K> {
        let states: &mut [State; K] = states.try_into().expect("an algorithm's own states");
        let Moved { grad, master, compute, .. } = self;
        StepSlices {
            grad,
            master,
            states: states.each_mut().map(|state| state.values.view_mut()),
            noise,
            compute,
        }
    }
}

fn compute_copy(copy: Option<SliceMut<'_>>) -> Result<ComputeCopy<'_>, DeviceError> {
    Ok(match copy {
        None => ComputeCopy::None,
        Some(copy) if copy.dtype() == DType::F16 => ComputeCopy::F16(copy.typed::<f16>()?),
        Some(copy) => ComputeCopy::Bf16(copy.typed::<bf16>()?),
    })
}

/// As [`Trained::settled_gradient`], beside other borrows of the same state.
fn settled_gradient<'a>(
    offloaded: &'a Option<Buffer>,
    grad: &'a GradState,
    owned: &Range<usize>,
    range: Range<usize>,
) -> Slice<'a> {
    let local = range.start - owned.start..range.end - owned.start;
    match (offloaded, grad) {
        (Some(grad), _) | (None, GradState::Shard(grad)) => grad.view().range(local),
        (None, GradState::Full(full)) => full.view().range(range),
        _ => unreachable!("the norm settled every gradient"),
    }
}

/// Where a unit's new parameters go: to their place in the compute copy, at once or from where the step is computed.
pub(crate) struct Target<'a> {
    tiers: &'a mut Tiers,
    /// The owned range of the compute copy.
    copy: SliceMut<'a>,
    /// The same where the step is computed, if the copy is elsewhere; in fp32 the master weights are.
    transfer: Option<Buffer>,
}

impl<'a> Target<'a> {
    /// `pieces` are what is going to be moved: the rest is zero and stays so.
    pub fn new(tiers: &'a mut Tiers, copy: SliceMut<'a>, pieces: &[Piece]) -> Result<Self, ZeroError> {
        let is_apart = tiers.transfers_to(copy.place()).is_some() && copy.dtype() != DType::F32;
        let mut transfer =
            if is_apart { Some(tiers.take_transfer(copy.dtype(), copy.numel())?) } else { None };
        let num_moved: usize = pieces.iter().map(|piece| piece.range.len()).sum();
        if let (Some(transfer), true) = (&mut transfer, num_moved < copy.numel()) {
            tiers.stepper.zero(transfer.view_mut())?;
        }
        Ok(Target { tiers, copy, transfer })
    }

    /// The fp32 parameters of `range`, and where their 16-bit copy goes. Without master weights the copy is the parameters.
    pub fn master_and_copy<'b>(
        &'b mut self,
        master: &'b mut Option<Buffer>,
        range: Range<usize>,
    ) -> (SliceMut<'b>, Option<SliceMut<'b>>) {
        let Some(master) = master else { return (self.copy.range_mut(range), None) };
        let copy = match &mut self.transfer {
            Some(transfer) => Some(transfer.view_mut().into_range(range.clone())),
            None if self.copy.dtype() == DType::F32 => None,
            None => Some(self.copy.range_mut(range.clone())),
        };
        (master.view_mut().into_range(range), copy)
    }

    /// Sends the new parameters to their place, while the next unit is updated.
    pub fn finish(self, master: Option<&Buffer>) -> Result<(), ZeroError> {
        let Target { tiers, copy, transfer } = self;
        let Some(copies) = tiers.transfers_to(copy.place()) else { return Ok(()) };
        let numel = copy.numel();
        let new = transfer.as_ref().or(master).expect("it is made where steps are computed");
        copies.copy(new.view().range(0..numel), copy).map_err(DeviceError::from)?;
        if let Some(transfer) = transfer {
            tiers.keep_transfer(transfer);
        }
        Ok(())
    }
}

impl ParamState {
    /// The owned range of the compute copy, wherever the copy is. Waits for a gather that nobody waited for: stages 1 and 2
    /// complete lazily, stage 3 may have prefetched.
    pub fn owned_copy(
        &mut self,
        unit: &str,
        owned: std::ops::Range<usize>,
    ) -> Result<SliceMut<'_>, ZeroError> {
        *self = match replace(self, ParamState::Moving) {
            ParamState::Completing(work) => ParamState::Resident(work.wait()?),
            ParamState::Gathering(work) => {
                let (shard, full) = work.wait()?;
                ParamState::Gathered { shard, full }
            }
            other => other,
        };
        match self {
            ParamState::Resident(full) => Ok(full.view_mut().into_range(owned)),
            ParamState::Sharded { shard } | ParamState::Gathered { shard, .. } => Ok(shard.view_mut()),
            ParamState::Moving => Err(ZeroError::Lost { unit: unit.to_owned() }),
            _ => unreachable!("waited for above"),
        }
    }
}
