//! The state of one unit on one rank.

use std::ops::Range;

use shardwise_device::{Buffer, DType, Slice};
use shardwise_plan::{UnitLayout, ZeroStage};

use crate::lane::Pending;
use crate::pieces::Piece;
use crate::{StateBytes, ZeroOptions};

/// One unit: its layout and what this rank holds of it.
pub(crate) struct Unit {
    pub layout: UnitLayout,
    /// The elements whose optimizer state this rank keeps: its shard, or everything in stage 0.
    pub owned: Range<usize>,
    pub params: ParamState,
    /// Absent for frozen parameters.
    pub trained: Option<Trained>,
}

/// Where the compute copy of the parameters is.
pub(crate) enum ParamState {
    /// The whole copy is here, always (stages 0 to 2).
    Resident(Buffer),
    /// The whole copy is being completed after a step (stages 1 and 2).
    Completing(Pending<Buffer>),
    /// Only the shard is here (stage 3).
    Sharded { shard: Buffer },
    /// The shard is on loan to an all-gather.
    Gathering(Pending<(Buffer, Buffer)>),
    /// The whole copy is here beside the shard.
    Gathered { shard: Buffer, full: Buffer },
    /// Between two of the others, within one call; or for ever, after an error ([`crate::ZeroError::Lost`]).
    Moving,
}

/// State of trainable parameters. Master weights and optimizer states cover `Unit::owned`.
pub(crate) struct Trained {
    /// fp32 weights; `None` when the model computes in fp32, for then they are the compute copy.
    pub master: Option<Buffer>,
    pub grad: GradState,
    /// The gradient that a step reads, where that is on the host and the model is not: of the owned range. `grad` then has what
    /// is still on the GPU, or on its way down, for which this may be on loan.
    pub offloaded: Option<Buffer>,
    /// Micro-batches reduced since the last step.
    pub num_reduced: usize,
    /// The owned range, with the optimizer's states.
    pub pieces: Vec<Piece>,
}

/// The gradient, summed over micro-batches and, once reduced, over ranks; in fp32, unless
/// [`crate::ReductionOptions::accumulation_dtype`] is another type.
pub(crate) enum GradState {
    /// The whole unit's (stage 0, and stage 1 with accumulation); its `owned` range is what a step reads.
    Full(Buffer),
    /// This rank's shard.
    Shard(Buffer),
    /// On its way: the whole unit's.
    ReducingFull(Pending<Buffer>),
    /// On its way: the shard, as the input of a reduce-scatter and its output in fp32.
    ReducingShard { work: Pending<(Buffer, Buffer)>, landing: Landing },
    /// On its way to the host, to be taken into [`Trained::offloaded`].
    ToHost { work: Pending<Down>, fold: Fold },
    /// On the host.
    OnHost,
    /// As [`ParamState::Moving`].
    Moving,
}

/// What a reduced shard does to what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fold {
    Set,
    Add,
}

/// A gradient on its way to the host, with the memory that it came by.
pub(crate) struct Down {
    /// One micro-batch's, whole, on the GPU.
    pub sent: Buffer,
    /// The sum over ranks of this rank's shard, on the GPU, if there are several.
    pub summed: Option<Buffer>,
    /// What goes in, in pinned memory: whoever reads it waits for the copy.
    pub told: Buffer,
}

/// Where a reduced shard goes. An input that nobody wants goes back to the pool.
pub(crate) enum Landing {
    /// It is there: the output is the shard.
    Output,
    /// To its place in the input, which is the whole gradient.
    Input,
    /// To its place in this gradient, whole or just the shard.
    Set(Buffer),
    /// Added there.
    Add(Buffer),
}

impl Unit {
    /// The elements a rank keeps optimizer state of.
    pub fn owned_range(layout: &UnitLayout, stage: ZeroStage, group_rank: usize) -> Range<usize> {
        if stage.shards_optimizer() { layout.shard_range(group_rank) } else { 0..layout.padded_numel }
    }

    /// Bytes held, without what is gathered for now. A buffer on loan to a collective counts as what comes back.
    /// Sums of gradients are of type `sums`.
    pub fn state_bytes(&self, options: &ZeroOptions, sums: DType) -> StateBytes {
        let ZeroOptions { stage, compute, grad_accum_steps, .. } = *options;
        let grad_bytes = sums.size_bytes();
        let (all, shard) = (self.layout.padded_numel, self.layout.shard_numel());
        let params = match &self.params {
            ParamState::Resident(copy)
            | ParamState::Sharded { shard: copy }
            | ParamState::Gathered { shard: copy, .. } => copy.num_bytes(),
            ParamState::Completing(_) => all * compute.size_bytes(),
            ParamState::Gathering(_) => shard * compute.size_bytes(),
            ParamState::Moving => 0,
        };
        let Some(trained) = &self.trained else { return StateBytes { params, ..StateBytes::default() } };
        let states = trained.pieces.iter().flat_map(|piece| &piece.states);
        StateBytes {
            params,
            master_params: trained.master.as_ref().map_or(0, Buffer::num_bytes),
            optimizer: states.map(|state| state.values.num_bytes()).sum(),
            grads: trained.offloaded.as_ref().map_or(0, Buffer::num_bytes)
                + match &trained.grad {
                    GradState::ToHost { .. } if trained.offloaded.is_none() => self.owned.len() * grad_bytes,
                    _ => 0,
                }
                + match &trained.grad {
                    GradState::Full(grad) | GradState::Shard(grad) => grad.num_bytes(),
                    GradState::ReducingFull(_) => all * grad_bytes,
                    GradState::ReducingShard { .. } if stage.keeps_whole_gradients(grad_accum_steps) => {
                        all * grad_bytes
                    }
                    GradState::ReducingShard { .. } => shard * grad_bytes,
                    GradState::ToHost { .. } | GradState::OnHost | GradState::Moving => 0,
                },
        }
    }
}

impl Trained {
    /// The settled gradient of `range`, a part of the unit that this rank owns (`owned`).
    pub fn settled_gradient(&self, owned: &Range<usize>, range: Range<usize>) -> Slice<'_> {
        let local = range.start - owned.start..range.end - owned.start;
        match (&self.offloaded, &self.grad) {
            (Some(grad), _) | (None, GradState::Shard(grad)) => grad.view().range(local),
            (None, GradState::Full(full)) => full.view().range(range),
            _ => unreachable!("settled before it is looked at"),
        }
    }
}
