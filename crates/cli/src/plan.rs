//! `shardwise plan`: what a run needs, before anything is allocated.

pub mod args;
mod groups;
mod quantity;
mod schedule;
mod search;
mod table;

use anyhow::Context;
use serde::Serialize;
use shardwise_monitor::format_count;
use shardwise_plan::run::{RunPlan, RunShape};
use shardwise_plan::{Axis, Overlap, UnitLayout};

use crate::args::PlanArgs;
use crate::console::UsageError;
use crate::plan::schedule::Timeline;
use crate::plan::search::Answer;
use crate::{Exit, console, run_file};

/// Prints the plan of the run: of the layout that the run file gives, of its pipeline, or of all layouts that there are.
pub fn run(args: &PlanArgs) -> anyhow::Result<Exit> {
    let num_cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let config = run_file::load(&args.run)?.config;
    let plan = config.plan(num_cores)?;
    let text = if let Some(device_memory) = args.search.device_memory {
        let answer = Answer::new(&config, &plan, device_memory, &args.pipeline, &args.search);
        if args.json { pretty(&answer.json())? } else { answer.describe(args.search.top as usize) }
    } else if let Some(kind) = args.pipeline.schedule {
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
        describe(&plan)
    };
    console::print_result(&text)?;
    Ok(Exit::Done)
}

fn pretty(value: &impl Serialize) -> serde_json::Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

fn describe(plan: &RunPlan) -> String {
    let stage = plan.shape.stage;
    let mut text = headlines(plan);
    let groups = groups::describe(&plan.shape.mesh);
    text += &if groups.is_empty() { groups } else { format!("\n{groups}") };
    text += &format!("\n{}\n", unit_table(&plan.units));
    text += &format!("memory of each rank, ZeRO stage {stage}\n{}\n", indented(plan.memory()));
    text += "\npeak in the other stages\n";
    for memory in plan.memory.iter().filter(|memory| memory.stage != stage) {
        text += &format!("  stage {:<18}{:>10}\n", u8::from(memory.stage), memory.peak);
    }
    let traffic = &plan.traffic;
    text += &format!(
        "\nsent by each rank in a step\n  {} elements, {}\n",
        format_count(traffic.elements as u64),
        traffic.bytes
    );
    text
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
    format!(
        "model  {}, {} parameters{trained}\n\
         ranks  {} = pipeline {pipeline} x data {data} x tensor {tensor}\n\
         step   {} tokens = {data} replicas x {grad_accum_steps} micro-batches x {micro_batch} samples x {seq_len}\n\
         how    ZeRO stage {stage}, {precision}, communication {overlap}\n",
        model.family(),
        format_count(plan.num_params as u64),
        mesh.world_size(),
        format_count(plan.step_tokens as u64),
    )
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
