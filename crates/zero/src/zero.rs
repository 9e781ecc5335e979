//! [`Zero`]: birth of the state, and parameters as they come and go.

use std::collections::VecDeque;
use std::mem::replace;
use std::ops::Range;
use std::ptr::NonNull;

use half::{bf16, f16};
use shardwise_comm::Group;
use shardwise_device::cuda::Access;
use shardwise_device::{Buffer, BufferPool, DType, DeviceError, Place, PoolStats, SliceMut};
use shardwise_kernels::{Processor, Threads, cast};
use shardwise_plan::{Overlap, ParamSpec, UnitLayout, ZeroStage};

use crate::lamb::NormTable;
use crate::lane::{Lane, Pending};
use crate::reduction::Reduction;
use crate::scaler::LossScaler;
use crate::tiers::Tiers;
use crate::unit::{GradState, ParamState, Trained, Unit};
use crate::{Groups, LossScalerState, LossScaling, Optimizer, Placement, StateBytes, ZeroError, ZeroOptions};

/// Gives the first values of elements of one parameter: from a file, or from a generator.
pub type Fill<'a> = dyn FnMut(&ParamSpec, Range<usize>, &mut [f32]) -> Result<(), Box<dyn std::error::Error + Send + Sync>>
    + 'a;

/// Elements filled at a time, so that birth needs no second copy of anything: enough to be worth several threads.
pub(crate) const FILL_NUMEL: usize = 1 << 22;

/// All model state of one rank.
pub struct Zero {
    pub(crate) options: ZeroOptions,
    /// Whether micro-batches are summed before anything is sent. One rank does so too, where the run asked for stage 0 or 1.
    pub(crate) sums_before_it_sends: bool,
    pub(crate) lane: Lane,
    pub(crate) placement: Placement,
    /// In the data group.
    pub(crate) group_rank: usize,
    pub(crate) units: Vec<Unit>,
    pub(crate) tiers: Tiers,
    /// Of the memory that has the model.
    pub(crate) pool: BufferPool,
    /// Of the memory that has the optimizer's state, where that is another.
    pub(crate) host_pool: Option<BufferPool>,
    /// Units whose gradients are on the side thread, oldest first.
    pub(crate) reducing: VecDeque<usize>,
    /// Elements of the largest unit: every gather buffer has room for it, so that any two are alike.
    gather_numel: usize,
    /// LAMB's, within a step.
    pub(crate) norms: Option<NormTable>,
    /// Applied steps.
    pub(crate) num_steps: u64,
    /// Counts steps, and knows the loss scale if there is one.
    pub(crate) scaler: LossScaler,
    pub(crate) reduction: Reduction,
}

impl Zero {
    /// [`Zero::on_mesh`] where no parameter is on ranks of several data groups.
    ///
    /// # Collective
    /// As [`Zero::on_mesh`].
    /// # Errors
    /// As [`Zero::on_mesh`].
    pub fn new(
        layouts: Vec<UnitLayout>,
        options: ZeroOptions,
        groups: impl Into<Groups>,
        fill: &mut Fill<'_>,
    ) -> Result<Self, ZeroError> {
        Zero::on_mesh(layouts, options, groups, Placement::default(), fill)
    }

    /// Lays out the state of this rank and fills its parameters. The layouts are of parameters as this rank's pipeline stage and tensor
    /// rank have them.
    ///
    /// `fill` is called for ranges of parameters of which this rank keeps master weights, and never for more.
    ///
    /// # Collective
    /// The data group. Every rank of it calls with the same layouts, options and placement; in the world options and catalogue are the
    /// same.
    /// # Errors
    /// [`ZeroError::WrongOption`], also for Muon on several tensor ranks and for a catalogue that lacks a parameter;
    /// [`ZeroError::WrongGroup`] if the layouts are for another number of ranks, [`ZeroError::Fill`] what `fill` says.
    pub fn on_mesh(
        layouts: Vec<UnitLayout>,
        options: ZeroOptions,
        groups: impl Into<Groups>,
        placement: Placement,
        fill: &mut Fill<'_>,
    ) -> Result<Self, ZeroError> {
        let groups = groups.into();
        options.check()?;
        if let (Optimizer::Muon(_), 2..) = (&options.optimizer, groups.tensor.group_size()) {
            let expected = "`adamw`, `lamb` or another: tensor-parallel ranks have no whole matrices";
            return Err(ZeroError::WrongOption { option: "optimizer", got: "muon".to_owned(), expected });
        }
        let placement = placement.complete(&layouts, &groups)?;
        let (group_rank, group_size) = (groups.data.group_rank(), groups.data.group_size());
        if let Some(wrong) = layouts.iter().find(|layout| layout.num_shards != group_size) {
            let (unit, expected) = (wrong.name.clone(), wrong.num_shards);
            return Err(ZeroError::WrongGroup { unit, expected, got: group_size });
        }
        let sums_before_it_sends = options.stage.sums_before_it_sends(options.grad_accum_steps);
        // One rank keeps all of the state in every stage, and has nobody to gather it from.
        let options = match group_size {
            1 => ZeroOptions { stage: ZeroStage::Zero, overlap: Overlap::Inline, ..options },
            _ => options,
        };
        let tiers = Tiers::new(&options)?;
        if tiers.offloads_optimizer().is_some() && group_size > 1 && !options.stage.shards_optimizer() {
            let (option, got) = ("offload.optimizer", "host".to_owned());
            let expected = "`device` in stage 0 on several ranks: each would step all of the model";
            return Err(ZeroError::WrongOption { option, got, expected });
        }
        let compute = options.gpu.as_ref().map(|gpu| gpu.stream().clone());
        let lane = Lane::new(groups, options.overlap, compute)?;
        let gather_numel = layouts.iter().map(|layout| layout.padded_numel).max().unwrap_or(0);
        let mut zero = Zero {
            scaler: LossScaler::new(options.loss_scaling.unwrap_or(LossScaling::Static(1.0))),
            reduction: Reduction::new(
                &options.reduction,
                options.compute,
                options.grad_accum_steps,
                group_size,
                lane.groups().world.group_size() == 1,
            ),
            options,
            sums_before_it_sends,
            lane,
            placement,
            group_rank,
            units: Vec::with_capacity(layouts.len()),
            pool: BufferPool::of(tiers.device.memory()),
            host_pool: tiers.offloads_optimizer().map(|_| BufferPool::of(tiers.state_memory())),
            tiers,
            reducing: VecDeque::new(),
            gather_numel,
            norms: None,
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
        let (tiers, offloads) = (&self.tiers, self.tiers.offloads_optimizer().is_some());
        let on_device = |dtype, numel| Buffer::allocate(dtype, numel, &tiers.device.memory());
        let of_state = |dtype, numel| Buffer::allocate(dtype, numel, &tiers.state_memory());
        let held = if stage.shards_parameters() { owned.clone() } else { 0..layout.padded_numel };
        let mut copy = match self.gathers() {
            true => Buffer::allocate(compute, held.len(), &tiers.shard_memory())?,
            false => on_device(compute, held.len())?,
        };
        // The compute copy in fp32 is the master copy, where it lies with the optimizer's state.
        let is_apart = copy.place() != tiers.state_memory().place();
        let needs_master = layout.trainable && (compute != DType::F32 || is_apart);
        let mut master = needs_master.then(|| of_state(DType::F32, owned.len())).transpose()?;
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
                    tiers.store(values, master.view_mut().into_range(at..at + count))?;
                }
                let at = at + owned.start - held.start;
                tiers.store(values, copy.view_mut().into_range(at..at + count))?;
                done += count;
            }
        }
        let params = if self.gathers() {
            ParamState::Sharded { shard: copy }
        } else if stage.shards_optimizer() {
            ParamState::Resident(self.lane.all_gather_in_place(copy)?.wait()?)
        } else {
            ParamState::Resident(copy)
        };
        let trained = if layout.trainable {
            let full = stage.keeps_whole_gradients(self.options.grad_accum_steps);
            let sums = self.reduction.sums;
            let offloaded = offloads.then(|| of_state(sums, owned.len())).transpose()?;
            Some(Trained {
                master,
                grad: match full {
                    _ if offloads => GradState::OnHost,
                    true => GradState::Full(on_device(sums, layout.padded_numel)?),
                    false => GradState::Shard(on_device(sums, layout.shard_numel())?),
                },
                offloaded,
                num_reduced: 0,
                pieces: self.options.pieces(&layout, owned.clone(), tiers)?,
            })
        } else {
            None
        };
        Ok(Unit { layout, owned, params, trained })
    }

    /// The units' layouts, by index.
    pub fn layouts(&self) -> impl ExactSizeIterator<Item = &UnitLayout> {
        self.units.iter().map(|unit| &unit.layout)
    }

    /// The layout of one unit.
    pub fn layout(&self, unit: usize) -> &UnitLayout {
        &self.units[unit].layout
    }

    /// The stage; 0 where one rank keeps all state, whatever was asked for.
    pub fn stage(&self) -> ZeroStage {
        self.options.stage
    }

    /// The group over which state is sharded.
    pub fn group(&self) -> &Group {
        &self.groups().data
    }

    /// All groups.
    pub fn groups(&self) -> &Groups {
        self.lane.groups()
    }

    /// Whether this rank's elements of `param` count here and not on another tensor rank or an earlier stage: in norms, and
    /// in what is written.
    pub fn speaks_for(&self, param: &str) -> bool {
        self.placement.speaks_for(param)
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

    /// Whether units are gathered before they are used, and released after: in stage 3, and where parameters are kept on the host.
    pub fn gathers(&self) -> bool {
        self.options.stage.shards_parameters() || self.tiers.offloads_params().is_some()
    }

    /// Where compute copies are, and gradients have to be.
    pub fn compute_place(&self) -> Place {
        self.tiers.device.memory().place()
    }

    /// To be called before the gathered copy of a unit is used by work that nobody logs, on the stream of [`ZeroOptions::gpu`]: that work
    /// waits for the copy to be there. Nothing on the host.
    ///
    /// # Errors
    /// What a GPU says.
    pub fn begin_use(&self, unit: usize) -> Result<(), ZeroError> {
        if let Processor::Gpu(gpu) = &self.tiers.device {
            gpu.stream().wait_for(self.full_copy(unit), Access::Read).map_err(DeviceError::from)?;
        }
        Ok(())
    }

    /// To be called after [`Zero::begin_use`] and that work, before the unit is released: whoever writes there waits for it.
    ///
    /// # Errors
    /// What a GPU says.
    pub fn end_use(&self, unit: usize) -> Result<(), ZeroError> {
        if let Processor::Gpu(gpu) = &self.tiers.device {
            gpu.stream().note(self.full_copy(unit), Access::Read).map_err(DeviceError::from)?;
        }
        Ok(())
    }

    /// Starts to make the unit's compute copy whole, where that can run beside the computation.
    ///
    /// # Collective
    /// As [`Zero::gather`].
    /// # Errors
    /// A failed collective or allocation.
    pub fn prefetch(&mut self, unit: usize) -> Result<(), ZeroError> {
        // A single rank copies its parameters up, beside the computation.
        let is_copied_up = self.lane.is_alone() && self.tiers.offloads_params().is_some();
        if self.lane.is_inline() && !is_copied_up { Ok(()) } else { self.start_gather(unit) }
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
        let (owned, padded) = (self.units[unit].owned.clone(), self.units[unit].layout.padded_numel);
        let gathering = match self.tiers.offloads_params() {
            Some(copies) => self.lane.gather_up(shard, full, owned, padded, copies)?,
            None => self.lane.all_gather(shard, full)?,
        };
        self.units[unit].params = match gathering {
            Pending::Ready((shard, full)) => ParamState::Gathered { shard, full },
            under_way => ParamState::Gathering(under_way),
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

    /// Time so far in which the caller's thread was in a collective or waited for one. On a GPU that is not what a collective costs: see
    /// [`Stream::stalled`](shardwise_device::cuda::Stream::stalled).
    pub fn exposed_comm(&self) -> std::time::Duration {
        self.lane.exposed()
    }

    /// The `values` of every rank of the world, in rank order.
    ///
    /// # Collective
    /// Every rank of the world calls with as many values.
    /// # Errors
    /// A failed collective.
    pub fn exchange(&self, values: &[f64]) -> Result<Vec<Vec<f64>>, ZeroError> {
        self.lane.exchange_over_world(values)
    }

    /// Bytes of model state that this rank holds, by kind, when nothing is gathered.
    pub fn state_bytes(&self) -> StateBytes {
        self.units.iter().map(|unit| unit.state_bytes(&self.options, self.reduction.sums)).fold(
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

    /// What the gradient of each micro-batch's loss has to be for the step that comes: the loss scale, or 1. Everything
    /// else, the mean over micro-batches and ranks too, is a factor of the step.
    pub fn loss_scale(&self) -> f64 {
        self.scaler.scale()
    }

    /// What has to be saved for the loss scale and the count of skipped steps to go on as they would have.
    pub fn loss_scaler_state(&self) -> LossScalerState {
        *self.scaler.state()
    }

    /// Goes on from a saved state, which is the same on all ranks.
    pub fn restore_loss_scaler(&mut self, state: LossScalerState) {
        self.scaler.restore(state);
    }

    pub(crate) fn threads(&self) -> Threads {
        self.options.threads
    }

    pub(crate) fn lost(&self, unit: usize) -> ZeroError {
        ZeroError::Lost { unit: self.units[unit].layout.name.clone() }
    }
}

/// Writes fp32 values as the compute type.
pub(crate) fn narrow(values: &[f32], out: SliceMut<'_>) -> Result<(), DeviceError> {
    match out.dtype() {
        DType::F32 => out.typed::<f32>()?.copy_from_slice(values),
        DType::Bf16 => cast::f32_to_bf16(values, out.typed::<bf16>()?),
        DType::F16 => cast::f32_to_f16(values, out.typed::<f16>()?),
        got => return Err(DeviceError::WrongDType { expected: DType::F32, got }),
    }
    Ok(())
}
