//! What `shardwise plan` predicts, against what ranks then need and send.
//!
//! Two cases are those that the project is compared on: `small` (34 M parameters), where activations and libtorch
//! weigh as much as model state, and `medium` (188 M), where state does. On meshes each rank is held to its own plan, for a model
//! in between.

// Helpers of tests may unwrap as tests may.
#![allow(clippy::unwrap_used)]

use std::fmt::Write as _;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use shardwise_config::RunConfig;
use shardwise_engine::ops::multiplies;
use shardwise_plan::run::RunPlan;
use shardwise_torch::Kind;
use tempfile::TempDir;

/// Relative error that a prediction may have.
const TOLERANCE: f64 = 0.15;
/// On a mesh, of every rank.
const MESH_TOLERANCE: f64 = 0.10;
const NUM_RANKS: usize = 2;
/// Everything has been touched after the first step; the second shows that it is enough.
const NUM_STEPS: usize = 2;

/// vocabulary, hidden, layers, heads, MLP, sequence, micro-batch
type Size = [usize; 7];
const SMALL: Size = [8192, 512, 8, 8, 1408, 256, 4];
const MEDIUM: Size = [16384, 1024, 12, 16, 2816, 256, 1];
const BETWEEN: Size = [16384, 512, 8, 8, 1408, 256, 4];

/// What varies between runs of a size.
#[derive(Debug, Clone, Copy)]
struct Variant {
    stage: u8,
    bf16: bool,
    grad_accum_steps: usize,
    overlap: bool,
}

impl Variant {
    const PLAIN: Variant = Variant { stage: 2, bf16: true, grad_accum_steps: 1, overlap: false };
}

fn run_file([vocab, hidden, layers, heads, mlp, seq_len, micro_batch]: Size, variant: Variant) -> Value {
    json!({
        "model": {"config": {"model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers,
            "num_attention_heads": heads, "intermediate_size": mlp, "max_position_embeddings": seq_len}},
        "data": {"tokens": "tokens.bin", "dtype": "u16", "seq_len": seq_len, "order": "sequential"},
        "steps": NUM_STEPS,
        "threads_per_rank": 1,
        "deepspeed": {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": variant.grad_accum_steps,
            // A plan does not count copies in fp32, which a processor without bf16 multiplies.
            "bf16": {"enabled": variant.bf16 && multiplies(Kind::BFloat16)},
            "zero_optimization": {"stage": variant.stage, "overlap_comm": variant.overlap},
            "optimizer": {"type": "AdamW", "params": {"lr": 3e-4}},
        },
    })
}

/// Plans and runs each variant; says of all of them how far the prediction was off, and fails if one is off too far.
fn compare(size: Size, variants: &[Variant]) {
    let mut table = String::new();
    let mut worst: f64 = 0.0;
    for &variant in variants {
        let folder = TempDir::new().unwrap();
        let run = folder.path().join("run.json");
        std::fs::write(&run, run_file(size, variant).to_string()).unwrap();
        write_tokens(&folder.path().join("tokens.bin"), size);
        let config = RunConfig::load(&run, &[], NUM_RANKS).unwrap().config;
        let plan = config.plan(std::thread::available_parallelism().unwrap().get()).unwrap();

        train(&run, &folder.path().join("out"));
        let metrics = std::fs::read_to_string(folder.path().join("out/metrics.jsonl")).unwrap();
        let last: Value = serde_json::from_str(metrics.lines().last().unwrap()).unwrap();
        let measured = last["peak_rss_mb"].as_f64().unwrap();
        let error = plan.memory().peak.mib() / measured - 1.0;
        worst = worst.max(error.abs());
        let predicted = plan.memory().peak.mib();
        writeln!(
            table,
            "{variant:?}: predicted {predicted:.0} MiB, measured {measured:.0} ({:+.1}%)",
            100.0 * error
        )
        .unwrap();
        check_traffic(&plan, last["comm_bytes"].as_u64().unwrap());
    }
    println!("{table}");
    assert!(worst <= TOLERANCE, "off by more than {TOLERANCE}:\n{table}");
}

/// Sent bytes are exact, up to the few numbers that ranks tell each other for the norm and the loss.
fn check_traffic(plan: &RunPlan, measured: u64) {
    let predicted = plan.busiest().0;
    assert!(
        (predicted..predicted + 1024).contains(&measured),
        "{measured} sent, {predicted} planned: {:?}",
        plan.shape
    );
}

/// Random tokens, enough for every step.
fn write_tokens(path: &Path, size: Size) {
    let mut state = 1u64;
    let mut token = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % size[0] as u64) as u16
    };
    let bytes: Vec<u8> = (0..1 << 16).flat_map(|_| token().to_le_bytes()).collect();
    std::fs::write(path, bytes).unwrap();
}

/// Runs the ranks as any launcher does; returns the most that each had resident, in MiB.
fn train(run: &Path, out: &Path) -> Vec<f64> {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut ranks: Vec<_> = (0..NUM_RANKS)
        .map(|rank| {
            Command::new(env!("CARGO_BIN_EXE_shardwise-worker"))
                .arg(run)
                .arg("--out")
                .arg(out)
                .env("RANK", rank.to_string())
                .env("LOCAL_RANK", rank.to_string())
                .env("WORLD_SIZE", NUM_RANKS.to_string())
                .env("MASTER_ADDR", "127.0.0.1")
                .env("MASTER_PORT", port.to_string())
                .env("OMP_NUM_THREADS", "1")
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    let mut peaks = vec![0.0; NUM_RANKS];
    while ranks.iter_mut().any(|rank| rank.try_wait().unwrap().is_none()) {
        for (peak, rank) in peaks.iter_mut().zip(&ranks) {
            *peak = resident_peak(rank).unwrap_or(*peak);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    for rank in ranks {
        let output = rank.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    peaks
}

/// The most that a process has had resident so far, in MiB; nothing once it is gone.
fn resident_peak(rank: &Child) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", rank.id())).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<f64>().unwrap() / 1024.0)
}

/// Plans and runs on a mesh; holds each rank to the plan of its pipeline stage.
fn compare_on_mesh(parallel: Value, size: Size, variant: Variant) {
    let folder = TempDir::new().unwrap();
    let run = folder.path().join("run.json");
    let mut file = run_file(size, variant);
    file["parallel"] = parallel.clone();
    std::fs::write(&run, file.to_string()).unwrap();
    write_tokens(&folder.path().join("tokens.bin"), size);
    let config = RunConfig::load(&run, &[], NUM_RANKS).unwrap().config;
    let plan = config.plan(std::thread::available_parallelism().unwrap().get()).unwrap();
    let peaks = train(&run, &folder.path().join("out"));
    for (rank, measured) in peaks.into_iter().enumerate() {
        let stage = plan.stages.iter().find(|stage| stage.ranks.contains(&rank)).unwrap();
        let memory = stage.memory_in(plan.shape.stage);
        let error = memory.peak.mib() / measured - 1.0;
        let predicted = memory.peak.mib();
        let said = format!(
            "{parallel}, rank {rank}: predicted {predicted:.0} MiB, measured {measured:.0} ({:+.1}%)",
            100.0 * error
        );
        println!("{said}\n{memory}");
        assert!(error.abs() <= MESH_TOLERANCE, "{said}\n{memory}");
    }
    let metrics = std::fs::read_to_string(folder.path().join("out/metrics.jsonl")).unwrap();
    let last: Value = serde_json::from_str(metrics.lines().last().unwrap()).unwrap();
    check_traffic(&plan, last["comm_bytes"].as_u64().unwrap());
}

#[test]
fn small_is_predicted_within_15_percent() {
    compare(
        SMALL,
        &[
            Variant { stage: 0, ..Variant::PLAIN },
            Variant { stage: 1, grad_accum_steps: 2, ..Variant::PLAIN },
            Variant::PLAIN,
            Variant { stage: 3, ..Variant::PLAIN },
            Variant { stage: 3, bf16: false, grad_accum_steps: 2, ..Variant::PLAIN },
            Variant { overlap: true, ..Variant::PLAIN },
            Variant { stage: 3, grad_accum_steps: 2, overlap: true, ..Variant::PLAIN },
        ],
    );
}

#[test]
fn medium_is_predicted_within_15_percent() {
    compare(MEDIUM, &[Variant::PLAIN]);
}

#[test]
fn tensor_parallel_ranks_are_predicted_within_10_percent() {
    compare_on_mesh(json!({ "tensor": 2 }), BETWEEN, Variant::PLAIN);
    compare_on_mesh(json!({ "tensor": 2, "sequence": true }), BETWEEN, Variant::PLAIN);
}

#[test]
fn pipeline_stages_are_predicted_within_10_percent() {
    let variant = Variant { grad_accum_steps: 4, ..Variant::PLAIN };
    let [vocab, hidden, layers, heads, mlp, seq_len, _] = BETWEEN;
    let size = [vocab, hidden, layers, heads, mlp, seq_len, 1];
    compare_on_mesh(json!({ "pipeline": 2 }), size, variant);
    compare_on_mesh(json!({ "pipeline": 2, "schedule": "zero-bubble" }), size, variant);
}
