//! What of the model is on this rank: the layers of its pipeline stage, each cut for its tensor rank.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use shardwise_plan::layout::units_on_stage;
use shardwise_plan::pipeline::{Schedule, ScheduleKind, StageCut, Stages};
use shardwise_plan::{Axis, LayerSpec, ParamSpec, UnitLayout};
use shardwise_zero::Placement;

use crate::{EngineError, Ranks};

/// How layers are spread over pipeline stages, and in what order those run micro-batches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PipelineOptions {
    /// The order.
    pub schedule: ScheduleKind,
    /// Which layers go where; without, stages get as equal numbers of parameters as can be.
    pub stages: Option<Stages>,
}

impl Default for PipelineOptions {
    fn default() -> Self {
        PipelineOptions { schedule: ScheduleKind::OneForwardOneBackward, stages: None }
    }
}

/// A part of the model: consecutive layers, one chunk of a stage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    /// Its place among all parts.
    pub index: usize,
    /// Its layers, as indices into this rank's.
    pub layers: Range<usize>,
    pub is_last: bool,
    /// Whether a layer of an earlier part learns, and so wants the gradient of this part's input.
    pub learns_before: bool,
    /// Whether the next part wants to give back a gradient.
    pub learns_until: bool,
}

/// The model and this rank's share of it.
#[derive(Debug)]
pub(crate) struct Stage {
    /// All layers, whole.
    pub specs: Vec<LayerSpec>,
    /// This rank's layers in the order they run, chunk by chunk, as indices into all of them.
    pub layers: Vec<usize>,
    /// The same, as this rank has them.
    pub local: Vec<LayerSpec>,
    /// This stage's chunks.
    pub parts: Vec<Part>,
    pub stages: Stages,
    pub schedule: Schedule,
    /// Parameters that several stages hold, with the first of them.
    shared: HashMap<String, usize>,
    /// Names of parameters that do not learn.
    frozen: HashSet<String>,
    pub degree: usize,
    pub tensor_rank: usize,
    pub stage: usize,
}

impl Stage {
    pub fn new(
        specs: Vec<LayerSpec>,
        options: PipelineOptions,
        num_microbatches: usize,
        ranks: &Ranks,
        is_frozen: impl Fn(&str) -> bool,
    ) -> Result<Self, EngineError> {
        check_ties(&specs)?;
        let (mesh, at) = (ranks.mesh(), ranks.at());
        let (num_stages, degree) = (mesh.degree(Axis::Pipeline), mesh.degree(Axis::Tensor));
        let schedule = Schedule::new(options.schedule, num_stages, num_microbatches)?;
        let stages = match options.stages {
            Some(stages) => stages,
            None => {
                let num_chunks = schedule.num_chunks();
                Stages::new(&specs, &vec![1; specs.len()], &StageCut::Parameters, num_stages, num_chunks)?
            }
        };
        let end = stages.parts().last().map_or(0, |part| part.end);
        let expected = (num_stages, schedule.num_parts(), specs.len());
        if (stages.num_stages(), stages.parts().len(), end) != expected {
            let (num_stages, num_parts) = (stages.num_stages(), stages.parts().len());
            let (expected_stages, expected_parts, num_layers) = expected;
            return Err(EngineError::WrongStages {
                num_stages,
                num_parts,
                end,
                expected_stages,
                expected_parts,
                num_layers,
            });
        }
        let params = specs.iter().flat_map(|layer| &layer.params).map(|param| &param.name);
        let frozen = params.filter(|name| is_frozen(name)).cloned().collect();
        let shared = stages.shared_params(&specs);
        let shared = shared.into_iter().map(|param| (param.name, param.stages[0])).collect();
        let learns = |layer: &LayerSpec| layer.params.iter().any(|param| !is_frozen(&param.name));
        let first_learner = specs.iter().position(learns).unwrap_or(specs.len());
        let mut layers = Vec::new();
        let mut parts = Vec::new();
        for chunk in 0..schedule.num_chunks() {
            let range = stages.layers(at.pipeline, chunk);
            let start = layers.len();
            layers.extend(range.clone());
            parts.push(Part {
                index: chunk * num_stages + at.pipeline,
                layers: start..layers.len(),
                is_last: range.end == specs.len(),
                learns_before: first_learner < range.start,
                learns_until: first_learner < range.end,
            });
        }
        // Every rank checks every layer, so that all refuse alike.
        let cut = specs.iter().map(|spec| spec.local(degree, at.tensor)).collect::<Result<Vec<_>, _>>()?;
        let local = layers.iter().map(|&layer| cut[layer].clone()).collect();
        Ok(Stage {
            specs,
            layers,
            local,
            parts,
            stages,
            schedule,
            shared,
            frozen,
            degree,
            tensor_rank: at.tensor,
            stage: at.pipeline,
        })
    }

    /// The flat buffers of a stage's layers, cut for this tensor rank.
    pub fn units(&self, stage: usize, num_shards: usize) -> Vec<UnitLayout> {
        let cut = |layer: usize| {
            self.specs[layer].local(self.degree, self.tensor_rank).expect("checked when the stage was made")
        };
        let local: Vec<_> = self.stages.layers_of(stage).map(cut).collect();
        units_on_stage(&local, &self.shared.keys().cloned().collect(), num_shards, |name| {
            self.frozen.contains(name)
        })
    }

    /// All parameters by name, whole, each as its first layer declares it.
    pub fn whole_params(&self) -> HashMap<&str, &ParamSpec> {
        let mut params = HashMap::new();
        for param in self.specs.iter().flat_map(|layer| &layer.params) {
            params.entry(param.name.as_str()).or_insert(param);
        }
        params
    }

    /// The stage that speaks for a parameter which `holder` holds.
    pub fn speaker(&self, name: &str, holder: usize) -> usize {
        self.shared.get(name).copied().unwrap_or(holder)
    }

    /// The parameters that several stages hold, each with these stages in order.
    pub fn shared(&self) -> Vec<shardwise_plan::pipeline::SharedParam> {
        self.stages.shared_params(&self.specs)
    }

    /// What of this rank's parameters others speak for.
    pub fn placement(&self) -> Placement {
        let params = || self.local.iter().flat_map(|layer| &layer.params);
        let whole = self.whole_params();
        let tensor_replicas = params()
            .filter(|param| whole[param.name.as_str()].is_spoken_for(self.degree, self.tensor_rank))
            .map(|param| param.name.clone())
            .collect();
        let stage_replicas = params()
            .map(|param| &param.name)
            .filter(|name| self.speaker(name, self.stage) != self.stage)
            .cloned()
            .collect();
        let mut seen = HashSet::new();
        let all = self.specs.iter().flat_map(|layer| layer.params.iter().map(move |param| (layer, param)));
        let catalogue = all
            .filter(|(_, param)| seen.insert(param.name.as_str()))
            .map(|(layer, param)| (layer.name.clone(), param.name.clone()))
            .collect();
        Placement { tensor_replicas, stage_replicas, catalogue }
    }
}

/// A parameter that two layers declare has one shape.
fn check_ties(specs: &[LayerSpec]) -> Result<(), EngineError> {
    let mut shapes: HashMap<&str, &[usize]> = HashMap::new();
    for param in specs.iter().flat_map(|layer| &layer.params) {
        let first = shapes.entry(&param.name).or_insert(&param.shape);
        if *first != param.shape {
            let (first, second) = (first.to_vec(), param.shape.clone());
            return Err(EngineError::TiedShapes { name: param.name.clone(), first, second });
        }
    }
    Ok(())
}
