//! Every layout, tried.

use std::collections::HashMap;

use serde::Serialize;

use super::cost::Costs;
use super::{Cluster, Estimate, Job, Layout, Recompute};
use crate::memory::LayerActivations;
use crate::param::LayerSpec;
use crate::pipeline::{ScheduleKind, Stages, loss_turn};
use crate::share::Share;
use crate::tensor::SplitError;
use crate::zoo::Microbatch;
use crate::{ActivationPolicy, ActivationRules, Axis, LossTurn, Mesh, OffloadTo, ZeroStage};

/// The largest power of two that is tried as a micro-batch.
const MOST_SAMPLES: usize = 64;

/// What was found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Search {
    /// Layouts that fit, fastest first; of equally fast ones that which needs less memory.
    pub feasible: Vec<Estimate>,
    /// Layouts that need more memory than there is, least missing first.
    pub over: Vec<Estimate>,
    /// Meshes that cannot be, with the reason.
    pub ruled_out: Vec<Ruled>,
}

/// Degrees that no mesh can have for this job, whatever the rest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Ruled {
    /// Pipeline degree, if it matters.
    pub pipeline: Option<usize>,
    /// Data degree, if it matters.
    pub data: Option<usize>,
    /// Tensor degree, if it matters.
    pub tensor: Option<usize>,
    /// Why.
    pub reason: String,
}

/// Tries every layout of `job` on `cluster`.
pub fn search(job: &Job, cluster: &Cluster) -> Search {
    let layers = job.model.layers();
    let flops = job.model.forward_flops(job.seq_len);
    let mut found = Search { feasible: Vec::new(), over: Vec::new(), ruled_out: Vec::new() };
    let degrees = |given: Option<usize>| -> Vec<usize> {
        let divides = |degree: &usize| cluster.num_ranks.is_multiple_of(*degree);
        (1..=cluster.num_ranks)
            .filter(divides)
            .filter(|&degree| given.is_none_or(|given| given == degree))
            .collect()
    };
    for (axis, given) in [(Axis::Pipeline, job.pipeline), (Axis::Tensor, job.tensor)] {
        if let Some(degree) = given.filter(|_| degrees(given).is_empty()) {
            let reason = format!("does not divide `{}` ranks", cluster.num_ranks);
            let (pipeline, tensor) =
                if axis == Axis::Pipeline { (Some(degree), None) } else { (None, Some(degree)) };
            found.ruled_out.push(Ruled { pipeline, data: None, tensor, reason });
        }
    }
    let sizes = micro_batches(job);
    let policies = |recompute, loss| {
        let policy = match recompute {
            Recompute::Off => ActivationPolicy::Keep,
            Recompute::Layers => ActivationPolicy::Recompute,
        };
        let policies =
            ActivationRules::all(policy).policies(layers.iter().map(|layer| layer.name.as_str()), loss);
        ((recompute, loss), policies)
    };
    let policies: Vec<_> = [Recompute::Off, Recompute::Layers]
        .into_iter()
        .flat_map(|recompute| [LossTurn::AtOnce, LossTurn::Later].map(|loss| policies(recompute, loss)))
        .collect();
    let is_frozen = |name: &str| job.frozen.iter().any(|pattern| pattern.matches(name));
    let mut locals = Vec::new();
    for tensor in degrees(job.tensor) {
        match LocalModel::new(job, &layers, tensor, &sizes) {
            Ok(local) => locals.push(local),
            Err(error) => found.rule_out([None, None, Some(tensor)], error.to_string()),
        }
    }
    for pipeline in degrees(job.pipeline) {
        let cut = |num_chunks| Stages::new(&layers, &flops, &job.cut, pipeline, num_chunks);
        let mut schedules: Vec<(Option<ScheduleKind>, Stages)> = Vec::new();
        if pipeline == 1 {
            schedules.extend(cut(1).ok().map(|stages| (None, stages)));
        } else {
            for &schedule in &job.schedules {
                match cut(schedule.num_chunks()) {
                    Ok(stages) => schedules.push((Some(schedule), stages)),
                    Err(error) => {
                        found.rule_out([Some(pipeline), None, None], format!("{schedule}: {error}"))
                    }
                }
            }
        }
        for local in locals.iter().filter(|local| cluster.num_ranks.is_multiple_of(pipeline * local.tensor)) {
            let Ok(mesh) = Mesh::new(cluster.num_ranks, pipeline, local.tensor) else { continue };
            let data = mesh.degree(Axis::Data);
            if !job.global_batch.is_multiple_of(data) {
                let reason = format!("does not divide the global batch of `{}` samples", job.global_batch);
                found.rule_out([None, Some(data), None], reason);
                continue;
            }
            for (schedule, stages) in &schedules {
                let shares = Share::all(&local.layers, stages, mesh, job.sequence, is_frozen);
                let costs = Costs { job, cluster, stages, shares: &shares, flops: &flops };
                for layout in layouts(job, mesh, *schedule, &sizes) {
                    let key = (layout.recompute, loss_turn(layout.schedule, layout.num_microbatches));
                    let policies = policies.iter().find(|(of, _)| *of == key).expect("all four are there");
                    let policies = &policies.1;
                    found.add(costs.estimate(&layout, &local.activations[&layout.micro_batch], policies));
                }
            }
        }
    }
    found.feasible.sort_by(|a, b| {
        let memory = |estimate: &Estimate| estimate.memory.total();
        a.step_s.total_cmp(&b.step_s).then(memory(a).cmp(&memory(b)))
    });
    found.over.sort_by(|a, b| a.excess.cmp(&b.excess).then(a.step_s.total_cmp(&b.step_s)));
    found
}

/// The model on one of `tensor` ranks.
struct LocalModel {
    layers: Vec<LayerSpec>,
    /// What each layer holds, by samples of a micro-batch.
    activations: HashMap<usize, Vec<LayerActivations>>,
    tensor: usize,
}

impl LocalModel {
    fn new(job: &Job, layers: &[LayerSpec], tensor: usize, sizes: &[usize]) -> Result<Self, SplitError> {
        let activations = |num_samples| {
            let Job { seq_len, compute_bytes, head_chunks, grouped_queries, .. } = *job;
            let microbatch = Microbatch { num_samples, seq_len, compute_bytes, head_chunks, grouped_queries };
            job.model.activations(tensor, job.sequence, microbatch)
        };
        // Rank 0 has no less than any other.
        let layers = layers.iter().map(|layer| layer.local(tensor, 0)).collect::<Result<_, _>>()?;
        let activations = sizes.iter().map(|&samples| (samples, activations(samples))).collect();
        Ok(LocalModel { layers, activations, tensor })
    }
}

/// Sizes of micro-batches to try.
fn micro_batches(job: &Job) -> Vec<usize> {
    let powers = std::iter::successors(Some(1), |samples| Some(samples * 2));
    let mut sizes: Vec<usize> =
        powers.take_while(|&samples| samples <= MOST_SAMPLES).chain([job.micro_batch]).collect();
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

/// Everything that can be chosen on one mesh with one schedule.
fn layouts(
    job: &Job,
    mesh: Mesh,
    schedule: Option<ScheduleKind>,
    sizes: &[usize],
) -> impl Iterator<Item = Layout> {
    let pipeline = mesh.degree(Axis::Pipeline);
    let batch = job.global_batch / mesh.degree(Axis::Data);
    let fills = move |micro_batch: &usize| {
        batch.is_multiple_of(*micro_batch)
            && match schedule {
                // Other numbers of micro-batches run too, with a larger bubble than the formula's.
                Some(ScheduleKind::Interleaved { .. }) => (batch / micro_batch).is_multiple_of(pipeline),
                _ => true,
            }
    };
    let stages: Vec<_> =
        ZeroStage::ALL.into_iter().filter(|&stage| job.stage.is_none_or(|given| given == stage)).collect();
    // One replica has nothing to shard over; but parameters wait on the host in stage 3 only.
    let alone = mesh.degree(Axis::Data) == 1 && job.stage.is_none();
    let stages = match job.device.offload().params {
        _ if !alone => stages,
        OffloadTo::Device => vec![ZeroStage::Zero],
        OffloadTo::Host => vec![ZeroStage::Zero, ZeroStage::Three],
    };
    sizes.iter().copied().filter(fills).flat_map(move |micro_batch| {
        let num_microbatches = batch / micro_batch;
        stages.clone().into_iter().flat_map(move |stage| {
            [Recompute::Off, Recompute::Layers].map(|recompute| Layout {
                mesh,
                stage,
                schedule,
                micro_batch,
                num_microbatches,
                recompute,
            })
        })
    })
}

impl Search {
    fn add(&mut self, estimate: Estimate) {
        if estimate.fits() { &mut self.feasible } else { &mut self.over }.push(estimate);
    }

    fn rule_out(&mut self, [pipeline, data, tensor]: [Option<usize>; 3], reason: String) {
        let ruled = Ruled { pipeline, data, tensor, reason };
        if !self.ruled_out.contains(&ruled) {
            self.ruled_out.push(ruled);
        }
    }
}
