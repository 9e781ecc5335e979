//! A whole run, planned: from a model's shape and a few numbers to units, memory and traffic of the ranks of each stage.

#[cfg(test)]
mod gpu_tests;
mod largest;
mod shape;
#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::ops::Range;

use serde::Serialize;

pub use largest::{Excess, Limits};
pub use shape::{RunShape, RunShapeError};

use crate::layout::units_of;
use crate::memory::{MemoryPlan, StateWidths};
use crate::pipeline::loss_turn;
use crate::share::{Share, Step};
use crate::traffic::{AxisTraffic, Traffic};
use crate::zoo::Microbatch;
use crate::{Axis, Bytes, Cuda, Device, Offload, UnitLayout, ZeroStage};

/// What a run will be like.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunPlan {
    /// What it was made from.
    #[serde(flatten)]
    pub shape: RunShape,
    /// The ranks of each pipeline stage, in order; one where there is no pipeline.
    pub stages: Vec<StagePlan>,
    /// Tokens of one step, of all ranks.
    pub step_tokens: usize,
    /// Elements of all parameters, each counted once.
    pub num_params: usize,
    /// Elements of the parameters that are trained.
    pub num_trained: usize,
}

/// What a run will be like on the ranks of one pipeline stage.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StagePlan {
    /// The stage.
    pub stage: usize,
    /// Its ranks.
    pub ranks: Range<usize>,
    /// Its layers, by their index in the model: a range for each chunk.
    pub layers: Vec<Range<usize>>,
    /// Units of its first tensor-parallel rank, in order. The others have no more.
    pub units: Vec<UnitLayout>,
    /// The most chunk-wise micro-batches whose activations are kept.
    pub alive: usize,
    /// Memory of that rank in the ZeRO stages 0 to 3.
    pub memory: [MemoryPlan; 4],
    /// The same on GPUs with other choices of what is offloaded: nothing, the optimizer, or parameters too, where a stage allows it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub choices: Vec<MemoryPlan>,
    /// What it sends in a step.
    pub traffic: AxisTraffic,
    /// What of that goes along the data axis, in elements too.
    pub data_traffic: Traffic,
}

impl RunPlan {
    /// Plans a run. Allocates nothing but the plan.
    ///
    /// # Errors
    /// [`RunShapeError`]
    pub fn new(shape: RunShape) -> Result<Self, RunShapeError> {
        shape.check()?;
        let specs = shape.model.layers();
        let is_frozen = |name: &str| shape.frozen.iter().any(|pattern| pattern.matches(name));
        let [num_replicas, tensor] = [Axis::Data, Axis::Tensor].map(|axis| shape.mesh.degree(axis));
        let local = specs.iter().map(|layer| layer.local(tensor, 0)).collect::<Result<Vec<_>, _>>()?;
        let stages = shape.stages()?;
        let shares = Share::all(&local, &stages, shape.mesh, shape.sequence, is_frozen);
        let microbatch = Microbatch {
            num_samples: shape.micro_batch,
            seq_len: shape.seq_len,
            compute_bytes: shape.compute_bytes,
            head_chunks: shape.head_chunks(),
            grouped_queries: shape.grouped_queries(),
        };
        let activations = shape.model.activations(tensor, shape.sequence, microbatch);
        let loss = loss_turn(shape.schedule, shape.grad_accum_steps);
        let step = Step {
            mesh: shape.mesh,
            stages: &stages,
            schedule: shape.schedule,
            zero: shape.stage,
            sequence: shape.sequence,
            hidden_size: shape.model.hidden_size(),
            activations: &activations,
            policies: &shape.activations.policies(specs.iter().map(|layer| layer.name.as_str()), loss),
            compute_bytes: shape.compute_bytes,
            widths: StateWidths::new(shape.compute_bytes, shape.optimizer_bytes, shape.grad_bytes),
            microbatch_tokens: shape.micro_batch * shape.seq_len,
            num_microbatches: shape.grad_accum_steps,
            overlap: shape.overlap,
            device: shape.device,
        };
        let planned = shares.into_iter().map(|share| StagePlan::new(share, &step)).collect();
        let step_tokens = num_replicas * shape.grad_accum_steps * step.microbatch_tokens;
        let whole = units_of(&specs, 1, is_frozen);
        let num_params = whole.iter().map(UnitLayout::numel).sum();
        let num_trained = whole.iter().filter(|unit| unit.trainable).map(UnitLayout::numel).sum();
        Ok(RunPlan { shape, stages: planned, step_tokens, num_params, num_trained })
    }

    /// The pipeline stage whose ranks need most memory.
    pub fn fullest(&self) -> &StagePlan {
        let peak = |plan: &&StagePlan| (plan.memory_in(self.shape.stage).peak, Reverse(plan.stage));
        self.stages.iter().max_by_key(peak).expect("there is a stage")
    }

    /// Memory of a rank of the fullest stage in the run's own stage of ZeRO.
    pub fn memory(&self) -> &MemoryPlan {
        self.fullest().memory_in(self.shape.stage)
    }

    /// What the busiest rank sends in a step, all axes together.
    pub fn busiest(&self) -> Bytes {
        self.stages.iter().map(|plan| plan.traffic.total()).max().unwrap_or_default()
    }

    /// The most that any rank sends in a step along each axis.
    pub fn traffic(&self) -> AxisTraffic {
        self.stages.iter().fold(AxisTraffic::default(), |most, plan| most.max(plan.traffic))
    }
}

impl StagePlan {
    fn new(share: Share, step: &Step<'_>) -> Self {
        let stage = share.stage;
        let num_ranks = step.mesh.world_size() / step.stages.num_stages();
        let layers = step.stages.parts().iter().skip(stage).step_by(step.stages.num_stages()).cloned();
        StagePlan {
            stage,
            ranks: stage * num_ranks..(stage + 1) * num_ranks,
            layers: layers.collect(),
            alive: step.alive(stage),
            memory: ZeroStage::ALL.map(|zero| step.memory(&share, zero)),
            choices: choices(&share, step),
            traffic: step.traffic(&share),
            data_traffic: step.data_traffic(&share),
            units: share.units,
        }
    }

    /// Memory of a rank in a stage of ZeRO.
    pub fn memory_in(&self, zero: ZeroStage) -> &MemoryPlan {
        &self.memory[usize::from(u8::from(zero))]
    }

    /// Elements of its parameters.
    pub fn num_params(&self) -> usize {
        self.units.iter().map(UnitLayout::numel).sum()
    }
}

/// Memory of a rank on a GPU, whatever is offloaded.
fn choices(share: &Share, step: &Step<'_>) -> Vec<MemoryPlan> {
    let Device::Cuda(cuda) = step.device else { return Vec::new() };
    let num_replicas = step.mesh.degree(Axis::Data);
    let all = ZeroStage::ALL
        .into_iter()
        .flat_map(|zero| [Offload::NOTHING, Offload::OPTIMIZER, Offload::ALL].map(|offload| (zero, offload)));
    all.filter(|(zero, offload)| offload.in_stage(*zero, num_replicas) == *offload)
        .map(|(zero, offload)| {
            Step { device: Device::Cuda(Cuda { offload, ..cuda }), ..*step }.memory(share, zero)
        })
        .collect()
}
