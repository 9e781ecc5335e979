//! Gradients: from a layer's tensors to this rank's fp32 shard.
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
//! Without a side thread a reduction reads the gradients where libtorch left them ([`Part`] lists); with one they
//! are first flattened into a buffer that can be moved to it. At most [`MAX_REDUCING`] such buffers are under way: without a
//! bound, a backward pass that outruns its reductions would hold the gradients of the whole model.

use std::mem::replace;

use half::bf16;
use shardwise_comm::Part;
use shardwise_device::{Buffer, DType, DeviceError, Slice, SliceMut};
use shardwise_kernels::{Threads, add, cast};
use shardwise_plan::memory::NUM_REDUCING;
use shardwise_plan::{UnitLayout, ZeroStage};

use crate::lane::Pending;
use crate::unit::{GradState, Unit};
use crate::{Zero, ZeroError};

/// Reductions under way on the side thread: one runs while the next is being filled.
const MAX_REDUCING: usize = NUM_REDUCING - 1;

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
        if accum == 1 || self.options.stage.shards_gradients() {
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
        if self.lane.is_inline() {
            return Ok(());
        }
        self.reducing.retain(|&other| other != unit);
        self.reducing.push_back(unit);
        while self.reducing.len() > MAX_REDUCING {
            let oldest = self.reducing.pop_front().expect("more than none");
            self.settle(oldest)?;
        }
        Ok(())
    }

    /// Adds a micro-batch to the whole unit's gradient.
    fn accumulate(&mut self, unit: usize, microbatch: usize, parts: &[Part<'_>]) -> Result<(), ZeroError> {
        let threads = self.threads();
        let GradState::Full(full) = self.grad_mut(unit) else {
            unreachable!("stages 0 and 1 keep the whole gradient when they accumulate")
        };
        let mut rest = full.view_mut();
        for part in parts {
            let (numel, data) = match part {
                Part::Data(data) => (data.numel(), Some(data)),
                Part::Zeros(numel) => (*numel, None),
            };
            let (here, after) = rest.split_at(numel);
            rest = after;
            match (data, microbatch) {
                (Some(data), 0) => widen(threads, data, here)?,
                (Some(data), _) => widen_add(threads, data, here)?,
                (None, 0) => here.typed::<f32>()?.fill(0.0),
                (None, _) => {}
            }
        }
        Ok(())
    }

    /// Reduces the whole unit's gradient of all micro-batches.
    fn reduce_accumulated(&mut self, unit: usize) -> Result<(), ZeroError> {
        let range = self.units[unit].layout.shard_range(self.group_rank);
        let GradState::Full(mut full) = replace(self.grad_mut(unit), GradState::Moving) else {
            unreachable!("as in `accumulate`")
        };
        let state = if self.options.stage == ZeroStage::Zero {
            GradState::ReducingFull(self.lane.all_reduce(full)?)
        } else {
            let mut spare = self.pool.take(DType::F32, range.len())?;
            if self.lane.is_inline() {
                self.lane
                    .inline(|group| group.reduce_scatter(&[Part::Data(full.view())], spare.view_mut()))?;
                full.typed_mut::<f32>()?[range].copy_from_slice(spare.typed()?);
                self.pool.give_back(spare);
                GradState::Full(full)
            } else {
                let all = 0..range.len();
                GradState::ReducingShard { work: self.lane.reduce_scatter(full, spare, all)?, add_to: None }
            }
        };
        *self.grad_mut(unit) = state;
        Ok(())
    }

    /// Reduces one micro-batch's gradient straight away.
    fn reduce_now(&mut self, unit: usize, microbatch: usize, parts: &[Part<'_>]) -> Result<(), ZeroError> {
        let range = self.units[unit].layout.shard_range(self.group_rank);
        let first = microbatch == 0;
        match replace(self.grad_mut(unit), GradState::Moving) {
            GradState::Full(full) => {
                let full = self.reduce_into(parts, full, range)?;
                let pending = match full {
                    Pending::Ready(full) => self.lane.all_gather_in_place(full)?,
                    Pending::UnderWay(_) => {
                        // The reduction must be here before its buffer can go on; the all-gather overlaps.
                        let full = full.wait()?;
                        self.lane.all_gather_in_place(full)?
                    }
                };
                *self.grad_mut(unit) = GradState::ReducingFull(pending);
            }
            GradState::Shard(shard) if self.lane.is_inline() => {
                let all = 0..shard.numel();
                let shard = if first {
                    self.reduce_into(parts, shard, all)?.wait()?
                } else {
                    let spare = self.pool.take(DType::F32, shard.numel())?;
                    let spare = self.reduce_into(parts, spare, all)?.wait()?;
                    let shard = self.add(shard, &spare)?;
                    self.pool.give_back(spare);
                    shard
                };
                *self.grad_mut(unit) = GradState::Shard(shard);
            }
            GradState::Shard(shard) => {
                let flat = self.flatten(parts)?;
                let all = 0..shard.numel();
                let (output, add_to) = match first {
                    true => (shard, None),
                    false => (self.pool.take(DType::F32, all.len())?, Some(shard)),
                };
                let work = self.lane.reduce_scatter(flat, output, all)?;
                *self.grad_mut(unit) = GradState::ReducingShard { work, add_to };
            }
            _ => unreachable!("settled by the caller"),
        }
        Ok(())
    }

    /// Reduce-scatters `parts` into `range` of `output`.
    fn reduce_into(
        &mut self,
        parts: &[Part<'_>],
        mut output: Buffer,
        range: std::ops::Range<usize>,
    ) -> Result<Pending<Buffer>, ZeroError> {
        if self.lane.is_inline() {
            self.lane.inline(|group| group.reduce_scatter(parts, output.view_mut().into_range(range)))?;
            return Ok(Pending::Ready(output));
        }
        let flat = self.flatten(parts)?;
        let (flat, output) = self.lane.reduce_scatter(flat, output, range)?.wait()?;
        self.pool.give_back(flat);
        Ok(Pending::Ready(output))
    }

    /// Waits for what is under way on a unit's gradient.
    pub(crate) fn settle(&mut self, unit: usize) -> Result<(), ZeroError> {
        let range = self.units[unit].layout.shard_range(self.group_rank);
        let keeps_full = self.options.stage.keeps_whole_gradients(self.options.grad_accum_steps);
        let state = match replace(self.grad_mut(unit), GradState::Moving) {
            GradState::ReducingFull(pending) => GradState::Full(pending.wait()?),
            GradState::ReducingShard { work, add_to } => {
                let (input, output) = work.wait()?;
                if keeps_full {
                    let mut full = input;
                    full.typed_mut::<f32>()?[range].copy_from_slice(output.typed()?);
                    self.pool.give_back(output);
                    GradState::Full(full)
                } else {
                    self.pool.give_back(input);
                    GradState::Shard(match add_to {
                        None => output,
                        Some(shard) => {
                            let shard = self.add(shard, &output)?;
                            self.pool.give_back(output);
                            shard
                        }
                    })
                }
            }
            GradState::Moving => return Err(self.lost(unit)),
            settled => settled,
        };
        *self.grad_mut(unit) = state;
        Ok(())
    }

    fn add(&self, mut shard: Buffer, more: &Buffer) -> Result<Buffer, ZeroError> {
        add::add_assign_on(self.threads(), shard.typed_mut()?, more.typed()?);
        Ok(shard)
    }

    /// One buffer with all parts, for a reduction that must own its input.
    fn flatten(&mut self, parts: &[Part<'_>]) -> Result<Buffer, ZeroError> {
        let numel = |part: &Part<'_>| match part {
            Part::Data(data) => data.numel(),
            Part::Zeros(numel) => *numel,
        };
        let mut flat = self.pool.take(self.options.compute, parts.iter().map(numel).sum())?;
        let mut rest = flat.view_mut();
        for part in parts {
            let (here, after) = rest.split_at(numel(part));
            rest = after;
            match part {
                Part::Data(data) => here.bytes().copy_from_slice(data.bytes()),
                Part::Zeros(_) => here.bytes().fill(0),
            }
        }
        Ok(flat)
    }

    fn grad_mut(&mut self, unit: usize) -> &mut GradState {
        &mut self.units[unit].trained.as_mut().expect("only trainable units are reduced").grad
    }
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

/// `out = data`, in f32.
fn widen(threads: Threads, data: &Slice<'_>, out: SliceMut<'_>) -> Result<(), DeviceError> {
    let out = out.typed::<f32>()?;
    match data.dtype() {
        DType::F32 => out.copy_from_slice(data.typed()?),
        DType::Bf16 => cast::bf16_to_f32_on(threads, data.typed::<bf16>()?, out),
        got => return Err(DeviceError::WrongDType { expected: DType::Bf16, got }),
    }
    Ok(())
}

/// `out += data`, in f32.
fn widen_add(threads: Threads, data: &Slice<'_>, out: SliceMut<'_>) -> Result<(), DeviceError> {
    let out = out.typed::<f32>()?;
    match data.dtype() {
        DType::F32 => add::add_assign_on(threads, out, data.typed()?),
        DType::Bf16 => add::add_assign_bf16_on(threads, out, data.typed::<bf16>()?),
        got => return Err(DeviceError::WrongDType { expected: DType::Bf16, got }),
    }
    Ok(())
}
