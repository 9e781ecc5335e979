//! What one rank has of a run: the layers of its pipeline stage, cut for its place in the tensor group.
//!
//! A [`Share`] is what a rank of one stage holds. The first tensor-parallel rank stands for its group: it has no less than any
//! other, and data-parallel ranks have the same. A [`Step`] says how a step goes, and counts what a share costs in it: memory
//! by the rules of [`crate::memory`], and what is sent along each axis:
//!
//! | axis | what is sent |
//! |---|---|
//! | data | gradients and parameters ([`crate::traffic`]) |
//! | tensor | sums within layers; gradients of shared heads, and with split tokens of what every rank has whole |
//! | pipeline | outputs of a chunk and gradients of its input; the sum of gradients of parameters that stages share |
//!
//! The plan of a run and the search for layouts both ask here, so they agree.

use std::cmp::Ordering;
use std::collections::HashSet;

use crate::layout::units_on_stage;
use crate::memory::{
    Calls, Flow, LayerActivations, LayerLoad, LayerParams, Learning, MemoryPlan, StateWidths, Workload,
    Written, first_backward, layer_params,
};
use crate::pipeline::{ScheduleKind, Stages};
use crate::traffic::{AxisTraffic, Traffic};
use crate::zoo::SequenceParallel;
use crate::{
    ActivationPolicy, Axis, Bytes, Device, LayerSpec, Mesh, OffloadTo, Overlap, ParamSpec, UnitLayout,
    ZeroStage,
};

/// What a rank of one pipeline stage holds.
#[derive(Debug, Clone)]
pub struct Share {
    /// The pipeline stage.
    pub stage: usize,
    /// Its layers, by their index in the model, chunk by chunk.
    pub layers: Vec<usize>,
    /// Its units; parameters that other stages hold too have units of their own.
    pub units: Vec<UnitLayout>,
    params: Vec<LayerParams>,
    /// Units of parameters that other stages hold too, with the number of stages.
    shared: Vec<(usize, usize)>,
    /// The first layer of the model that has a trainable parameter.
    first_learner: usize,
    /// Elements sent when the gradients of one micro-batch are summed over the tensor group.
    summed_numel: usize,
    /// Whole parameters while the model is written.
    written: Written,
}

impl Share {
    /// The shares of all stages, in order, where `layers` are those of the model as a tensor-parallel rank has them.
    pub fn all(
        layers: &[LayerSpec],
        stages: &Stages,
        mesh: Mesh,
        sequence: SequenceParallel,
        is_frozen: impl Fn(&str) -> bool,
    ) -> Vec<Share> {
        let shared = stages.shared_params(layers);
        let tensor = mesh.degree(Axis::Tensor);
        let names: HashSet<String> = shared.iter().map(|param| param.name.clone()).collect();
        let learns = |layer: &LayerSpec| layer.params.iter().any(|param| !is_frozen(&param.name));
        let first_learner = layers.iter().position(learns).unwrap_or(layers.len());
        let share = |stage| {
            let indices: Vec<usize> = stages.layers_of(stage).collect();
            let own: Vec<LayerSpec> = indices.iter().map(|&layer| layers[layer].clone()).collect();
            let units = units_on_stage(&own, &names, mesh.degree(Axis::Data), &is_frozen);
            let here = |(index, unit): (usize, &UnitLayout)| {
                let param = shared.iter().find(|param| param.name == unit.name)?;
                unit.trainable.then_some((index, param.stages.len()))
            };
            Share {
                stage,
                layers: indices,
                params: layer_params(&own, &units),
                shared: units.iter().enumerate().filter_map(here).collect(),
                first_learner,
                summed_numel: summed_numel(&units, tensor, sequence),
                written: written(layers, &units, stages.num_stages(), tensor),
                units,
            }
        };
        (0..stages.num_stages()).map(share).collect()
    }
}

/// What a rank sends to sum the gradients of parameters that several tensor-parallel ranks have, where each has another part
/// of the sum: shared heads, and with split tokens whatever is whole.
fn summed_numel(units: &[UnitLayout], degree: usize, sequence: SequenceParallel) -> usize {
    let slots = units.iter().filter(|unit| unit.trainable).flat_map(|unit| &unit.slots);
    let sent = |slot: &crate::ParamSlot| {
        let ranks = match (slot.param.split, sequence) {
            (Some(split), _) => split.num_sharers(degree),
            (None, SequenceParallel::On) => degree,
            (None, SequenceParallel::Off) => 1,
        };
        2 * slot.param.numel() * (ranks - 1) / ranks
    };
    slots.map(sent).sum()
}

/// The largest parameters, whole: those of `units`, as often as a rank holds them at a time, and any of the model's.
fn written(layers: &[LayerSpec], units: &[UnitLayout], num_stages: usize, degree: usize) -> Written {
    let whole = |param: &ParamSpec| match param.split {
        Some(split) => param.numel() * degree / split.num_sharers(degree),
        None => param.numel(),
    };
    // Parts of the group and what is made of them; what goes to other stages.
    let copies = |param: &ParamSpec| match param.split {
        Some(_) if degree > 1 => 2,
        _ => usize::from(num_stages > 1),
    };
    let own = units.iter().flat_map(|unit| &unit.slots).map(|slot| copies(&slot.param) * whole(&slot.param));
    let all = layers.iter().flat_map(|layer| &layer.params).map(whole);
    Written { own: own.max().unwrap_or(0), others: all.max().filter(|_| num_stages > 1).unwrap_or(0) }
}

/// How a step goes.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// The ranks.
    pub mesh: Mesh,
    /// Which layers each pipeline stage holds.
    pub stages: &'a Stages,
    /// How the pipeline is filled; `None` without one.
    pub schedule: Option<ScheduleKind>,
    /// How much of the state is sharded over the data axis.
    pub zero: ZeroStage,
    /// Whether tensor-parallel ranks split the tokens between linear layers.
    pub sequence: SequenceParallel,
    /// Width of what passes between layers, on all tensor-parallel ranks together.
    pub hidden_size: usize,
    /// What each layer of the model holds on a tensor-parallel rank.
    pub activations: &'a [LayerActivations],
    /// What becomes of it until the backward pass.
    pub policies: &'a [ActivationPolicy],
    /// Bytes of an element of the type that layers compute in.
    pub compute_bytes: usize,
    /// Bytes of an element of each kind of state.
    pub widths: StateWidths,
    /// Tokens of one micro-batch.
    pub microbatch_tokens: usize,
    /// Micro-batches of a replica.
    pub num_microbatches: usize,
    /// Whether collectives of the data axis run beside the computation.
    pub overlap: Overlap,
    /// Where ranks compute.
    pub device: Device,
}

/// What a rank says of a token's scores: their maximum, the sum of their exponentials, the target's score, in fp32.
const ROW_STATS_BYTES: usize = 12;

/// A direction through a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// From input to output.
    Forward,
    /// From the output's gradient to the input's.
    Backward,
}

impl Step<'_> {
    /// Memory of a rank with this share, were the ZeRO stage `zero`.
    pub fn memory(&self, share: &Share, zero: ZeroStage) -> MemoryPlan {
        let load = Workload {
            units: &share.units,
            layers: &self.loads(share),
            flow: self.flow(share),
            device: self.device,
            calls: self.calls(share),
            num_groups: self.num_groups(share),
            compute_bytes: self.compute_bytes,
            widths: self.widths.of_run(self.mesh.world_size(), self.num_microbatches),
            microbatch_tokens: self.microbatch_tokens,
            grad_accum_steps: self.num_microbatches,
            overlap: self.overlap,
            written: share.written,
        };
        MemoryPlan::new(&load, zero)
    }

    /// Groups of the axes, of the messages to and from each neighbour, and of stages that share a parameter.
    fn num_groups(&self, share: &Share) -> usize {
        let of_axes =
            [Axis::Data, Axis::Tensor].into_iter().filter(|&axis| self.mesh.degree(axis) > 1).count();
        let of_messages = self.flow(share).map_or(0, |flow| flow.num_messages);
        of_axes + of_messages + share.shared.len().min(1)
    }

    /// Calls that may be under way at a time: those of the caller's thread, one of the side thread, and messages, which have threads.
    fn calls(&self, share: &Share) -> Calls {
        let [data, tensor] = [Axis::Data, Axis::Tensor].map(|axis| self.mesh.degree(axis) > 1);
        let beside = data && self.overlap == Overlap::SideThread;
        let in_turn = tensor || !share.shared.is_empty() || (data && !beside);
        let messages = self.flow(share).map_or(0, |flow| flow.num_messages);
        Calls { collectives: usize::from(beside) + usize::from(in_turn), messages }
    }

    fn loads<'b>(&self, share: &'b Share) -> Vec<LayerLoad<'b>> {
        let load = |(&layer, params): (&usize, &'b LayerParams)| LayerLoad {
            params,
            activations: self.activations[layer],
            input: self.input(layer),
            learns: match layer.cmp(&share.first_learner) {
                Ordering::Less => Learning::Nothing,
                Ordering::Equal => Learning::Params,
                Ordering::Greater => Learning::Input,
            },
            policy: self.policies[layer],
            input_at: self.input_at(layer),
        };
        share.layers.iter().zip(&share.params).map(load).collect()
    }

    /// Where a layer's input waits for its backward: on CPU there is one memory.
    fn input_at(&self, layer: usize) -> OffloadTo {
        match (self.device, self.policies[layer]) {
            (Device::Cuda(_), ActivationPolicy::Offload) => OffloadTo::Host,
            _ => OffloadTo::Device,
        }
    }

    /// Elements of a layer's input for each token. The model's input is token ids.
    fn input(&self, layer: usize) -> usize {
        if layer > 0 { self.activations[layer - 1].output } else { 0 }
    }

    fn flow(&self, share: &Share) -> Option<Flow> {
        (self.stages.num_stages() > 1).then(|| {
            let num_chunks = self.schedule.map_or(1, ScheduleKind::num_chunks);
            let chunks = || (0..num_chunks).map(|chunk| self.stages.layers(share.stage, chunk));
            let num_layers = self.activations.len();
            let stays = |layer: usize| self.input_at(layer) == OffloadTo::Device;
            // Before the next chunk's input waits on the host, the output that would be kept as such is gone.
            let nexts = chunks().map(Some).skip(1).chain([None]);
            let sent = chunks().zip(nexts).filter(|(chunk, next)| {
                let is_kept = next.as_ref().is_none_or(|next| stays(next.start));
                self.policies[chunk.end - 1].recomputes() && is_kept
            });
            let [before, after] =
                [chunks().any(|chunk| chunk.start > 0), chunks().any(|chunk| chunk.end < num_layers)];
            Flow {
                alive: self.alive(share.stage),
                waiting: match self.schedule {
                    Some(ScheduleKind::ZeroBubble) => self.num_microbatches.min(share.stage + 1),
                    _ => 0,
                },
                num_chunks,
                received: chunks()
                    .filter(|chunk| stays(chunk.start))
                    .map(|chunk| self.input(chunk.start))
                    .sum(),
                sent: sent.map(|(chunk, _)| self.activations[chunk.end - 1].output).sum(),
                message: self.boundary_numel(),
                num_messages: 2 * (usize::from(before) + usize::from(after)),
            }
        })
    }

    /// The most chunk-wise micro-batches whose activations a stage keeps.
    pub fn alive(&self, stage: usize) -> usize {
        alive(self.schedule, self.stages.num_stages(), self.num_microbatches, stage)
    }

    /// What passes between two layers for a token, on one rank.
    fn boundary_numel(&self) -> usize {
        match self.sequence {
            SequenceParallel::Off => self.hidden_size,
            SequenceParallel::On => self.hidden_size.div_ceil(self.mesh.degree(Axis::Tensor)),
        }
    }

    /// A micro-batch between two layers, on one rank.
    pub fn boundary(&self) -> Bytes {
        Bytes::of(self.microbatch_tokens * self.boundary_numel(), self.compute_bytes)
    }

    /// What a rank with this share sends in a step.
    pub fn traffic(&self, share: &Share) -> AxisTraffic {
        let each_microbatch = |layer: &usize| {
            self.tensor_bytes(*layer, Pass::Forward) + self.tensor_bytes(*layer, Pass::Backward)
        };
        let within: Bytes = share.layers.iter().map(each_microbatch).sum();
        let summed = Bytes::of(share.summed_numel, self.compute_bytes);
        AxisTraffic {
            pipeline: self.pipeline_bytes(share),
            data: self.data_traffic(share).bytes,
            tensor: Bytes((within + summed).0 * self.num_microbatches as u64),
        }
    }

    /// What of it goes along the data axis, in elements too.
    pub fn data_traffic(&self, share: &Share) -> Traffic {
        let loads = self.loads(share);
        let first = first_backward(&loads);
        let mut num_gathers = vec![0; share.units.len()];
        for (i, load) in loads.iter().enumerate() {
            // For the forward pass, and for the backward pass if there is one. Gradients of weights that wait need no weights.
            let uses = if i < first { 1 } else { 2 };
            load.params.units.iter().for_each(|&unit| num_gathers[unit] += uses);
        }
        Traffic::new(&share.units, self.zero, self.num_microbatches, self.compute_bytes, |unit| {
            num_gathers[unit]
        })
    }

    fn pipeline_bytes(&self, share: &Share) -> Bytes {
        let num_stages = self.stages.num_stages();
        if num_stages == 1 {
            return Bytes(0);
        }
        // Of every chunk the output goes on and the input's gradient goes back, but for the ends of the model, and for what is
        // before the first parameter that is trained.
        let parts = self.stages.parts().iter().skip(share.stage).step_by(num_stages);
        let num_layers = self.activations.len();
        let messages: u64 = parts
            .map(|part| u64::from(part.end < num_layers) + u64::from(part.start > share.first_learner))
            .sum();
        let shared = |&(unit, holders): &(usize, usize)| {
            let unit = &share.units[unit];
            // A rank sums what it updates.
            let owned = if self.zero.shards_optimizer() { unit.shard_numel() } else { unit.padded_numel };
            Bytes::of(2 * owned * (holders - 1) / holders, self.widths.grads)
        };
        let tied: Bytes = share.shared.iter().map(shared).sum();
        Bytes(self.boundary().0 * messages * self.num_microbatches as u64) + tied
    }

    /// What a rank sends to its tensor group for one layer and micro-batch.
    ///
    /// An all-reduce sends 2 (T - 1) / T of the activations, and so do the all-gather and reduce-scatter in its place where
    /// tokens are split: what was gathered for linear layers stays for their backward. The head's
    /// ranks also tell each other, of every token, what its softmax over all classes takes.
    pub fn tensor_bytes(&self, layer: usize, pass: Pass) -> Bytes {
        let degree = self.mesh.degree(Axis::Tensor) as u64;
        let whole = Bytes::of(self.microbatch_tokens * self.hidden_size, self.compute_bytes).0;
        let recomputes = u64::from(self.policies[layer].recomputes());
        let (first, last) = (layer == 0, layer + 1 == self.activations.len());
        // In halves of an all-reduce: of a block's two sums, of the vocabulary's parts, of the gradient of the head's input.
        // Where tokens are split, the latter two are one half in each direction.
        let is_split = self.sequence == SequenceParallel::On;
        let halves = match pass {
            _ if (first || last) && is_split => 1,
            Pass::Forward if first => 2,
            Pass::Forward if last => 0,
            Pass::Forward => 4,
            Pass::Backward if first => 0,
            Pass::Backward if last => 2,
            Pass::Backward => 4 + 4 * recomputes,
        };
        let softmaxes = match pass {
            Pass::Forward if last => 1,
            Pass::Backward if last => recomputes,
            _ => 0,
        };
        let stats = Bytes::of(self.microbatch_tokens * (degree as usize - 1), ROW_STATS_BYTES);
        Bytes(halves * whole * (degree - 1) / degree + softmaxes * stats.0)
    }
}

/// The most chunk-wise micro-batches whose activations a stage keeps: what [`crate::pipeline::Schedule`] does, as formulas.
pub(crate) fn alive(
    schedule: Option<ScheduleKind>,
    num_stages: usize,
    num_microbatches: usize,
    stage: usize,
) -> usize {
    match schedule {
        None => 1,
        Some(ScheduleKind::GPipe) => num_microbatches,
        Some(ScheduleKind::OneForwardOneBackward | ScheduleKind::Interleaved { num_chunks: 1 }) => {
            num_microbatches.min(num_stages - stage)
        }
        Some(ScheduleKind::ZeroBubble) => num_microbatches.min(num_stages),
        Some(ScheduleKind::Interleaved { num_chunks }) => {
            let group = num_microbatches.div_ceil((num_microbatches / num_stages).max(1));
            let most = (num_chunks - 1) * group + 2 * (num_stages - stage - 1) + 1;
            most.min(num_microbatches * num_chunks)
        }
    }
}
