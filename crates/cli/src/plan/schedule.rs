//! `shardwise plan --schedule`: who computes what when, drawn.

use anyhow::Context;
use serde_json::json;
use shardwise_monitor::format_count;
use shardwise_plan::pipeline::{
    Durations, Schedule, ScheduleKind, Simulation, Stages, Transport, svg, timeline,
};
use shardwise_plan::run::RunShape;
use shardwise_plan::{Axis, LayerSpec, Mesh};

use super::args::PipelineArgs;
use super::groups;
use super::table::table;
use crate::console::UsageError;

/// A pipeline of the run, simulated with a backward that takes twice as long as a forward and stages that take equally long.
pub struct Timeline {
    kind: ScheduleKind,
    mesh: Mesh,
    layers: Vec<LayerSpec>,
    flops: Vec<u64>,
    stages: Stages,
    schedule: Schedule,
    simulation: Simulation,
    receives: usize,
}

impl Timeline {
    /// Plans the pipeline of a run of `global_batch` samples a step.
    pub fn new(
        shape: &RunShape,
        global_batch: usize,
        kind: ScheduleKind,
        args: &PipelineArgs,
    ) -> anyhow::Result<Self> {
        let given =
            |degree: Option<u64>, axis| degree.map_or(shape.mesh.degree(axis), |degree| degree as usize);
        let (pipeline, tensor) = (given(args.pipeline, Axis::Pipeline), given(args.tensor, Axis::Tensor));
        let usage = |message: String, hint: &str| UsageError::new(message, hint);
        let mesh = Mesh::new(shape.mesh.world_size(), pipeline, tensor).map_err(|error| {
            usage(error.to_string(), "choose `-n`, `--pipeline` and `--tensor` so that they divide")
        })?;
        shape
            .model
            .check_tensor(tensor)
            .map_err(|error| usage(error.to_string(), "choose another `--tensor`"))?;
        let num_microbatches = match args.micro_batches {
            Some(number) => number as usize,
            None => {
                let at_a_time = shape.micro_batch * mesh.degree(Axis::Data);
                if !global_batch.is_multiple_of(at_a_time) {
                    let message = format!(
                        "the global batch of `{global_batch}` samples is no multiple of `{at_a_time}`, a micro-batch of every replica"
                    );
                    return Err(usage(message, "give `--micro-batches`").into());
                }
                global_batch / at_a_time
            }
        };
        let (layers, flops) = (shape.model.layers(), shape.model.forward_flops(shape.seq_len));
        let cut = args.cut.as_ref().unwrap_or(&shape.stage_cut);
        let stages = Stages::new(&layers, &flops, cut, pipeline, kind.num_chunks())
            .map_err(|error| usage(error.to_string(), "choose fewer stages or chunks, or another `--cut`"))?;
        let schedule = Schedule::new(kind, pipeline, num_microbatches)
            .map_err(|error| usage(error.to_string(), "choose `--micro-batches` or `--schedule` to fit"))?;
        schedule.validate().context("a schedule of our own is not valid")?;
        let simulation = schedule.simulate(&Durations::unit(schedule.num_parts()), Transport::Buffered)?;
        let receives = schedule.receives_to_post()?;
        Ok(Timeline { kind, mesh, layers, flops, stages, schedule, simulation, receives })
    }

    /// All of it as people read it.
    pub fn describe(&self) -> String {
        let posted = if self.receives == 1 { "receive" } else { "receives" };
        let mut text = format!(
            "schedule  {}, {} stages, {} micro-batches\n\
             bubble    {:.1}% of the stages' time, where a backward takes as long as two forwards\n\
             messages  no deadlock with {} {posted} of each channel posted ahead, even where sends wait for them\n\n",
            self.kind,
            self.schedule.num_stages(),
            self.schedule.num_microbatches(),
            100.0 * self.simulation.bubble,
            self.receives,
        );
        text += &groups::describe(&self.mesh);
        text += &format!("\n{}", table(&self.rows(), 2));
        for shared in self.stages.shared_params(&self.layers) {
            let stages: Vec<_> = shared.stages.iter().map(usize::to_string).collect();
            text += &format!("shared: {} by stages {}\n", shared.name, stages.join(", "));
        }
        text + "\n" + &timeline(&self.simulation, 1.0)
    }

    fn rows(&self) -> Vec<Vec<String>> {
        let mut rows =
            vec![["stage", "layers", "parameters", "operations", "alive"].map(str::to_owned).to_vec()];
        let all: u64 = self.flops.iter().sum();
        for stage in 0..self.schedule.num_stages() {
            let name = |range: std::ops::Range<usize>| match range.len() {
                1 => self.layers[range.start].name.clone(),
                _ => format!("{} .. {}", self.layers[range.start].name, self.layers[range.end - 1].name),
            };
            let chunks: Vec<_> =
                (0..self.schedule.num_chunks()).map(|chunk| name(self.stages.layers(stage, chunk))).collect();
            let params = || self.stages.layers_of(stage).flat_map(|layer| &self.layers[layer].params);
            // A tied parameter within the stage is there once.
            let named: std::collections::HashMap<_, _> =
                params().map(|param| (&param.name, param.numel())).collect();
            let flops: u64 = self.stages.layers_of(stage).map(|layer| self.flops[layer]).sum();
            rows.push(vec![
                stage.to_string(),
                chunks.join(", "),
                format_count(named.values().sum::<usize>() as u64),
                format!("{:.1}%", 100.0 * flops as f64 / all.max(1) as f64),
                self.simulation.peak_activations[stage].to_string(),
            ]);
        }
        rows
    }

    /// All of it for scripts; `schedule` is the text form.
    pub fn json(&self) -> serde_json::Value {
        json!({
            "kind": self.kind.to_string(),
            "mesh": self.mesh,
            "parts": self.stages.parts(),
            "shared": self.stages.shared_params(&self.layers),
            "makespan": self.simulation.makespan,
            "bubble": self.simulation.bubble,
            "peak_activations": self.simulation.peak_activations,
            "receives_to_post": self.receives,
            "schedule": self.schedule.to_string(),
        })
    }

    /// The timeline as an image.
    pub fn svg(&self) -> String {
        let title = format!(
            "{}: {} stages, {} micro-batches, bubble {:.1}%",
            self.kind,
            self.schedule.num_stages(),
            self.schedule.num_microbatches(),
            100.0 * self.simulation.bubble
        );
        svg(&self.simulation, &title)
    }
}
