//! What one layout costs: traffic of the busiest rank, time of a step, and with `memory` the fullest stage.

use super::shape::{Kind, LocalModel};
use super::{AxisTraffic, Cluster, Estimate, Job, Layout, RankMemory, Recompute};
use crate::memory::ModelState;
use crate::pipeline::{ScheduleKind, Stages};
use crate::traffic::Traffic;
use crate::zoo::SequenceParallel;
use crate::{Axis, Bytes, Overlap};

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
pub(super) struct KindCost {
    pub state: ModelState,
    sent: Bytes,
    /// The same where an earlier layer of the stage holds the tied parameters.
    pub state_without_tied: ModelState,
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
    pub(super) fn finds_tied(&self, layers: &[usize], layer: usize) -> bool {
        self.model.tied_to[layer].is_some_and(|first| layers.contains(&first))
    }

    /// Whether a layer's forward pass runs again for its backward: all but the model's last, whose backward follows at once.
    pub(super) fn recomputes(&self, layout: &Layout, layer: usize) -> bool {
        layout.recompute == Recompute::Layers && layer + 1 < self.flops.len()
    }

    pub(super) fn tokens(&self, layout: &Layout) -> usize {
        layout.micro_batch * self.job.seq_len
    }

    /// A micro-batch between two layers, on one rank.
    pub(super) fn boundary(&self, layout: &Layout) -> Bytes {
        let width = match self.job.sequence {
            SequenceParallel::Off => self.job.model.hidden_size(),
            SequenceParallel::On => self.job.model.hidden_size().div_ceil(self.model.tensor),
        };
        Bytes::of(self.tokens(layout) * width, self.job.compute_bytes)
    }

    fn sent(&self, layout: &Layout, kinds: &[KindCost], layers: &[usize]) -> AxisTraffic {
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
        Bytes::of(numel, self.job.widths.grads)
    }

    /// What a rank sends to its tensor group for one layer and micro-batch.
    ///
    /// An all-reduce sends 2 (T - 1) / T of the activations, and so do the all-gather and reduce-scatter in its place where
    /// tokens are split; then the inputs of both pairs of linear layers are gathered for their backward once more.
    fn tensor_bytes(&self, layout: &Layout, layer: usize, pass: Pass) -> Bytes {
        let degree = self.model.tensor as u64;
        let whole = Bytes::of(self.tokens(layout) * self.job.model.hidden_size(), self.job.compute_bytes).0;
        let recomputes = u64::from(self.recomputes(layout, layer));
        let gathers = u64::from(self.job.sequence == SequenceParallel::On);
        let (first, last) = (layer == 0, layer + 1 == self.flops.len());
        // In halves of an all-reduce: of a block's two sums, of the vocabulary's parts, of the gradient of the head's input.
        let halves = match pass {
            Pass::Forward if first => 2,
            Pass::Forward if last => 0,
            Pass::Forward => 4,
            Pass::Backward if first => 0,
            Pass::Backward if last => 2,
            Pass::Backward => 4 + 4 * recomputes + 2 * gathers,
        };
        Bytes(halves * whole * (degree - 1) / degree)
    }

    fn time(&self, layout: &Layout, layers: &[usize]) -> StageTime {
        let degree = self.model.tensor;
        let seconds = |of: &dyn Fn(usize) -> bool| {
            let flops: u64 = layers.iter().filter(|&&layer| of(layer)).map(|&layer| self.flops[layer]).sum();
            flops as f64 * self.tokens(layout) as f64 / degree as f64 / self.cluster.flops
        };
        let one = seconds(&|_| true);
        let again = seconds(&|layer| self.recomputes(layout, layer));
        let rate = self.rate(degree);
        let tensor = |pass: Pass| -> f64 {
            layers.iter().map(|&layer| self.tensor_bytes(layout, layer, pass).0 as f64 / rate).sum()
        };
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

#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    Forward,
    Backward,
}
