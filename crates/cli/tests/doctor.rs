//! `shardwise doctor` on a machine like this one.

// Helpers of tests may unwrap as tests may.
#![allow(clippy::unwrap_used)]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn doctor(worker: &Path, args: &[&str]) -> Output {
    doctor_with(worker, args, Path::new("/nowhere/libnccl.so.2"))
}

fn doctor_with(worker: &Path, args: &[&str], nccl: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shardwise"));
    command.arg("doctor").args(args).env("SHARDWISE_WORKER", worker);
    // Places where there is none, so that the answer does not depend on the machine.
    command.env("SHARDWISE_NVRTC", "/nowhere/libnvrtc.so").env("SHARDWISE_NCCL", nccl).output().unwrap()
}

fn script(folder: &Path, name: &str, text: &str) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    path
}

#[test]
fn it_says_what_there_is_and_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let worker = script(folder.path(), "worker", "#!/bin/sh\necho shardwise-worker 9.9.9\n");
    let output = doctor(&worker, &[]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{said}");
    for part in
        ["cores ", "GiB available", "shardwise-worker 9.9.9", "/nowhere/libnvrtc.so", "driver ", "used "]
    {
        assert!(said.contains(part), "`{part}` in:\n{said}");
    }
    for part in [
        "nccl    not usable: no usable NCCL",
        "`/nowhere/libnccl.so.2`: no such file",
        "collectives: through host memory",
    ] {
        assert!(said.contains(part), "`{part}` in:\n{said}");
    }
    let libtorch = format!("#!/bin/sh\necho {}\necho it sees GPUs\n", folder.path().display());
    let said = doctor(&script(folder.path(), "telling", &libtorch), &[]).stdout;
    let told = format!("torch   {}; it sees GPUs\n", folder.path().display());
    let said = String::from_utf8(said).unwrap();
    assert!(said.contains(&told), "{said}");
    let output = doctor(&worker, &["--json"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["cores"].as_u64().unwrap() > 0);
    assert!(report["worker"]["found"].as_str().unwrap().ends_with("shardwise-worker 9.9.9"));
    assert!(report["nvrtc"]["problem"].is_string() && report["gpus"]["gpus"].is_array());
    assert!(report["nccl"]["problem"].is_string());
    assert!(report["collectives"].as_str().unwrap().starts_with("through host memory"));
}

#[test]
fn nccl_is_told_by_place_and_version() {
    let folder = tempfile::tempdir().unwrap();
    let worker = script(folder.path(), "worker", "#!/bin/sh\necho shardwise-worker 9.9.9\n");
    let fake = shardwise_fake_gpu::FakeGpu::lazy();
    let said = String::from_utf8(doctor_with(&worker, &[], fake.path()).stdout).unwrap();
    assert!(said.contains(&format!("nccl    {}, version 2.28.9\n", fake.path().display())), "{said}");
    let used = "gpus    collectives: nccl where each rank has a GPU of its own, else through host memory\n";
    assert!(said.contains(used), "{said}");
    let report: serde_json::Value =
        serde_json::from_slice(&doctor_with(&worker, &["--json"], fake.path()).stdout).unwrap();
    assert!(report["nccl"]["found"].as_str().unwrap().ends_with(", version 2.28.9"), "{report}");
}

#[test]
fn a_worker_that_does_not_start_is_told_with_its_reason() {
    let folder = tempfile::tempdir().unwrap();
    let worker =
        script(folder.path(), "worker", "#!/bin/sh\necho libtorch_cpu.so: not found >&2\nexit 127\n");
    let output = doctor(&worker, &[]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("does not start: libtorch_cpu.so: not found"), "{said}");
    let output = doctor(Path::new("/nowhere/worker"), &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains("is no file"));
}
