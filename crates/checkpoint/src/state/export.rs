//! A checkpoint's master parameters as a Hugging Face folder.
//!
//! Parameters are streamed piece by piece from the ranks' files into the new ones, whatever the mesh was: what is in
//! memory is one small buffer, never a tensor and never the model.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::io;
use crate::state::problem::Damage;
use crate::state::read::Checkpoint;
use crate::state::region::Region;
use crate::state::shard::Progress;
use crate::{CheckpointError, FileDType, HfWriter, TensorMeta};

/// The kind of tensor that a model consists of.
pub const PARAM: &str = "param";
const BUFFER_NUMEL: usize = 1 << 20;
const CONFIG: &str = "config.json";
/// What other programs look for beside the weights.
const MODEL_FILES: [&str; 9] = [
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
];

/// What [`Checkpoint::export`] wrote.
#[derive(Debug)]
pub struct Exported {
    /// The files, weights last.
    pub files: Vec<PathBuf>,
    /// Parameters, each counted once.
    pub num_params: usize,
}

impl Checkpoint {
    /// Writes the parameters in `dtype` to `dir`, in files of at most `max_shard_bytes` of data, with the
    /// configuration and tokenizer that were saved with the checkpoint. Weights of another model there are replaced.
    ///
    /// # Errors
    /// [`CheckpointError::NoParams`]; [`CheckpointError::Overflow`] if a number does not fit in `dtype`;
    /// [`CheckpointError::Damaged`], [`CheckpointError::Io`].
    pub fn export(
        &self,
        dir: impl AsRef<Path>,
        dtype: FileDType,
        max_shard_bytes: u64,
        mut report: impl FnMut(Progress),
    ) -> Result<Exported, CheckpointError> {
        let dir = dir.as_ref();
        let params: Vec<_> = self.tensors().filter(|tensor| tensor.kind == PARAM).collect();
        if params.is_empty() {
            return Err(CheckpointError::NoParams { dir: self.dir().to_owned() });
        }
        let metas: Vec<_> = params
            .iter()
            .map(|param| TensorMeta { name: param.name.to_owned(), shape: param.shape.to_vec(), dtype })
            .collect();
        let mut writer = HfWriter::create(dir, &metas, max_shard_bytes)?;
        let total_bytes = params.iter().map(|param| param.num_bytes()).sum();
        let mut progress = Progress { done_bytes: 0, total_bytes };
        let mut buffer = vec![0.0; BUFFER_NUMEL];
        for param in &params {
            writer.begin(param.name)?;
            for start in (0..param.numel()).step_by(BUFFER_NUMEL) {
                let range = start..param.numel().min(start + BUFFER_NUMEL);
                let values = &mut buffer[..range.len()];
                self.read_f32(param.name, PARAM, &Region::flat(param.shape, range), values)?;
                writer.append(values)?;
                progress.done_bytes += (values.len() * param.dtype.size_bits() / 8) as u64;
                report(progress);
            }
        }
        let mut files = Vec::new();
        for name in MODEL_FILES {
            let Some(mut bytes) = self.read_attached(name)? else { continue };
            if name == CONFIG {
                bytes = self.describe(&bytes, dtype)?;
            }
            let path = dir.join(name);
            fs::write(&path, bytes).map_err(|source| io("write", &path, source))?;
            files.push(path);
        }
        files.extend(writer.finish()?);
        Ok(Exported { files, num_params: params.iter().map(|param| param.numel()).sum() })
    }

    /// The saved `config.json` with what the exported weights change: their type, and that they are a language model
    /// even if the run started from a bare decoder or from a run file.
    fn describe(&self, config: &[u8], dtype: FileDType) -> Result<Vec<u8>, CheckpointError> {
        let bad = |why: String| CheckpointError::Damaged {
            path: self.dir().join(CONFIG),
            holds: "the model's configuration".to_owned(),
            damage: Damage::Unreadable { why },
        };
        let mut config: Value = serde_json::from_slice(config).map_err(|error| bad(error.to_string()))?;
        let object = config.as_object_mut().ok_or_else(|| bad("it is no JSON object".to_owned()))?;
        let name = match dtype {
            FileDType::Bf16 => "bfloat16",
            FileDType::F16 => "float16",
            FileDType::F64 => "float64",
            _ => "float32",
        };
        // Newer files say `dtype`, older ones `torch_dtype`.
        for key in ["dtype", "torch_dtype"] {
            if object.contains_key(key) || key == "torch_dtype" && !object.contains_key("dtype") {
                object.insert(key.into(), name.into());
            }
        }
        let architecture = match object.get("model_type").and_then(Value::as_str) {
            Some("llama") => Some("LlamaForCausalLM"),
            Some("gpt2") => Some("GPT2LMHeadModel"),
            _ => None,
        };
        if let Some(architecture) = architecture {
            object.insert("architectures".into(), vec![architecture].into());
        }
        Ok(format!("{config:#}\n").into_bytes())
    }
}
