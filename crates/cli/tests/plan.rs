//! `shardwise plan` as people and scripts meet it.

// Helpers of tests may unwrap as tests may.
#![allow(clippy::unwrap_used)]

use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

const RUN: &str = r#"{
"model": {"config": {"model_type": "llama", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408,
  "num_hidden_layers": 8, "num_attention_heads": 8, "max_position_embeddings": 256}},
"data": {"tokens": "not/at/hand.bin", "dtype": "u16", "seq_len": 256},
"steps": 10,
"threads_per_rank": 1,
"deepspeed": {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "bf16": {"enabled": true},
  "zero_optimization": {"stage": 2, "overlap_comm": false}, "optimizer": {"type": "AdamW", "params": {"lr": 0.001}}}
}"#;

fn plan(run: &str, args: &[&str]) -> Output {
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("run.json"), run).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_shardwise"));
    command.args(["plan", "run.json"]).args(args).current_dir(folder.path()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn shows_units_memory_and_traffic() {
    let output = plan(RUN, &["-n", "2"]);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(text(&output.stderr), "");
    let shown = text(&output.stdout);
    for line in [
        "model  llama, 34,087,424 parameters",
        "ranks  2 = pipeline 1 x data 2 x tensor 1",
        "step   4,096 tokens = 2 replicas x 2 micro-batches x 4 samples x 256",
        "how    ZeRO stage 2, bf16, communication in turn with computation",
        "model.embed_tokens                    1   4,194,304  4,194,304  2,097,152",
        "model.layers.0 .. model.layers.7      8   3,212,288  3,212,288  1,606,144",
        "lm_head                               1   4,194,816  4,194,816  2,097,408",
        "  parameters                65.0 MiB",
        "  master parameters         65.0 MiB",
        "  optimizer states           130 MiB",
        "  gradients                 65.0 MiB",
        // Half of everything: reduced for each micro-batch and gathered once, in bf16.
        "  51,131,136 elements, 97.5 MiB",
    ] {
        assert!(shown.lines().any(|shown| shown == line), "no line `{line}` in\n{shown}");
    }
}

#[test]
fn json_has_it_all() {
    let output = plan(RUN, &["-n", "4", "--json", "--set", "deepspeed.zero_optimization.stage=3"]);
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((json["stage"].as_u64(), json["num_params"].as_u64()), (Some(3), Some(34_087_424)));
    assert_eq!(json["units"].as_array().unwrap().len(), 10);
    assert_eq!(json["units"][1]["slots"][1]["param"]["name"], "model.layers.0.self_attn.q_proj.weight");
    let peaks: Vec<u64> = (0..4).map(|stage| json["memory"][stage]["peak"].as_u64().unwrap()).collect();
    assert!(peaks.is_sorted_by(|a, b| a > b), "{peaks:?}");
    let kinds = [
        "params",
        "master_params",
        "optimizer",
        "grads",
        "gathered",
        "reductions",
        "activations",
        "layer_grads",
        "temporaries",
        "staging",
        "runtime",
    ];
    let sum: u64 = kinds.iter().map(|kind| json["memory"][3][kind].as_u64().unwrap()).sum();
    assert_eq!(sum, peaks[3]);
}

#[test]
fn a_model_larger_than_any_host_is_planned_at_once() {
    let sizes = "{\"model_type\": \"llama\", \"vocab_size\": 128256, \"hidden_size\": 16384, \"intermediate_size\": 53248, \
                 \"num_hidden_layers\": 126, \"num_attention_heads\": 128, \"num_key_value_heads\": 8, \
                 \"max_position_embeddings\": 8192}";
    let set = format!("model.config={sizes}");
    let output = plan(RUN, &["-n", "1024", "--set", &set, "--set", "deepspeed.zero_optimization.stage=3"]);
    let shown = text(&output.stdout);
    assert!(shown.starts_with("model  llama, 405,853,388,800 parameters\n"), "{shown}");
}

#[test]
fn what_cannot_be_planned_is_bad_configuration() {
    for (set, expected) in [
        ("data.seq_len=512", "error: `data.seq_len` is `512`, the model has `256` positions\nhint: "),
        (
            "model.config.num_attention_heads=7",
            "error: `model.config`: `num_attention_heads` is `7`, expected a divisor of",
        ),
        ("steps=many", "error: --set steps=many: `steps` is `\"many\"`"),
        ("train.frozen=[\"*.bias\"]", "error: `*.bias` in `train.frozen` matches no parameter\nhint: "),
    ] {
        let output = plan(RUN, &["--set", set]);
        let shown = text(&output.stderr);
        assert!(shown.starts_with(expected), "{shown}");
        assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0));
    }
}
