//! What a configuration plans, and what it says when that is nothing.

use super::{Files, deepspeed, run_with};
use crate::{Overlap, ZeroStage};

const LLAMA: &str = r#"{"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 128, "vocab_size": 100}"#;

fn files(config: &str) -> Files {
    Files::new(&[("run.json", &run_with(&deepspeed(""))), ("model/config.json", config)])
}

fn plan(files: &Files, sets: &[&str], ranks: usize) -> Result<shardwise_plan::run::RunPlan, String> {
    files.load("run.json", sets, ranks).unwrap().config.plan(2).map_err(|errors| files.relative(errors))
}

#[test]
fn a_folder_with_nothing_but_config_json_is_enough() {
    let plan =
        plan(&files(LLAMA), &["deepspeed.zero_optimization.stage=3", "deepspeed.bf16.enabled=true"], 2);
    let plan = plan.unwrap();
    assert_eq!(
        (plan.shape.stage, plan.shape.compute_bytes, plan.shape.overlap),
        (ZeroStage::Three, 2, Overlap::Inline)
    );
    assert_eq!((plan.shape.micro_batch, plan.shape.seq_len, plan.step_tokens), (2, 64, 2 * 2 * 64));
    assert_eq!(plan.stages[0].units.len(), 4);
}

#[test]
fn the_tokenizer_to_be_trained_gives_the_vocabulary() {
    let sets = [
        "model.path=null",
        r#"model.config={"model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2}"#,
    ];
    let text = [
        "data={\"text\": \"a.txt\", \"seq_len\": 64, \"tokenizer\": {\"train_bpe\": {\"vocab_size\": 300}}}",
    ];
    let files = files(LLAMA);
    assert_eq!(
        plan(&files, &sets, 1).unwrap_err(),
        "error: `model.config`: `vocab_size` is missing\n\
         hint: set `model.config.vocab_size` to the number of the tokenizer's tokens, or have the run train one with \
         `data.tokenizer.train_bpe`"
    );
    let with_text = [&sets[..], &text[..]].concat();
    assert_eq!(plan(&files, &with_text, 1).unwrap().shape.model.vocab_size(), 300);
    let too_small = [&with_text[..], &["model.config.vocab_size=200"]].concat();
    assert_eq!(
        plan(&files, &too_small, 1).unwrap_err(),
        "error: the tokenizer has `300` tokens, the model's `vocab_size` is `200`\n\
         hint: use the model's own tokenizer, or a smaller vocabulary"
    );
}

#[test]
fn a_model_that_is_none_is_named() {
    for (config, expected) in [
        ("{\"model_type\": \"llama\",\n}", "error: model/config.json:2:1: trailing comma"),
        (
            "{\"model_type\": \"bert\"}",
            "error: `model/config.json`: `model_type` is `bert`, expected `llama` or `gpt2`",
        ),
    ] {
        assert_eq!(plan(&files(config), &[], 1).unwrap_err(), expected);
    }
    let none = Files::new(&[("run.json", &run_with(&deepspeed("")))]);
    assert!(plan(&none, &[], 1).unwrap_err().starts_with("error: could not read `model/config.json`: "));
    assert_eq!(
        plan(&files(LLAMA), &["data.seq_len=256"], 1).unwrap_err(),
        "error: `data.seq_len` is `256`, the model has `128` positions\n\
         hint: shorten the samples, or raise the model's number of positions"
    );
}

#[test]
fn communication_overlaps_where_ranks_have_a_core_to_spare() {
    let overlap = |sets: &[&str], ranks, cores| {
        let config = files(LLAMA).load("run.json", sets, ranks).unwrap().config;
        config.overlap(cores, config.threads(None, cores))
    };
    assert_eq!(overlap(&[], 2, 8), Overlap::Inline, "an even share of the cores leaves none");
    assert_eq!(overlap(&["threads_per_rank=3"], 2, 8), Overlap::SideThread);
    assert_eq!(overlap(&["threads_per_rank=3"], 1, 8), Overlap::Inline, "nobody to talk to");
    let key = "deepspeed.zero_optimization.overlap_comm";
    assert_eq!(overlap(&[&format!("{key}=true")], 2, 2), Overlap::SideThread);
    assert_eq!(overlap(&["threads_per_rank=1", &format!("{key}=false")], 2, 8), Overlap::Inline);
}

#[test]
fn settings_of_the_state_and_of_activations_reach_the_plan() {
    let files = files(LLAMA);
    let shape = |sets: &[&str]| plan(&files, sets, 1).unwrap().shape;
    let of = |shape: &shardwise_plan::run::RunShape| {
        (shape.precision, shape.compute_bytes, shape.optimizer_bytes, shape.grad_bytes)
    };
    assert_eq!(of(&shape(&[])), ("fp32", 4, 8, 4));
    let fp16 = ["deepspeed.fp16.enabled=true", "deepspeed.data_types.grad_accum_dtype=fp16"];
    assert_eq!(of(&shape(&[&fp16[..], &["optimizer.state_dtype=bf16"]].concat())), ("fp16", 2, 4, 2));
    assert_eq!(of(&shape(&["deepspeed.optimizer={type: 'SGD'}"])), ("fp32", 4, 0, 4));
    assert_eq!(of(&shape(&["deepspeed.optimizer={type: 'Lion'}"])), ("fp32", 4, 4, 4));

    let activations = |sets: &[&str]| plan(&files, sets, 1).unwrap().memory().activations;
    assert!(activations(&["activations.policy=recompute"]) < activations(&[]));
    assert_eq!(
        plan(&files, &["activations.rules=[{match: 'layers.*', policy: 'keep'}]"], 1).unwrap_err(),
        "error: `layers.*` in `activations` matches no layer; the layers are [\"model.embed_tokens\", \"model.layers.0\", \
         \"model.layers.1\", \"lm_head\"]"
    );
    assert_eq!(
        plan(&files, &["train.groups=[{match: ['*norm*', '*.bias'], weight_decay: 0}]"], 1).unwrap_err(),
        "error: `*.bias` in `train.groups` matches no parameter\n\
         hint: `*` stands for any run of characters; `shardwise plan --json` shows all names"
    );
}
