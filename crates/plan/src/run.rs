//! A whole run, planned: from a model's shape and a few numbers to units, memory and traffic.

use std::fmt::Display;
use std::ops::Range;

use serde::{Serialize, Serializer};

use crate::layout::units_of;
use crate::memory::{MemoryPlan, StateWidths};
use crate::mesh::MeshError;
use crate::pipeline::{PartitionError, ScheduleError, ScheduleKind, StageCut, Stages};
use crate::share::{Share, Step};
use crate::tensor::SplitError;
use crate::traffic::{AxisTraffic, Traffic};
use crate::zoo::{ModelConfig, SequenceParallel};
use crate::{ActivationRules, Axis, Bytes, Mesh, NamePattern, Overlap, UnitLayout, ZeroStage};

/// What decides how a run goes, as plain values.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunShape {
    /// The model.
    pub model: ModelConfig,
    /// The ranks.
    pub mesh: Mesh,
    /// How the pipeline is filled; `None` without one.
    #[serde(serialize_with = "optional_text")]
    pub schedule: Option<ScheduleKind>,
    /// What is spread evenly over the pipeline stages.
    #[serde(serialize_with = "text")]
    pub stage_cut: StageCut,
    /// Whether tensor-parallel ranks split the tokens between linear layers.
    pub sequence: SequenceParallel,
    /// How much of the state is sharded.
    pub stage: ZeroStage,
    /// Bytes of an element of the type that layers compute in: 2 or 4.
    pub compute_bytes: usize,
    /// What that type is called: `fp32`, `bf16` or `fp16`.
    pub precision: &'static str,
    /// Bytes of the optimizer's states of one element; 8 for AdamW in fp32.
    pub optimizer_bytes: usize,
    /// Bytes of an element of a sum of gradients; 4 in fp32.
    pub grad_bytes: usize,
    /// Samples of one micro-batch of one rank.
    pub micro_batch: usize,
    /// Tokens of one sample.
    pub seq_len: usize,
    /// Micro-batches in a step.
    pub grad_accum_steps: usize,
    /// Whether collectives run beside the computation.
    pub overlap: Overlap,
    /// What becomes of activations between forward and backward.
    pub activations: ActivationRules,
    /// Parameters that are not trained.
    pub frozen: Vec<NamePattern>,
    /// Parameters without weight decay.
    pub no_decay: Vec<NamePattern>,
    /// Parameters with a learning rate or weight decay of their own, all groups in one list.
    pub grouped: Vec<NamePattern>,
}

/// Why a run cannot go as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RunShapeError {
    /// The ranks do not divide into axes.
    #[error(transparent)]
    Mesh(#[from] MeshError),
    /// A parameter that the tensor-parallel ranks cannot split.
    #[error(transparent)]
    Split(#[from] SplitError),
    /// Layers that the pipeline stages cannot share.
    #[error("`parallel.pipeline` is `{num_stages}`, with `{num_chunks}` chunks of layers each: {source}")]
    Stages {
        /// Pipeline stages.
        num_stages: usize,
        /// Chunks of layers of each.
        num_chunks: usize,
        /// Why not.
        source: PartitionError,
    },
    /// A schedule that the micro-batches do not fill.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// Tokens that the tensor-parallel ranks cannot share.
    #[error("`data.seq_len` is `{seq_len}`, of which `{tensor}` tensor-parallel ranks have no equal shares")]
    Tokens {
        /// Tokens of one sample.
        seq_len: usize,
        /// Tensor-parallel ranks.
        tensor: usize,
    },
    /// Samples are longer than the model's positions.
    #[error("`data.seq_len` is `{seq_len}`, the model has `{max_positions}` positions")]
    TooLong {
        /// Tokens of one sample.
        seq_len: usize,
        /// The model's limit.
        max_positions: usize,
    },
    /// A pattern that names no parameter.
    #[error("`{pattern}` in `train.{list}` matches no parameter")]
    PatternMatchesNothing {
        /// Where it stands.
        list: &'static str,
        /// The pattern.
        pattern: String,
    },
    /// A rule for activations that names no layer.
    #[error("`{pattern}` in `activations` matches no layer; the layers are {layers:?}")]
    NoSuchLayer {
        /// The pattern.
        pattern: String,
        /// What there is.
        layers: Vec<String>,
    },
}

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
        let activations = shape.model.activations_on(
            tensor,
            shape.sequence,
            shape.micro_batch,
            shape.seq_len,
            shape.compute_bytes,
        );
        let step = Step {
            mesh: shape.mesh,
            stages: &stages,
            schedule: shape.schedule,
            zero: shape.stage,
            sequence: shape.sequence,
            hidden_size: shape.model.hidden_size(),
            activations: &activations,
            policies: &shape.activations.policies(specs.iter().map(|layer| layer.name.as_str())),
            compute_bytes: shape.compute_bytes,
            widths: StateWidths::new(shape.compute_bytes, shape.optimizer_bytes, shape.grad_bytes),
            microbatch_tokens: shape.micro_batch * shape.seq_len,
            num_microbatches: shape.grad_accum_steps,
            overlap: shape.overlap,
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
        let peak = |plan: &&StagePlan| (plan.memory_in(self.shape.stage).peak, std::cmp::Reverse(plan.stage));
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

impl RunShape {
    /// Which layers each pipeline stage holds.
    ///
    /// # Errors
    /// [`RunShapeError::Stages`], or [`RunShapeError::Schedule`] if too few micro-batches go through them.
    pub fn stages(&self) -> Result<Stages, RunShapeError> {
        let num_stages = self.mesh.degree(Axis::Pipeline);
        let num_chunks = self.schedule.map_or(1, ScheduleKind::num_chunks);
        if let Some(schedule) = self.schedule {
            schedule.check(num_stages, self.grad_accum_steps)?;
        }
        let flops = self.model.forward_flops(self.seq_len);
        Stages::new(&self.model.layers(), &flops, &self.stage_cut, num_stages, num_chunks)
            .map_err(|source| RunShapeError::Stages { num_stages, num_chunks, source })
    }

    /// Checks what the model has to say to the rest.
    ///
    /// # Errors
    /// [`RunShapeError`]
    pub fn check(&self) -> Result<(), RunShapeError> {
        let layers = self.model.layers();
        let max_positions = self.model.max_positions();
        if self.seq_len > max_positions {
            return Err(RunShapeError::TooLong { seq_len: self.seq_len, max_positions });
        }
        let tensor = self.mesh.degree(Axis::Tensor);
        self.model.check_tensor(tensor)?;
        if self.sequence == SequenceParallel::On && !self.seq_len.is_multiple_of(tensor) {
            return Err(RunShapeError::Tokens { seq_len: self.seq_len, tensor });
        }
        self.stages()?;
        let names = || layers.iter().flat_map(|layer| &layer.params).map(|param| &param.name);
        let lists = [("frozen", &self.frozen), ("no_decay", &self.no_decay), ("groups", &self.grouped)];
        for (list, patterns) in lists {
            if let Some(stray) = patterns.iter().find(|pattern| !names().any(|name| pattern.matches(name))) {
                return Err(RunShapeError::PatternMatchesNothing {
                    list,
                    pattern: stray.as_str().to_owned(),
                });
            }
        }
        let names = layers.iter().map(|layer| layer.name.as_str());
        if let Some(stray) = self.activations.stray(names.clone()) {
            return Err(RunShapeError::NoSuchLayer {
                pattern: stray.as_str().to_owned(),
                layers: names.map(str::to_owned).collect(),
            });
        }
        Ok(())
    }
}

fn text<S: Serializer>(value: &impl Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

fn optional_text<S: Serializer>(value: &Option<impl Display>, serializer: S) -> Result<S::Ok, S::Error> {
    value.as_ref().map(ToString::to_string).serialize(serializer)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn shape(num_ranks: usize, tied: bool) -> RunShape {
        let json = json!({"model_type": "llama", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64,
                          "num_hidden_layers": 2, "num_attention_heads": 2, "tie_word_embeddings": tied});
        RunShape {
            model: ModelConfig::from_json(&json).unwrap(),
            mesh: Mesh::new(num_ranks, 1, 1).unwrap(),
            schedule: None,
            stage_cut: StageCut::Parameters,
            sequence: SequenceParallel::Off,
            stage: ZeroStage::Three,
            compute_bytes: 2,
            precision: "bf16",
            optimizer_bytes: 8,
            grad_bytes: 4,
            micro_batch: 4,
            seq_len: 16,
            grad_accum_steps: 3,
            overlap: Overlap::Inline,
            activations: ActivationRules::default(),
            frozen: Vec::new(),
            no_decay: Vec::new(),
            grouped: Vec::new(),
        }
    }

    #[test]
    fn adds_up() {
        let plan = RunPlan::new(shape(2, false)).unwrap();
        assert_eq!(plan.step_tokens, 2 * 3 * 4 * 16);
        assert_eq!(plan.num_params, plan.num_trained);
        assert_eq!(plan.memory().stage, ZeroStage::Three);
        let padded: usize = plan.stages[0].units.iter().map(|unit| unit.padded_numel).sum();
        // Each micro-batch: two gathers and a reduction of everything.
        assert_eq!(plan.stages[0].data_traffic.elements, 3 * 3 * padded / 2);
    }

    #[test]
    fn a_tied_table_is_gathered_for_both_of_its_layers() {
        let tied = RunPlan::new(shape(2, true)).unwrap();
        let table = tied.stages[0].units[0].padded_numel;
        let padded: usize = tied.stages[0].units.iter().map(|unit| unit.padded_numel).sum();
        assert_eq!(tied.stages[0].data_traffic.elements, 3 * (3 * padded + 2 * table) / 2);
    }

    #[test]
    fn frozen_layers_before_the_first_trained_one_are_gathered_once() {
        let mut shape = shape(2, false);
        shape.frozen = vec![NamePattern::new("model.*")];
        let plan = RunPlan::new(shape).unwrap();
        let half = |trainable: bool| -> usize {
            let units = plan.stages[0].units.iter().filter(|unit| unit.trainable == trainable);
            units.map(|unit| unit.padded_numel - unit.shard_numel()).sum()
        };
        // The head goes backward: its frozen norm is gathered twice, like its trained table.
        let norm = plan.stages[0]
            .units
            .iter()
            .find(|unit| unit.name == "lm_head" && !unit.trainable)
            .unwrap()
            .padded_numel;
        assert_eq!(plan.stages[0].data_traffic.elements, 3 * (3 * half(true) + half(false) + norm / 2));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let refused = |change: fn(&mut RunShape)| {
            let mut shape = shape(2, false);
            change(&mut shape);
            RunPlan::new(shape).unwrap_err().to_string()
        };
        assert_eq!(
            refused(|shape| shape.seq_len = 4096),
            "`data.seq_len` is `4096`, the model has `2048` positions"
        );
        assert_eq!(
            refused(|shape| shape.no_decay = vec![NamePattern::new("*.bias")]),
            "`*.bias` in `train.no_decay` matches no parameter"
        );
        let rule = (NamePattern::new("h.*"), crate::ActivationPolicy::Recompute);
        let mut shape = shape(2, false);
        shape.activations.rules.push(rule);
        let error = RunPlan::new(shape).unwrap_err().to_string();
        assert!(
            error.starts_with("`h.*` in `activations` matches no layer; the layers are [\"model."),
            "{error}"
        );
    }

    #[test]
    fn narrower_states_are_counted() {
        let state = |optimizer_bytes, grad_bytes| {
            let plan = RunPlan::new(RunShape { optimizer_bytes, grad_bytes, ..shape(1, false) }).unwrap();
            (
                plan.memory().state,
                plan.stages[0].units.iter().map(|unit| unit.padded_numel as u64).sum::<u64>(),
            )
        };
        let (adamw, padded) = state(8, 4);
        assert_eq!((adamw.optimizer.0, adamw.grads.0), (8 * padded, 4 * padded));
        let (narrow, _) = state(4, 2);
        assert_eq!((narrow.optimizer.0, narrow.grads.0), (4 * padded, 2 * padded));
    }

    fn on(mesh: [usize; 3], tied: bool, change: fn(&mut RunShape)) -> RunPlan {
        let [pipeline, data, tensor] = mesh;
        let mut shape = shape(1, tied);
        shape.mesh = Mesh::new(pipeline * data * tensor, pipeline, tensor).unwrap();
        shape.schedule = (pipeline > 1).then_some(ScheduleKind::OneForwardOneBackward);
        change(&mut shape);
        RunPlan::new(shape).unwrap()
    }

    #[test]
    fn the_ranks_of_a_mesh_hold_the_model_once_for_each_replica() {
        for tied in [false, true] {
            let plan = on([2, 3, 2], tied, |_| {});
            let ranks: Vec<_> = plan.stages.iter().map(|stage| stage.ranks.clone()).collect();
            assert_eq!(ranks, [0..6, 6..12]);
            let held: usize = plan.stages.iter().map(StagePlan::num_params).sum();
            // Tables and matrices are halved, norms are not: two in each block and the last one.
            let norms = 5 * 32;
            let table = 100 * 32;
            let twice = if tied { table / 2 } else { 0 };
            assert_eq!(held, (plan.num_params - norms) / 2 + norms + twice, "tied {tied}");
            let own = |unit: &&UnitLayout| unit.name == "model.embed_tokens.weight";
            let shared: Vec<_> = plan.stages.iter().map(|stage| stage.units.iter().find(own)).collect();
            assert_eq!(shared[0].is_some(), tied);
            assert_eq!(shared[0], shared[1], "the same unit on both stages");
            assert_eq!(plan.step_tokens, 3 * 3 * 4 * 16);
        }
    }

    #[test]
    fn a_stage_keeps_as_many_micro_batches_as_the_schedule_lets_live() {
        let seven = json!({"model_type": "llama", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64,
                           "num_hidden_layers": 7, "num_attention_heads": 2});
        let kept = |schedule| -> Vec<(usize, u64)> {
            let shape = RunShape {
                model: ModelConfig::from_json(&seven).unwrap(),
                mesh: Mesh::new(3, 3, 1).unwrap(),
                schedule: Some(schedule),
                stage_cut: StageCut::Uniform,
                grad_accum_steps: 8,
                ..shape(1, false)
            };
            let stages = RunPlan::new(shape).unwrap().stages;
            stages
                .iter()
                .map(|stage| (stage.alive, stage.memory_in(ZeroStage::Three).activations.0))
                .collect()
        };
        let one = kept(ScheduleKind::OneForwardOneBackward);
        assert_eq!(one.iter().map(|&(alive, _)| alive).collect::<Vec<_>>(), [3, 2, 1]);
        let gpipe = kept(ScheduleKind::GPipe);
        assert!(gpipe.iter().all(|&(alive, _)| alive == 8));
        // The middle stage has blocks alone: 8 micro-batches against 2.
        assert_eq!(gpipe[1].1, 4 * one[1].1);
    }

    #[test]
    fn each_axis_sends_its_own() {
        let only = |mesh| {
            let AxisTraffic { pipeline, data, tensor } = on(mesh, true, |_| {}).traffic();
            [pipeline, data, tensor].map(|bytes| bytes > Bytes(0))
        };
        assert_eq!(only([1, 1, 1]), [false; 3]);
        assert_eq!(only([2, 1, 1]), [true, false, false]);
        assert_eq!(only([1, 2, 1]), [false, true, false]);
        assert_eq!(only([1, 1, 2]), [false, false, true]);
        let plan = on([2, 2, 1], true, |_| {});
        // 3 micro-batches of 64 tokens forward, and the gradient of half of the table in fp32, whose sum two stages make.
        let table = plan.stages[0].units.iter().find(|unit| unit.name.ends_with("weight")).unwrap();
        let expected = 3 * 64 * 32 * 2 + 4 * table.shard_numel() as u64;
        assert_eq!(plan.stages[0].traffic.pipeline, Bytes(expected));
        assert_eq!(plan.busiest(), plan.stages.iter().map(|stage| stage.traffic.total()).max().unwrap());
        // With split tokens the gradients of norms are sums over the group.
        let split = on([1, 1, 2], false, |shape| shape.sequence = SequenceParallel::On);
        let whole = on([1, 1, 2], false, |_| {});
        let norms = 5 * 32;
        let more = split.traffic().tensor.0 - whole.traffic().tensor.0;
        assert_eq!(more, 3 * 2 * norms);
    }
}
