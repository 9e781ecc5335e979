//! `shardwise plan --device-memory`: which layouts of all ranks fit, fastest first.

use std::collections::HashSet;

use serde_json::json;
use shardwise_config::{CommOverlap, RunConfig};
use shardwise_monitor::format_count;
use shardwise_plan::memory::StateWidths;
use shardwise_plan::pipeline::ScheduleKind;
use shardwise_plan::planner::{Cluster, Estimate, Job, Layout, Recompute, Ruled, Search, search};
use shardwise_plan::run::RunPlan;
use shardwise_plan::zoo::SequenceParallel;
use shardwise_plan::{Axis, Bytes, Overlap};

use super::args::{PipelineArgs, SearchArgs};
use super::quantity::short;
use super::table::table;

/// What was asked and what was found.
pub struct Answer {
    job: Job,
    cluster: Cluster,
    num_params: usize,
    found: Search,
}

impl Answer {
    /// Searches the layouts of a run on devices of `device_memory`.
    pub fn new(
        config: &RunConfig,
        plan: &RunPlan,
        device_memory: Bytes,
        pipeline: &PipelineArgs,
        args: &SearchArgs,
    ) -> Self {
        let shape = &plan.shape;
        let degree = |given: Option<u64>| given.map(|degree| degree as usize);
        let every = || {
            let interleaved = [2, 4].map(|num_chunks| ScheduleKind::Interleaved { num_chunks });
            [ScheduleKind::OneForwardOneBackward, ScheduleKind::ZeroBubble]
                .into_iter()
                .chain(interleaved)
                .collect()
        };
        let job = Job {
            model: shape.model.clone(),
            seq_len: shape.seq_len,
            global_batch: config.batch.global_batch_size,
            micro_batch: shape.micro_batch,
            compute_bytes: shape.compute_bytes,
            device: shape.device,
            grouped_queries: shape.grouped_queries(),
            head_chunks: shape.head_chunks(),
            widths: StateWidths::new(shape.compute_bytes, shape.optimizer_bytes, shape.grad_bytes),
            frozen: shape.frozen.clone(),
            // The cores of this host say nothing of the cluster's devices, which copy beside computing.
            overlap: match config.zero.overlap_comm {
                CommOverlap::Blocking => Overlap::Inline,
                CommOverlap::Overlapped | CommOverlap::Automatic => Overlap::SideThread,
            },
            sequence: if args.sequence_parallel { SequenceParallel::On } else { shape.sequence },
            cut: pipeline.cut.clone().unwrap_or_else(|| shape.stage_cut.clone()),
            schedules: pipeline
                .schedule
                .map_or_else(every, |named| vec![named.unwrap_or(config.parallel.schedule)]),
            pipeline: degree(pipeline.pipeline),
            tensor: degree(pipeline.tensor),
            stage: None,
        };
        let cluster = Cluster {
            num_ranks: shape.mesh.world_size(),
            ranks_per_host: args.ranks_per_host as usize,
            device_memory,
            reserved: args.reserve,
            flops: args.flops,
            link: args.link,
            host_link: args.intra_link,
        };
        let found = search(&job, &cluster);
        Answer { job, cluster, num_params: plan.num_params, found }
    }

    /// All layouts, for scripts.
    pub fn json(&self) -> serde_json::Value {
        json!({
            "num_params": self.num_params,
            "global_batch": self.job.global_batch,
            "seq_len": self.job.seq_len,
            "cluster": self.cluster,
            "feasible": self.found.feasible,
            "over": self.found.over,
            "ruled_out": self.found.ruled_out,
        })
    }

    /// The best of each list, as people read them.
    pub fn describe(&self, top: usize) -> String {
        let Search { feasible, over, ruled_out } = &self.found;
        let mut text = self.headlines();
        text += &match (feasible.len(), feasible.len() + over.len()) {
            (0, all) => format!("none of {} layouts fits\n", format_count(all as u64)),
            (fit, all) => format!(
                "{} of {} layouts fit, fastest first\n",
                format_count(fit as u64),
                format_count(all as u64)
            ),
        };
        if !feasible.is_empty() {
            let shown = &feasible[..top.min(feasible.len())];
            let unit = Unit::for_sizes_to(shown.iter().map(|estimate| estimate.memory.total()).max());
            let rows = shown.iter().map(|estimate| row(estimate, unit));
            let rows: Vec<_> = headings(unit).into_iter().chain(rows).collect();
            text += &table(&rows, 1);
            text += &more(feasible.len(), top);
        }
        // One line for a mesh says enough: its layout that is nearest to fitting, if none fits.
        let mut seen: HashSet<_> = feasible.iter().map(|estimate| estimate.layout.mesh).collect();
        let nearest: Vec<_> = over.iter().filter(|estimate| seen.insert(estimate.layout.mesh)).collect();
        if !nearest.is_empty() {
            text += "\nmeshes that do not fit, with what is missing in their smallest layout\n";
            let rows: Vec<_> = nearest.iter().take(top).map(|estimate| over_row(estimate)).collect();
            text += &table(&rows, 2);
            text += &more(nearest.len(), top);
        }
        if !ruled_out.is_empty() {
            text += "\nruled out\n";
            ruled_lines(ruled_out).iter().for_each(|line| text += &format!("  {line}\n"));
        }
        text
    }

    fn headlines(&self) -> String {
        let Cluster { num_ranks, ranks_per_host, device_memory, reserved, flops, link, host_link } =
            self.cluster;
        format!(
            "model  {}, {} parameters\n\
             step   {} tokens = {} samples x {}\n\
             ranks  {num_ranks}, {ranks_per_host} on a host, {device_memory} each, of which {reserved} reserved\n\
             rates  {}flop/s, {}B/s between hosts, {}B/s within\n\n",
            self.job.model.family(),
            format_count(self.num_params as u64),
            format_count((self.job.global_batch * self.job.seq_len) as u64),
            format_count(self.job.global_batch as u64),
            self.job.seq_len,
            short(flops),
            short(link),
            short(host_link),
        )
    }
}

/// What a column of bytes counts in.
#[derive(Debug, Clone, Copy)]
enum Unit {
    Mib,
    Gib,
}

impl Unit {
    /// The unit in which the largest of some sizes has few digits.
    fn for_sizes_to(largest: Option<Bytes>) -> Self {
        if largest.is_some_and(|bytes| bytes.mib() < 8192.0) { Unit::Mib } else { Unit::Gib }
    }

    fn name(self) -> &'static str {
        match self {
            Unit::Mib => "MiB:",
            Unit::Gib => "GiB:",
        }
    }

    fn count(self, bytes: Bytes) -> String {
        match self {
            Unit::Mib => format!("{:.0}", bytes.mib()),
            Unit::Gib => format!("{:.1}", bytes.mib() / 1024.0),
        }
    }
}

fn headings(unit: Unit) -> [Vec<String>; 2] {
    let axes = ["pipe", "data", "tensor"];
    let layout = ["schedule", axes[0], axes[1], axes[2], "ZeRO", "batch", "recompute"];
    let memory = ["params", "grads", "optim", "activ", "buffers", "total"];
    let above = |above: &str, names: &[&str]| {
        let blanks = std::iter::repeat_n(String::new(), names.len() - 1);
        std::iter::once(above.to_owned()).chain(blanks).collect::<Vec<_>>()
    };
    let first =
        [above("", &layout), above(unit.name(), &memory), above("sent:", &axes), above("", &["", ""])];
    let second = layout.into_iter().chain(memory).chain(axes).chain(["bubble", "step"]);
    [first.concat(), second.map(str::to_owned).collect()]
}

fn row(estimate: &Estimate, unit: Unit) -> Vec<String> {
    let Estimate { layout, memory, traffic, bubble, step_s, .. } = estimate;
    let Layout { mesh, stage, schedule, micro_batch, num_microbatches, recompute } = layout;
    let mut row = vec![schedule.map_or("-".to_owned(), |schedule| schedule.to_string())];
    row.extend([Axis::Pipeline, Axis::Data, Axis::Tensor].map(|axis| mesh.degree(axis).to_string()));
    row.extend([stage.to_string(), format!("{num_microbatches}x{micro_batch}"), name(*recompute).to_owned()]);
    row.extend(memory.kinds().map(|(_, bytes)| unit.count(bytes)));
    row.push(unit.count(memory.total()));
    row.extend([traffic.pipeline, traffic.data, traffic.tensor].map(|bytes| unit.count(bytes)));
    row.extend([format!("{:.1}%", 100.0 * bubble), format!("{} s", significant(*step_s))]);
    row
}

/// A number with three digits at least.
fn significant(value: f64) -> String {
    let digits = if value >= 100.0 { 0 } else { 2 - value.log10().floor().clamp(-7.0, 1.0) as i32 };
    format!("{value:.w$}", w = digits.max(0) as usize)
}

fn over_row(estimate: &Estimate) -> Vec<String> {
    let Layout { mesh, stage, micro_batch, recompute, .. } = estimate.layout;
    let [pipeline, data, tensor] = [Axis::Pipeline, Axis::Data, Axis::Tensor].map(|axis| mesh.degree(axis));
    let (kind, bytes) = estimate.memory.largest();
    let recompute = if recompute == Recompute::Layers { ", recompute" } else { "" };
    vec![
        format!("  pipeline {pipeline} x data {data} x tensor {tensor}"),
        format!("ZeRO {stage}, micro-batch {micro_batch}{recompute}"),
        format!("{} over", estimate.excess),
        format!("{kind} {bytes} of {}", estimate.memory.total()),
    ]
}

/// One line for each reason: degrees that fail alike are counted.
fn ruled_lines(all: &[Ruled]) -> Vec<String> {
    let mut alike: Vec<(String, Vec<&Ruled>)> = Vec::new();
    for ruled in all {
        let axes = [ruled.pipeline, ruled.data, ruled.tensor].map(|degree| degree.is_some());
        let words = ruled.reason.replace(|c: char| !c.is_alphabetic(), "");
        let key = format!("{axes:?} {words}");
        match alike.iter_mut().find(|(other, _)| *other == key) {
            Some((_, those)) => those.push(ruled),
            None => alike.push((key, vec![ruled])),
        }
    }
    let line = |those: &[&Ruled]| {
        let Ruled { pipeline, data, tensor, .. } = those[0];
        let degrees = [("pipeline", pipeline), ("data", data), ("tensor", tensor)];
        let named =
            degrees.into_iter().filter_map(|(axis, degree)| degree.map(|degree| format!("{axis} {degree}")));
        let others = if those.len() > 1 { format!(" and {} more", those.len() - 1) } else { String::new() };
        format!("{}{others}: {}", named.collect::<Vec<_>>().join(" x "), those[0].reason)
    };
    alike.iter().map(|(_, those)| line(those)).collect()
}

fn name(recompute: Recompute) -> &'static str {
    match recompute {
        Recompute::Off => "off",
        Recompute::Layers => "layers",
    }
}

fn more(all: usize, shown: usize) -> String {
    match all.saturating_sub(shown) {
        0 => String::new(),
        left => format!("  and {} more: `--top N`, or `--json` for all\n", format_count(left as u64)),
    }
}
