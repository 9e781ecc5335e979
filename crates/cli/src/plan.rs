//! `shardwise plan`: what a run needs, before anything is allocated.

pub mod args;
mod gpus;
mod groups;
mod quantity;
mod schedule;
mod search;
mod table;

use std::cmp::Reverse;
use std::ops::Range;

use anyhow::Context;
use serde::Serialize;
use shardwise_monitor::format_count;
use shardwise_plan::run::{Limits, RunPlan, RunShape};
use shardwise_plan::traffic::{AxisTraffic, Traffic};
use shardwise_plan::zoo::SequenceParallel;
use shardwise_plan::{Axis, Bytes, Device, Overlap, UnitLayout, ZeroStage};

use crate::args::PlanArgs;
use crate::console::UsageError;
use crate::plan::gpus::Largest;
use crate::plan::schedule::Timeline;
use crate::plan::search::Answer;
use crate::{Exit, console, run_file};

/// Prints the plan of the run: of the layout that the run file gives, of its pipeline, or of all layouts that there are.
pub fn run(args: &PlanArgs) -> anyhow::Result<Exit> {
    let num_cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let config = run_file::load(&args.run)?.config;
    let plan = config.plan(num_cores)?;
    let limits = gpus::limits(&plan, &args.search)?;
    let text = if let (Some(limits), true) = (limits, args.search.largest) {
        let largest = Largest::new(&plan, limits)?;
        if args.json { pretty(&largest.json())? } else { largest.describe() }
    } else if let Some(device_memory) = args.search.device_memory {
        let answer = Answer::new(&config, &plan, device_memory, &args.pipeline, &args.search);
        if args.json {
            let mut json = answer.json();
            if let Some(limits) = &limits {
                json["run"] = gpus::verdict_json(&plan, limits);
            }
            pretty(&json)?
        } else {
            // What the run file says comes before what it could say.
            let of_run = |limits: &Limits| {
                let verdict = gpus::verdict(&plan, limits);
                format!("{}\n{verdict}\n{}\n", headlines(&plan), gpus::choices(&plan, Some(limits)))
            };
            limits.as_ref().map(of_run).unwrap_or_default() + &answer.describe(args.search.top as usize)
        }
    } else if let Some(named) = args.pipeline.schedule {
        let kind = named.unwrap_or(config.parallel.schedule);
        let timeline = Timeline::new(&plan.shape, config.batch.global_batch_size, kind, &args.pipeline)?;
        if let Some(file) = &args.pipeline.svg {
            let write = std::fs::write(file, timeline.svg());
            write.with_context(|| format!("could not write `{}`", file.display()))?;
        }
        if args.json { pretty(&timeline.json())? } else { timeline.describe() }
    } else if args.pipeline.pipeline.is_some()
        || args.pipeline.tensor.is_some()
        || args.pipeline.cut.is_some()
    {
        let message = "`--pipeline`, `--tensor` and `--cut` are for `--schedule` and `--device-memory`";
        return Err(UsageError::new(
            message,
            "give `parallel.pipeline` and `parallel.tensor` in the run file",
        )
        .into());
    } else if args.json {
        pretty(&plan)?
    } else {
        describe(&plan, gpus::limit_of_run(&plan, config.cuda.memory_limit).as_ref())
    };
    console::print_result(&text)?;
    Ok(Exit::Done)
}

fn pretty(value: &impl Serialize) -> serde_json::Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

fn describe(plan: &RunPlan, limits: Option<&Limits>) -> String {
    let zero = plan.shape.stage;
    let fullest = plan.fullest();
    let mut text = headlines(plan);
    let groups = groups::describe(&plan.shape.mesh);
    text += &if groups.is_empty() { groups } else { format!("\n{groups}") };
    // With one pipeline stage there is nothing to tell apart.
    let of_stage = match plan.stages.len() {
        1 => String::new(),
        _ => {
            text += &format!(
                "\npipeline stages, fullest first: what a rank holds and sends\n{}",
                stages_table(plan)
            );
            format!(" of stage {}", fullest.stage)
        }
    };
    text += &format!("\n{}\n", unit_table(&fullest.units));
    text += &format!("memory of each rank{of_stage}, ZeRO stage {zero}\n{}\n", indented(plan.memory()));
    if plan.shape.device != Device::Cpu {
        let verdict = limits.map(|limits| format!("\n{}", gpus::verdict(plan, limits)));
        text += &format!("{}\n{}", verdict.unwrap_or_default(), gpus::choices(plan, limits));
        return text + "\n" + &sent(plan);
    }
    text += "\npeak in the other stages\n";
    for other in ZeroStage::ALL.into_iter().filter(|other| *other != zero) {
        let peak = plan.stages.iter().map(|plan| plan.memory_in(other).peak).max().unwrap_or_default();
        text += &format!("  stage {:<18}{peak:>10}\n", u8::from(other));
    }
    text + "\n" + &sent(plan)
}

fn sent(plan: &RunPlan) -> String {
    let AxisTraffic { pipeline, data, tensor } = plan.traffic();
    let degree = |axis| plan.shape.mesh.degree(axis);
    if degree(Axis::Pipeline) * degree(Axis::Tensor) == 1 {
        let Traffic { elements, bytes } = plan.fullest().data_traffic;
        return format!(
            "sent by each rank in a step\n  {} elements, {bytes}\n",
            format_count(elements as u64)
        );
    }
    let axes = [("pipeline", pipeline), ("data", data), ("tensor", tensor)];
    let line = |(axis, bytes): (&str, Bytes)| format!("  {axis:<24}{bytes:>10}\n");
    let lines: String = axes.into_iter().filter(|(_, bytes)| *bytes > Bytes(0)).map(line).collect();
    format!(
        "sent in a step along each axis, by its busiest rank\n{lines}  {:<24}{:>10}\n",
        "the busiest rank in all",
        plan.busiest()
    )
}

/// One line for each pipeline stage. The first tensor-parallel rank of a stage stands for all of its ranks.
fn stages_table(plan: &RunPlan) -> String {
    let layers = plan.shape.model.layers();
    let chunk = |range: &Range<usize>| match range.len() {
        1 => layers[range.start].name.clone(),
        _ => format!("{} .. {}", layers[range.start].name, layers[range.end - 1].name),
    };
    let headings =
        ["  stage", "ranks", "layers", "parameters", "alive", "peak", "pipeline", "data", "tensor"];
    let mut rows = vec![headings.map(str::to_owned).to_vec()];
    let mut stages: Vec<_> = plan.stages.iter().collect();
    stages.sort_by_key(|stage| (Reverse(stage.memory_in(plan.shape.stage).peak), stage.stage));
    for stage in stages {
        let ranks = match stage.ranks.len() {
            1 => stage.ranks.start.to_string(),
            _ => format!("{} .. {}", stage.ranks.start, stage.ranks.end - 1),
        };
        rows.push(vec![
            format!("  {}", stage.stage),
            ranks,
            stage.layers.iter().map(chunk).collect::<Vec<_>>().join(", "),
            format_count(stage.num_params() as u64),
            stage.alive.to_string(),
            stage.memory_in(plan.shape.stage).peak.to_string(),
            stage.traffic.pipeline.to_string(),
            stage.traffic.data.to_string(),
            stage.traffic.tensor.to_string(),
        ]);
    }
    table::table(&rows, 3)
}

fn headlines(plan: &RunPlan) -> String {
    let RunShape { model, mesh, stage, precision, micro_batch, seq_len, grad_accum_steps, overlap, .. } =
        &plan.shape;
    let trained = match plan.num_params - plan.num_trained {
        0 => String::new(),
        frozen => format!(", {} of them frozen", format_count(frozen as u64)),
    };
    let [pipeline, data, tensor] = [Axis::Pipeline, Axis::Data, Axis::Tensor].map(|axis| mesh.degree(axis));
    let overlap = match overlap {
        Overlap::Inline => "in turn with computation",
        Overlap::SideThread => "beside computation",
    };
    let mut text = format!(
        "model  {}, {} parameters{trained}\n\
         ranks  {} = pipeline {pipeline} x data {data} x tensor {tensor}\n\
         step   {} tokens = {data} replicas x {grad_accum_steps} micro-batches x {micro_batch} samples x {seq_len}\n\
         how    ZeRO stage {stage}, {precision}, communication {overlap}\n",
        model.family(),
        format_count(plan.num_params as u64),
        mesh.world_size(),
        format_count(plan.step_tokens as u64),
    );
    if let Some(schedule) = plan.shape.schedule {
        text += &format!("pipe   {schedule}, stages cut by {}\n", plan.shape.stage_cut);
    }
    if let Device::Cuda(cuda) = plan.shape.device {
        text += &format!("gpu    offloaded to the host: {}\n", cuda.offload.describe());
    }
    if plan.shape.sequence == SequenceParallel::On {
        text += "tensor tokens are split between linear layers\n";
    }
    text
}

/// One line for each unit, or for a run of units that differ in their number only.
fn unit_table(units: &[UnitLayout]) -> String {
    let alike = |a: &UnitLayout, b: &UnitLayout| {
        let shape = |unit: &UnitLayout| (unit.trainable, unit.numel(), unit.padded_numel);
        shape(a) == shape(b) && without_digits(&a.name) == without_digits(&b.name)
    };
    let mut rows = vec![["unit", "units", "parameters", "padded", "shard"].map(str::to_owned)];
    for run in units.chunk_by(alike) {
        let (first, last) = (&run[0], &run[run.len() - 1]);
        let mut name = first.name.clone();
        if run.len() > 1 {
            name += &format!(" .. {}", last.name);
        }
        if !first.trainable {
            name += " (frozen)";
        }
        let counts = [run.len(), first.numel(), first.padded_numel, first.shard_numel()];
        let [count, numel, padded, shard] = counts.map(|count| format_count(count as u64));
        rows.push([name, count, numel, padded, shard]);
    }
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: [usize; 5] = std::array::from_fn(width);
    rows.iter().fold(String::new(), |text, row| {
        let numbers: String = (1..5).map(|i| format!("  {:>w$}", row[i], w = widths[i])).collect();
        text + &format!("{:<w$}{numbers}\n", row[0], w = widths[0])
    })
}

fn without_digits(name: &str) -> String {
    name.chars().filter(|c| !c.is_ascii_digit()).collect()
}

fn indented(lines: impl std::fmt::Display) -> String {
    lines.to_string().lines().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
}
