//! What people type after `shardwise plan` about pipelines and about many ranks.

use std::path::PathBuf;

use clap::Args;
use shardwise_plan::Bytes;
use shardwise_plan::pipeline::{ScheduleKind, StageCut};

use super::quantity;

const TIMELINE: &str = "Pipeline schedules";
const SEARCH: &str = "Layouts of many ranks";

#[derive(Debug, Clone, Args)]
pub struct PipelineArgs {
    /// Draw the timeline of a pipeline schedule, the run file's unless named: gpipe, 1f1b, interleaved:CHUNKS or zero-bubble.
    /// With `--device-memory`: try this schedule only
    #[arg(long, value_name = "NAME", help_heading = TIMELINE)]
    pub schedule: Option<Option<ScheduleKind>>,
    /// Write the timeline as an SVG image too
    #[arg(long, value_name = "FILE", requires = "schedule", conflicts_with = "device_memory", help_heading = TIMELINE)]
    pub svg: Option<PathBuf>,
    /// Micro-batches of a step [default: what the global batch gives]
    #[arg(long, value_name = "N", requires = "schedule", conflicts_with = "device_memory", value_parser = count(), help_heading = TIMELINE)]
    pub micro_batches: Option<u64>,
    /// Pipeline stages [default: the run file's; with `--device-memory` all that divide the ranks]
    #[arg(long, value_name = "N", value_parser = count(), help_heading = TIMELINE)]
    pub pipeline: Option<u64>,
    /// Tensor-parallel ranks [default: the run file's; with `--device-memory` all that divide the ranks]
    #[arg(long, value_name = "N", value_parser = count(), help_heading = TIMELINE)]
    pub tensor: Option<u64>,
    /// What is spread evenly over the stages: time, parameters, uniform or pattern:LAYERS [default: the run file's]
    #[arg(long, value_name = "MEASURE", help_heading = TIMELINE)]
    pub cut: Option<StageCut>,
}

#[derive(Debug, Clone, Args)]
pub struct SearchArgs {
    /// List the layouts of all ranks that fit devices of this size, fastest first, as in `--device-memory 80GB`; for a run on GPUs
    /// say first whether it fits as it is
    #[arg(long, value_name = "BYTES", value_parser = quantity::bytes, help_heading = SEARCH)]
    pub device_memory: Option<Bytes>,
    /// Memory of each host, for a run on GPUs
    #[arg(long, value_name = "BYTES", value_parser = quantity::bytes, requires = "device_memory", help_heading = SEARCH)]
    pub host_memory: Option<Bytes>,
    /// For a run on GPUs, instead: the most layers of its model that fit, by what is offloaded
    #[arg(long, requires = "device_memory", conflicts_with_all = ["schedule", "pipeline", "tensor", "cut"], help_heading = SEARCH)]
    pub largest: bool,
    /// Memory of each device that is not for the plan to give
    #[arg(long, value_name = "BYTES", value_parser = quantity::bytes, default_value = "1GiB", requires = "device_memory", help_heading = SEARCH)]
    pub reserve: Bytes,
    /// Floating-point operations that a rank does in a second
    #[arg(long, value_name = "RATE", value_parser = quantity::flops, default_value = "400T", requires = "device_memory", help_heading = SEARCH)]
    pub flops: f64,
    /// Bytes that a rank sends to other hosts in a second
    #[arg(long, value_name = "RATE", value_parser = quantity::rate, default_value = "25GB/s", requires = "device_memory", help_heading = SEARCH)]
    pub link: f64,
    /// Bytes that a rank sends within its host in a second
    #[arg(long, value_name = "RATE", value_parser = quantity::rate, default_value = "300GB/s", requires = "device_memory", help_heading = SEARCH)]
    pub intra_link: f64,
    /// Neighbouring ranks that share a host
    #[arg(long, value_name = "N", value_parser = count(), default_value_t = 8, requires = "device_memory", help_heading = SEARCH)]
    pub ranks_per_host: u64,
    /// Let tensor-parallel ranks split the tokens between linear layers
    #[arg(long, requires = "device_memory", help_heading = SEARCH)]
    pub sequence_parallel: bool,
    /// Lines of each list; `--json` has all
    #[arg(long, value_name = "N", value_parser = count(), default_value_t = 20, requires = "device_memory", help_heading = SEARCH)]
    pub top: u64,
}

fn count() -> clap::builder::RangedU64ValueParser {
    clap::value_parser!(u64).range(1..=1 << 20)
}
