//! What one layout costs: memory of the fullest stage, traffic of the busiest rank, time of a step.

use std::collections::BTreeMap;

use super::shape::{Kind, LocalModel};
use super::{AxisTraffic, Cluster, Estimate, Job, Layout, RankMemory, Recompute};
use crate::memory::ModelState;
use crate::pipeline::{ScheduleKind, Stages};
use crate::traffic::Traffic;
use crate::zoo::SequenceParallel;
use crate::{Axis, Bytes, Overlap, ZeroStage};

/// Bytes of an element of a sum of gradients.
const SUM_BYTES: usize = 4;

/// Reductions on the side thread whose buffers are in use, as in `memory`.
const NUM_REDUCING: usize = 3;

/// Buffers of a pipeline stage for messages: in each direction one that comes and one that goes.
const NUM_MESSAGES: usize = 4;

/// All that the estimates of one mesh have in common.
pub(super) struct Costs<'a> {
    pub job: &'a Job,
    pub cluster: &'a Cluster,
    pub model: &'a LocalModel,
    pub kinds: &'a [Kind],
    pub stages: &'a Stages,
    /// Forward operations of each layer for a token, on all tensor-parallel ranks together.
    pub flops: &'a [u64],
}

/// State and traffic of one kind of layer in one stage of ZeRO.
struct KindCost {
    state: ModelState,
    sent: Bytes,
    /// The same where an earlier layer of the stage holds the tied parameters.
    state_without_tied: ModelState,
    sent_without_tied: Bytes,
    /// What is sent more if a later layer of the stage uses its units too.
    sent_for_tied: Bytes,
}

/// Time of a micro-batch on one stage.
#[derive(Clone, Copy)]
struct StageTime {
    forward: f64,
    backward_input: f64,
    backward_weight: f64,
}

impl StageTime {
    fn total(self) -> f64 {
        self.forward + self.backward_input + self.backward_weight
    }
}

impl Costs<'_> {
    pub fn estimate(&self, layout: &Layout) -> Estimate {
        let kinds: Vec<_> = self.kinds.iter().map(|kind| self.kind_cost(kind, layout)).collect();
        let num_stages = self.stages.num_stages();
        let mut fullest = (0, RankMemory::default());
        let mut traffic = AxisTraffic::default();
        let mut times = Vec::with_capacity(num_stages);
        for stage in 0..num_stages {
            let layers: Vec<usize> = self.stages.layers_of(stage).collect();
            let memory = self.memory(layout, &kinds, &layers, stage);
            if stage == 0 || memory.total() > fullest.1.total() {
                fullest = (stage, memory);
            }
            let sent = self.sent(layout, &kinds, &layers);
            traffic.pipeline = traffic.pipeline.max(sent.pipeline);
            traffic.data = traffic.data.max(sent.data);
            traffic.tensor = traffic.tensor.max(sent.tensor);
            times.push(self.time(layout, &layers));
        }
        let (bubble, step_s) = self.step(layout, &times, &traffic);
        let (fullest_stage, memory) = fullest;
        let excess = Bytes(memory.total().0.saturating_sub(self.cluster.device_memory.0));
        Estimate { layout: *layout, memory, fullest_stage, excess, traffic, bubble, step_s }
    }

    fn kind_cost(&self, kind: &Kind, layout: &Layout) -> KindCost {
        let accum = layout.num_microbatches;
        let state = |units| ModelState::new(units, layout.stage, accum, self.job.widths);
        let sent = |units, gathers| {
            Traffic::new(units, layout.stage, accum, self.job.compute_bytes, |_| gathers).bytes
        };
        let all = sent(&kind.units, 2);
        KindCost {
            state: state(&kind.units),
            sent: all,
            state_without_tied: state(&kind.without_tied),
            sent_without_tied: sent(&kind.without_tied, 2),
            sent_for_tied: Bytes(sent(&kind.units, 4).0 - all.0),
        }
    }

    /// Whether a layer finds its tied parameters in an earlier layer of the stage.
    fn finds_tied(&self, layers: &[usize], layer: usize) -> bool {
        self.model.tied_to[layer].is_some_and(|first| layers.contains(&first))
    }

    fn tokens(&self, layout: &Layout) -> usize {
        layout.micro_batch * self.job.seq_len
    }

    /// A micro-batch between two layers, on one rank.
    fn boundary(&self, layout: &Layout) -> Bytes {
        let width = match self.job.sequence {
            SequenceParallel::Off => self.job.model.hidden_size(),
            SequenceParallel::On => self.job.model.hidden_size().div_ceil(self.model.tensor),
        };
        Bytes::of(self.tokens(layout) * width, self.job.compute_bytes)
    }

    fn memory(&self, layout: &Layout, kinds: &[KindCost], layers: &[usize], stage: usize) -> RankMemory {
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
        let added =
            |at_a_time| if accumulates { of_each_size(false, at_a_time, SUM_BYTES) } else { Bytes(0) };
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
        let activations = |layer: usize| self.model.activations[layer];
        // What the stage keeps of a layer: with recomputation only the output, which is the next layer's input.
        let kept = |layer: usize| {
            let held = activations(layer);
            match layout.recompute {
                Recompute::Off => bytes(held.kept + held.output),
                Recompute::Layers => bytes(held.output),
            }
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
            let recomputed = match layout.recompute {
                Recompute::Off => Bytes(0),
                // The graph that is dropped after the forward pass lives while it runs.
                Recompute::Layers => bytes(activations(layer).kept),
            };
            fullest.raise_to(held + recomputed, bytes(activations(layer).forward));
        }
        let grads = |numel: usize| Bytes::of(numel, compute_bytes);
        let mut waiting = Bytes(0);
        for &layer in layers.iter().rev() {
            let kind = &self.kinds[self.model.kinds[layer]];
            let temporaries =
                bytes(activations(layer).backward + activations(layer).output + input_width(layer));
            let recomputed = match layout.recompute {
                Recompute::Off => Bytes(0),
                Recompute::Layers => bytes(activations(layer).kept),
            };
            fullest.raise_to(held + recomputed, temporaries + grads(kind.trained) + waiting);
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

    fn sent(&self, layout: &Layout, kinds: &[KindCost], layers: &[usize]) -> AxisTraffic {
        let degree = self.model.tensor as u64;
        let (num_layers, num_microbatches) = (self.flops.len(), layout.num_microbatches as u64);
        let mut sent = AxisTraffic::default();
        for &layer in layers {
            let cost = &kinds[self.model.kinds[layer]];
            sent.data += if self.finds_tied(layers, layer) { cost.sent_without_tied } else { cost.sent };
            if layers.iter().any(|&other| self.model.tied_to[other] == Some(layer)) {
                sent.data += cost.sent_for_tied;
            }
            sent.tensor += self.tensor_bytes(layout, layer, Pass::Forward);
            sent.tensor += self.tensor_bytes(layout, layer, Pass::Backward);
        }
        sent.tensor = Bytes(sent.tensor.0 * num_microbatches);
        let num_stages = self.stages.num_stages();
        if num_stages > 1 {
            // Of every chunk the output goes on and the input's gradient goes back, but for the ends of the model.
            let chunks = self.stages.parts().iter().filter(|part| layers.contains(&part.start));
            let messages: u64 =
                chunks.map(|part| u64::from(part.end < num_layers) + u64::from(part.start > 0)).sum();
            sent.pipeline = Bytes(self.boundary(layout).0 * messages * num_microbatches);
            sent.pipeline += self.tied_bytes(layout, layers);
        }
        debug_assert!(degree > 1 || sent.tensor == Bytes(0));
        sent
    }

    /// The sum of gradients of parameters that this stage shares with another: with two stages, each sends its own once.
    fn tied_bytes(&self, layout: &Layout, layers: &[usize]) -> Bytes {
        let apart = |layer: usize| {
            self.model.tied_to[layer].is_some_and(|first| layers.contains(&first) != layers.contains(&layer))
        };
        let numel: usize = (0..self.flops.len())
            .filter(|&layer| apart(layer))
            .map(|layer| self.kinds[self.model.kinds[layer]].trained_tied)
            .sum();
        let whole = layout.stage.keeps_whole_gradients(layout.num_microbatches);
        let numel = if whole { numel } else { numel.div_ceil(layout.mesh.degree(Axis::Data)) };
        Bytes::of(numel, SUM_BYTES)
    }

    /// What a rank sends to its tensor group for one layer and micro-batch.
    ///
    /// An all-reduce sends 2 (T - 1) / T of the activations, and so do the all-gather and reduce-scatter in its place where
    /// tokens are split; then the inputs of both pairs of linear layers are gathered for their backward once more.
    fn tensor_bytes(&self, layout: &Layout, layer: usize, pass: Pass) -> Bytes {
        let degree = self.model.tensor as u64;
        let whole = Bytes::of(self.tokens(layout) * self.job.model.hidden_size(), self.job.compute_bytes).0;
        let is_block = layer > 0 && layer + 1 < self.flops.len();
        let recomputes = u64::from(layout.recompute == Recompute::Layers);
        // In halves of an all-reduce.
        let halves = match (pass, is_block) {
            (Pass::Forward, true) => 4,
            (Pass::Backward, true) => {
                4 + 4 * recomputes + if self.job.sequence == SequenceParallel::On { 2 } else { 0 }
            }
            // The sum of the vocabulary's parts, and the gradient of the head's input.
            (Pass::Forward, false) => {
                if layer == 0 {
                    2
                } else {
                    0
                }
            }
            (Pass::Backward, false) => {
                if layer == 0 {
                    0
                } else {
                    2
                }
            }
        };
        Bytes(halves * whole * (degree - 1) / degree)
    }

    fn time(&self, layout: &Layout, layers: &[usize]) -> StageTime {
        let degree = self.model.tensor;
        let flops: u64 = layers.iter().map(|&layer| self.flops[layer]).sum();
        let one = flops as f64 * self.tokens(layout) as f64 / degree as f64 / self.cluster.flops;
        let rate = self.rate(degree);
        let tensor = |pass: Pass| -> f64 {
            layers.iter().map(|&layer| self.tensor_bytes(layout, layer, pass).0 as f64 / rate).sum()
        };
        let again = if layout.recompute == Recompute::Layers { one } else { 0.0 };
        StageTime {
            forward: one + tensor(Pass::Forward),
            backward_input: one + again + tensor(Pass::Backward),
            backward_weight: one,
        }
    }

    /// Bytes a second within groups that span this many neighbouring ranks.
    fn rate(&self, span: usize) -> f64 {
        if span <= self.cluster.ranks_per_host { self.cluster.host_link } else { self.cluster.link }
    }

    /// The bubble, and the time of a step.
    fn step(&self, layout: &Layout, times: &[StageTime], traffic: &AxisTraffic) -> (f64, f64) {
        let num_microbatches = layout.num_microbatches as f64;
        let slowest = times.iter().copied().max_by(|a, b| a.total().total_cmp(&b.total()));
        let slowest = slowest.expect("a pipeline has stages");
        let all: f64 = times.iter().map(|time| time.total()).sum();
        // What passes before the slowest stage is busy and after it.
        let filling = match layout.schedule {
            None => 0.0,
            Some(ScheduleKind::ZeroBubble) => {
                let StageTime { forward, backward_input, backward_weight } = slowest;
                let unfilled = (forward + backward_input - backward_weight) / slowest.total();
                (all - slowest.total()) * unfilled
            }
            Some(schedule) => (all - slowest.total()) / schedule.num_chunks() as f64,
        };
        let busy = num_microbatches * slowest.total();
        let pipeline = busy + filling;
        let bubble =
            if pipeline > 0.0 { 1.0 - num_microbatches * all / (times.len() as f64 * pipeline) } else { 0.0 };
        let [p, d, t] = [Axis::Pipeline, Axis::Data, Axis::Tensor].map(|axis| layout.mesh.degree(axis));
        let data = traffic.data.0 as f64 / self.rate(d * t);
        let beside = match self.job.overlap {
            Overlap::Inline => 0.0,
            Overlap::SideThread if layout.stage.shards_gradients() => busy,
            Overlap::SideThread => slowest.backward_input + slowest.backward_weight,
        };
        let message = self.boundary(layout).0 as f64 / self.rate(p * d * t);
        let messages = 2.0 * (p - 1) as f64 * message;
        (bubble.max(0.0), pipeline + messages + (data - beside).max(0.0))
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

#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    Forward,
    Backward,
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
