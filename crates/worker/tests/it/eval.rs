//! The loss on a held-out text: the same while training on sharded ranks and from the saved model.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::ranks::Ranks;

const TRAINED_ON: &str =
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer\n";
const HELD_OUT: &str = "the question is to suffer in the mind, or not to be nobler...";

/// Two fp32 programs that add the same numbers in another order; the note shows four digits.
const TOLERANCE: f64 = 1e-4;
/// Two such numbers, both of four digits.
const SHOWN_TOLERANCE: f64 = 2.01e-4;

fn run_file(dir: &Path, stage: usize) -> Value {
    std::fs::write(dir.join("text.txt"), TRAINED_ON.repeat(40)).unwrap();
    std::fs::write(dir.join("held-out.txt"), HELD_OUT).unwrap();
    json!({
        "model": { "config": {
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 16, "tie_word_embeddings": true,
        }},
        "data": {
            "text": dir.join("text.txt"), "tokenizer": { "train_bpe": { "vocab_size": 280 } }, "seq_len": 8,
        },
        "steps": 30,
        "deepspeed": {
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": { "stage": stage },
            "optimizer": { "type": "AdamW", "params": { "lr": 1e-2 } },
        },
    })
}

fn eval(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_shardwise-worker")).arg("eval").args(args).output().unwrap()
}

/// The number after `loss` in a line that begins like this.
fn loss_in(log: &str, begin: &str) -> f64 {
    let line =
        log.lines().find_map(|line| line.split_once(begin)).unwrap_or_else(|| panic!("{begin}: {log}")).1;
    line.trim_start_matches(": loss ").split(',').next().unwrap().parse().unwrap()
}

#[test]
fn training_ranks_and_the_saved_model_agree_on_a_held_out_text() {
    // The windows do not divide evenly: one rank of three runs out first.
    for (num_ranks, stage) in [(2, 3), (3, 3), (2, 0)] {
        let dir = tempfile::tempdir().unwrap();
        let held_out = dir.path().join("held-out.txt");
        let held_out = held_out.to_str().unwrap();
        let ended = Ranks::new(&run_file(dir.path(), stage), num_ranks).arg("--eval").arg(held_out).run();
        assert!(ended.codes.iter().all(|code| *code == Some(0)), "{}", ended.report());
        let [before, after] = ["before", "after"]
            .map(|when| loss_in(&ended.stderr[0], &format!("held-out text {when} training")));
        // A model that knows nothing hesitates among its 280 tokens.
        assert!((before - 280_f64.ln()).abs() < 0.5 && after < before - 0.5, "{before} {after}");

        let model = ended.path("model");
        let output = eval(&[model.to_str().unwrap(), "--text", held_out, "--seq-len", "8", "--json"]);
        let json: Value = serde_json::from_slice(&output.stdout).unwrap();
        let loss = json["loss"].as_f64().unwrap();
        assert!((loss - after).abs() < TOLERANCE, "{num_ranks} ranks, stage {stage}: {loss} {after}");
        assert!((json["perplexity"].as_f64().unwrap() - loss.exp()).abs() < 1e-9);

        let part = eval(&[model.to_str().unwrap(), "--text", held_out, "--max-tokens", "10", "--json"]);
        let part: Value = serde_json::from_slice(&part.stdout).unwrap();
        assert_eq!((&part["tokens"], &part["seq_len"]), (&json!(10), &json!(16)));

        for (args, expected) in [
            (
                ["--text", held_out, "--seq-len", "17"],
                "error: `--seq-len` is `17`, the model has `16` positions\nhint: ",
            ),
            (
                ["--text", "no/such/file", "--seq-len", "8"],
                "error: held-out text `no/such/file` cannot be read: ",
            ),
        ] {
            let output = eval(&[&[model.to_str().unwrap()], &args[..]].concat());
            let said = String::from_utf8(output.stderr).unwrap();
            assert!(said.starts_with(expected), "{said}");
            assert_eq!(output.status.code(), Some(2));
        }
    }
}

#[test]
fn a_mesh_measures_a_text_as_one_rank_does() {
    let dir = tempfile::tempdir().unwrap();
    let measure = |[pipeline, data, tensor]: [usize; 3], stage: usize, sequence: bool| {
        let mut run = run_file(dir.path(), stage);
        run["steps"] = 10.into();
        run["deepspeed"]["train_micro_batch_size_per_gpu"] = 2.into();
        run["deepspeed"]["train_batch_size"] = 8.into();
        run["parallel"] = json!({ "pipeline": pipeline, "tensor": tensor, "sequence": sequence });
        let held_out = dir.path().join("held-out.txt");
        let ended =
            Ranks::new(&run, pipeline * data * tensor).arg("--eval").arg(held_out.to_str().unwrap()).run();
        assert!(ended.codes.iter().all(|code| *code == Some(0)), "{}", ended.report());
        let log = &ended.stderr[0];
        let [before, after] =
            ["before", "after"].map(|when| loss_in(log, &format!("held-out text {when} training")));
        let num_tokens: Vec<_> = log.lines().filter_map(|line| Some(line.split_once(", over ")?.1)).collect();
        (before, after, num_tokens.join(", "))
    };
    let alone = measure([1, 1, 1], 0, false);
    assert_eq!(alone.2.matches(" tokens").count(), 2, "{}", alone.2);
    for (mesh, stage, sequence) in
        [([2, 1, 1], 1, false), ([1, 1, 2], 0, true), ([2, 2, 1], 3, false), ([1, 2, 2], 3, false)]
    {
        let found = measure(mesh, stage, sequence);
        assert_eq!(found.2, alone.2, "{mesh:?}");
        let gaps = [(found.0 - alone.0).abs(), (found.1 - alone.1).abs()];
        assert!(gaps.iter().all(|&gap| gap <= SHOWN_TOLERANCE), "{mesh:?}: {found:?}, alone {alone:?}");
    }
}

#[test]
fn a_run_on_token_ids_has_no_tokenizer_for_a_text() {
    let run = crate::case::Case { steps: 1, ..crate::case::Case::new(2) }.run_file();
    let ended = Ranks::new(&run, 1).arg("--eval").arg("any.txt").run();
    assert_eq!(ended.codes, [Some(2)]);
    let expected = "error: `--eval` names a text, but the run reads token ids\nhint: train on `data.text`";
    assert!(ended.stderr[0].contains(expected), "{}", ended.report());
}
