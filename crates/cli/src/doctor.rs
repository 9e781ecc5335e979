//! `shardwise doctor`: what this machine has, and what a run would use of it.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

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
    let (folder, libtorch) = libtorch();
    let nvrtc = nvrtc(folder.clone());
    let nccl = nccl(folder);
    let collectives = collectives(&nccl);
    let inventory = Inventory::take(None);
    let num_gpus = inventory.gpus.iter().filter(|gpu| gpu.problem.is_none()).count();
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
            "libtorch": told(&libtorch),
            "nvrtc": told(&nvrtc),
            "nccl": told(&nccl),
            "gpus": serde_json::to_value(&inventory).unwrap_or(Value::Null),
            "collectives": collectives,
            "used": { "cpu": { "cores": cores }, "cuda": { "gpus": num_gpus } },
        });
        console::print_result(&format!("{report:#}\n"))?;
    } else {
        let text = |found: &Found| found.clone().unwrap_or_else(|problem| format!("not usable: {problem}"));
        let mut out = format!("shardwise {}\n", env!("CARGO_PKG_VERSION"));
        let memory = memory.map_or("unknown".to_owned(), |bytes| {
            format!("{:.1} GiB available", bytes as f64 / f64::from(1 << 30))
        });
        let _ = writeln!(out, "cores   {cores}\nmemory  {memory}\nworker  {}", text(&worker));
        let _ = writeln!(out, "torch   {}", text(&libtorch));
        let _ = write!(out, "nvrtc   {}\nnccl    {}\n{inventory}", text(&nvrtc), text(&nccl));
        let _ = writeln!(out, "gpus    collectives: {collectives}");
        let gpus = match num_gpus {
            0 => "no GPU, so it is refused".to_owned(),
            1 => "1 GPU, by one rank; by more with `cuda.share`".to_owned(),
            n => format!("{n} GPUs, one by each rank"),
        };
        let _ = writeln!(out, "used    `device = \"cpu\"`: cores and memory; `device = \"cuda\"`: {gpus}");
        console::print_result(&out)?;
    }
    Ok(if worker.is_ok() { Exit::Done } else { Exit::Failed })
}

/// The binary of a rank, which is asked for its version: so it has been started, and has found libtorch.
fn worker() -> Found {
    let path = worker_binary::locate().map_err(|error| format!("{error:#}"))?;
    Ok(format!("{}, {}", path.display(), ask(&path, "--version")?.trim()))
}

/// What the worker prints when it is asked for `what`.
fn ask(path: &Path, what: &str) -> Result<String, String> {
    let output = Command::new(path)
        .arg(what)
        .output()
        .map_err(|error| format!("`{}` does not start: {error}", path.display()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.lines().next().unwrap_or_default().to_owned();
        return Err(format!("`{}` does not start: {said}", path.display()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The folder of the libtorch that the worker has found, and what it says of CUDA there.
fn libtorch() -> (Option<PathBuf>, Found) {
    let said = worker_binary::locate().map_err(|error| format!("{error:#}"));
    let said = said.and_then(|path| ask(&path, "libtorch"));
    let mut lines = said.as_deref().unwrap_or_default().lines();
    let folder = lines.next().map(PathBuf::from).filter(|folder| folder.is_dir());
    let cuda = lines.next().unwrap_or("it does not say whether it has CUDA").to_owned();
    let found = match (&folder, said) {
        (Some(folder), _) => Ok(format!("{}; {cuda}", folder.display())),
        (None, Ok(_)) => Err("the worker does not say where it is".to_owned()),
        (None, Err(problem)) => Err(problem),
    };
    (folder, found)
}

/// The compiler of kernels for GPUs.
fn nvrtc(libtorch: Option<PathBuf>) -> Found {
    let given = std::env::var_os("SHARDWISE_NVRTC").map(Into::into);
    match Nvrtc::load(&Search { given, libtorch }) {
        Ok(nvrtc) => Ok(format!("{}, version {}", Path::new(nvrtc.place()).display(), nvrtc.version())),
        Err(error) => Err(error.to_string().replace('\n', " ")),
    }
}

/// What GPUs exchange through.
fn nccl(libtorch: Option<PathBuf>) -> Found {
    let given = std::env::var_os("SHARDWISE_NCCL").map(Into::into);
    match nccl::Library::load(&nccl::Search { given, libtorch }) {
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
