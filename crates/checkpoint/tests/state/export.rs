//! Checkpoints as Hugging Face folders.

use std::fs;

use half::bf16;
use serde_json::{Value, json};
use shardwise_checkpoint::state::{Attachment, Checkpoint, Keep, Region};
use shardwise_checkpoint::{CheckpointError, FileDType, HfReader};

use crate::common::{Layout, TENSORS, contents, save, values, write_rank};

#[test]
fn a_model_from_any_mesh() {
    let dir = tempfile::tempdir().unwrap();
    for (step, layout) in [Layout::zero(1), Layout { data: 3, tensor: 2 }].into_iter().enumerate() {
        let step = step as u64;
        let committed = save(&dir.path().join("checkpoints"), layout, step, 1, Keep::All).unwrap();
        let checkpoint = Checkpoint::open(&committed.dir).unwrap();
        for (dtype, name) in [(FileDType::F32, "float32"), (FileDType::Bf16, "bfloat16")] {
            let model = dir.path().join(format!("{name}-{step}"));
            let mut done = 0;
            let exported =
                checkpoint.export(&model, dtype, 300, |progress| done = progress.done_bytes).unwrap();
            assert_eq!((exported.num_params, done), (5 + 65 + 55 + 55 + 84 + 1, 265 * 4));
            assert!(exported.files.iter().all(|file| file.is_file()));
            assert!(model.join("model.safetensors.index.json").exists());
            let reader = HfReader::open(&model).unwrap();
            assert_eq!(reader.tensors().len(), TENSORS.len());
            for (name, shape) in TENSORS {
                let mut expected = values(name, "param", step, shape, &Region::whole(shape));
                if dtype == FileDType::Bf16 {
                    expected.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32());
                }
                reader.expect(name, shape).unwrap();
                assert_eq!(reader.read_f32(name).unwrap(), expected, "{name}");
            }
            let config: Value =
                serde_json::from_slice(&fs::read(model.join("config.json")).unwrap()).unwrap();
            assert_eq!(
                config,
                json!({"model_type": "llama", "torch_dtype": name, "architectures": ["LlamaForCausalLM"]})
            );
        }
    }
}

#[test]
fn only_files_of_a_model_are_copied() {
    let dir = tempfile::tempdir().unwrap();
    let save = write_rank(dir.path(), Layout::zero(1), 3, 1, 0).unwrap();
    let mut said = contents(Layout::zero(1), 3);
    let attach = |name: &str, text: &str| Attachment { name: name.to_owned(), bytes: text.as_bytes().into() };
    said.attached =
        vec![attach("tokenizer.json", "{}"), attach("run.toml", "x"), attach("model.safetensors", "x")];
    let committed = save.commit(&said, Keep::All).unwrap();
    let model = dir.path().join("model");
    let checkpoint = Checkpoint::open(&committed.dir).unwrap();
    checkpoint.export(&model, FileDType::F16, u64::MAX, |_| ()).unwrap();
    let mut names: Vec<_> = fs::read_dir(&model).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["model.safetensors", "tokenizer.json"]);
    assert!(HfReader::open(&model).is_ok());
}

#[test]
fn damage_is_not_exported() {
    let dir = tempfile::tempdir().unwrap();
    let committed = save(dir.path(), Layout::zero(2), 3, 1, Keep::All).unwrap();
    let path = committed.dir.join("rank-00001.safetensors");
    let good = fs::read(&path).unwrap();
    let model = dir.path().join("model");
    let export_with_flip_at = |place: usize| {
        let mut bytes = good.clone();
        bytes[place] ^= 1;
        fs::write(&path, bytes).unwrap();
        let checkpoint = Checkpoint::open(&committed.dir).unwrap();
        checkpoint.export(&model, FileDType::F32, u64::MAX, |_| ())
    };
    // The file begins with parameters, after its header.
    let data_start = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let error = export_with_flip_at(data_start).unwrap_err();
    assert!(matches!(error, CheckpointError::Damaged { .. }));
    assert!(error.to_string().contains("rank-00001.safetensors`, which holds `param` of `"), "{error}");
    assert_eq!(fs::read_dir(&model).unwrap().count(), 0);
    // Its last bytes are moments, which no model needs.
    export_with_flip_at(good.len() - 1).unwrap();
}
