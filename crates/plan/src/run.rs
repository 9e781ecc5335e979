//! A whole run, planned: from a model's shape and a few numbers to units, memory and traffic.

use std::fmt::Display;

use serde::{Serialize, Serializer};

use crate::layout::units_of;
use crate::memory::{LayerLoad, MemoryPlan, Workload, first_trained, layer_loads};
use crate::mesh::MeshError;
use crate::pipeline::{PartitionError, ScheduleError, ScheduleKind, StageCut, Stages};
use crate::tensor::SplitError;
use crate::traffic::Traffic;
use crate::zoo::{ModelConfig, SequenceParallel};
use crate::{ActivationRules, Axis, Mesh, NamePattern, Overlap, UnitLayout, ZeroStage};

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

/// What a run will be like, on each of its ranks.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunPlan {
    /// What it was made from.
    #[serde(flatten)]
    pub shape: RunShape,
    /// Units, in order.
    pub units: Vec<UnitLayout>,
    /// Memory of each rank in the stages 0 to 3.
    pub memory: [MemoryPlan; 4],
    /// What each rank sends in a step.
    pub traffic: Traffic,
    /// Tokens of one step, of all ranks.
    pub step_tokens: usize,
    /// Elements of all parameters, each counted once.
    pub num_params: usize,
    /// Elements of the parameters that are trained.
    pub num_trained: usize,
}

impl RunPlan {
    /// Plans a run. Allocates nothing but the plan.
    ///
    /// # Errors
    /// [`RunShapeError`]
    pub fn new(shape: RunShape) -> Result<Self, RunShapeError> {
        shape.check()?;
        let specs = shape.model.layers();
        let num_ranks = shape.mesh.degree(Axis::Data);
        let is_frozen = |name: &str| shape.frozen.iter().any(|pattern| pattern.matches(name));
        let units = units_of(&specs, num_ranks, is_frozen);
        let activations = shape.model.activations(shape.micro_batch, shape.seq_len, shape.compute_bytes);
        let layers = layer_loads(&specs, &units, &activations, &shape.activations);
        let load = Workload {
            units: &units,
            layers: &layers,
            num_ranks,
            compute_bytes: shape.compute_bytes,
            optimizer_bytes: shape.optimizer_bytes,
            grad_bytes: shape.grad_bytes,
            microbatch_tokens: shape.micro_batch * shape.seq_len,
            grad_accum_steps: shape.grad_accum_steps,
            overlap: shape.overlap,
        };
        let memory = ZeroStage::ALL.map(|stage| MemoryPlan::new(&load, stage));
        let num_gathers = |unit| num_gathers(&layers, unit);
        let traffic =
            Traffic::new(&units, shape.stage, shape.grad_accum_steps, shape.compute_bytes, num_gathers);
        let step_tokens = num_ranks * shape.grad_accum_steps * load.microbatch_tokens;
        let num_params = units.iter().map(UnitLayout::numel).sum();
        let num_trained = units.iter().filter(|unit| unit.trainable).map(UnitLayout::numel).sum();
        Ok(RunPlan { shape, units, memory, traffic, step_tokens, num_params, num_trained })
    }

    /// Memory of each rank in the run's own stage.
    pub fn memory(&self) -> &MemoryPlan {
        &self.memory[usize::from(u8::from(self.shape.stage))]
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

/// How often a micro-batch gathers a unit in stage 3: for the forward and the backward pass of every layer that uses it.
fn num_gathers(layers: &[LayerLoad], unit: usize) -> usize {
    let first = first_trained(layers);
    let uses = layers.iter().enumerate().filter(|(_, layer)| layer.units.contains(&unit));
    uses.map(|(i, _)| if i < first { 1 } else { 2 }).sum()
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
        let padded: usize = plan.units.iter().map(|unit| unit.padded_numel).sum();
        // Each micro-batch: two gathers and a reduction of everything.
        assert_eq!(plan.traffic.elements, 3 * 3 * padded / 2);
    }

    #[test]
    fn a_tied_table_is_gathered_for_both_of_its_layers() {
        let tied = RunPlan::new(shape(2, true)).unwrap();
        let table = tied.units[0].padded_numel;
        let padded: usize = tied.units.iter().map(|unit| unit.padded_numel).sum();
        assert_eq!(tied.traffic.elements, 3 * (3 * padded + 2 * table) / 2);
    }

    #[test]
    fn frozen_layers_before_the_first_trained_one_are_gathered_once() {
        let mut shape = shape(2, false);
        shape.frozen = vec![NamePattern::new("model.*")];
        let plan = RunPlan::new(shape).unwrap();
        let half = |trainable: bool| -> usize {
            let units = plan.units.iter().filter(|unit| unit.trainable == trainable);
            units.map(|unit| unit.padded_numel - unit.shard_numel()).sum()
        };
        // The head goes backward: its frozen norm is gathered twice, like its trained table.
        let norm =
            plan.units.iter().find(|unit| unit.name == "lm_head" && !unit.trainable).unwrap().padded_numel;
        assert_eq!(plan.traffic.elements, 3 * (3 * half(true) + half(false) + norm / 2));
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
            (plan.memory().state, plan.units.iter().map(|unit| unit.padded_numel as u64).sum::<u64>())
        };
        let (adamw, padded) = state(8, 4);
        assert_eq!((adamw.optimizer.0, adamw.grads.0), (8 * padded, 4 * padded));
        let (narrow, _) = state(4, 2);
        assert_eq!((narrow.optimizer.0, narrow.grads.0), (4 * padded, 2 * padded));
    }
}
