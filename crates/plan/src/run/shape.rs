//! What decides how a run goes, and whether it can.

use std::fmt::Display;

use serde::{Serialize, Serializer};

use crate::memory::HeadChunks;
use crate::mesh::MeshError;
use crate::pipeline::{PartitionError, ScheduleError, ScheduleKind, StageCut, Stages};
use crate::tensor::SplitError;
use crate::zoo::{GroupedQueries, ModelConfig, SequenceParallel};
use crate::{ActivationRules, Axis, Device, Mesh, NamePattern, Overlap, ZeroStage};

/// What decides how a run goes, as plain values.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunShape {
    /// The model.
    pub model: ModelConfig,
    /// The ranks.
    pub mesh: Mesh,
    /// Where they compute.
    pub device: Device,
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
    /// Rows whose scores over the vocabulary a head holds at a time; if none, what saves memory decides.
    pub head_chunk_rows: Option<usize>,
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

    /// How a head is cut.
    pub fn head_chunks(&self) -> HeadChunks {
        match (self.head_chunk_rows, self.device) {
            (Some(rows), _) => HeadChunks::Rows(rows),
            (None, Device::Cuda(_)) => HeadChunks::Gpu,
            (None, Device::Cpu) => HeadChunks::Host,
        }
    }

    /// What attention holds of keys and values that queries share. On a GPU the kernel that takes them as they are is for 16 bits on
    /// sm_80 and later. bf16 is not to be had on less; for others copies are counted, of which some cards need none.
    pub fn grouped_queries(&self) -> GroupedQueries {
        match self.device {
            Device::Cuda(_) if self.precision != "bf16" => GroupedQueries::Repeated,
            _ => GroupedQueries::Shared,
        }
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
