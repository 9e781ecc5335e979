//! Memory of one rank: state, what a step holds, and the pools between, by the rules of `memory`.

use std::collections::BTreeMap;

use super::cost::{Costs, KindCost};
use super::{Layout, RankMemory};
use crate::memory::NUM_REDUCING;
use crate::pipeline::ScheduleKind;
use crate::{Axis, Bytes, Overlap, ZeroStage};

/// Buffers of a pipeline stage for messages: in each direction one that comes and one that goes.
const NUM_MESSAGES: usize = 4;

impl Costs<'_> {
    pub(super) fn memory(
        &self,
        layout: &Layout,
        kinds: &[KindCost],
        layers: &[usize],
        stage: usize,
    ) -> RankMemory {
        let mut memory = RankMemory::default();
        for &layer in layers {
            let cost = &kinds[self.model.kinds[layer]];
            let state = if self.finds_tied(layers, layer) { cost.state_without_tied } else { cost.state };
            memory.parameters += state.params;
            memory.gradients += state.grads;
            memory.optimizer += state.master_params + state.optimizer;
        }
        let step = self.fullest_moment(layout, layers, stage);
        memory.activations = step.activations;
        memory.buffers = step.besides + self.pools(layout, layers) + self.cluster.reserved;
        if self.stages.num_stages() > 1 {
            memory.buffers += Bytes(NUM_MESSAGES as u64 * self.boundary(layout).0);
        }
        memory
    }

    /// Gathered parameters and reductions under way, by the rules of `memory`.
    fn pools(&self, layout: &Layout, layers: &[usize]) -> Bytes {
        let compute_bytes = self.job.compute_bytes;
        let units = |layer: usize| {
            let kind = &self.kinds[self.model.kinds[layer]];
            if self.finds_tied(layers, layer) { &kind.without_tied } else { &kind.units }
        };
        let mut sizes: BTreeMap<(usize, usize), usize> = BTreeMap::new();
        let mut largest = 0;
        for unit in layers.iter().flat_map(|&layer| units(layer)) {
            largest = largest.max(unit.padded_numel);
            if unit.trainable {
                *sizes.entry((unit.padded_numel, unit.shard_numel())).or_default() += 1;
            }
        }
        let of_each_size = |whole: bool, at_a_time: usize, bytes: usize| -> Bytes {
            let size = |(&(padded, shard), &count): (&(usize, usize), &usize)| {
                Bytes::of(if whole { padded } else { shard } * at_a_time.min(count), bytes)
            };
            sizes.iter().map(size).sum()
        };
        let accumulates = layout.num_microbatches > 1;
        let added = |at_a_time| {
            if accumulates { of_each_size(false, at_a_time, self.job.widths.grads) } else { Bytes(0) }
        };
        let reductions = match (self.job.overlap, layout.stage) {
            (Overlap::Inline, ZeroStage::Zero) => Bytes(0),
            (Overlap::Inline, _) => added(1),
            (Overlap::SideThread, ZeroStage::Zero) if accumulates => Bytes(0),
            (Overlap::SideThread, ZeroStage::Zero) => of_each_size(true, 1, compute_bytes),
            (Overlap::SideThread, ZeroStage::One) if accumulates => added(NUM_REDUCING),
            (Overlap::SideThread, _) => of_each_size(true, NUM_REDUCING, compute_bytes) + added(NUM_REDUCING),
        };
        if !layout.stage.shards_parameters() {
            return reductions;
        }
        let at_a_time = match self.job.overlap {
            Overlap::Inline => 1,
            Overlap::SideThread => 2,
        };
        let count = |&layer: &usize| units(layer).len() + usize::from(self.finds_tied(layers, layer));
        let windows = layers.windows(at_a_time.min(layers.len()).max(1));
        let num_gathered = windows.map(|window| window.iter().map(count).sum::<usize>()).max().unwrap_or(0);
        reductions + Bytes::of(num_gathered * largest, compute_bytes)
    }

    /// The most that the layers of a stage hold at one moment, with as many micro-batches alive as the schedule keeps.
    fn fullest_moment(&self, layout: &Layout, layers: &[usize], stage: usize) -> Moment {
        let compute_bytes = self.job.compute_bytes;
        let tokens = self.tokens(layout);
        let bytes = |per_token: usize| Bytes::of(per_token * tokens, compute_bytes);
        let activations = |layer: usize| self.model.activations(layout.micro_batch)[layer];
        // What the stage keeps of a layer: with recomputation only the output, which is the next layer's input.
        let kept = |layer: usize| {
            let held = activations(layer);
            if self.recomputes(layout, layer) { bytes(held.output) } else { bytes(held.kept + held.output) }
        };
        let again = |layer: usize| {
            if self.recomputes(layout, layer) { bytes(activations(layer).kept) } else { Bytes(0) }
        };
        let input_width = |layer: usize| if layer == 0 { 0 } else { activations(layer - 1).output };
        // The input of the stage's first layer comes from elsewhere, and stays.
        let received = bytes(layers.first().map_or(0, |&layer| input_width(layer)));
        let one: Bytes = received + layers.iter().map(|&layer| kept(layer)).sum();
        let deferred: Bytes = match layout.schedule {
            // Gradients of outputs stay until the weights' turn.
            Some(ScheduleKind::ZeroBubble) => {
                layers.iter().map(|&layer| bytes(activations(layer).output)).sum()
            }
            _ => Bytes(0),
        };
        let (alive, num_chunks) = alive(layout, stage);
        let others = Bytes((one + deferred).0 * alive.saturating_sub(num_chunks) as u64 / num_chunks as u64);

        let mut fullest = Moment::default();
        let mut held = others + received;
        for &layer in layers {
            held += kept(layer);
            // The forward pass of a layer that is computed again holds it too; a bound, as in `memory`.
            let fixed = Bytes::of(activations(layer).fixed, compute_bytes);
            fullest.raise_to(held + again(layer), bytes(activations(layer).forward) + fixed);
        }
        let grads = |numel: usize| Bytes::of(numel, compute_bytes);
        let mut waiting = Bytes(0);
        for &layer in layers.iter().rev() {
            let kind = &self.kinds[self.model.kinds[layer]];
            let temporaries =
                bytes(activations(layer).backward + activations(layer).output + input_width(layer));
            fullest.raise_to(held + again(layer), temporaries + grads(kind.trained) + waiting);
            if self.finds_tied(layers, layer) {
                waiting += grads(kind.trained_tied);
            }
            held = Bytes(held.0.saturating_sub(kept(layer).0));
            if waiting > Bytes(0) && layers.iter().any(|&other| self.model.tied_to[other] == Some(layer)) {
                // Two gradients of a tied parameter and their sum.
                fullest.raise_to(held, grads(kind.trained) + waiting + waiting);
            }
        }
        fullest
    }
}

/// Chunk-wise micro-batches that a stage keeps at most, and the number of chunks: what [`crate::pipeline::Schedule`] does, as
/// formulas.
pub(super) fn alive(layout: &Layout, stage: usize) -> (usize, usize) {
    let num_stages = layout.mesh.degree(Axis::Pipeline);
    let num_microbatches = layout.num_microbatches;
    match layout.schedule {
        None => (1, 1),
        Some(ScheduleKind::GPipe) => (num_microbatches, 1),
        Some(ScheduleKind::OneForwardOneBackward | ScheduleKind::Interleaved { num_chunks: 1 }) => {
            (num_microbatches.min(num_stages - stage), 1)
        }
        Some(ScheduleKind::ZeroBubble) => (num_microbatches.min(num_stages), 1),
        Some(ScheduleKind::Interleaved { num_chunks }) => {
            let group = num_microbatches.div_ceil((num_microbatches / num_stages).max(1));
            let most = (num_chunks - 1) * group + 2 * (num_stages - stage - 1) + 1;
            (most.min(num_microbatches * num_chunks), num_chunks)
        }
    }
}

/// What is held at one moment.
#[derive(Clone, Copy, Default)]
struct Moment {
    activations: Bytes,
    besides: Bytes,
}

impl Moment {
    fn raise_to(&mut self, activations: Bytes, besides: Bytes) {
        if activations + besides > self.activations + self.besides {
            *self = Moment { activations, besides };
        }
    }
}
