//! Hugging Face folders: `config.json` and `*.safetensors`.

use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;

use serde_json::Value;
use shardwise_checkpoint::{FileDType, HfReader, HfWriter, TensorMeta};
use shardwise_engine::{BoxError, Engine, ParamSource};
use shardwise_plan::zoo::ModelConfig;
use shardwise_plan::{LayerSpec, ParamSpec};

use crate::ModelError;

/// Files larger than this are split, as Hugging Face's tools do.
const MAX_FILE_BYTES: u64 = 5_000_000_000;

/// Reads `config.json` in `dir`: what it means to us, and all that it says.
///
/// # Errors
/// [`ModelError::ReadConfig`], [`ModelError::ParseConfig`], [`ModelError::Config`], which name the file.
pub fn read_config(dir: &Path) -> Result<(ModelConfig, Value), ModelError> {
    let path = dir.join("config.json");
    let text = std::fs::read_to_string(&path)
        .map_err(|source| ModelError::ReadConfig { path: path.clone(), source })?;
    let json: Value = serde_json::from_str(&text)
        .map_err(|source| ModelError::ParseConfig { path: path.clone(), source })?;
    let config = ModelConfig::from_json(&json).map_err(|source| ModelError::Config { path, source })?;
    Ok((config, json))
}

/// Parameters from a Hugging Face folder, read by element range.
#[derive(Debug)]
pub struct HfSource {
    reader: HfReader,
}

impl HfSource {
    /// Opens the weights in `dir` and checks that every parameter of `layers` is there with its shape.
    ///
    /// # Errors
    /// [`ModelError::Weights`], which names the file and the tensor.
    pub fn open(dir: &Path, layers: &[LayerSpec]) -> Result<Self, ModelError> {
        let source = HfSource { reader: HfReader::open(dir)? };
        for param in layers.iter().flat_map(|layer| &layer.params) {
            source.reader.expect(source.name_in_file(&param.name), &param.shape)?;
        }
        Ok(source)
    }

    /// Some files hold the bare decoder, without the prefix that the language model puts before its names.
    fn name_in_file<'a>(&self, name: &'a str) -> &'a str {
        match name.split_once('.') {
            Some(("model" | "transformer", bare))
                if !self.reader.contains(name) && self.reader.contains(bare) =>
            {
                bare
            }
            _ => name,
        }
    }
}

impl ParamSource for HfSource {
    fn fill(&mut self, param: &ParamSpec, range: Range<usize>, out: &mut [f32]) -> Result<(), BoxError> {
        Ok(self.reader.read_range_f32(self.name_in_file(&param.name), range, out)?)
    }
}

/// Writes the model's master weights to `dir` in fp32, with `config` as its `config.json`; rank 0 writes, the others help
/// to gather. Needs memory for one layer.
///
/// # Collective
/// Every rank calls.
/// # Errors
/// [`ModelError::Weights`] or [`ModelError::Write`], on rank 0; a failed collective.
pub fn save_hf(engine: &mut Engine, dir: &Path, config: &Value) -> Result<(), ModelError> {
    let is_writer = engine.ranks().world().group_rank() == 0;
    let mut seen = HashSet::new();
    let metas = engine
        .specs()
        .iter()
        .flat_map(|layer| &layer.params)
        .filter(|param| seen.insert(param.name.clone()))
        .map(|param| TensorMeta {
            name: param.name.clone(),
            shape: param.shape.clone(),
            dtype: FileDType::F32,
        })
        .collect::<Vec<_>>();
    let mut writer = if is_writer { Some(HfWriter::create(dir, &metas, MAX_FILE_BYTES)?) } else { None };
    engine.for_each_param::<ModelError>(|param, values| match &mut writer {
        Some(writer) => Ok(writer.write(&param.name, values)?),
        None => Ok(()),
    })?;
    if let Some(writer) = writer {
        let path = dir.join("config.json");
        let text = format!("{:#}\n", describe_saved(config));
        std::fs::write(&path, text).map_err(|source| ModelError::Write { path, source })?;
        writer.finish()?;
    }
    Ok(())
}

/// `config`, with what the saved weights have changed: their type, and that they are a whole language model even if the
/// folder they came from held a bare decoder, or a run file described them.
fn describe_saved(config: &Value) -> Value {
    let mut config = config.clone();
    let Some(object) = config.as_object_mut() else { return config };
    // Newer files say `dtype`, older ones `torch_dtype`.
    for key in ["dtype", "torch_dtype"] {
        if object.contains_key(key) || key == "torch_dtype" && !object.contains_key("dtype") {
            object.insert(key.into(), "float32".into());
        }
    }
    let architecture = match object.get("model_type").and_then(Value::as_str) {
        Some("llama") => "LlamaForCausalLM",
        Some("gpt2") => "GPT2LMHeadModel",
        _ => return config,
    };
    object.insert("architectures".into(), vec![architecture].into());
    config
}
