//! [`Zero`]: birth of the state, and parameters as they come and go.

use std::collections::VecDeque;
use std::mem::replace;
use std::ops::Range;
use std::ptr::NonNull;

use half::bf16;
use shardwise_comm::Group;
use shardwise_device::{Buffer, BufferPool, DType, DeviceError, Place, PoolStats, SliceMut};
use shardwise_kernels::{Threads, cast};
use shardwise_plan::{ParamSpec, UnitLayout, ZeroStage, pattern::matches_pattern};

use crate::lane::{Lane, Pending};
use crate::unit::{GradState, ParamState, Trained, Unit};
use crate::{StateBytes, ZeroError, ZeroOptions};

/// Gives the first values of elements of one parameter: from a file, or from a generator.
pub type Fill<'a> = dyn FnMut(&ParamSpec, Range<usize>, &mut [f32]) -> Result<(), Box<dyn std::error::Error + Send + Sync>>
    + 'a;

/// Elements filled at a time, so that birth needs no second copy of anything.
const FILL_NUMEL: usize = 1 << 20;

/// All model state of one rank.
pub struct Zero {
    pub(crate) options: ZeroOptions,
    pub(crate) lane: Lane,
    pub(crate) group_rank: usize,
    pub(crate) group_size: usize,
    pub(crate) units: Vec<Unit>,
    pub(crate) pool: BufferPool,
    /// Units whose gradients are on the side thread, oldest first.
    pub(crate) reducing: VecDeque<usize>,
    /// Elements of the largest unit: every gather buffer has room for it, so that any two are alike.
    gather_numel: usize,
    /// Applied steps.
    pub(crate) num_steps: u64,
}

impl Zero {
    /// Lays out the state of this rank and fills its parameters.
    ///
    /// `fill` is called for ranges of parameters of which this rank keeps master weights, and never for more.
    ///
    /// # Collective
    /// `group`. Every rank calls with the same layouts and options.
    /// # Errors
    /// [`ZeroError::WrongOption`], [`ZeroError::WrongGroup`] if the layouts are for another number of ranks,
    /// [`ZeroError::Fill`] what `fill` says.
    pub fn new(
        layouts: Vec<UnitLayout>,
        options: ZeroOptions,
        group: Group,
        fill: &mut Fill<'_>,
    ) -> Result<Self, ZeroError> {
        options.check()?;
        let (group_rank, group_size) = (group.group_rank(), group.group_size());
        if let Some(wrong) = layouts.iter().find(|layout| layout.num_shards != group_size) {
            let (unit, expected) = (wrong.name.clone(), wrong.num_shards);
            return Err(ZeroError::WrongGroup { unit, expected, got: group_size });
        }
        let lane = Lane::new(group, options.overlap)?;
        let gather_numel = layouts.iter().map(|layout| layout.padded_numel).max().unwrap_or(0);
        let mut zero = Zero {
            options,
            lane,
            group_rank,
            group_size,
            units: Vec::with_capacity(layouts.len()),
            pool: BufferPool::new(Place::Cpu),
            reducing: VecDeque::new(),
            gather_numel,
            num_steps: 0,
        };
        for layout in layouts {
            let unit = zero.new_unit(layout, fill)?;
            zero.units.push(unit);
        }
        Ok(zero)
    }

    fn new_unit(&self, layout: UnitLayout, fill: &mut Fill<'_>) -> Result<Unit, ZeroError> {
        let (stage, compute) = (self.options.stage, self.options.compute);
        let owned = Unit::owned_range(&layout, stage, self.group_rank);
        let zeros = |dtype, numel| Buffer::zeroed(dtype, numel, Place::Cpu);
        let held = if stage.shards_parameters() { owned.clone() } else { 0..layout.padded_numel };
        let mut copy = zeros(compute, held.len())?;
        let needs_master = layout.trainable && compute != DType::F32;
        let mut master = needs_master.then(|| zeros(DType::F32, owned.len())).transpose()?;
        let mut scratch = vec![0f32; FILL_NUMEL.min(owned.len())];
        for fragment in layout.fragments(owned.clone()) {
            let param = &layout.slots[fragment.slot].param;
            let mut done = 0;
            while done < fragment.param_range.len() {
                let count = FILL_NUMEL.min(fragment.param_range.len() - done);
                let from = fragment.param_range.start + done;
                let values = &mut scratch[..count];
                fill(param, from..from + count, values)
                    .map_err(|source| ZeroError::Fill { param: param.name.clone(), source })?;
                let at = fragment.local_range.start + done;
                if let Some(master) = &mut master {
                    master.typed_mut::<f32>()?[at..at + count].copy_from_slice(values);
                }
                let at = at + owned.start - held.start;
                narrow(values, copy.view_mut().into_range(at..at + count))?;
                done += count;
            }
        }
        let params = if stage.shards_parameters() {
            ParamState::Sharded { shard: copy }
        } else if stage.shards_optimizer() {
            ParamState::Resident(self.lane.all_gather_in_place(copy)?.wait()?)
        } else {
            ParamState::Resident(copy)
        };
        let trained = if layout.trainable {
            let full = stage.keeps_whole_gradients(self.options.grad_accum_steps);
            Some(Trained {
                master,
                exp_avg: zeros(DType::F32, owned.len())?,
                exp_avg_sq: zeros(DType::F32, owned.len())?,
                grad: match full {
                    true => GradState::Full(zeros(DType::F32, layout.padded_numel)?),
                    false => GradState::Shard(zeros(DType::F32, layout.shard_numel())?),
                },
                num_reduced: 0,
                decay: self.decay_ranges(&layout, owned.clone()),
            })
        } else {
            None
        };
        Ok(Unit { layout, owned, params, trained })
    }

    /// Consecutive ranges of `owned` with their weight decay, as few as can be; gaps go with their neighbour, for
    /// they are zero and stay so.
    fn decay_ranges(&self, layout: &UnitLayout, owned: Range<usize>) -> Vec<(Range<usize>, f64)> {
        let numel = owned.len();
        let mut ranges: Vec<(Range<usize>, f64)> = Vec::new();
        for fragment in layout.fragments(owned) {
            let name = &layout.slots[fragment.slot].param.name;
            let exempt = self.options.no_decay.iter().any(|pattern| matches_pattern(pattern, name));
            let decay = if exempt { 0.0 } else { self.options.adamw.weight_decay };
            match ranges.last_mut() {
                Some((last, same)) if *same == decay => last.end = fragment.local_range.end,
                Some((last, _)) => {
                    last.end = fragment.local_range.start;
                    ranges.push((fragment.local_range, decay));
                }
                None => ranges.push((0..fragment.local_range.end, decay)),
            }
        }
        if let Some((last, _)) = ranges.last_mut() {
            last.end = numel;
        }
        ranges
    }

    /// The units' layouts, by index.
    pub fn layouts(&self) -> impl ExactSizeIterator<Item = &UnitLayout> {
        self.units.iter().map(|unit| &unit.layout)
    }

    /// The layout of one unit.
    pub fn layout(&self, unit: usize) -> &UnitLayout {
        &self.units[unit].layout
    }

    /// The stage.
    pub fn stage(&self) -> ZeroStage {
        self.options.stage
    }

    /// The group over which state is sharded.
    pub fn group(&self) -> &Group {
        self.lane.group()
    }

    /// Makes the unit's compute copy whole and says where it is. It stays there until [`Zero::release`] or
    /// [`Zero::step`]; nobody may write there.
    ///
    /// # Collective
    /// In stage 3: every rank gathers the same units in the same order.
    /// # Errors
    /// A failed collective or allocation.
    pub fn gather(&mut self, unit: usize) -> Result<NonNull<u8>, ZeroError> {
        self.start_gather(unit)?;
        let state = &mut self.units[unit].params;
        *state = match replace(state, ParamState::Moving) {
            ParamState::Completing(work) => ParamState::Resident(work.wait()?),
            ParamState::Gathering(work) => {
                let (shard, full) = work.wait()?;
                ParamState::Gathered { shard, full }
            }
            other => other,
        };
        match state {
            ParamState::Resident(full) | ParamState::Gathered { full, .. } => Ok(full.as_ptr()),
            ParamState::Moving => Err(self.lost(unit)),
            _ => unreachable!("start_gather leaves a whole copy, or one under way"),
        }
    }

    /// Starts to make the unit's compute copy whole, where that can run beside the computation.
    ///
    /// # Collective
    /// As [`Zero::gather`].
    /// # Errors
    /// A failed collective or allocation.
    pub fn prefetch(&mut self, unit: usize) -> Result<(), ZeroError> {
        if self.lane.is_inline() { Ok(()) } else { self.start_gather(unit) }
    }

    fn start_gather(&mut self, unit: usize) -> Result<(), ZeroError> {
        if !matches!(self.units[unit].params, ParamState::Sharded { .. }) {
            return Ok(());
        }
        let full = self.pool.take(self.options.compute, self.gather_numel)?;
        let state = &mut self.units[unit].params;
        let ParamState::Sharded { shard } = replace(state, ParamState::Moving) else {
            unreachable!("checked above")
        };
        *state = match self.lane.all_gather(shard, full)? {
            Pending::Ready((shard, full)) => ParamState::Gathered { shard, full },
            Pending::UnderWay(work) => ParamState::Gathering(work),
        };
        Ok(())
    }

    /// Lets the unit's whole compute copy go, where it is sharded.
    pub fn release(&mut self, unit: usize) {
        let state = &mut self.units[unit].params;
        *state = match replace(state, ParamState::Moving) {
            ParamState::Gathered { shard, full } => {
                self.pool.give_back(full);
                ParamState::Sharded { shard }
            }
            other => other,
        };
    }

    /// Waits until every collective issued so far has run, on the side thread too: what follows is measured alone.
    ///
    /// # Errors
    /// A failed collective.
    pub fn drain(&self) -> Result<(), ZeroError> {
        self.lane.drain()
    }

    /// Time so far in which the caller's thread was in a collective or waited for one, and computed nothing.
    pub fn exposed_comm(&self) -> std::time::Duration {
        self.lane.exposed()
    }

    /// The `values` of every rank, in rank order.
    ///
    /// # Collective
    /// Every rank calls with as many values.
    /// # Errors
    /// A failed collective.
    pub fn exchange(&self, values: &[f64]) -> Result<Vec<Vec<f64>>, ZeroError> {
        self.lane.exchange(values)
    }

    /// Bytes of model state that this rank holds, by kind, when nothing is gathered.
    pub fn state_bytes(&self) -> StateBytes {
        let ZeroOptions { stage, compute, grad_accum_steps, .. } = self.options;
        self.units.iter().map(|unit| unit.state_bytes(stage, compute, grad_accum_steps)).fold(
            StateBytes::default(),
            |a, b| StateBytes {
                params: a.params + b.params,
                master_params: a.master_params + b.master_params,
                optimizer: a.optimizer + b.optimizer,
                grads: a.grads + b.grads,
            },
        )
    }

    /// What the pool of gather and reduce buffers holds now and held at most.
    pub fn pool_stats(&self) -> PoolStats {
        self.pool.stats()
    }

    /// Applied steps so far.
    pub fn num_steps(&self) -> u64 {
        self.num_steps
    }

    pub(crate) fn threads(&self) -> Threads {
        self.options.threads
    }

    pub(crate) fn lost(&self, unit: usize) -> ZeroError {
        ZeroError::Lost { unit: self.units[unit].layout.name.clone() }
    }
}

/// Writes fp32 values as the compute type.
fn narrow(values: &[f32], out: SliceMut<'_>) -> Result<(), DeviceError> {
    match out.dtype() {
        DType::F32 => out.typed::<f32>()?.copy_from_slice(values),
        DType::Bf16 => cast::f32_to_bf16(values, out.typed::<bf16>()?),
        got => return Err(DeviceError::WrongDType { expected: DType::Bf16, got }),
    }
    Ok(())
}
