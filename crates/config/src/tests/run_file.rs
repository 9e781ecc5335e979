//! The run file itself: JSON and TOML, overrides, paths.

use std::path::PathBuf;

use super::*;
use crate::*;

const TOML: &str = r#"
steps = 10 # comments are part of TOML
seed = 3
threads_per_rank = 2

[model]
init_seed = 5
[model.config]
model_type = "llama"
rope_theta = 5e5

[data]
text = ["a.txt", "more/*.txt"]
tokenizer = { train_bpe = { vocab_size = 512 } }
seq_len = 64
order = "sequential"

[parallel]
deadline_s = 30

[train]
no_decay = ["*norm*", "*.bias"]
frozen = ["embed*"]

[deepspeed]
train_batch_size = 8
gradient_clipping = 0.0
zero_optimization.stage = 3
bf16.enabled = true
steps_per_print = 5
optimizer.type = "AdamW"
scheduler.type = "WarmupLR"
scheduler.params = { warmup_num_steps = 4, warmup_type = "linear", warmup_max_lr = 0.5 }
"#;

const JSON: &str = r#"{
    "steps": 10, "seed": 3, "threads_per_rank": 2,
    "model": {"init_seed": 5, "config": {"model_type": "llama", "rope_theta": 5e5}},
    "data": {"text": ["a.txt", "more/*.txt"], "tokenizer": {"train_bpe": {"vocab_size": 512}}, "seq_len": 64,
        "order": "sequential"},
    "parallel": {"deadline_s": 30},
    "train": {"no_decay": ["*norm*", "*.bias"], "frozen": ["embed*"]},
    "deepspeed": {"train_batch_size": 8, "gradient_clipping": 0.0, "zero_optimization": {"stage": 3},
        "bf16": {"enabled": true}, "steps_per_print": 5, "optimizer": {"type": "AdamW"},
        "scheduler": {"type": "WarmupLR",
            "params": {"warmup_num_steps": 4, "warmup_type": "linear", "warmup_max_lr": 0.5}}},
}"#;

#[test]
fn toml_and_json_say_the_same() {
    let files = Files::new(&[("run.toml", TOML), ("run.json", JSON)]);
    let toml = files.load("run.toml", &[], 2).unwrap().config;
    assert_eq!(toml, files.load("run.json", &[], 2).unwrap().config);
    assert_eq!(toml.steps, 10);
    assert_eq!((toml.seed, toml.model.init_seed, toml.data.seed), (3, 5, 3));
    assert_eq!(toml.threads_per_rank, Some(2));
    let ModelSource::Config(model) = &toml.model.source else { panic!("an inline model") };
    assert_eq!(serde_json::to_string(model).unwrap(), r#"{"model_type":"llama","rope_theta":500000.0}"#);
    let folder = files.0.path();
    assert_eq!(
        toml.data.source,
        DataSource::Text {
            text: vec![folder.join("a.txt"), folder.join("more/*.txt")],
            tokenizer: TokenizerSource::TrainBpe { vocab_size: 512 },
        }
    );
    assert_eq!((toml.data.seq_len, toml.data.order), (64, SampleOrder::Sequential));
    assert_eq!((toml.parallel.world_size, toml.parallel.data, toml.parallel.deadline_s), (2, 2, 30.0));
    let batch = toml.batch;
    assert_eq!((batch.global_batch_size, batch.micro_batch, batch.grad_accum_steps), (8, 4, 1));
    assert_eq!(toml.precision, Precision::Bf16);
    assert_eq!(toml.clip_grad_norm, None);
    assert_eq!(toml.zero.stage, ZeroStage::Three);
    assert_eq!(toml.zero.overlap_comm, CommOverlap::Automatic);
    assert_eq!(
        toml.lr_schedule,
        LrSchedule::Warmup { min_lr: 0.0, max_lr: 0.5, num_steps: 4, curve: WarmupCurve::Linear }
    );
    assert!(toml.train.no_decay[1].matches("model.layers.0.bias"));
    assert_eq!(toml.report.steps_per_print, Some(5));
}

#[test]
fn the_smallest_run_has_the_documented_defaults() {
    let config = load(&run_with(&deepspeed("")), &[], 1).unwrap().config;
    assert_eq!((config.seed, config.model.init_seed, config.data.seed), (0, 0, 0));
    assert_eq!(config.device, Device::Cpu);
    assert_eq!(config.threads_per_rank, None);
    assert_eq!(config.data.order, SampleOrder::Shuffled);
    assert_eq!((config.parallel.pipeline, config.parallel.tensor, config.parallel.deadline_s), (1, 1, 120.0));
    assert_eq!(config.precision, Precision::Fp32);
    let Optimizer::AdamW(adamw) = config.optimizer else { panic!("AdamW") };
    assert_eq!((adamw.betas, adamw.eps, adamw.weight_decay), ([0.9, 0.999], 1e-8, 0.0));
    assert_eq!(config.lr_schedule, LrSchedule::Constant { lr: 0.001 });
    assert_eq!(config.clip_grad_norm, Some(1.0));
    assert_eq!(config.zero.stage, ZeroStage::Zero);
    assert_eq!(config.report.steps_per_print, None);
}

#[test]
fn toml_errors_have_lines() {
    let files = Files::new(&[
        ("twice.toml", "steps = 1\nsteps = 2\n"),
        ("syntax.toml", "steps = \n[model\n"),
        ("date.toml", "steps = 2020-01-01\nseed = inf\n"),
        ("key.toml", &TOML.replace("seq_len", "seqlen")),
    ]);
    let says = |name: &str| files.load(name, &[], 1).unwrap_err();
    assert_eq!(says("twice.toml"), "error: twice.toml:2:1: duplicate key");
    let syntax = says("syntax.toml");
    assert!(syntax.starts_with("error: syntax.toml:1:9: ") && syntax.contains("syntax.toml:2:"), "{syntax}");
    assert_eq!(
        says("date.toml"),
        "\
error: date.toml:1:9: `2020-01-01` is a date, and no key takes one
error: date.toml:2:8: `inf` is not a number that can be stored"
    );
    assert_eq!(
        says("key.toml"),
        "\
error: key.toml:15: `data.seqlen` is not a known key
hint: did you mean `seq_len`?
error: key.toml:12: `data.seq_len` is missing
hint: tokens of one sample, for example 512"
    );
}

#[test]
fn overrides_reach_everywhere() {
    let files = Files::new(&[
        ("run.json", &run_with("\"configs/ds.json\"")),
        ("configs/ds.json", &deepspeed("")),
        ("other.json", &deepspeed(r#", "zero_optimization": {"stage": 1}"#)),
    ]);
    let load = |sets: &[&str]| files.load("run.json", sets, 1).unwrap().config;
    assert_eq!(load(&["steps=5e1"]).steps, 50);
    assert_eq!(load(&["deepspeed.zero_optimization.stage=2"]).zero.stage, ZeroStage::Two);
    assert_eq!(load(&["deepspeed=other.json"]).zero.stage, ZeroStage::One);
    let config = load(&["deepspeed=other.json", "deepspeed.bf16.enabled=true"]);
    assert_eq!((config.zero.stage, config.precision), (ZeroStage::One, Precision::Bf16));
    let config = load(&["steps=1", "steps=2", "train.frozen=['a', \"b\"]", "data.order=sequential"]);
    assert_eq!(config.steps, 2);
    assert_eq!(config.train.frozen, [NamePattern::new("a"), NamePattern::new("b")]);
    assert_eq!(config.data.order, SampleOrder::Sequential);
    // `null` gives a key back its default.
    assert_eq!(load(&["deepspeed.scheduler=null"]).lr_schedule, LrSchedule::Constant { lr: 0.001 });
    assert_eq!(load(&["parallel=null", "parallel.deadline_s=5"]).parallel.deadline_s, 5.0);
}

#[test]
fn files_are_found_beside_the_run_file() {
    let files = Files::new(&[
        ("run.json", JSON),
        ("a.txt", "a"),
        ("more/c.txt", "c"),
        ("more/b.txt", "b"),
        ("odd [x]/run.json", JSON),
        ("odd [x]/a.txt", "a"),
        ("odd [x]/more/b.txt", "b"),
        ("tokens/run.json", &run_with(&deepspeed(""))),
        ("tokens/model/weights", ""),
    ]);
    let texts = |run: &str, sets: &[&str]| -> Result<Vec<PathBuf>, String> {
        files.load(run, sets, 1).unwrap().text_files().map_err(|errors| files.relative(errors))
    };
    let path = |name: &str| files.0.path().join(name);
    assert_eq!(texts("run.json", &[]).unwrap(), [path("a.txt"), path("more/b.txt"), path("more/c.txt")]);
    let twice = texts("run.json", &["data.text=['more/c.txt', 'more/*', 'a.txt']"]).unwrap();
    assert_eq!(twice, [path("more/c.txt"), path("more/b.txt"), path("a.txt")]);
    assert_eq!(texts("odd [x]/run.json", &[]).unwrap(), [path("odd [x]/a.txt"), path("odd [x]/more/b.txt")]);
    assert_eq!(
        texts("run.json", &["data.text=['z.txt', '*.md', 'more', 'a[']"]).unwrap_err(),
        "\
error: --set data.text=['z.txt', '*.md', 'more', 'a[']: `data.text` names `z.txt`, which does not exist
hint: relative paths start at the run file's folder
error: --set data.text=['z.txt', '*.md', 'more', 'a[']: `data.text` names `*.md`, which fits no file
hint: relative paths start at the run file's folder
error: --set data.text=['z.txt', '*.md', 'more', 'a[']: `data.text` names `more`, which is a folder, not a file
hint: relative paths start at the run file's folder
error: --set data.text=['z.txt', '*.md', 'more', 'a[']: `data.text` names `a[`, which is not a valid pattern
hint: relative paths start at the run file's folder"
    );
    let tokens = files.load("tokens/run.json", &[], 1).unwrap();
    assert!(tokens.text_files().unwrap().is_empty());
    assert_eq!(
        files.relative(tokens.check_files().unwrap_err()),
        "\
error: tokens/run.json:2: `model.path` names `tokens/model`, a folder without a `config.json`
hint: relative paths start at the run file's folder
error: tokens/run.json:3: `data.tokens` names `tokens/tokens.bin`, which does not exist
hint: relative paths start at the run file's folder"
    );
    fs::write(path("tokens/model/config.json"), "{}").unwrap();
    fs::write(path("tokens/tokens.bin"), "").unwrap();
    tokens.check_files().unwrap();
}
