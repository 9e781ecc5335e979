//! Bytes that a rank needs, by kind, before anything is allocated.
//!
//! Model state is exact: [`ModelState`] counts the elements that `shardwise-zero` allocates. What comes on top while a step
//! runs follows from how the step runs, layer by layer, and from a few constants that are measured; a test holds the sum to
//! within 15% of the peak of real runs.
//!
//! | kind | whose memory | lives |
//! |---|---|---|
//! | state: parameters, master weights, moments, gradients | `zero` | always |
//! | gathered parameters, reductions in progress | `zero`'s pool | from first use on |
//! | activations, gradients of layers, temporaries | libtorch's allocator | within a step; the most is never given back |
//! | what ranks show each other | shared | always |
//! | libtorch and this program | the process | always |
//!
//! A rank with a GPU has the same on the GPU, but for what is offloaded and what is the host's by nature: [`HostMemory`].

mod head;
mod host;
mod layers;
mod state;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Serialize;

pub use head::{HeadChunks, HeadShape};
pub use host::{HostMemory, PIECE};
pub(crate) use layers::first_backward;
pub use layers::{Flow, LayerActivations, LayerLoad, LayerParams, Learning, layer_params};
pub use state::{ModelState, StateWidths};

use crate::{Bytes, Device, Offload, OffloadTo, Overlap, UnitLayout, ZeroStage};

/// A process that has loaded libtorch and trained a model of no size: code and read-only data that were touched (about 75
/// MiB), libtorch's registry of operators on the heap (60), threads, its kernels' scratch memory and our own binary.
const RUNTIME: Bytes = Bytes(150 << 20);

/// What is set aside on a GPU for its context, libtorch's libraries and their workspaces. An assumption, not a measurement.
pub const GPU_RESERVED: Bytes = Bytes(1 << 30);

/// Reductions on the side thread whose buffers are in use: two under way and one being filled.
pub const NUM_REDUCING: usize = 3;

/// Gradients on their way to the host whose buffers are in use: three under way and one being filled.
pub const NUM_GOING_DOWN: usize = 4;

/// What the ranks of one group on a host show each other at a time, together: 2 MiB in each of two phases, divided among them.
pub const STAGING: Bytes = Bytes(4 << 20);

/// What a plan of memory depends on, for one rank.
#[derive(Debug, Clone, Copy)]
pub struct Workload<'a> {
    /// All units of the rank, as laid out for the data-parallel ranks.
    pub units: &'a [UnitLayout],
    /// All layers, in the order they run.
    pub layers: &'a [LayerLoad<'a>],
    /// How micro-batches go through them; `None` without a pipeline.
    pub flow: Option<Flow>,
    /// Where the rank computes.
    pub device: Device,
    /// Calls on GPU memory that may be under way at a time.
    pub calls: Calls,
    /// Groups in which the rank exchanges more than a few numbers.
    pub num_groups: usize,
    /// Bytes of an element of the type that layers compute in: 2 or 4.
    pub compute_bytes: usize,
    /// Bytes of an element of each kind of state.
    pub widths: StateWidths,
    /// Tokens of one micro-batch.
    pub microbatch_tokens: usize,
    /// Micro-batches in a step.
    pub grad_accum_steps: usize,
    /// Whether collectives run beside the computation.
    pub overlap: Overlap,
    /// Whole parameters while the trained model is written.
    pub written: Written,
}

/// Calls of a rank's groups that may be under way at a time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Calls {
    /// Collectives.
    pub collectives: usize,
    /// Messages to and from other pipeline stages.
    pub messages: usize,
}

/// Elements of whole parameters that a rank of a mesh holds at a time while the trained model is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Written {
    /// Besides one of its units: a parameter as it comes from the tensor group and as it is put together, or as it goes to other
    /// pipeline stages.
    pub own: usize,
    /// One that another pipeline stage has.
    pub others: usize,
}

/// Bytes that one rank needs, by kind. All data-parallel ranks need the same. With a GPU these are of its memory, and `host` has the
/// others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// The stage of ZeRO.
    pub stage: ZeroStage,
    /// Model state.
    #[serde(flatten)]
    pub state: ModelState,
    /// Whole parameters of the units in use (stage 3).
    pub gathered: Bytes,
    /// Buffers of reductions in progress.
    pub reductions: Bytes,
    /// New parameters on their way to where they are kept, if that is elsewhere.
    pub transfers: Bytes,
    /// Activations kept for the backward pass, where most are.
    pub activations: Bytes,
    /// Gradients of layers on their way to a reduction, at the same moment.
    pub layer_grads: Bytes,
    /// What the running layer needs besides, at the same moment.
    pub temporaries: Bytes,
    /// Buffers of messages from and to other pipeline stages.
    pub messages: Bytes,
    /// Memory shared with the other ranks.
    pub staging: Bytes,
    /// The process itself; on a GPU what is set aside for context and libraries.
    pub runtime: Bytes,
    /// Instead of activations, layers' gradients and temporaries, while the trained model is written: one unit in fp32, and on
    /// a mesh parameters that are put together.
    pub saving: Bytes,
    /// The most that is resident at one moment of the run: what the system counts as peak RSS, or what is used of a GPU's memory.
    pub peak: Bytes,
    /// What is in host memory, if the rest is on a GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<HostMemory>,
}

impl MemoryPlan {
    /// Plans the memory of each rank.
    pub fn new(load: &Workload<'_>, stage: ZeroStage) -> Self {
        let moment =
            layers::peak(load.layers, load.flow.as_ref(), load.microbatch_tokens, load.compute_bytes);
        let message = load.flow.map_or(0, |flow| flow.num_messages * flow.message * load.microbatch_tokens);
        let offload = load.offload_in(stage);
        let (state, _) = ModelState::on_gpu(load.units, stage, load.grad_accum_steps, load.widths, offload);
        let on_host = |bytes: Bytes| if load.device == Device::Cpu { bytes } else { Bytes(0) };
        let mut plan = MemoryPlan {
            stage,
            state,
            gathered: Bytes::of(load.num_gather_buffers(stage) * load.largest(), load.compute_bytes),
            reductions: load.reductions(stage),
            transfers: match offload {
                Offload { optimizer: OffloadTo::Device, params: OffloadTo::Host } => load.transfers(stage),
                _ => Bytes(0),
            },
            activations: moment.activations,
            layer_grads: moment.layer_grads,
            temporaries: moment.temporaries,
            messages: Bytes::of(message, load.compute_bytes),
            staging: on_host(load.staging()),
            runtime: if load.device == Device::Cpu { RUNTIME } else { GPU_RESERVED },
            saving: on_host(load.saving()),
            peak: Bytes(0),
            host: (load.device != Device::Cpu).then(|| HostMemory::new(load, stage, offload)),
        };
        let always = plan.state.total()
            + plan.gathered
            + plan.reductions
            + plan.transfers
            + plan.messages
            + plan.staging
            + plan.runtime;
        plan.peak = always + plan.step().max(plan.saving);
        plan
    }

    /// In host memory at one moment of the run: all of it, or what is beside a GPU.
    pub fn host_peak(&self) -> Bytes {
        self.host.map_or(self.peak, |host| host.peak)
    }

    /// What is kept on the host beside a GPU.
    pub fn offload(&self) -> Offload {
        self.host.map_or(Offload::NOTHING, |host| host.offload)
    }

    /// What libtorch holds within a step.
    fn step(&self) -> Bytes {
        self.activations + self.layer_grads + self.temporaries
    }
}

impl Workload<'_> {
    /// Whether no other rank has a shard: nothing is gathered from others, nor reduced.
    fn is_alone(&self) -> bool {
        self.units.iter().all(|unit| unit.num_shards == 1)
    }

    /// What is offloaded in a stage.
    fn offload_in(&self, stage: ZeroStage) -> Offload {
        let num_replicas = self.units.iter().map(|unit| unit.num_shards).max().unwrap_or(1);
        self.device.offload().in_stage(stage, num_replicas)
    }

    /// Elements of the largest unit.
    fn largest(&self) -> usize {
        self.units.iter().map(|unit| unit.padded_numel).max().unwrap_or(0)
    }

    fn staging(&self) -> Bytes {
        Bytes(STAGING.0 * self.num_groups as u64)
    }

    fn saving(&self) -> Bytes {
        Bytes::of((self.largest() + self.written.own).max(self.written.others), size_of::<f32>())
    }

    /// Buffers with room for any unit's whole parameters, as many as are in use at a time: those of one layer, and those of the
    /// next where they come beside the computation.
    fn num_gather_buffers(&self, stage: ZeroStage) -> usize {
        let comes_up = self.offload_in(stage).params == OffloadTo::Host;
        let at_a_time = match (self.is_alone(), self.overlap) {
            (true, _) if !comes_up => return 0,
            // One rank's parameters are copied up, which is always beside.
            (true, _) | (false, Overlap::SideThread) => 2,
            (false, Overlap::Inline) => 1,
        };
        if !stage.shards_parameters() {
            return 0;
        }
        let units_of = |layers: &[LayerLoad<'_>]| {
            layers.iter().flat_map(|layer| &layer.params.units).collect::<BTreeSet<_>>().len()
        };
        self.layers.windows(at_a_time.min(self.layers.len()).max(1)).map(units_of).max().unwrap_or(0)
    }

    /// Two buffers with room for what a rank updates of any unit, in the type that layers compute in. In fp32 none are needed: what is
    /// sent is the master weights.
    fn transfers(&self, stage: ZeroStage) -> Bytes {
        let trained = self.units.iter().filter(|unit| unit.trainable);
        let owned = trained.map(|unit| match stage.shards_optimizer() {
            true => unit.shard_numel(),
            false => unit.padded_numel,
        });
        let numel = if self.widths.master_params > 0 { owned.max().unwrap_or(0) } else { 0 };
        Bytes::of(2 * numel, self.compute_bytes)
    }

    /// Gradients on their way to the host: as layers made them and, where ranks share them, the sum of a shard.
    fn going_down(&self, stage: ZeroStage) -> Bytes {
        let units = || self.units.iter().filter(|unit| unit.trainable);
        let (is_alone, accum) = (self.is_alone(), self.grad_accum_steps);
        let sent = match stage.sums_before_it_sends(accum) {
            // They leave from where they are kept.
            true => Bytes(0),
            false => of_each_size(units().map(|unit| unit.padded_numel), NUM_GOING_DOWN, self.compute_bytes),
        };
        let summed = of_each_size(units().map(UnitLayout::shard_numel), NUM_GOING_DOWN, SUM_BYTES);
        sent + if is_alone { Bytes(0) } else { summed }
    }

    /// Reductions in the caller's thread read gradients where libtorch left them; what they need is a shard to add from. Those
    /// on the side thread have an input of their own. The pool keeps buffers by size.
    fn reductions(&self, stage: ZeroStage) -> Bytes {
        if self.offload_in(stage).optimizer == OffloadTo::Host {
            return self.going_down(stage);
        }
        if self.is_alone() {
            return Bytes(0);
        }
        let units = || self.units.iter().filter(|unit| unit.trainable);
        let whole = || units().map(|unit| unit.padded_numel);
        let shards = || units().map(UnitLayout::shard_numel);
        let accumulates = self.grad_accum_steps > 1;
        let added = |at_a_time| {
            if accumulates { of_each_size(shards(), at_a_time, self.widths.grads) } else { Bytes(0) }
        };
        match (self.overlap, stage) {
            (Overlap::Inline, ZeroStage::Zero) => Bytes(0),
            (Overlap::Inline, _) => added(1),
            // The sum is reduced where it is.
            (Overlap::SideThread, ZeroStage::Zero) if accumulates => Bytes(0),
            (Overlap::SideThread, ZeroStage::Zero) => of_each_size(whole(), 1, self.compute_bytes),
            (Overlap::SideThread, ZeroStage::One) if accumulates => added(NUM_REDUCING),
            (Overlap::SideThread, _) => {
                of_each_size(whole(), NUM_REDUCING, self.compute_bytes) + added(NUM_REDUCING)
            }
        }
    }
}

/// Bytes of an element of the sums that ranks make.
const SUM_BYTES: usize = size_of::<f32>();

/// Buffers of these many elements, where `at_a_time` of the same size are in use.
fn of_each_size(sizes: impl Iterator<Item = usize>, at_a_time: usize, element_bytes: usize) -> Bytes {
    let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
    sizes.for_each(|numel| *counts.entry(numel).or_default() += 1);
    counts.into_iter().map(|(numel, count)| Bytes::of(numel * at_a_time.min(count), element_bytes)).sum()
}

impl MemoryPlan {
    /// Each kind with its bytes where the rank computes and, if that is on a GPU, on the host. Together they are the peaks.
    pub fn kinds(&self) -> Vec<(&'static str, Bytes, Bytes)> {
        let ModelState { params, master_params, optimizer, grads } = self.state;
        let host = self.host.unwrap_or_default();
        let (runtime, moving) = match self.host {
            None => ("libtorch and program", "reductions in progress"),
            Some(_) => ("libraries and program", "gradients on their way"),
        };
        let saving = |saving: Bytes, step: Bytes| Bytes(saving.0.saturating_sub(step.0));
        vec![
            ("parameters", params, host.state.params),
            ("master parameters", master_params, host.state.master_params),
            ("optimizer states", optimizer, host.state.optimizer),
            ("gradients", grads, host.state.grads),
            ("gathered parameters", self.gathered, Bytes(0)),
            (moving, self.reductions, host.reductions),
            ("parameters on their way", self.transfers, host.transfers),
            ("activations", self.activations, host.activations),
            ("gradients of layers", self.layer_grads, Bytes(0)),
            ("temporaries", self.temporaries, Bytes(0)),
            ("messages between stages", self.messages, Bytes(0)),
            ("pieces of collectives", Bytes(0), host.pieces),
            ("shared with other ranks", self.staging, host.staging),
            (runtime, self.runtime, host.runtime),
            (
                "saving, beyond a step",
                saving(self.saving, self.step()),
                saving(host.saving, host.activations),
            ),
        ]
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds = self.kinds();
        let Some(host) = self.host else {
            for (kind, bytes, _) in kinds.into_iter().filter(|(_, bytes, _)| *bytes > Bytes(0)) {
                writeln!(f, "{kind:<24}{bytes:>10}")?;
            }
            return write!(f, "{:<24}{:>10}", "peak", self.peak);
        };
        writeln!(f, "{:<24}{:>10}{:>12}", "", "device", "host")?;
        for (kind, device, host) in kinds {
            let shown = |bytes: Bytes| if bytes > Bytes(0) { bytes.to_string() } else { "-".to_owned() };
            if device + host > Bytes(0) {
                writeln!(f, "{kind:<24}{:>10}{:>12}", shown(device), shown(host))?;
            }
        }
        write!(f, "{:<24}{:>10}{:>12}", "peak", self.peak, host.peak)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::units_of;
    use crate::{ActivationPolicy, Init, LayerSpec, ParamSpec};

    /// Five layers of 640, 64, 64, 64 and 64 elements.
    fn plan(stage: ZeroStage, grad_accum_steps: usize, overlap: Overlap) -> MemoryPlan {
        let layer = |i: usize| LayerSpec {
            name: format!("l{i}"),
            params: vec![ParamSpec::new(
                &format!("l{i}"),
                "w",
                &[if i == 0 { 640 } else { 64 }],
                Init::Zeros,
            )],
        };
        let layers: Vec<_> = (0..5).map(layer).collect();
        let units = units_of(&layers, 2, |_| false);
        let activations = [LayerActivations { kept: 7, output: 1, ..LayerActivations::default() }; 5];
        let params = layer_params(&layers, &units);
        let load = |params| LayerLoad {
            params,
            activations: activations[0],
            input: 1,
            learns: Learning::Input,
            policy: ActivationPolicy::Keep,
            input_at: OffloadTo::Device,
        };
        let layers: Vec<_> = params.iter().map(load).collect();
        let load = Workload {
            units: &units,
            layers: &layers,
            flow: None,
            device: Device::Cpu,
            calls: Calls::default(),
            num_groups: 1,
            compute_bytes: 2,
            widths: StateWidths::adamw(2),
            microbatch_tokens: 100,
            grad_accum_steps,
            overlap,
            written: Written::default(),
        };
        MemoryPlan::new(&load, stage)
    }

    #[test]
    fn pools_hold_what_is_in_use_at_a_time() {
        use Overlap::{Inline, SideThread};
        use ZeroStage::{One, Three, Two, Zero};
        let three = 640 + 3 * 64; // no more than that many of a size are under way
        for (stage, accum, overlap, gathered, reductions) in [
            (Zero, 1, Inline, 0, 0),
            (Zero, 2, Inline, 0, 0),
            (One, 1, Inline, 0, 0),
            (One, 2, Inline, 0, (640 + 64) / 2 * 4),
            (Two, 1, Inline, 0, 0),
            (Three, 2, Inline, 640 * 2, (640 + 64) / 2 * 4),
            (Zero, 1, SideThread, 0, (640 + 64) * 2),
            (Zero, 2, SideThread, 0, 0),
            (One, 1, SideThread, 0, three * 2),
            (One, 2, SideThread, 0, three / 2 * 4),
            (Two, 2, SideThread, 0, three * 2 + three / 2 * 4),
            (Three, 1, SideThread, 2 * 640 * 2, three * 2),
        ] {
            let plan = plan(stage, accum, overlap);
            let found = (plan.gathered, plan.reductions);
            assert_eq!(found, (Bytes(gathered), Bytes(reductions)), "{stage} {accum} {overlap:?}");
        }
    }

    #[test]
    fn the_peak_is_the_sum_of_what_is_shown() {
        let plan = plan(ZeroStage::Two, 1, Overlap::Inline);
        let state = plan.state.total();
        // Saving needs the largest unit in fp32, less than a step.
        assert_eq!((plan.saving, plan.activations), (Bytes(2560), Bytes(2 * 100 * 5 * 8)));
        let step = plan.activations + plan.layer_grads + plan.temporaries;
        assert_eq!(plan.peak, state + step + plan.staging + plan.runtime);
        let shown = plan.to_string();
        assert!(shown.ends_with(&format!("peak{:>30}", plan.peak.to_string())), "{shown}");
        assert!(!shown.contains("gathered") && !shown.contains("saving"), "{shown}");
    }
}
