//! Runs on GPUs: what is on the device and what on the host, whether it fits, and the largest model that would.

use anyhow::Context;
use serde_json::json;
use shardwise_monitor::format_count;
use shardwise_plan::memory::{GPU_RESERVED, MemoryPlan};
use shardwise_plan::run::{Excess, Limits, RunPlan, RunShape};
use shardwise_plan::{Axis, Bytes, Cuda, Device, Offload, OffloadTo, ZeroStage};

use super::args::SearchArgs;
use super::table::table;
use crate::console::UsageError;

/// The memory that a run on GPUs is asked to fit, if it is one.
///
/// # Errors
/// Questions about GPUs and hosts, where the run has no GPUs.
pub fn limits(plan: &RunPlan, args: &SearchArgs) -> Result<Option<Limits>, UsageError> {
    let asked = [("--largest", args.largest), ("--host-memory", args.host_memory.is_some())];
    match (plan.shape.device, args.device_memory) {
        (Device::Cuda(_), Some(device)) => Ok(Some(Limits {
            device,
            reserved: args.reserve,
            host: args.host_memory,
            ranks_per_host: plan.shape.mesh.world_size().min(args.ranks_per_host as usize),
        })),
        (Device::Cpu, _) => match asked.into_iter().find(|(_, asked)| *asked) {
            Some((flag, _)) => {
                let message =
                    format!("`{flag}` is about memory beside GPUs, and the run's `device` is `cpu`");
                Err(UsageError::new(message, "add `--set device=cuda`"))
            }
            None => Ok(None),
        },
        (_, None) => Ok(None),
    }
}

/// What `cuda.memory_limit` of the run file leaves to a rank.
pub fn limit_of_run(plan: &RunPlan, memory_limit: Option<u64>) -> Option<Limits> {
    let Device::Cuda(_) = plan.shape.device else { return None };
    let device = Bytes(memory_limit?);
    Some(Limits { device, reserved: GPU_RESERVED, host: None, ranks_per_host: 1 })
}

/// Whether the run fits.
pub fn verdict(plan: &RunPlan, limits: &Limits) -> String {
    let memory = plan.memory();
    let excess = plan.excess(limits);
    let mut text = format!(
        "does it fit? ZeRO stage {}, offloaded: {}\n  device  {} of {}: {}\n",
        memory.stage,
        memory.offload().describe(),
        limits.on_device(memory),
        limits.device,
        judged(excess.device, largest_kind(memory, |(kind, device, _)| (kind, device))),
    );
    if let Some(host) = limits.host {
        let ranks = match limits.ranks_per_host {
            1 => String::new(),
            n => format!(" for {n} ranks"),
        };
        let judged = judged(excess.host, largest_kind(memory, |(kind, _, host)| (kind, host)));
        text += &format!("  host    {} of {host}{ranks}: {judged}\n", limits.on_host(memory));
    }
    text
}

fn judged(excess: Bytes, (kind, bytes): (&str, Bytes)) -> String {
    match excess {
        Bytes(0) => "fits".to_owned(),
        excess => format!("{excess} over; {kind}: {bytes}"),
    }
}

type Kind = (&'static str, Bytes, Bytes);

fn largest_kind(memory: &MemoryPlan, on: impl Fn(Kind) -> (&'static str, Bytes)) -> (&'static str, Bytes) {
    memory.kinds().into_iter().map(on).max_by_key(|&(_, bytes)| bytes).unwrap_or_default()
}

/// The run in every stage of ZeRO with whatever can be offloaded, on the fullest ranks.
pub fn choices(plan: &RunPlan, limits: Option<&Limits>) -> String {
    let mut rows = vec![["  stage", "offloaded", "device", "host"].map(str::to_owned).to_vec()];
    for index in 0..plan.stages[0].choices.len() {
        let all = || plan.stages.iter().map(|stage| &stage.choices[index]);
        let most = |bytes: fn(&MemoryPlan) -> Bytes| all().map(bytes).max().unwrap_or_default();
        let one = &plan.stages[0].choices[index];
        let mut row = vec![format!("  {}", one.stage), one.offload().describe().to_owned()];
        let device =
            limits.map(|limits| all().map(|memory| limits.on_device(memory)).max().unwrap_or_default());
        row.push(device.unwrap_or_else(|| most(|memory| memory.peak)).to_string());
        row.push(most(MemoryPlan::host_peak).to_string());
        if let Some(limits) = limits {
            let excess = all().map(|memory| limits.excess(memory)).fold(Excess::default(), Excess::max);
            row.push(over(excess));
        }
        rows.push(row);
    }
    format!("each rank at its fullest\n{}", table(&rows, 2))
}

fn over(Excess { device, host }: Excess) -> String {
    let parts = [("device", device), ("host", host)].into_iter().filter(|(_, bytes)| *bytes > Bytes(0));
    let parts: Vec<_> = parts.map(|(place, bytes)| format!("{place} {bytes} over")).collect();
    if parts.is_empty() { "fits".to_owned() } else { parts.join(", ") }
}

/// The same for scripts.
pub fn verdict_json(plan: &RunPlan, limits: &Limits) -> serde_json::Value {
    json!({
        "limits": limits,
        "memory": plan.memory(),
        "choices": plan.fullest().choices,
        "excess": plan.excess(limits),
        "fits": plan.fits(limits),
    })
}

/// The largest models that fit, by what is offloaded.
pub struct Largest {
    limits: Limits,
    family: &'static str,
    num_ranks: usize,
    found: Vec<(Offload, Option<RunPlan>)>,
}

impl Largest {
    /// Finds the most blocks of the run's model that fit.
    ///
    /// # Errors
    /// A run that is none with fewer blocks.
    pub fn new(plan: &RunPlan, limits: Limits) -> anyhow::Result<Self> {
        let shape = &plan.shape;
        let Device::Cuda(cuda) = shape.device else { anyhow::bail!("the run is not on GPUs") };
        let num_replicas = shape.mesh.degree(Axis::Data);
        let find = |offload: Offload| {
            // The least that the choice asks of the stage.
            let least = match offload {
                Offload { params: OffloadTo::Host, .. } => ZeroStage::Three,
                Offload { optimizer: OffloadTo::Host, .. } if num_replicas > 1 => ZeroStage::One,
                _ => ZeroStage::Zero,
            };
            let device = Device::Cuda(Cuda { offload, ..cuda });
            let largest =
                RunShape { device, stage: shape.stage.max(least), ..shape.clone() }.largest(&limits);
            let context = "the model cannot be planned with another number of layers";
            Ok::<_, anyhow::Error>((offload, largest.context(context)?))
        };
        let found = [Offload::NOTHING, Offload::OPTIMIZER, Offload::ALL].into_iter().map(find);
        let (family, num_ranks) = (shape.model.family(), shape.mesh.world_size());
        Ok(Largest { limits, family, num_ranks, found: found.collect::<anyhow::Result<_>>()? })
    }

    /// As people read it.
    pub fn describe(&self) -> String {
        let Limits { device, reserved, host, ranks_per_host } = self.limits;
        let host = host.map_or_else(|| "any".to_owned(), |host| host.to_string());
        let ranks = match self.num_ranks {
            1 => "1 rank".to_owned(),
            n => format!("{n} ranks, {ranks_per_host} on a host"),
        };
        let mut text = format!(
            "the most layers of this {} that fit\n  {ranks}; device memory {device}, of which {reserved} reserved; host memory {host}\n\n",
            self.family,
        );
        let headings =
            ["  offloaded", "ZeRO", "layers", "parameters", "device", "host", "host B/param", "times"];
        let mut rows = vec![headings.map(str::to_owned).to_vec()];
        let first = self.found.first().and_then(|(_, plan)| plan.as_ref()).map(|plan| plan.num_params);
        for (offload, plan) in &self.found {
            let mut row = vec![format!("  {}", offload.describe())];
            row.extend(match plan {
                None => vec!["-".to_owned(), "none fits".to_owned()],
                Some(plan) => vec![
                    plan.shape.stage.to_string(),
                    plan.shape.model.num_blocks().to_string(),
                    format_count(plan.num_params as u64),
                    self.limits.on_device(plan.memory()).to_string(),
                    self.limits.on_host(plan.memory()).to_string(),
                    format!("{:.1}", self.host_bytes_per_param(plan)),
                    first.map_or_else(
                        || "-".to_owned(),
                        |first| format!("{:.1}", plan.num_params as f64 / first as f64),
                    ),
                ],
            });
            rows.push(row);
        }
        text += &table(&rows, 1);
        text
    }

    /// Bytes of a host, process and buffers included, for each parameter of the model.
    fn host_bytes_per_param(&self, plan: &RunPlan) -> f64 {
        self.limits.on_host(plan.memory()).0 as f64 / plan.num_params.max(1) as f64
    }

    /// The same for scripts.
    pub fn json(&self) -> serde_json::Value {
        let one = |(offload, plan): &(Offload, Option<RunPlan>)| {
            let plan = plan.as_ref().map(|plan| {
                json!({
                    "stage": plan.shape.stage,
                    "num_layers": plan.shape.model.num_blocks(),
                    "num_params": plan.num_params,
                    "memory": plan.memory(),
                    "host_bytes_per_param": self.host_bytes_per_param(plan),
                })
            });
            json!({ "offload": offload, "largest": plan })
        };
        json!({ "limits": self.limits, "largest": self.found.iter().map(one).collect::<Vec<_>>() })
    }
}
