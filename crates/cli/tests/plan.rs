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
    assert_eq!(json["stages"][0]["units"].as_array().unwrap().len(), 10);
    assert_eq!(
        json["stages"][0]["units"][1]["slots"][1]["param"]["name"],
        "model.layers.0.self_attn.q_proj.weight"
    );
    let peaks: Vec<u64> =
        (0..4).map(|stage| json["stages"][0]["memory"][stage]["peak"].as_u64().unwrap()).collect();
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
        "messages",
        "staging",
        "runtime",
    ];
    let sum: u64 = kinds.iter().map(|kind| json["stages"][0]["memory"][3][kind].as_u64().unwrap()).sum();
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

/// The value after a word at the start of a line.
fn after<'a>(shown: &'a str, word: &str) -> &'a str {
    let line = shown.lines().find_map(|line| line.strip_prefix(word));
    line.unwrap_or_else(|| panic!("no `{word}` in\n{shown}")).trim()
}

#[test]
fn a_schedule_is_drawn_as_text_and_as_an_image() {
    let folder = TempDir::new().unwrap();
    let image = folder.path().join("timeline.svg");
    let output = plan(RUN, &["-n", "4", "--pipeline", "2", "--schedule", "--svg", image.to_str().unwrap()]);
    assert_eq!(text(&output.stderr), "");
    let shown = text(&output.stdout);
    // 4 samples x 2 micro-batches x 4 ranks, over 2 replicas.
    assert_eq!(after(&shown, "schedule"), "1f1b, 2 stages, 4 micro-batches");
    assert!(after(&shown, "bubble").starts_with("20.0% "), "{shown}");
    for line in [
        "  pipeline  [0 2] [1 3]",
        "  data      [0 1] [2 3]",
        "0      model.embed_tokens .. model.layers.3  17,043,456       43.2%      2",
        "1      model.layers.4 .. lm_head             17,043,968       56.8%      1",
        "stage 0   F0 F1 .  .  B0 -- F2 B1 -- F3 B2 -- .  B3 --",
        "stage 1   .  F0 B0 -- F1 B1 -- F2 B2 -- F3 B3 -- .  .",
    ] {
        assert!(shown.lines().any(|shown| shown == line), "no line `{line}` in\n{shown}");
    }
    let drawn = std::fs::read_to_string(image).unwrap();
    assert!(drawn.starts_with("<svg ") && drawn.contains("1f1b: 2 stages, 4 micro-batches, bubble 20.0%"));
}

#[test]
fn the_example_of_the_documentation_plans_what_it_shows() {
    let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/parallelism.md");
    let docs = std::fs::read_to_string(docs).unwrap();
    let mut blocks = docs.split("```").skip(1).step_by(2);
    let run = blocks.next().unwrap().strip_prefix("toml\n").unwrap();
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("run.toml"), run).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_shardwise"));
    let plan = command.args(["plan", "run.toml", "-n", "8"]).current_dir(folder.path()).output().unwrap();
    let drawn = Command::new(env!("CARGO_BIN_EXE_shardwise"))
        .args(["plan", "run.toml", "-n", "8", "--schedule"])
        .current_dir(folder.path())
        .output()
        .unwrap();
    let shown = text(&plan.stdout) + &text(&drawn.stdout);
    let shows = |block: &str| shown.contains(block.trim_start_matches('\n'));
    let examples: Vec<_> =
        blocks.filter(|block| block.contains("  pipeline  ") || block.contains("stage")).collect();
    let shown_here = examples.iter().filter(|block| shows(block)).count();
    assert_eq!(shown_here, 3, "groups, stages and timeline\n{shown}\n{examples:#?}");
}

#[test]
fn a_mesh_is_shown_stage_by_stage_with_its_groups() {
    let mesh = r#"parallel={"pipeline": 2, "tensor": 2, "schedule": "zero-bubble", "stages": "time", "sequence": true}"#;
    let sets = ["-n", "8", "--set", mesh, "--set", "model.config.tie_word_embeddings=true"];
    let shown = text(&plan(RUN, &sets).stdout);
    for line in [
        "ranks  8 = pipeline 2 x data 2 x tensor 2",
        "step   4,096 tokens = 2 replicas x 2 micro-batches x 4 samples x 256",
        "pipe   zero-bubble, stages cut by time",
        "tensor tokens are split between linear layers",
        "  pipeline  [0 4] [1 5] [2 6] [3 7]",
        "  data      [0 2] [1 3] [4 6] [5 7]",
        "  tensor    [0 1] [2 3] [4 5] [6 7]",
        // Both stages have the table, in a unit of its own: half of it on each of two tensor-parallel ranks.
        "model.embed_tokens.weight             1   2,097,152  2,097,152  1,048,576",
        "memory of each rank of stage 0, ZeRO stage 2",
        "sent in a step along each axis, by its busiest rank",
    ] {
        assert!(shown.lines().any(|shown| shown == line), "no line `{line}` in\n{shown}");
    }
    let stages: Vec<_> = shown.lines().filter(|line| line.contains(" .. ") && line.contains("MiB")).collect();
    assert!(stages[0].starts_with("  0      0 .. 3  model.embed_tokens .. model.layers.4  "), "{shown}");
    assert!(stages[1].starts_with("  1      4 .. 7  model.layers.5 .. lm_head             "), "{shown}");
    // What the run file says is what the timeline shows, and what is tried.
    let drawn = text(&plan(RUN, &[&sets[..], &["--schedule"]].concat()).stdout);
    assert_eq!(after(&drawn, "schedule"), "zero-bubble, 2 stages, 2 micro-batches");
    let json: Value = serde_json::from_slice(&plan(RUN, &[&sets[..], &["--json"]].concat()).stdout).unwrap();
    assert_eq!((&json["schedule"], &json["stage_cut"]), (&"zero-bubble".into(), &"time".into()));
    assert_eq!(json["stages"][1]["layers"], serde_json::json!([{"start": 6, "end": 10}]));
}

#[test]
fn a_schedule_as_json_has_its_text_form() {
    let set = "model.config.tie_word_embeddings=true";
    let args = [
        "-n",
        "2",
        "--pipeline",
        "2",
        "--schedule",
        "zero-bubble",
        "--micro-batches",
        "2",
        "--json",
        "--set",
        set,
    ];
    let json: Value = serde_json::from_slice(&plan(RUN, &args).stdout).unwrap();
    let schedule = json["schedule"].as_str().unwrap();
    assert!(
        schedule.starts_with("stages 2 chunks 1 microbatches 2\n0: F0 F0>1 F1 F1>1 B0<1 I0 W0 "),
        "{schedule}"
    );
    assert_eq!(json["shared"][0]["name"], "model.embed_tokens.weight");
    assert_eq!(json["peak_activations"], serde_json::json!([2, 2]));
}

#[test]
fn layouts_of_many_ranks_are_listed_best_first() {
    let args = ["-n", "16", "--device-memory", "1GB", "--reserve", "0", "--top", "3"];
    let shown = text(&plan(RUN, &args).stdout);
    assert!(after(&shown, "rates").starts_with("400 Tflop/s, 25 GB/s between hosts, 300 GB/s within"));
    assert!(
        shown.contains(" layouts fit, fastest first\n")
            && shown.contains(" more: `--top N`, or `--json` for all\n")
    );
    assert!(shown.contains(
        "  tensor 16: the `8` heads of `model.layers.0.self_attn.q_proj.weight` cannot be cut over `16`"
    ));
    let json: Value = serde_json::from_slice(&plan(RUN, &[&args[..6], &["--json"]].concat()).stdout).unwrap();
    let steps: Vec<_> =
        json["feasible"].as_array().unwrap().iter().map(|e| e["step_s"].as_f64().unwrap()).collect();
    assert!(steps.len() > 100 && steps.is_sorted());
    let tight =
        text(&plan(RUN, &["-n", "2", "--device-memory", "100MB", "--pipeline", "1", "--tensor", "1"]).stdout);
    assert!(tight.contains("\nnone of "), "{tight}");
    assert!(tight.contains("  pipeline 1 x data 2 x tensor 1  ZeRO 3, micro-batch 1, recompute"), "{tight}");
    assert!(tight.contains(" over  buffers "), "what is reserved alone is too much\n{tight}");
}

#[test]
fn a_trillion_parameters_on_1024_ranks_have_layouts() {
    let sizes = "{\"model_type\": \"gpt2\", \"vocab_size\": 51200, \"n_embd\": 25600, \"n_layer\": 128, \"n_head\": 160, \
                 \"n_positions\": 2048, \"resid_pdrop\": 0, \"embd_pdrop\": 0, \"attn_pdrop\": 0}";
    let set = format!("model.config={sizes}");
    let rates = ["--flops", "400T", "--link", "25GB/s", "--intra-link", "300GB/s"];
    let args = [&["--ranks", "1024", "--device-memory", "80GB", "--set", &set][..], &rates[..]].concat();
    let shown = text(&plan(RUN, &args).stdout);
    assert_eq!(after(&shown, "model"), "gpt2, 1,008,038,758,400 parameters");
    assert!(shown.contains("  pipe  data  tensor  ZeRO  "), "{shown}");
    assert!(shown.contains("  tensor 64 and 4 more: the `160` heads"), "{shown}");
}

/// The numbers of a line that begins with `words`.
fn line<'a>(shown: &'a str, words: &str) -> Vec<&'a str> {
    let line = shown.lines().find(|line| line.trim_start().starts_with(words));
    line.unwrap_or_else(|| panic!("no `{words}` in\n{shown}")).trim_start()[words.len()..]
        .split("  ")
        .map(str::trim)
        .filter(|cell| !cell.is_empty())
        .collect()
}

const ON_GPU: [&str; 4] = ["--set", "device=cuda", "--set", "deepspeed.zero_optimization.stage=3"];
const OFFLOAD_ALL: [&str; 4] = [
    "--set",
    "deepspeed.zero_optimization.offload_optimizer.device=cpu",
    "--set",
    "deepspeed.zero_optimization.offload_param.device=cpu",
];

#[test]
fn memory_of_a_gpu_and_of_the_host_beside_it() {
    let shown = text(&plan(RUN, &[&ON_GPU[..], &OFFLOAD_ALL].concat()).stdout);
    assert!(shown.contains("gpu    offloaded to the host: optimizer and parameters\n"), "{shown}");
    // 34 million parameters at 2, 4, 8 and 4 bytes.
    assert_eq!(line(&shown, "parameters "), ["-", "65.0 MiB"]);
    assert_eq!(line(&shown, "master parameters"), ["-", "130 MiB"]);
    assert_eq!(line(&shown, "optimizer states"), ["-", "260 MiB"]);
    assert_eq!(line(&shown, "gradients "), ["-", "130 MiB"]);
    assert_eq!(line(&shown, "gathered parameters"), ["16.0 MiB", "-"]);
    assert_eq!(line(&shown, "libraries and program"), ["1.00 GiB", "1.00 GiB"]);
    // Each stage without offload and with, and all of it in stage 3.
    let choices = shown.split("each rank at its fullest\n").nth(1).unwrap().split("\n\n").next().unwrap();
    assert_eq!(choices.lines().count(), 1 + 9, "{choices}");
    let limited = text(&plan(RUN, &[&ON_GPU[..], &["--set", "cuda.memory_limit=1.2GB"]].concat()).stdout);
    assert!(
        limited.contains("  device  1.72 GiB of 1.12 GiB: 622 MiB over; libraries and program: 1.00 GiB\n"),
        "{limited}"
    );

    let json = plan(RUN, &[&ON_GPU[..], &OFFLOAD_ALL, &["--json"]].concat());
    let json: Value = serde_json::from_slice(&json.stdout).unwrap();
    let memory = &json["stages"][0]["memory"][3];
    assert_eq!((memory["params"].as_u64(), memory["optimizer"].as_u64()), (Some(0), Some(0)));
    let params = json["num_params"].as_u64().unwrap();
    assert_eq!(memory["host"]["optimizer"].as_u64(), Some(8 * params));
    assert_eq!(memory["host"]["offload"], serde_json::json!({"optimizer": "host", "params": "host"}));
    assert_eq!(json["stages"][0]["choices"].as_array().unwrap().len(), 9);
    assert_eq!(json["device"]["cuda"]["collectives"], "auto");
}

#[test]
fn a_run_on_gpus_is_held_to_their_memory() {
    let args = [&ON_GPU[..], &["--device-memory", "1.5GB", "--host-memory", "16GB", "--top", "2"]].concat();
    let shown = text(&plan(RUN, &args).stdout);
    assert!(shown.contains("does it fit? ZeRO stage 3, offloaded: nothing\n"), "{shown}");
    assert!(
        shown.contains("  device  1.72 GiB of 1.40 GiB: 336 MiB over; libraries and program: 1.00 GiB\n"),
        "{shown}"
    );
    assert!(line(&shown, "host ")[0].ends_with("of 14.9 GiB: fits"), "{shown}");
    assert!(shown.contains(" layouts fit, fastest first\n") || shown.contains("none of "), "{shown}");
    let json: Value = serde_json::from_slice(&plan(RUN, &[&args[..], &["--json"]].concat()).stdout).unwrap();
    assert_eq!(json["run"]["fits"], false);
    assert!(json["run"]["excess"]["device"].as_u64() > Some(0) && json["run"]["excess"]["host"] == 0);
}

#[test]
fn the_largest_model_by_what_is_offloaded() {
    let args = [&ON_GPU[..], &["--device-memory", "4GB", "--host-memory", "64GB", "--largest"]].concat();
    let recompute = [&args[..], &["--set", "activations.policy=recompute"]].concat();
    let json: Value =
        serde_json::from_slice(&plan(RUN, &[&recompute[..], &["--json"]].concat()).stdout).unwrap();
    let params: Vec<u64> =
        (0..3).map(|i| json["largest"][i]["largest"]["num_params"].as_u64().unwrap()).collect();
    assert!(params[1] > 5 * params[0] && params[2] > 8 * params[0], "{params:?}");
    // 18 bytes of state, and process and buffers.
    let host = json["largest"][2]["largest"]["host_bytes_per_param"].as_f64().unwrap();
    assert!((18.0..19.0).contains(&host), "{host}");
    let shown = text(&plan(RUN, &recompute).stdout);
    assert_eq!(line(&shown, "nothing").last(), Some(&"1.0"), "{shown}");
    let none = text(&plan(RUN, &[&ON_GPU[..], &["--device-memory", "1GB", "--largest"]].concat()).stdout);
    assert_eq!(line(&none, "nothing").last(), Some(&"none fits"), "{none}");
    for args in
        [&["--device-memory", "1GB", "--largest"][..], &["--device-memory", "1GB", "--host-memory", "1GB"]]
    {
        let output = plan(RUN, args);
        let says = text(&output.stderr);
        assert!(
            says.contains("is about memory beside GPUs, and the run's `device` is `cpu`\nhint: "),
            "{says}"
        );
        assert_eq!(output.status.code(), Some(2));
    }
}

#[test]
fn pipelines_that_cannot_be_are_bad_usage() {
    for (args, expected) in [
        (
            &["--pipeline", "2"][..],
            "error: `--pipeline`, `--tensor` and `--cut` are for `--schedule` and `--device-memory`\nhint: ",
        ),
        (
            &["--schedule", "--pipeline", "3"],
            "error: `16` ranks cannot be split into pipeline `3` x tensor `1`",
        ),
        (&["--schedule", "--pipeline", "16"], "error: `10` layers cannot be cut into `16` parts"),
        (
            &["--schedule", "--tensor", "16"],
            "error: the `8` heads of `model.layers.0.self_attn.q_proj.weight` cannot be cut",
        ),
        (
            &["--schedule", "interleaved", "--pipeline", "4", "--micro-batches", "3"],
            "error: `3` micro-batches do not fill `4` interleaved stages, expected at least `4`",
        ),
        (&["--schedule", "--svg", "no/such/folder.svg"], "error: could not write `no/such/folder.svg`: "),
    ] {
        let output = plan(RUN, &[&["-n", "16"], args].concat());
        let shown = text(&output.stderr);
        assert!(shown.starts_with(expected), "{shown}");
        let code = if shown.contains("could not write") { 1 } else { 2 };
        assert_eq!((output.status.code(), output.stdout.len()), (Some(code), 0), "{shown}");
    }
}
