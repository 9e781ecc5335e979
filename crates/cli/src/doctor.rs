//! `shardwise doctor`: what this machine has, and what a run would use of it.

use std::fmt::Write;
use std::path::Path;

use serde_json::{Value, json};
use shardwise_comm::nccl;
use shardwise_device::cuda::Inventory;
use shardwise_kernels::cuda::{Nvrtc, Search};

use crate::args::DoctorArgs;
use crate::{Exit, console, worker_binary};

/// A library or binary: where it is and which, or why it cannot be used.
type Found = Result<String, String>;

/// Looks around and prints what there is. What is missing is told, and no failure: a machine without GPUs trains too.
pub fn run(args: &DoctorArgs) -> anyhow::Result<Exit> {
    let worker = worker();
    let nvrtc = nvrtc();
    let nccl = nccl();
    let collectives = collectives(&nccl);
    let inventory = Inventory::take(None);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let memory = std::fs::read_to_string("/proc/meminfo").ok();
    let memory = memory.as_deref().and_then(available_bytes);
    if args.json {
        let told = |found: &Found| match found {
            Ok(text) => json!({ "found": text }),
            Err(problem) => json!({ "problem": problem }),
        };
        let report = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "cores": cores,
            "available_memory_bytes": memory,
            "worker": told(&worker),
            "nvrtc": told(&nvrtc),
            "nccl": told(&nccl),
            "gpus": serde_json::to_value(&inventory).unwrap_or(Value::Null),
            "collectives": collectives,
            "used": "cpu",
        });
        console::print_result(&format!("{report:#}\n"))?;
    } else {
        let text = |found: &Found| found.clone().unwrap_or_else(|problem| format!("not usable: {problem}"));
        let mut out = format!("shardwise {}\n", env!("CARGO_PKG_VERSION"));
        let memory = memory.map_or("unknown".to_owned(), |bytes| {
            format!("{:.1} GiB available", bytes as f64 / f64::from(1 << 30))
        });
        let _ = writeln!(out, "cores   {cores}\nmemory  {memory}\nworker  {}", text(&worker));
        let _ = write!(out, "nvrtc   {}\nnccl    {}\n{inventory}", text(&nvrtc), text(&nccl));
        let _ = writeln!(out, "gpus    collectives: {collectives}");
        out += "used    cores and memory: ranks of this version compute on the CPU\n";
        console::print_result(&out)?;
    }
    Ok(if worker.is_ok() { Exit::Done } else { Exit::Failed })
}

/// The binary of a rank, which is asked for its version: so it has been started, and has found libtorch.
fn worker() -> Found {
    let path = worker_binary::locate().map_err(|error| format!("{error:#}"))?;
    let output = std::process::Command::new(&path)
        .arg("--version")
        .output()
        .map_err(|error| format!("`{}` does not start: {error}", path.display()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.lines().next().unwrap_or_default().to_owned();
        return Err(format!("`{}` does not start: {said}", path.display()));
    }
    Ok(format!("{}, {}", path.display(), String::from_utf8_lossy(&output.stdout).trim()))
}

/// The compiler of kernels for GPUs.
fn nvrtc() -> Found {
    let given = std::env::var_os("SHARDWISE_NVRTC").map(Into::into);
    match Nvrtc::load(&Search { given, libtorch: None }) {
        Ok(nvrtc) => Ok(format!("{}, version {}", Path::new(nvrtc.place()).display(), nvrtc.version())),
        Err(error) => Err(error.to_string().replace('\n', " ")),
    }
}

/// What GPUs exchange through. Beside libtorch, as wheels lie, it is found if `LIBTORCH` says where that is.
fn nccl() -> Found {
    let path = |name| std::env::var_os(name).map(Into::into);
    match nccl::Library::load(&nccl::Search { given: path("SHARDWISE_NCCL"), libtorch: path("LIBTORCH") }) {
        Ok(nccl) => Ok(format!("{}, version {}", nccl.place(), nccl.version())),
        Err(error) => Err(error.to_string().replace('\n', " ")),
    }
}

/// How ranks on GPUs would exchange.
fn collectives(nccl: &Found) -> &'static str {
    match nccl {
        Ok(_) => "nccl where each rank has a GPU of its own, else through host memory",
        Err(_) => "through host memory; with NCCL, nccl where each rank has a GPU of its own",
    }
}

fn available_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_what_the_system_says() {
        let text = "MemTotal:       24000000 kB\nMemAvailable:   1024 kB\n";
        assert_eq!(available_bytes(text), Some(1 << 20));
        assert_eq!(available_bytes("MemTotal: 1 kB"), None);
        let own = std::fs::read_to_string("/proc/meminfo").unwrap();
        assert!(available_bytes(&own).unwrap() > 0);
    }
}
