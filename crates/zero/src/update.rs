//! The update: from a unit's gradient to its new parameters.
//!
//! ```text
//! element by element    each piece in one pass                                          | complete the copy
//! Muon                  momentum | all-gather (fp32) | orthogonalize own matrices, apply | complete the copy
//! LAMB                  moments and norms, of all units | exchange norms | apply          | complete the copy
//! ```
//!
//! Ranks orthogonalize the matrices of which they own a part: all get the same bits from the same numbers, and a matrix
//! that straddles shards is computed more than once rather than sent. Norms of LAMB are summed within shards and
//! then in rank order, also where one rank has all shards, so stages agree bit for bit. Where tensor ranks have parts of a
//! parameter, one exchange more sums over them.

use std::mem::replace;

use half::{bf16, f16};
use shardwise_device::{Buffer, DType, DeviceError, SliceMut};
use shardwise_kernels::Threads;
use shardwise_kernels::optimizer::{
    Adagrad, Adam, ComputeCopy, Lamb, Lion, Muon, Noise, Sgd, SquaredNorms, States, Tensors, orthogonalize_on,
};

use crate::algorithm::Algorithm;
use crate::lane::{Pending, sum_of};
use crate::pieces::{Piece, State};
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
        let Unit { layout, owned, params, trained: Some(trained), .. } = &mut self.units[unit] else {
            unreachable!("checked above")
        };
        let Trained { master, grad, pieces, .. } = trained;
        let grad = match grad {
            GradState::Full(full) => &full.typed::<f32>()?[owned.clone()],
            GradState::Shard(shard) => shard.typed::<f32>()?,
            _ => unreachable!("the norm settled every gradient"),
        };
        let mut copy = params.owned_copy(&layout.name, owned.clone())?;
        for piece in pieces {
            let range = piece.range.clone();
            let noise = match self.options.states {
                StatePrecision::F32 => None,
                StatePrecision::Bf16 { seed } => {
                    // By parameter: units of replicas may differ.
                    let slot = &layout.slots[piece.slot];
                    let first = owned.start + range.start - slot.offset;
                    Some(Noise::new(seed, &slot.param.name, update.step, first as u64))
                }
            };
            let (master, copy) = master_and_copy(master, copy.range_mut(range.clone()), range.clone())?;
            let grad = match (piece.settings.algorithm, &directions) {
                (Algorithm::Muon { .. }, Some(directions)) => {
                    &directions.typed::<f32>()?[owned.start + range.start..owned.start + range.end]
                }
                _ => &grad[range],
            };
            let shape = &layout.slots[piece.slot].param.shape;
            piece.take_gradient(update, noise, shape, grad, master, copy);
        }
        if let Some(directions) = directions {
            self.pool.give_back(directions);
        }
        match self.options.optimizer {
            Optimizer::Lamb(_) => Ok(()),
            _ => self.complete(unit),
        }
    }

    /// Ends the update of all units.
    pub(crate) fn finish_update(&mut self, update: Update) -> Result<(), ZeroError> {
        let Optimizer::Lamb(_) = self.options.optimizer else { return Ok(()) };
        let norms = self.lamb_norms()?;
        for (index, norms) in norms.iter().enumerate() {
            let Unit { layout, owned, params, trained: Some(trained), .. } = &mut self.units[index] else {
                continue;
            };
            let mut copy = params.owned_copy(&layout.name, owned.clone())?;
            for piece in &trained.pieces {
                let range = piece.range.clone();
                let copy = copy.range_mut(range.clone());
                let (master, copy) = master_and_copy(&mut trained.master, copy, range)?;
                piece.apply_lamb(update, norms[piece.slot], master, copy)?;
            }
            self.complete(index)?;
        }
        Ok(())
    }

    /// The norms of every parameter of every unit, whole.
    fn lamb_norms(&self) -> Result<Vec<Vec<SquaredNorms>>, ZeroError> {
        // A row for each shard, with two numbers for each parameter.
        let starts =
            self.units.iter().scan(0, |start, unit| Some(replace(start, *start + unit.layout.slots.len())));
        let starts: Vec<usize> = starts.collect();
        let num_params: usize = self.units.iter().map(|unit| unit.layout.slots.len()).sum();
        let num_shards = self.group().group_size();
        let mut rows = vec![vec![0.0; 2 * num_params]; num_shards];
        for (unit, start) in self.units.iter().zip(&starts) {
            for piece in unit.trained.iter().flat_map(|trained| &trained.pieces) {
                let at = 2 * (start + piece.slot);
                rows[piece.shard][at..at + 2].copy_from_slice(&[piece.norms.param, piece.norms.update]);
            }
        }
        if self.options.stage.shards_optimizer() {
            rows = self.lane.exchange(&rows[self.group_rank])?;
        }
        let mut norms = sum_of(&rows, 2 * num_params);
        if self.groups().tensor.group_size() > 1 {
            // Each part once; the ranks that another speaks for take what it says.
            for (unit, start) in self.units.iter().zip(&starts) {
                for (slot, i) in unit.layout.slots.iter().zip(*start..) {
                    if self.placement.tensor_replicas.contains(&slot.param.name) {
                        norms[2 * i..2 * i + 2].fill(0.0);
                    }
                }
            }
            norms = sum_of(&self.lane.exchange_over_tensor(&norms)?, 2 * num_params);
        }
        let of = |i: usize| SquaredNorms { param: norms[2 * i], update: norms[2 * i + 1] };
        let units = self.units.iter().zip(starts);
        Ok(units.map(|(unit, start)| (start..start + unit.layout.slots.len()).map(of).collect()).collect())
    }

    /// The orthogonal directions of a unit's matrices, where this rank owns a part of them; nothing if it has no matrices.
    fn muon_directions(&mut self, unit: usize, update: Update) -> Result<Option<Buffer>, ZeroError> {
        let Zero { units, options, pool, lane, .. } = self;
        let Unit { layout, owned, trained: Some(trained), .. } = &mut units[unit] else { return Ok(None) };
        let is_matrix = |slot: &shardwise_plan::layout::ParamSlot| {
            matches!(options.settings(&slot.param).algorithm, Algorithm::Muon { .. })
        };
        // Asked of the layout, as every rank must join the all-gather.
        if !layout.slots.iter().any(is_matrix) {
            return Ok(None);
        }
        let grad = match &trained.grad {
            GradState::Full(full) => &full.typed::<f32>()?[owned.clone()],
            GradState::Shard(shard) => shard.typed::<f32>()?,
            _ => unreachable!("the norm settled every gradient"),
        };
        let mut full = pool.take(DType::F32, owned.len())?;
        let values = full.typed_mut::<f32>()?;
        values.fill(0.0);
        for piece in &mut trained.pieces {
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
}

impl Piece {
    fn lr(&self, update: Update) -> f64 {
        update.lr * self.settings.lr_scale
    }

    /// Moves this piece, or just the moments where the norms of whole parameters are needed first. The `grad` of Muon
    /// is the direction.
    fn take_gradient(
        &mut self,
        update: Update,
        noise: Option<Noise>,
        shape: &[usize],
        grad: &[f32],
        master: &mut [f32],
        compute: ComputeCopy<'_>,
    ) {
        let (lr, weight_decay) = (self.lr(update), self.settings.weight_decay);
        let Update { grad_scale, step, threads, .. } = update;
        let states = &mut self.states;
        match self.settings.algorithm {
            Algorithm::Adam(adam, decay) => {
                let (beta1, beta2, eps) = (adam.beta1, adam.beta2, adam.eps);
                let bias_correction = adam.bias_correction;
                let adam = Adam { lr, beta1, beta2, eps, weight_decay, decay, bias_correction, step };
                let tensors = Tensors { grad, master, states: states_of(states, noise), compute };
                adam.step_on(threads, grad_scale, tensors);
            }
            Algorithm::Sgd(sgd) => {
                let (momentum, dampening, direction) = (sgd.momentum, sgd.dampening, sgd.direction);
                let sgd = Sgd { lr, momentum, dampening, weight_decay, direction, step };
                match states.is_empty() {
                    true => {
                        let tensors = Tensors { grad, master, states: States::F32([]), compute };
                        sgd.plain_step_on(threads, grad_scale, tensors);
                    }
                    false => {
                        let tensors = Tensors { grad, master, states: states_of(states, noise), compute };
                        sgd.step_on(threads, grad_scale, tensors);
                    }
                }
            }
            Algorithm::Adagrad(adagrad) => {
                let (lr_decay, eps) = (adagrad.lr_decay, adagrad.eps);
                let tensors = Tensors { grad, master, states: states_of(states, noise), compute };
                Adagrad { lr, lr_decay, eps, weight_decay, step }.step_on(threads, grad_scale, tensors);
            }
            Algorithm::Lion(lion) => {
                let (beta1, beta2) = (lion.beta1, lion.beta2);
                let tensors = Tensors { grad, master, states: states_of(states, noise), compute };
                Lion { lr, beta1, beta2, weight_decay }.step_on(threads, grad_scale, tensors);
            }
            Algorithm::Lamb(_) => {
                let States::F32([m, v]) = states_of(&mut self.states, None) else {
                    unreachable!("the options refuse other states")
                };
                let lamb = lamb(self.settings.algorithm, lr, weight_decay, step);
                self.norms = lamb.moments_on(threads, grad_scale, grad, master, m, v);
            }
            Algorithm::Muon { momentum, direction, .. } => {
                let muon = Muon { lr, momentum, direction, weight_decay };
                let tensors = Tensors { grad, master, states: States::F32([]), compute };
                muon.apply_on(threads, [shape[0], shape[1]], tensors);
            }
        }
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

    /// LAMB's second pass.
    fn apply_lamb(
        &self,
        update: Update,
        norms: SquaredNorms,
        master: &mut [f32],
        compute: ComputeCopy<'_>,
    ) -> Result<(), DeviceError> {
        let (lr, weight_decay) = (self.lr(update), self.settings.weight_decay);
        let lamb = lamb(self.settings.algorithm, lr, weight_decay, update.step);
        let (m, v) = (self.states[0].values.typed()?, self.states[1].values.typed()?);
        lamb.apply_on(update.threads, norms, master, m, v, compute);
        Ok(())
    }
}

fn lamb(algorithm: Algorithm, lr: f64, weight_decay: f64, step: u64) -> Lamb {
    let Algorithm::Lamb(options) = algorithm else { unreachable!("LAMB takes all parameters or none") };
    Lamb {
        lr,
        beta1: options.beta1,
        beta2: options.beta2,
        eps: options.eps,
        weight_decay,
        max_coeff: options.max_coeff,
        min_coeff: options.min_coeff,
        bias_correction: options.bias_correction,
        step,
    }
}

/// The states of an algorithm that has `K` of them, as kernels take them.
fn states_of<const K: usize>(states: &mut [State], noise: Option<Noise>) -> States<'_, K> {
    const TYPED: &str = "states have the type of the options";
    let states: &mut [State; K] = states.try_into().expect("an algorithm's own states");
    match noise {
        None => States::F32(states.each_mut().map(|state| state.values.typed_mut().expect(TYPED))),
        Some(noise) => {
            States::Bf16(states.each_mut().map(|state| state.values.typed_mut().expect(TYPED)), noise)
        }
    }
}

/// The fp32 parameters of `range`, and where their 16-bit copy goes. In fp32 the copy is the parameters.
fn master_and_copy<'a>(
    master: &'a mut Option<Buffer>,
    copy: SliceMut<'a>,
    range: std::ops::Range<usize>,
) -> Result<(&'a mut [f32], ComputeCopy<'a>), DeviceError> {
    let Some(master) = master else { return Ok((copy.typed()?, ComputeCopy::None)) };
    let copy = match copy.dtype() {
        DType::F16 => ComputeCopy::F16(copy.typed::<f16>()?),
        _ => ComputeCopy::Bf16(copy.typed::<bf16>()?),
    };
    Ok((&mut master.typed_mut()?[range], copy))
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
