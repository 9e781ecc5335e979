//! Every class of error with the full text people see.

use super::*;

/// What loading `run` says, on 2 ranks.
fn says(run: &str, overrides: &[&str]) -> String {
    load(run, overrides, 2).expect_err("this configuration has errors")
}

fn deepspeed_says(more: &str) -> String {
    says(&run_with(&deepspeed(more)), &[])
}

#[test]
fn unknown_keys_at_any_depth() {
    assert_eq!(
        says(&run_with(&deepspeed(r#", "zero_optimization": {"stge": 2}"#)).replace("steps", "stps"), &[]),
        "\
error: run.json:4: `stps` is not a known key
hint: did you mean `steps`?
error: run.json:5: `deepspeed.zero_optimization.stge` is not a known key
hint: did you mean `stage`?
error: run.json:1: `steps` is missing
hint: the number of optimizer steps to train"
    );
    assert_eq!(
        deepspeed_says(r#", "zero_optimization": {"offload_optimizer": {"devise": "none"}}"#),
        "\
error: run.json:5: `deepspeed.zero_optimization.offload_optimizer.devise` is not a known key
hint: did you mean `device`?"
    );
    assert_eq!(deepspeed_says(r#", "qqq": 1"#), "error: run.json:5: `deepspeed.qqq` is not a known key");
}

#[test]
fn a_key_in_the_wrong_place_is_pointed_to_its_own() {
    assert_eq!(
        says(&run_with(&deepspeed("")).replace("\"steps\"", "\"gradient_clipping\": 1.0, \"steps\""), &[]),
        "\
error: run.json:4: `gradient_clipping` is not a known key
hint: did you mean `deepspeed.gradient_clipping`?"
    );
    let files = Files::new(&[
        ("run.json", &run_with("\"ds.json\"")),
        ("ds.json", &deepspeed(",\n\"overlap_comm\": true")),
    ]);
    assert_eq!(
        files.load("run.json", &[], 1).unwrap_err(),
        "\
error: ds.json:2: `overlap_comm` is not a known key
hint: did you mean `zero_optimization.overlap_comm`?"
    );
}

#[test]
fn duplicate_keys() {
    assert_eq!(
        deepspeed_says(",\n\"zero_optimization\": {\"stage\": 1,\n\"stage\": 2}"),
        "\
error: run.json:7: `deepspeed.zero_optimization.stage` is set twice, first at run.json:6
hint: keep one of the two"
    );
    let files = Files::new(&[
        ("run.json", &run_with("\"ds.json\"")),
        ("ds.json", &deepspeed(",\n\"bf16\": {},\n\"bf16\": {}")),
    ]);
    assert_eq!(
        files.load("run.json", &[], 1).unwrap_err(),
        "\
error: ds.json:3: `bf16` is set twice, first at ds.json:2
hint: keep one of the two"
    );
    assert_eq!(
        deepspeed_says(r#", "bf16": {"enabled": true}, "bfloat16": {"enabled": true}"#),
        "\
error: run.json:5: `deepspeed.bfloat16` and `deepspeed.bf16` are the same setting
hint: keep one of the two"
    );
}

#[test]
fn wrong_types_and_ranges() {
    let cases = [
        (
            r#", "zero_optimization": {"stage": 4}"#,
            "zero_optimization.stage` is `4`, expected a whole number from 0 to 3",
        ),
        (
            r#", "zero_optimization": {"stage3_prefetch_bucket_size": 15099494.4}"#,
            "zero_optimization.stage3_prefetch_bucket_size` is `15099494.4`, expected a whole number of at least 0",
        ),
        (r#", "zero_optimization": true"#, "zero_optimization` is `true`, expected an object"),
        (
            r#", "zero_optimization": {"overlap_comm": "true"}"#,
            "zero_optimization.overlap_comm` is `\"true\"`, expected `true` or `false`\nhint: remove the quotes",
        ),
        (r#", "gradient_clipping": -1"#, "gradient_clipping` is `-1`, expected a number of at least 0"),
        (
            r#", "gradient_clipping": "1.0""#,
            "gradient_clipping` is `\"1.0\"`, expected a number of at least 0\nhint: remove the quotes",
        ),
        (
            r#", "gradient_clipping": null"#,
            "gradient_clipping` is `null`, expected a number of at least 0\nhint: leave the key out for its default",
        ),
        (r#", "steps_per_print": true"#, "steps_per_print` is `true`, expected a whole number of at least 1"),
        (
            r#", "communication_data_type": "int8""#,
            "communication_data_type` is `\"int8\"`, expected `\"fp32\"`, `\"bf16\"` or `\"fp16\"`",
        ),
        (
            r#", "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}"#,
            "scheduler.params.warmup_num_steps` is `0`, expected a whole number of at least 1",
        ),
    ];
    for (more, expected) in cases {
        assert_eq!(deepspeed_says(more), format!("error: run.json:5: `deepspeed.{expected}"));
    }
    assert_eq!(
        says(&run_with(&deepspeed("")), &["deepspeed.optimizer.params.betas=[0.9,1.0]", "data.seq_len=0"]),
        "\
error: --set data.seq_len=0: `data.seq_len` is `0`, expected a whole number of at least 1
error: --set deepspeed.optimizer.params.betas=[0.9,1.0]: `deepspeed.optimizer.params.betas` is `[0.9,1.0]`, \
expected two numbers of at least 0 and below 1"
    );
}

#[test]
fn what_is_not_supported_yet_is_refused_by_name() {
    let cases = [
        (
            r#", "fp16": {"enabled": true, "auto_cast": true}"#,
            "fp16.auto_cast` is not supported yet\nhint: set it to `false` or leave it out; layers compute in fp16 \
             throughout, and inputs are token ids",
        ),
        (
            r#", "zero_optimization": {"offload_optimizer": {"device": "nvme"}}"#,
            "zero_optimization.offload_optimizer.device` = `\"nvme\"` is not supported yet\nhint: set it to `\"none\"` or \
             leave it out; `\"cpu\"` keeps it in host memory",
        ),
        (
            r#", "zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.3}}"#,
            "zero_optimization.offload_optimizer.ratio` = `0.3` is not supported yet\nhint: set it to `1.0` or leave it \
             out; all of the optimizer's state is offloaded, or none of it",
        ),
        (
            r#", "zero_optimization": {"reduce_scatter": false}"#,
            "zero_optimization.reduce_scatter` is not supported yet\nhint: set it to `true` or leave it out; sharded \
             gradients are always reduce-scattered",
        ),
        (
            r#", "sparse_attention": {"mode": "fixed"}"#,
            "sparse_attention` is not supported yet\nhint: leave it out: attention is dense",
        ),
        (
            r#", "scheduler": {"type": "StepLR"}"#,
            "scheduler.type` = `\"StepLR\"` is not supported yet\nhint: set it to `\"WarmupLR\"`, `\"WarmupDecayLR\"`, \
             `\"WarmupCosineLR\"`, `\"OneCycle\"` or `\"LRRangeTest\"`",
        ),
        (
            r#", "bf16": {"enabled": true}, "data_types": {"param_dtype": "fp32"}"#,
            "data_types.param_dtype` = `\"fp32\"` is not supported yet\nhint: leave it out: the run's precision is \
             `bf16`, and what is computed in the run's precision is also stored in it",
        ),
        (
            r#", "bf16": {"enabled": true}, "data_types": {"grad_accum_dtype": "fp16"}"#,
            "data_types.grad_accum_dtype` = `\"fp16\"` is not supported yet\nhint: set it to `\"fp32\"` or leave it out; \
             the run's precision, `\"bf16\"`, is possible too",
        ),
    ];
    for (more, expected) in cases {
        assert_eq!(deepspeed_says(more), format!("error: run.json:5: `deepspeed.{expected}"));
    }
    assert_eq!(
        says(&run_with(&deepspeed("")), &["deepspeed.sequence_parallel_size=2", "deepspeed.zero_optimization.zero_hpz_partition_size=4"]),
        "\
error: --set deepspeed.sequence_parallel_size=2: `deepspeed.sequence_parallel_size` = `2` is not supported yet
hint: set it to `1` or leave it out; the run file's `parallel.sequence` splits what is between linear layers over \
tensor-parallel ranks
error: --set deepspeed.zero_optimization.zero_hpz_partition_size=4: \
`deepspeed.zero_optimization.zero_hpz_partition_size` = `4` is not supported yet
hint: set it to `1` or leave it out"
    );
}

#[test]
fn optimizers_and_schedulers() {
    let with = |set: &str| says(&run_with(&deepspeed("")), &[set]);
    assert_eq!(
        with("deepspeed.optimizer.type=OneBitAdam"),
        "\
error: --set deepspeed.optimizer.type=OneBitAdam: `deepspeed.optimizer.type` = `\"OneBitAdam\"` is not supported yet
hint: set it to `\"AdamW\"`, `\"Adam\"`, `\"SGD\"`, `\"Adagrad\"`, `\"Lion\"`, `\"Lamb\"` or `\"Muon\"`"
    );
    assert_eq!(
        with("deepspeed.optimizer.type=AdaW"),
        "\
error: --set deepspeed.optimizer.type=AdaW: `deepspeed.optimizer.type` is `\"AdaW\"`, expected \
`\"AdamW\"`, `\"Adam\"`, `\"SGD\"`, `\"Adagrad\"`, `\"Lion\"`, `\"Lamb\"` or `\"Muon\"`
hint: did you mean `AdamW`?"
    );
    assert_eq!(
        with("deepspeed.optimizer.params.max_grad_norm=1.0"),
        "\
error: --set deepspeed.optimizer.params.max_grad_norm=1.0: `deepspeed.optimizer.params.max_grad_norm` is not a setting
hint: set `gradient_clipping` instead"
    );
    assert_eq!(
        with("deepspeed.optimizer.params.freeze_step=100"),
        "\
error: --set deepspeed.optimizer.params.freeze_step=100: `deepspeed.optimizer.params.freeze_step` is a parameter of \
OneBitAdam or OneBitLamb, not of AdamW
hint: leave it out"
    );
    assert_eq!(
        with("deepspeed.optimizer.params.amsgrad=true"),
        "\
error: --set deepspeed.optimizer.params.amsgrad=true: `deepspeed.optimizer.params.amsgrad` is not supported yet
hint: set it to `false` or leave it out"
    );
    assert_eq!(
        says(&run_with(r#"{"train_batch_size": 2, "scheduler": {}}"#), &[]),
        "\
error: run.json:5: `deepspeed.optimizer` is missing
hint: write {\"type\": \"AdamW\", \"params\": {\"lr\": 3e-4}}
error: run.json:5: `deepspeed.scheduler.type` is missing
hint: `\"WarmupLR\"`, `\"WarmupDecayLR\"`, `\"WarmupCosineLR\"`, `\"OneCycle\"` or `\"LRRangeTest\"`; without \
`scheduler` the rate is constant"
    );
}

#[test]
fn batch_sizes_that_do_not_fit() {
    let with =
        |sizes: &str| says(&run_with(&deepspeed(sizes)), &["deepspeed.train_micro_batch_size_per_gpu=4"]);
    assert_eq!(
        with(r#", "train_batch_size": 32, "gradient_accumulation_steps": 2"#),
        "\
error: run.json:5: `train_batch_size` 32 is not `train_micro_batch_size_per_gpu` 4 x `gradient_accumulation_steps` 2 x \
2 data-parallel ranks = 16
hint: set `train_batch_size` to 16, or leave one of the three out"
    );
    assert_eq!(
        with(r#", "train_batch_size": 30"#),
        "\
error: run.json:5: `train_batch_size` 30 is not a multiple of `train_micro_batch_size_per_gpu` 4 x 2 data-parallel \
ranks = 8
hint: change one of them, or the number of ranks"
    );
    assert_eq!(
        says(&run_with(r#"{"optimizer": {"type": "AdamW"}}"#), &[]),
        "\
error: run.json:5: neither `train_batch_size` nor `train_micro_batch_size_per_gpu` is set
hint: set `train_micro_batch_size_per_gpu` to the samples of one forward pass"
    );
    assert_eq!(
        says(&run_with(&deepspeed(r#", "data_parallel_size": 4"#)), &[]),
        "\
error: run.json:5: `deepspeed.data_parallel_size` is 4, but there are 2 data-parallel ranks
hint: leave it out: it follows from the number of ranks"
    );
}

#[test]
fn auto_is_an_error_unless_the_batch_sizes_decide_it() {
    assert_eq!(
        deepspeed_says(r#", "gradient_clipping": "auto", "zero_optimization": {"reduce_bucket_size": "auto"}"#),
        "\
error: run.json:5: `deepspeed.gradient_clipping` is `\"auto\"`, and nothing fills in `auto` here
hint: set it, or leave it out for its default
error: run.json:5: `deepspeed.zero_optimization.reduce_bucket_size` is `\"auto\"`, and nothing fills in `auto` here
hint: leave it out: it has no effect here"
    );
    assert_eq!(
        deepspeed_says(r#", "train_batch_size": "auto", "gradient_accumulation_steps": "auto""#),
        "\
error: run.json:5: `deepspeed.train_batch_size` is `\"auto\"`, and nothing fills in `auto` here
hint: set two of the three batch sizes; the third follows
error: run.json:5: `deepspeed.gradient_accumulation_steps` is `\"auto\"`, and nothing fills in `auto` here
hint: set two of the three batch sizes; the third follows"
    );
    let batch = |more: &str| load(&run_with(&deepspeed(more)), &[], 2).unwrap().config.batch;
    let solved = batch(r#", "train_batch_size": 12, "gradient_accumulation_steps": "auto""#);
    assert_eq!((solved.global_batch_size, solved.micro_batch, solved.grad_accum_steps), (12, 2, 3));
    let solved = batch(r#", "train_batch_size": "auto", "gradient_accumulation_steps": 3"#);
    assert_eq!(solved.global_batch_size, 12);
    assert_eq!(batch(r#", "train_batch_size": "auto""#).global_batch_size, 4);
}

#[test]
fn both_precisions_on() {
    assert_eq!(
        deepspeed_says(",\n\"fp16\": {\"enabled\": true},\n\"bf16\": {\"enabled\": true}"),
        "\
error: run.json:6: `deepspeed.bf16.enabled` and `deepspeed.fp16.enabled` are both set, but a run computes in one precision
hint: keep one of the two"
    );
}

#[test]
fn a_run_has_one_model_and_one_source_of_data() {
    let run = run_with(&deepspeed(""));
    assert_eq!(
        says(&run, &["model.config={}", "data.text=a.txt"]),
        "\
error: --set model.config={}: `model.path` and `model.config` are both set, but a model is described once
hint: keep one of the two
error: --set data.text=a.txt: `data.tokens` and `data.text` are both set, but a run reads one of the two
hint: keep one of the two"
    );
    assert_eq!(
        says(&run, &["model={}", "data={\"seq_len\": 8}"]),
        "\
error: --set model={}: `model.path` is missing
hint: set it, or write the keys of a `config.json` as `model.config`
error: --set data={\"seq_len\": 8}: `data.tokens` is missing
hint: set it, or name text files as `data.text`"
    );
    assert_eq!(
        says(&run, &["data={\"seq_len\": 8, \"text\": [\"a.txt\"], \"dtype\": \"u16\"}"]),
        "\
error: --set data={\"seq_len\": 8, \"text\": [\"a.txt\"], \"dtype\": \"u16\"}: `data.dtype` is set, but it says \
something about `data.tokens` only
hint: leave it out
error: --set data={\"seq_len\": 8, \"text\": [\"a.txt\"], \"dtype\": \"u16\"}: `data.tokenizer` is missing
hint: a `tokenizer.json`, or {\"train_bpe\": {\"vocab_size\": 8192}} to train one on the text"
    );
    assert_eq!(
        says(&run, &["data={\"tokens\": \"t.bin\", \"tokenizer\": \"t.json\"}"]),
        "\
error: --set data={\"tokens\": \"t.bin\", \"tokenizer\": \"t.json\"}: `data.seq_len` is missing
hint: tokens of one sample, for example 512
error: --set data={\"tokens\": \"t.bin\", \"tokenizer\": \"t.json\"}: `data.tokenizer` is set, but it says something \
about `data.text` only
hint: leave it out
error: --set data={\"tokens\": \"t.bin\", \"tokenizer\": \"t.json\"}: `data.dtype` is missing
hint: `\"u16\"` or `\"u32\"`, as the file was written"
    );
}

#[test]
fn an_empty_run_file_lists_what_is_missing() {
    assert_eq!(
        says("{}", &[]),
        "\
error: run.json:1: `data` is missing
hint: set `data.tokens` or `data.text`, and `data.seq_len`
error: run.json:1: `deepspeed` is missing
hint: name a DeepSpeed configuration file, or write its content inline: batch size and optimizer come from it
error: run.json:1: `model` is missing
hint: set `model.path` to a Hugging Face folder, or write `model.config` inline
error: run.json:1: `steps` is missing
hint: the number of optimizer steps to train"
    );
}

#[test]
fn files_that_cannot_be_read() {
    let missing = "No such file or directory (os error 2)";
    let files =
        Files::new(&[("run.json", &run_with("\"ds.json\"")), ("list.json", "[1]"), ("bad.json", "{,}")]);
    assert_eq!(
        files.load("none.json", &[], 1).unwrap_err(),
        format!("error: could not read `none.json`: {missing}")
    );
    assert_eq!(
        files.load("run.json", &[], 1).unwrap_err(),
        format!(
            "error: run.json:5: could not read `ds.json`: {missing}\nhint: relative paths start at the run file's folder"
        )
    );
    assert_eq!(
        files.load("run.json", &["deepspeed=list.json"], 1).unwrap_err(),
        "error: list.json:1: `the configuration` is `[1]`, expected an object"
    );
    assert_eq!(
        files.load("run.json", &["deepspeed=bad.json", "steps=x"], 1).unwrap_err(),
        "\
error: bad.json:1:2: `,` where a key or `}` should be
error: --set steps=x: `steps` is `\"x\"`, expected a whole number of at least 1"
    );
    assert_eq!(
        files.load("list.json", &[], 1).unwrap_err(),
        "error: list.json:1: `the configuration` is `[1]`, expected an object"
    );
}

#[test]
fn overrides_that_lead_nowhere() {
    assert_eq!(
        says(
            &run_with(&deepspeed("")),
            &["steps", "a..b=1", "steps.more=1", "deepspeed.zero_optimization.stge=2", "deepspeed.bf16={\"enabled\": 1, \"enabled\": 2}"]
        ),
        "\
error: --set steps: there is no `=`
hint: write `--set KEY.PATH=VALUE`, for example `--set steps=10`
error: --set a..b=1: a part of the key path is empty
hint: write it like `deepspeed.zero_optimization.stage`
error: --set steps.more=1: `steps` is `10`, which has no keys
hint: set the whole value instead
error: --set deepspeed.bf16={\"enabled\": 1, \"enabled\": 2}: `deepspeed.bf16.enabled` is set twice, first at --set \
deepspeed.bf16={\"enabled\": 1, \"enabled\": 2}
hint: keep one of the two
error: --set deepspeed.zero_optimization.stge=2: `deepspeed.zero_optimization.stge` is not a known key
hint: did you mean `stage`?"
    );
}

#[test]
fn a_run_of_no_ranks() {
    assert_eq!(
        load(&run_with(&deepspeed("")), &[], 0).unwrap_err(),
        "error: a run needs at least one rank, got `-n 0`\nhint: `-n 1` runs on this process alone"
    );
}
