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

mod head;
mod layers;
mod state;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Serialize;

pub use head::HeadShape;
pub(crate) use layers::first_backward;
pub use layers::{Flow, LayerActivations, LayerLoad, LayerParams, Learning, layer_params};
pub use state::{ModelState, StateWidths};

use crate::{Bytes, Overlap, UnitLayout, ZeroStage};

/// A process that has loaded libtorch and trained a model of no size: code and read-only data that were touched (about 75
/// MiB), libtorch's registry of operators on the heap (60), threads, its kernels' scratch memory and our own binary.
const RUNTIME: Bytes = Bytes(150 << 20);

/// Reductions on the side thread whose buffers are in use: two under way and one being filled.
pub const NUM_REDUCING: usize = 3;

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

/// Elements of whole parameters that a rank of a mesh holds at a time while the trained model is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Written {
    /// Besides one of its units: a parameter as it comes from the tensor group and as it is put together, or as it goes to other
    /// pipeline stages.
    pub own: usize,
    /// One that another pipeline stage has.
    pub others: usize,
}

/// Bytes that one rank needs, by kind. All data-parallel ranks need the same.
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
    /// The process itself.
    pub runtime: Bytes,
    /// Instead of activations, layers' gradients and temporaries, while the trained model is written: one unit in fp32, and on
    /// a mesh parameters that are put together.
    pub saving: Bytes,
    /// The most that is resident at one moment of the run: what the system counts as peak RSS.
    pub peak: Bytes,
}

impl MemoryPlan {
    /// Plans the memory of each rank.
    pub fn new(load: &Workload<'_>, stage: ZeroStage) -> Self {
        let is_alone = load.units.iter().all(|unit| unit.num_shards == 1);
        let largest = load.units.iter().map(|unit| unit.padded_numel).max().unwrap_or(0);
        let moment =
            layers::peak(load.layers, load.flow.as_ref(), load.microbatch_tokens, load.compute_bytes);
        let message = load.flow.map_or(0, |flow| flow.num_messages * flow.message * load.microbatch_tokens);
        let staging = Bytes(STAGING.0 * load.num_groups as u64);
        let mut plan = MemoryPlan {
            stage,
            state: ModelState::new(load.units, stage, load.grad_accum_steps, load.widths),
            // One rank gathers and reduces nothing.
            gathered: match is_alone {
                true => Bytes(0),
                false => Bytes::of(load.num_gather_buffers(stage) * largest, load.compute_bytes),
            },
            reductions: if is_alone { Bytes(0) } else { load.reductions(stage) },
            activations: moment.activations,
            layer_grads: moment.layer_grads,
            temporaries: moment.temporaries,
            messages: Bytes::of(message, load.compute_bytes),
            staging,
            runtime: RUNTIME,
            saving: Bytes::of((largest + load.written.own).max(load.written.others), size_of::<f32>()),
            peak: Bytes(0),
        };
        let always = plan.state.total()
            + plan.gathered
            + plan.reductions
            + plan.messages
            + plan.staging
            + plan.runtime;
        plan.peak = always + plan.step().max(plan.saving);
        plan
    }

    /// What libtorch holds within a step.
    fn step(&self) -> Bytes {
        self.activations + self.layer_grads + self.temporaries
    }
}

impl Workload<'_> {
    /// Buffers with room for any unit's whole parameters, as many as are in use at a time: those of one layer, and with a
    /// side thread those of the next.
    fn num_gather_buffers(&self, stage: ZeroStage) -> usize {
        if !stage.shards_parameters() {
            return 0;
        }
        let at_a_time = match self.overlap {
            Overlap::Inline => 1,
            Overlap::SideThread => 2,
        };
        let units_of = |layers: &[LayerLoad<'_>]| {
            layers.iter().flat_map(|layer| &layer.params.units).collect::<BTreeSet<_>>().len()
        };
        self.layers.windows(at_a_time.min(self.layers.len()).max(1)).map(units_of).max().unwrap_or(0)
    }

    /// Reductions in the caller's thread read gradients where libtorch left them; what they need is a shard to add from. Those
    /// on the side thread have an input of their own. The pool keeps buffers by size.
    fn reductions(&self, stage: ZeroStage) -> Bytes {
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

/// Buffers of these many elements, where `at_a_time` of the same size are in use.
fn of_each_size(sizes: impl Iterator<Item = usize>, at_a_time: usize, element_bytes: usize) -> Bytes {
    let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
    sizes.for_each(|numel| *counts.entry(numel).or_default() += 1);
    counts.into_iter().map(|(numel, count)| Bytes::of(numel * at_a_time.min(count), element_bytes)).sum()
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ModelState { params, master_params, optimizer, grads } = self.state;
        let rows = [
            ("parameters", params),
            ("master parameters", master_params),
            ("optimizer states", optimizer),
            ("gradients", grads),
            ("gathered parameters", self.gathered),
            ("reductions in progress", self.reductions),
            ("activations", self.activations),
            ("gradients of layers", self.layer_grads),
            ("temporaries", self.temporaries),
            ("messages between stages", self.messages),
            ("shared with other ranks", self.staging),
            ("libtorch and program", self.runtime),
            ("saving, beyond a step", Bytes(self.saving.0.saturating_sub(self.step().0))),
        ];
        for (kind, bytes) in rows.into_iter().filter(|(_, bytes)| *bytes > Bytes(0)) {
            writeln!(f, "{kind:<24}{bytes:>10}")?;
        }
        write!(f, "{:<24}{:>10}", "peak", self.peak)
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
        };
        let layers: Vec<_> = params.iter().map(load).collect();
        let load = Workload {
            units: &units,
            layers: &layers,
            flow: None,
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
