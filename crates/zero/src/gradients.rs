//! Gradients: from a layer's tensors to this rank's gradient of the unit.
//!
//! ```text
//!                    first micro-batch          later ones                     last one
//! no accumulation    reduce-scatter into the shard (stage 0: into its place in the whole, then all-gather)
//! stage 0, 1         whole = grads              whole += grads                 then all-reduce | reduce-scatter
//! stage 2, 3         reduce-scatter into shard  reduce-scatter, shard += that  same
//! ```
//! Stage 1 reduce-scatters its whole gradient into a spare shard, which is copied into the rank's own range: the step
//! finds it there, as in stage 0.
//!
//! What is sent may be divided and cast first (`reduction.rs`); then, and where there is a side thread, it is written to a
//! flat buffer. Otherwise a reduction reads the gradients where libtorch left them ([`Part`] lists). At most
//! [`MAX_REDUCING`] such buffers are under way on the side thread: without a bound, a backward pass that outruns its
//! reductions would hold the gradients of the whole model.
//!
//! Ranks are summed in f32. A unit's gradient of another type is rounded from that sum, so there the sum has a spare
//! shard in f32 for a moment.

use std::mem::replace;
use std::ops::Range;

use half::{bf16, f16};
use shardwise_comm::Part;
use shardwise_device::{Buffer, BufferPool, DType, Slice};
use shardwise_kernels::processor::Piece;
use shardwise_plan::memory::{NUM_GOING_DOWN, NUM_REDUCING};
use shardwise_plan::{UnitLayout, ZeroStage};

use crate::lane::Pending;
use crate::unit::{Down, Fold, GradState, Landing, Trained, Unit};
use crate::{Zero, ZeroError};

/// Reductions under way on the side thread: one runs while the next is being filled.
const MAX_REDUCING: usize = NUM_REDUCING - 1;

/// Gradients under way to the host: it takes one in while the GPU is at the next ones.
const MAX_GOING_DOWN: usize = NUM_GOING_DOWN - 1;

impl Zero {
    /// Takes the gradients of one unit in one micro-batch: one for each of its parameters, in their order and in the
    /// compute type; `None` is zero. They are read before the call returns.
    ///
    /// `microbatch` counts from 0 in each step; the last one completes the unit's reduction.
    ///
    /// # Collective
    /// Every rank reduces the same units in the same order.
    /// # Errors
    /// [`ZeroError::WrongGradient`] and [`ZeroError::WrongGradientType`] for a gradient of another size or type,
    /// [`ZeroError::WrongMicroBatch`] out of turn, or a failed collective.
    pub fn reduce(
        &mut self,
        unit: usize,
        microbatch: usize,
        grads: &[Option<Slice<'_>>],
    ) -> Result<(), ZeroError> {
        let accum = self.options.grad_accum_steps;
        let Unit { layout, trained, .. } = &mut self.units[unit];
        let parts = parts_of(layout, self.options.compute, grads)?;
        let Some(trained) = trained else { return Ok(()) };
        let expected = trained.num_reduced;
        if microbatch != expected || expected == accum {
            return Err(ZeroError::WrongMicroBatch { unit: layout.name.clone(), expected, got: microbatch });
        }
        trained.num_reduced += 1;
        self.settle(unit)?; // the previous micro-batch's reduction
        if self.tiers.offloads_optimizer().is_some() && !self.sums_before_it_sends {
            let flat = self.outgoing(self.options.compute, &parts)?;
            let fold = if microbatch == 0 { Fold::Set } else { Fold::Add };
            self.send_down(unit, flat, fold)?;
        } else if accum == 1 || self.options.stage.shards_gradients() {
            self.reduce_now(unit, microbatch, &parts)?;
        } else {
            self.accumulate(unit, microbatch, &parts)?;
            if microbatch + 1 == accum {
                self.reduce_accumulated(unit)?;
            }
        }
        self.limit_reducing(unit)
    }

    /// Notes that a reduction of `unit` may be under way, and waits for the oldest if there are too many.
    fn limit_reducing(&mut self, unit: usize) -> Result<(), ZeroError> {
        let most = match self.tiers.offloads_optimizer() {
            Some(_) => MAX_GOING_DOWN,
            None if self.lane.is_inline() => return Ok(()),
            None => MAX_REDUCING,
        };
        self.reducing.retain(|&other| other != unit);
        self.reducing.push_back(unit);
        while self.reducing.len() > most {
            let oldest = self.reducing.pop_front().expect("more than none");
            self.settle(oldest)?;
        }
        Ok(())
    }

    /// Adds a micro-batch to the whole unit's gradient.
    fn accumulate(&mut self, unit: usize, microbatch: usize, parts: &[Part<'_>]) -> Result<(), ZeroError> {
        let device = self.tiers.device.clone();
        if matches!(self.grad_mut(unit), GradState::OnHost) {
            // The sum of the last step's went down, and its memory back.
            let (sums, numel) = (self.reduction.sums, self.units[unit].layout.padded_numel);
            *self.grad_mut(unit) = GradState::Full(self.pool.take(sums, numel)?);
        }
        let GradState::Full(full) = self.grad_mut(unit) else {
            unreachable!("stages 0 and 1 keep the whole gradient when they accumulate")
        };
        match microbatch {
            0 => device.pack(&pieces(parts), 1.0, full.view_mut())?,
            _ => device.accumulate(&pieces(parts), full.view_mut())?,
        }
        Ok(())
    }

    /// Starts to bring one gradient of a unit to the host, summed over ranks where there are several.
    fn send_down(&mut self, unit: usize, sent: Buffer, fold: Fold) -> Result<(), ZeroError> {
        let copies = self.tiers.offloads_optimizer().expect("asked by the caller").clone();
        let shard_numel = self.units[unit].layout.shard_numel();
        let (summed, told) = match self.lane.is_alone() {
            true => (None, sent.dtype()),
            false => (Some(self.pool.take(DType::F32, shard_numel)?), DType::F32),
        };
        let told = match self.takes_as_it_is(unit, told, fold) {
            true => self.trained_mut(unit).offloaded.take().expect("just looked at"),
            false => self.step_pool().take(told, shard_numel)?,
        };
        let work = self.lane.reduce_down(Down { sent, summed, told }, &copies)?;
        *self.grad_mut(unit) = GradState::ToHost { work, fold };
        Ok(())
    }

    /// Whether what goes down, in numbers of type `told`, is the gradient that a step reads: it goes right to its place.
    fn takes_as_it_is(&self, unit: usize, told: DType, fold: Fold) -> bool {
        let trained = self.units[unit].trained.as_ref().expect("only trainable units are reduced");
        fold == Fold::Set && trained.offloaded.as_ref().is_some_and(|grad| grad.dtype() == told)
    }

    /// The pool of what the optimizer computes on.
    pub(crate) fn step_pool(&mut self) -> &mut BufferPool {
        self.host_pool.as_mut().unwrap_or(&mut self.pool)
    }

    /// Reduces the whole unit's gradient of all micro-batches.
    fn reduce_accumulated(&mut self, unit: usize) -> Result<(), ZeroError> {
        let shard_numel = self.units[unit].layout.shard_numel();
        let is_stage_0 = self.options.stage == ZeroStage::Zero;
        let GradState::Full(full) = replace(self.grad_mut(unit), GradState::Moving) else {
            unreachable!("as in `accumulate`")
        };
        let sends_as_is = self.reduction.sends_as_is(full.dtype());
        if self.tiers.offloads_optimizer().is_some() {
            let sent = match sends_as_is {
                true => full,
                false => {
                    let sent = self.outgoing(full.dtype(), &[Part::Data(full.view())])?;
                    self.pool.give_back(full);
                    sent
                }
            };
            return self.send_down(unit, sent, Fold::Set);
        }
        if is_stage_0 && sends_as_is {
            *self.grad_mut(unit) = GradState::ReducingFull(self.lane.all_reduce(full)?);
            return Ok(());
        }
        let (input, landing) = if sends_as_is {
            (full, Landing::Input)
        } else {
            let sent = self.outgoing(full.dtype(), &[Part::Data(full.view())])?;
            (sent, Landing::Set(full))
        };
        let spare = self.pool.take(DType::F32, shard_numel)?;
        let work = self.lane.reduce_scatter(input, spare, 0..shard_numel)?;
        let state = if is_stage_0 {
            // The sum must be here before it can go on to the others; the all-gather overlaps.
            let GradState::Full(full) = self.land(unit, work, landing)? else {
                unreachable!("stage 0 keeps the whole gradient")
            };
            GradState::ReducingFull(self.lane.all_gather_in_place(full)?)
        } else if self.lane.is_inline() {
            self.land(unit, work, landing)?
        } else {
            GradState::ReducingShard { work, landing }
        };
        *self.grad_mut(unit) = state;
        Ok(())
    }

    /// Reduces one micro-batch's gradient straight away.
    fn reduce_now(&mut self, unit: usize, microbatch: usize, parts: &[Part<'_>]) -> Result<(), ZeroError> {
        let range = self.units[unit].layout.shard_range(self.group_rank);
        let fold = if microbatch == 0 { Fold::Set } else { Fold::Add };
        let state = match replace(self.grad_mut(unit), GradState::Moving) {
            GradState::Full(full) => {
                // As in `reduce_accumulated`.
                let full = self.reduce_into(parts, full, range, fold)?;
                GradState::ReducingFull(self.lane.all_gather_in_place(full)?)
            }
            GradState::Shard(shard) if self.lane.is_inline() => {
                let all = 0..shard.numel();
                GradState::Shard(self.reduce_into(parts, shard, all, fold)?)
            }
            GradState::Shard(shard) => {
                let flat = self.outgoing(self.options.compute, parts)?;
                let all = 0..shard.numel();
                let (output, landing) = match fold {
                    Fold::Set if shard.dtype() == DType::F32 => (shard, Landing::Output),
                    Fold::Set => (self.pool.take(DType::F32, all.len())?, Landing::Set(shard)),
                    Fold::Add => (self.pool.take(DType::F32, all.len())?, Landing::Add(shard)),
                };
                let work = self.lane.reduce_scatter(flat, output, all)?;
                GradState::ReducingShard { work, landing }
            }
            _ => unreachable!("settled by the caller"),
        };
        *self.grad_mut(unit) = state;
        Ok(())
    }

    /// Reduce-scatters one micro-batch's `parts` into `range` of `buffer`, and waits.
    fn reduce_into(
        &mut self,
        parts: &[Part<'_>],
        buffer: Buffer,
        range: Range<usize>,
        fold: Fold,
    ) -> Result<Buffer, ZeroError> {
        let as_it_is = self.lane.is_alone() && buffer.dtype() == self.options.compute;
        if fold == Fold::Set && (as_it_is || buffer.dtype() == DType::F32) {
            return self.reduce_scatter(parts, buffer, range);
        }
        let mut buffer = buffer;
        let spare = self.pool.take(DType::F32, range.len())?;
        let spare = self.reduce_scatter(parts, spare, 0..range.len())?;
        self.fold(fold, &spare, &mut buffer, range)?;
        self.pool.give_back(spare);
        Ok(buffer)
    }

    /// Reduce-scatters one micro-batch's `parts` into `range` of `output`, and waits. It is in f32, or, of a rank that is alone, in their type.
    fn reduce_scatter(
        &mut self,
        parts: &[Part<'_>],
        mut output: Buffer,
        range: Range<usize>,
    ) -> Result<Buffer, ZeroError> {
        let compute = self.options.compute;
        if self.lane.is_alone() {
            self.tiers.device.pack(&pieces(parts), 1.0, output.view_mut().into_range(range))?;
            return Ok(output);
        }
        if self.lane.is_inline() && self.reduction.sends_as_is(compute) {
            self.lane.inline(|group| group.reduce_scatter(parts, output.view_mut().into_range(range)))?;
            return Ok(output);
        }
        let flat = self.outgoing(compute, parts)?;
        let (flat, output) = self.lane.reduce_scatter(flat, output, range)?.wait()?;
        self.pool.give_back(flat);
        Ok(output)
    }

    /// Waits for what is under way on a unit's gradient.
    pub(crate) fn settle(&mut self, unit: usize) -> Result<(), ZeroError> {
        let state = match replace(self.grad_mut(unit), GradState::Moving) {
            GradState::ReducingFull(pending) => GradState::Full(pending.wait()?),
            GradState::ReducingShard { work, landing } => self.land(unit, work, landing)?,
            GradState::ToHost { work, fold } => self.take_in(unit, work, fold)?,
            GradState::Moving => return Err(self.lost(unit)),
            settled => settled,
        };
        *self.grad_mut(unit) = state;
        Ok(())
    }

    /// Waits for a gradient on its way to the host and puts it where it belongs.
    fn take_in(&mut self, unit: usize, work: Pending<Down>, fold: Fold) -> Result<GradState, ZeroError> {
        let Down { sent, summed, told } = work.wait()?;
        self.pool.give_back(sent);
        if let Some(summed) = summed {
            self.pool.give_back(summed);
        }
        let trained = self.units[unit].trained.as_mut().expect("only trainable units are reduced");
        let Some(grad) = &mut trained.offloaded else {
            trained.offloaded = Some(told);
            return Ok(GradState::OnHost);
        };
        let grad = grad.view_mut();
        match fold {
            Fold::Set => self.tiers.stepper.scale(told.view(), 1.0, grad)?,
            Fold::Add => self.tiers.stepper.accumulate(&[Piece::Data(told.view())], grad)?,
        }
        self.step_pool().give_back(told);
        Ok(GradState::OnHost)
    }

    /// Waits for a reduced shard and puts it where it belongs.
    fn land(
        &mut self,
        unit: usize,
        work: Pending<(Buffer, Buffer)>,
        landing: Landing,
    ) -> Result<GradState, ZeroError> {
        let (input, output) = work.wait()?;
        let (mut buffer, fold) = match landing {
            Landing::Output => {
                self.pool.give_back(input);
                return Ok(GradState::Shard(output));
            }
            Landing::Input => (input, Fold::Set),
            Landing::Set(buffer) => {
                self.pool.give_back(input);
                (buffer, Fold::Set)
            }
            Landing::Add(buffer) => {
                self.pool.give_back(input);
                (buffer, Fold::Add)
            }
        };
        let keeps_full = self.options.stage.keeps_whole_gradients(self.options.grad_accum_steps);
        let range =
            if keeps_full { self.units[unit].layout.shard_range(self.group_rank) } else { 0..output.numel() };
        self.fold(fold, &output, &mut buffer, range)?;
        self.pool.give_back(output);
        Ok(if keeps_full { GradState::Full(buffer) } else { GradState::Shard(buffer) })
    }

    /// Puts a reduced shard, in f32, into `range` of a unit's gradient.
    fn fold(
        &self,
        fold: Fold,
        shard: &Buffer,
        buffer: &mut Buffer,
        range: Range<usize>,
    ) -> Result<(), ZeroError> {
        let place = buffer.view_mut().into_range(range);
        match fold {
            Fold::Set => self.tiers.device.scale(shard.view(), 1.0, place)?,
            Fold::Add => self.tiers.device.accumulate(&[Piece::Data(shard.view())], place)?,
        }
        Ok(())
    }

    /// `parts` of type `own`, flat, as they go on the wire.
    fn outgoing(&mut self, own: DType, parts: &[Part<'_>]) -> Result<Buffer, ZeroError> {
        let numel = parts.iter().map(Part::numel).sum();
        let mut flat = self.pool.take(self.reduction.wire(own), numel)?;
        self.tiers.device.pack(&pieces(parts), self.reduction.before, flat.view_mut())?;
        Ok(flat)
    }

    fn grad_mut(&mut self, unit: usize) -> &mut GradState {
        &mut self.trained_mut(unit).grad
    }

    fn trained_mut(&mut self, unit: usize) -> &mut Trained {
        self.units[unit].trained.as_mut().expect("only trainable units are reduced")
    }
}

/// The same for a processor. Without the empty ones: that which states a type lies on the host.
fn pieces<'a>(parts: &[Part<'a>]) -> Vec<Piece<'a>> {
    let pieces = parts.iter().filter(|part| part.numel() > 0).map(|part| match part {
        Part::Data(data) => Piece::Data(*data),
        Part::Zeros(numel) => Piece::Zeros(*numel),
    });
    pieces.collect()
}

/// The flat unit as a list of gradients, gaps and padding.
fn parts_of<'a>(
    layout: &UnitLayout,
    compute: DType,
    grads: &[Option<Slice<'a>>],
) -> Result<Vec<Part<'a>>, ZeroError> {
    assert_eq!(grads.len(), layout.slots.len(), "one gradient for each parameter of `{}`", layout.name);
    let mut parts = Vec::with_capacity(2 * grads.len() + 2);
    // States the type for a rank that happens to have no gradient at all where others have some.
    parts.push(Part::Data(match compute {
        DType::Bf16 => Slice::of::<bf16>(&[]),
        DType::F16 => Slice::of::<f16>(&[]),
        _ => Slice::of::<f32>(&[]),
    }));
    let mut at = 0;
    for (slot, grad) in layout.slots.iter().zip(grads) {
        if slot.offset > at {
            parts.push(Part::Zeros(slot.offset - at));
        }
        let expected = slot.param.numel();
        match grad {
            Some(grad) if grad.numel() != expected => {
                return Err(ZeroError::WrongGradient {
                    param: slot.param.name.clone(),
                    expected,
                    got: grad.numel(),
                });
            }
            Some(grad) if grad.dtype() != compute => {
                return Err(ZeroError::WrongGradientType {
                    param: slot.param.name.clone(),
                    expected: compute,
                    got: grad.dtype(),
                });
            }
            Some(grad) => parts.push(Part::Data(*grad)),
            None => parts.push(Part::Zeros(expected)),
        }
        at = slot.offset + expected;
    }
    if layout.padded_numel > at {
        parts.push(Part::Zeros(layout.padded_numel - at));
    }
    Ok(parts)
}
