//! What `save_hf` writes: the same bits, however the model was sharded, in files that other tools read.

use std::fs;
use std::path::Path;

use serde_json::Value;
use shardwise_checkpoint::{FileDType, HfReader, HfWriter, TensorMeta};
use shardwise_comm::{solo, thread};
use shardwise_device::DType;
use shardwise_engine::{Batch, Engine, EngineError};
use shardwise_models::{read_config, save_hf};
use shardwise_plan::ZeroStage;

use crate::fixture::{Golden, MODELS, folder, frozen, load, numbers, options};

/// A parameter's name and its values, whole.
type Values = Vec<(String, Vec<f32>)>;

fn values(engine: &mut Engine) -> Values {
    let mut all = Values::new();
    engine
        .for_each_param::<EngineError>(|param, values| {
            all.push((param.name.clone(), values.to_vec()));
            Ok(())
        })
        .unwrap();
    all
}

/// Trains a fixture for two steps on `world_size` ranks and saves it to `dir`. Returns what every rank held, and predicts.
fn train_and_save(
    model: &str,
    stage: ZeroStage,
    compute: DType,
    world_size: usize,
    dir: &Path,
) -> (Values, Vec<f32>) {
    let mut of_ranks = thread::run(world_size, |group| {
        let golden = Golden::read(model);
        let rank = group.group_rank() as i64;
        let mut engine = load(&folder(model), options(stage, compute), group);
        for _ in 0..2 {
            let (input, target) = golden.next_token();
            let mine = |all: &shardwise_torch::Tensor| all.f_narrow(0, rank % 2, 1);
            let batch = |_| Ok(Batch { input: mine(&input)?, target: mine(&target)?, first_row: 0 });
            engine.train_step(1e-2, batch).unwrap();
        }
        let (_, json) = read_config(&folder(model)).unwrap();
        save_hf(&mut engine, dir, &json).unwrap();
        (values(&mut engine), numbers(&engine.predict(&golden.ids).unwrap()))
    });
    let (first, logits) = of_ranks.remove(0);
    for (rank, (others, _)) in of_ranks.iter().enumerate() {
        assert!(*others == first, "{model}: rank {} holds other values than rank 0", rank + 1);
    }
    (first, logits)
}

fn file_names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_saved_model_has_the_same_bits_at_every_stage_and_reads_back() {
    for model in MODELS {
        let born = values(&mut load(&folder(model), frozen(), solo()));
        for (world_size, compute) in [2, 3].into_iter().flat_map(|n| [(n, DType::F32), (n, DType::Bf16)]) {
            let mut first: Option<Vec<u8>> = None;
            for stage in ZeroStage::ALL {
                let what = format!("{model}, {world_size} ranks, stage {stage}, {compute:?}");
                let dir = tempfile::tempdir().unwrap();
                let (trained, _) = train_and_save(model, stage, compute, world_size, dir.path());
                for ((name, before), (_, after)) in born.iter().zip(&trained) {
                    assert!(before != after, "{what}: `{name}` has not learned");
                }

                assert_eq!(file_names(dir.path()), ["config.json", "model.safetensors"], "{what}");
                let reader = HfReader::open(dir.path()).unwrap();
                assert_eq!(reader.tensors().len(), trained.len(), "{what}");
                for (name, expected) in &trained {
                    assert_eq!(reader.info(name).unwrap().dtype, FileDType::F32, "{what}: `{name}`");
                    assert!(reader.read_f32(name).unwrap() == *expected, "{what}: `{name}`");
                }
                // Opening checks every shape.
                let back = values(&mut load(dir.path(), frozen(), solo()));
                assert!(back == trained, "{what}: read back");

                let bytes = fs::read(dir.path().join("model.safetensors")).unwrap();
                assert!(*first.get_or_insert_with(|| bytes.clone()) == bytes, "{what}: the bytes of stage 0");
            }
        }
    }
}

#[test]
fn config_json_keeps_what_it_said_and_says_what_the_weights_are() {
    for (model, architecture) in [
        ("llama-gqa", "LlamaForCausalLM"),
        ("llama-bias-rope", "LlamaForCausalLM"),
        ("gpt2", "GPT2LMHeadModel"),
        ("gpt2-bare", "GPT2LMHeadModel"),
    ] {
        let (_, mut json) = read_config(&folder(model)).unwrap();
        json["dtype"] = "bfloat16".into();
        json["torch_dtype"] = "bfloat16".into();
        let dir = tempfile::tempdir().unwrap();
        let mut engine = load(&folder(model), frozen(), solo());
        save_hf(&mut engine, dir.path(), &json).unwrap();
        let (_, saved) = read_config(dir.path()).unwrap();
        for key in ["dtype", "torch_dtype"] {
            json[key] = "float32".into();
        }
        json["architectures"] = Value::from(vec![architecture]);
        assert_eq!(saved, json, "{model}");

        // Described inline in a run file, a model says neither.
        for key in ["dtype", "torch_dtype", "architectures"] {
            json.as_object_mut().unwrap().remove(key);
        }
        save_hf(&mut engine, dir.path(), &json).unwrap();
        let (_, saved) = read_config(dir.path()).unwrap();
        assert_eq!(saved["architectures"], Value::from(vec![architecture]), "{model}");
        assert_eq!(saved["torch_dtype"], "float32", "{model}");
    }
}

/// Leaves trained models and what they predict in `target/tmp/exports`, for `scripts/golden/check_export.py`, which loads them into the
/// transformers package.
#[test]
fn exports_for_the_transformers_package_are_complete() {
    for model in MODELS {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("exports").join(model);
        let (trained, logits) = train_and_save(model, ZeroStage::Three, DType::F32, 2, &dir);
        fs::write(dir.join("golden.json"), Golden::read(model).json.to_string()).unwrap();
        let scratch = tempfile::tempdir_in(&dir).unwrap();
        let meta = TensorMeta { name: "logits".into(), shape: vec![2, 40, 67], dtype: FileDType::F32 };
        let mut writer = HfWriter::create(scratch.path(), &[meta], u64::MAX).unwrap();
        writer.write("logits", &logits).unwrap();
        writer.finish().unwrap();
        fs::rename(scratch.path().join("model.safetensors"), dir.join("logits.safetensors")).unwrap();
        drop(scratch);

        assert_eq!(
            file_names(&dir),
            ["config.json", "golden.json", "logits.safetensors", "model.safetensors"]
        );
        let mut back = load(&dir, frozen(), solo());
        assert!(values(&mut back) == trained, "{model}");
        assert!(numbers(&back.predict(&Golden::read(model).ids).unwrap()) == logits, "{model}");
    }
}
