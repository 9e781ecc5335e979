//! `shardwise inspect`, `verify` and `export` as people and scripts meet them.

// Helpers of tests may unwrap as tests may.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Output};

use serde_json::json;
use shardwise_checkpoint::state::{Attachment, Contents, Fragment, Keep, Mesh, Region, Save};
use shardwise_checkpoint::{FileDType, HfReader};

/// A run of two ranks that saved after two steps.
fn save(run: &Path, step: u64) {
    let dir = run.join("checkpoints");
    std::fs::create_dir_all(run).unwrap();
    let shape = [6, 4];
    let mut saves = Vec::new();
    for rank in 0..2 {
        let save = Save::begin(&dir, step, 0xbeef, rank).unwrap();
        let fragment = |kind: &str| Fragment {
            name: "model.layers.0.weight".to_owned(),
            kind: kind.to_owned(),
            dtype: FileDType::F32,
            shape: shape.to_vec(),
            region: Region::flat(&shape, rank * 12..rank * 12 + 12),
        };
        let mut writer = save.shard_writer(&[fragment("param"), fragment("exp_avg")]).unwrap();
        for i in 0..2 {
            let values = (0..12).map(|element| (rank * 12 + element) as f32 + i as f32 * 0.5);
            writer.write(i, &values.flat_map(f32::to_le_bytes).collect::<Vec<_>>()).unwrap();
        }
        writer.finish().unwrap();
        saves.push(save);
    }
    let attach = |name: &str, text: &str| Attachment { name: name.to_owned(), bytes: text.as_bytes().into() };
    let contents = Contents {
        program: "shardwise 0.1.0".to_owned(),
        mesh: Mesh { world_size: 2, zero_stage: 1, pipeline: 1, data: 2, tensor: 1 },
        config: json!({"steps": 10}),
        run_state: json!({"applied": step}),
        attached: vec![attach("config.json", r#"{"model_type":"llama"}"#), attach("tokenizer.json", "{}")],
    };
    saves.swap_remove(0).commit(&contents, Keep::All).unwrap();
}

fn shardwise(folder: &Path, args: &str) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shardwise"));
    let Output { status, stdout, stderr } =
        command.args(args.split(' ')).current_dir(folder).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code(), text(stdout), text(stderr))
}

#[test]
fn inspect_shows_what_is_there() {
    let folder = tempfile::tempdir().unwrap();
    save(&folder.path().join("run"), 4);
    save(&folder.path().join("run"), 8);
    for path in ["run", "run/checkpoints", "run/checkpoints/step-000008"] {
        let (code, shown, errors) = shardwise(folder.path(), &format!("inspect {path}"));
        assert_eq!((code, errors.as_str()), (Some(0), ""));
        for line in [
            "checkpoint  run/checkpoints/step-000008",
            "step        8",
            "ranks       2 = pipeline 1 x data 2 x tensor 1, ZeRO stage 1",
            "with        config.json, tokenizer.json",
            "written by  shardwise 0.1.0, run 000000000000beef, format 1",
            "kind     tensors  elements      size",
            "param          1        24  96 bytes",
            "exp_avg        1        24  96 bytes",
            "model.layers.0.weight  [6, 4]  F32   param, exp_avg",
            "  \"applied\": 8",
            "  \"steps\": 10",
        ] {
            assert!(shown.lines().any(|shown| shown == line), "no line `{line}` in\n{shown}");
        }
    }
}

#[test]
fn verify_names_what_is_damaged() {
    let folder = tempfile::tempdir().unwrap();
    save(&folder.path().join("run"), 4);
    save(&folder.path().join("run"), 8);
    let (code, shown, errors) = shardwise(folder.path(), "verify run");
    assert_eq!((code, errors.as_str()), (Some(0), ""));
    assert!(
        shown.starts_with("run/checkpoints/step-000008: step 8, ") && shown.contains(" GB/s)"),
        "{shown}"
    );

    let file = folder.path().join("run/checkpoints/step-000008/rank-00001.safetensors");
    let good = std::fs::read(&file).unwrap();
    let mut bad = good.clone();
    *bad.last_mut().unwrap() ^= 4;
    std::fs::write(&file, &bad).unwrap();
    let (code, shown, errors) = shardwise(folder.path(), "verify run");
    assert_eq!(code, Some(1));
    assert!(errors.starts_with("error: `run/checkpoints/step-000008` is damaged\nhint: "), "{errors}");
    let lost = "  param of model.layers.0.weight\n  exp_avg of model.layers.0.weight\n";
    let stretch = format!("bytes `0..{}` are not what was written (altered)", good.len());
    assert_eq!(shown, format!("rank-00001.safetensors: {stretch}\n{lost}"));

    // A newest checkpoint with a short file is verified too, not passed over.
    std::fs::write(&file, &good[..good.len() - 1]).unwrap();
    let (code, shown, _) = shardwise(folder.path(), "verify run");
    assert_eq!(code, Some(1));
    assert!(shown.starts_with("rank-00001.safetensors: it has `"), "{shown}");
    // Others go on with the one before, and say so.
    let (code, shown, errors) = shardwise(folder.path(), "inspect run");
    assert!(code == Some(0) && shown.contains("step        4\n"), "{shown}");
    assert!(errors.starts_with("warning: passed over a damaged checkpoint: `run/checkpoints/"), "{errors}");

    // So is one when no other is left.
    std::fs::rename(folder.path().join("run/checkpoints/step-000004"), folder.path().join("aside")).unwrap();
    assert!(shardwise(folder.path(), "verify run").1.starts_with("rank-00001.safetensors: it has `"));

    std::fs::write(file.with_file_name("manifest.json"), "{}").unwrap();
    let (code, _, errors) = shardwise(folder.path(), "verify run/checkpoints/step-000008");
    assert_eq!(code, Some(1));
    assert!(errors.contains("manifest.json`: it does not begin with a checksum"), "{errors}");
}

#[test]
fn export_writes_a_model() {
    let folder = tempfile::tempdir().unwrap();
    save(&folder.path().join("run"), 4);
    let (code, shown, errors) = shardwise(folder.path(), "export run model --dtype bf16");
    assert_eq!((code, errors.as_str()), (Some(0), ""));
    assert!(shown.starts_with("step 4, 24 parameters as BF16 ("), "{shown}");
    assert!(
        shown.ends_with("  model/config.json\n  model/tokenizer.json\n  model/model.safetensors\n"),
        "{shown}"
    );
    let reader = HfReader::open(folder.path().join("model")).unwrap();
    let expected: Vec<_> = (0..24).map(|element| element as f32).collect();
    assert_eq!(reader.read_f32("model.layers.0.weight").unwrap(), expected);
    let config = std::fs::read_to_string(folder.path().join("model/config.json")).unwrap();
    assert!(config.contains("\"torch_dtype\": \"bfloat16\""), "{config}");

    let (code, _, errors) = shardwise(folder.path(), "export run run/checkpoints/step-000004");
    assert_eq!(code, Some(2));
    assert!(
        errors.starts_with("error: `run/checkpoints/step-000004` is itself a checkpoint\nhint: "),
        "{errors}"
    );
}

#[test]
fn where_nothing_is_nothing_is_found() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("empty")).unwrap();
    for command in
        ["inspect empty", "verify empty", "export empty model", "inspect nowhere", "verify nowhere"]
    {
        let (code, shown, errors) = shardwise(folder.path(), command);
        assert_eq!((code, shown.as_str()), (Some(2), ""), "{command}");
        assert!(errors.starts_with("error: there is no checkpoint in `"), "{errors}");
    }
}
