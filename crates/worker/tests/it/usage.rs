//! Mistakes of launchers and run files: each has its message, its hint and its exit code, and no rank waits for another.

use serde_json::{Value, json};

use crate::case::{Case, fixture};
use crate::ranks::{Ended, Ranks};

const USAGE: Option<i32> = Some(2);
const TRAINING: Option<i32> = Some(1);

fn run_file() -> Value {
    Case { steps: 2, micro_batch: 1, ..Case::new(2) }.run_file()
}

/// Every rank ended with `code` and said all of `texts`.
fn assert_said(ended: &Ended, code: Option<i32>, texts: &[&str]) {
    for (rank, stderr) in ended.stderr.iter().enumerate() {
        assert_eq!(ended.codes[rank], code, "rank {rank} of {}", ended.report());
        for text in texts {
            assert!(stderr.contains(text), "rank {rank} does not say {text:?}:{}", ended.report());
        }
    }
}

#[test]
fn a_launcher_that_says_half_is_told_what_is_missing() {
    let alone = |name, value| Ranks::new(&run_file(), 1).env(0, name, value).run();
    let only_rank = alone("WORLD_SIZE", None);
    assert_said(
        &only_rank,
        USAGE,
        &[
            "error: environment variable `RANK` is set, but `WORLD_SIZE` is not\n",
            "hint: set both, or neither to run a single rank\n",
        ],
    );
    let only_size = alone("RANK", None);
    assert_said(&only_size, USAGE, &["error: environment variable `WORLD_SIZE` is set, but `RANK` is not\n"]);
    let no_number = alone("RANK", Some("one"));
    assert_said(
        &no_number,
        USAGE,
        &[
            "error: environment variable `RANK` is `one`, expected a whole number\n",
            "hint: the launcher sets it",
        ],
    );
    let other_host = alone("LOCAL_RANK", Some("1"));
    assert_said(
        &other_host,
        USAGE,
        &["error: `LOCAL_RANK` is `1` on rank `0`: ranks on several hosts\n", "hint: "],
    );
}

#[test]
fn a_gpu_that_is_not_there_is_named_before_anything_is_built() {
    let mut run = run_file();
    run["device"] = "cuda".into();
    run["cuda"] = json!({ "memory_limit": "1GB", "share": true });
    let both = Ranks::new(&run, 1).run();
    assert_said(
        &both,
        USAGE,
        &["error: `cuda.memory_limit` is set, and `cuda.share` lets", "hint: leave one"],
    );
    run["cuda"] = json!({});
    // Hides those of a machine that has some.
    let ended = Ranks::new(&run, 1).env(0, "CUDA_VISIBLE_DEVICES", Some("")).run();
    let says = &ended.stderr[0];
    assert_eq!(ended.codes[0], USAGE, "{says}");
    assert!(says.contains("no CUDA driver: could not load") || says.contains("sees no GPU"), "{says}");
}

#[test]
fn a_rank_out_of_range_is_refused() {
    for rank in ["1", "7"] {
        let ended = Ranks::new(&run_file(), 1).env(0, "RANK", Some(rank)).run();
        assert_said(
            &ended,
            USAGE,
            &[
                &format!("error: `RANK` is `{rank}` and `WORLD_SIZE` is `1`\n"),
                "hint: ranks count from 0 to `WORLD_SIZE` - 1\n",
            ],
        );
    }
}

#[test]
fn two_processes_with_one_rank_are_told_so() {
    let ended = Ranks::new(&run_file(), 3).env(2, "RANK", Some("1")).env(2, "LOCAL_RANK", Some("1")).run();
    assert_said(&ended, TRAINING, &["error: ", "two processes are rank `1`"]);
}

#[test]
fn ranks_with_different_run_files_are_told_so() {
    let other = json!({ "steps": 3 });
    let ended = Ranks::new(&run_file(), 2).run_file_of(1, &merged(run_file(), other)).run();
    assert_said(
        &ended,
        TRAINING,
        &["error: ", "ranks `0` and `1` were started with different configurations"],
    );
}

#[test]
fn mistakes_in_the_run_file_end_every_rank_with_a_hint() {
    let cases: [(Value, &[&str]); 6] = [
        (
            json!({ "deepspeed": { "zero_optimization": { "stge": 2 } } }),
            &["`deepspeed.zero_optimization.stge` is not a known key", "hint: did you mean `stage`?"],
        ),
        (
            json!({ "deepspeed": { "train_batch_size": 5 } }),
            &["`train_batch_size` 5 is not", "hint: set `train_batch_size` to 2"],
        ),
        (
            json!({ "data": { "seq_len": 65 } }),
            &[
                "error: `data.seq_len` is `65`, the model has `64` positions\n",
                "hint: shorten the samples, or raise the model's number of positions\n",
            ],
        ),
        (json!({ "data": { "tokens": "no-such-file.bin" } }), &["`data.tokens`", "no-such-file.bin"]),
        (json!({ "model": { "path": fixture("") } }), &["config.json"]),
        (
            json!({ "deepspeed": { "fp16": { "enabled": true, "auto_cast": true } } }),
            &["`deepspeed.fp16.auto_cast`"],
        ),
    ];
    for (change, texts) in cases {
        let ended = Ranks::new(&merged(run_file(), change), 2).run();
        assert_said(&ended, USAGE, texts);
        assert_said(&ended, USAGE, &["error: "]);
    }
}

#[test]
fn unsupported_arguments_are_refused() {
    let ended = Ranks::new(&run_file(), 1).arg("--resume").arg("no-such-checkpoint").run();
    assert_said(&ended, USAGE, &["error: ", "no-such-checkpoint"]);
    let ended = Ranks::new(&run_file(), 1).arg("--set").arg("steps=many").run();
    assert_said(&ended, USAGE, &["error: ", "`steps`"]);
}

#[test]
fn weights_that_are_not_the_models_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = crate::case::read_json(&fixture("model/config.json"));
    config["num_hidden_layers"] = 3.into();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    std::fs::copy(fixture("model/model.safetensors"), folder.path().join("model.safetensors")).unwrap();
    let change = json!({ "model": { "path": folder.path() } });
    let ended = Ranks::new(&merged(run_file(), change), 2).run();
    assert_said(&ended, USAGE, &["error: ", "`model.layers.2.input_layernorm.weight`", "model.safetensors"]);
}

#[test]
fn patterns_that_match_no_parameter_are_refused() {
    for list in ["frozen", "no_decay"] {
        let change = json!({ "train": { list: ["*.nrom.*"] } });
        let ended = Ranks::new(&merged(run_file(), change), 2).run();
        let said = format!("error: `*.nrom.*` in `train.{list}` matches no parameter\n");
        assert_said(&ended, USAGE, &[&said, "hint: "]);
    }
}

#[test]
fn a_tokenizer_with_more_tokens_than_the_model_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text.txt");
    std::fs::write(&text, "the cat sat on the mat, and the rat sat on the cat. ".repeat(40)).unwrap();
    let mut run = run_file();
    let mut model = crate::case::read_json(&fixture("model/config.json"));
    model["vocab_size"] = 256.into();
    run["model"] = json!({ "config": model });
    run["data"] =
        json!({ "text": [text], "tokenizer": { "train_bpe": { "vocab_size": 260 } }, "seq_len": 16 });
    let ended = Ranks::new(&run, 2).run();
    assert_said(
        &ended,
        USAGE,
        &[
            "error: the tokenizer has `260` tokens, the model's `vocab_size` is `256`\n",
            "hint: use the model's own tokenizer, or a smaller vocabulary\n",
        ],
    );
}

#[test]
fn a_token_outside_the_vocabulary_ends_all_ranks_and_names_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokens.bin");
    // In the second sample, which is rank 1's.
    let mut tokens = vec![0u16; 1024];
    tokens[100] = 1024;
    let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
    std::fs::write(&path, bytes).unwrap();
    let ended = Ranks::new(&merged(run_file(), json!({ "data": { "tokens": path } })), 2).run();
    assert_eq!(ended.codes, [TRAINING, TRAINING], "{}", ended.report());
    let said = &ended.stderr[1];
    assert!(
        said.contains("has token `1024` at byte `200`, expected less than the vocabulary size `1024`"),
        "{said}"
    );
    assert!(ended.stderr[0].contains("rank `1` gave up"), "{}", ended.report());
}

/// `base` with the values of `change` in their places.
fn merged(mut base: Value, change: Value) -> Value {
    match (base.as_object_mut(), change) {
        (Some(object), Value::Object(changes)) => {
            for (key, value) in changes {
                let old = object.remove(&key).unwrap_or(Value::Null);
                object.insert(key, merged(old, value));
            }
            base
        }
        (_, change) => change,
    }
}
