//! From a GGUF file to a Hugging Face folder.
//!
//! All that can be refused is refused before anything is written: keys, tensors and tokenizer. Weights then stream
//! through a small buffer, one head at a time where rows change places.

use std::path::Path;

use serde_json::Value;

use crate::gguf::llama::{Llama, Rows, Wanted, deinterleave};
use crate::gguf::{GgufProblem, GgufReader, tokenizer};
use crate::{CheckpointError, FileDType, HfWriter, TensorMeta};

/// Elements on their way at a time, a multiple of every block.
const PIECE_NUMEL: usize = 64 * 1024;

/// Whether the tokenizer comes along.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenizerImport {
    /// It does; one that cannot is an error.
    Needed,
    /// Weights and `config.json` only.
    LeaveOut,
}

/// What a caller chooses.
#[derive(Debug, Clone)]
pub struct ImportOptions {
    /// The element type of the weights in the folder.
    pub dtype: FileDType,
    /// Larger files are split.
    pub max_shard_bytes: u64,
    /// Whether the tokenizer comes along.
    pub tokenizer: TokenizerImport,
}

/// What was imported.
#[derive(Debug, Clone)]
pub struct Imported {
    /// Weights in the model, those of a tied head counted once.
    pub num_params: usize,
    /// Tensors in the folder.
    pub num_tensors: usize,
    /// Tokens of the tokenizer, if it came along.
    pub num_tokens: Option<usize>,
}

/// Writes the Llama in `file` to `dir` as `config.json`, safetensors, `tokenizer.json` and `tokenizer_config.json`.
///
/// `check` sees `config.json` before anything is written and may refuse it.
///
/// # Errors
/// [`CheckpointError::Gguf`], [`CheckpointError::MissingTensor`], [`CheckpointError::WrongShape`] for what cannot be
/// imported; [`CheckpointError::Overflow`] if a weight does not fit in `dtype`; [`CheckpointError::Io`]; what `check`
/// says.
pub fn import<E: From<CheckpointError>>(
    file: &GgufReader,
    dir: &Path,
    options: &ImportOptions,
    check: impl FnOnce(&Value) -> Result<(), E>,
) -> Result<Imported, E> {
    let model = Llama::read(file)?;
    let tensors = model.tensors(file)?;
    let mut config = model.config();
    config["torch_dtype"] = torch_name(options.dtype).into();
    for (key, id) in tokenizer::special_ids(file) {
        config[key] = id.into();
    }
    check(&config)?;
    let tokenizer = match options.tokenizer {
        TokenizerImport::LeaveOut => None,
        TokenizerImport::Needed => {
            let vocab_size = config["vocab_size"].as_u64().unwrap_or(0) as usize;
            let built = tokenizer::build(file, vocab_size);
            Some(built.map_err(|reason| file.problem(GgufProblem::Tokenizer { reason }))?)
        }
    };

    let metas = |tensor: &Wanted| TensorMeta {
        name: tensor.hf_name.clone(),
        shape: tensor.shape.clone(),
        dtype: options.dtype,
    };
    let metas: Vec<TensorMeta> = tensors.iter().map(metas).collect();
    let mut writer = HfWriter::create(dir, &metas, options.max_shard_bytes)?;
    for tensor in &tensors {
        copy(file, tensor, &mut writer)?;
    }
    write_json(&dir.join("config.json"), &config)?;
    let mut num_tokens = None;
    if let Some(files) = tokenizer {
        write_json(&dir.join("tokenizer.json"), &files.tokenizer)?;
        write_json(&dir.join("tokenizer_config.json"), &files.config)?;
        num_tokens = files.tokenizer["model"]["vocab"].as_object().map(serde_json::Map::len);
    }
    writer.finish()?;
    let num_params = tensors.iter().map(|tensor| tensor.shape.iter().product::<usize>()).sum();
    Ok(Imported { num_params, num_tensors: tensors.len(), num_tokens })
}

/// Streams one tensor.
fn copy(file: &GgufReader, tensor: &Wanted, writer: &mut HfWriter) -> Result<(), CheckpointError> {
    let numel: usize = tensor.shape.iter().product();
    let row_numel: usize = tensor.shape[1..].iter().product();
    let piece_numel = match tensor.rows {
        Rows::AsTheyAre => PIECE_NUMEL,
        Rows::Interleaved { head_dim } => head_dim * row_numel,
    };
    let mut values = vec![0.0; piece_numel.min(numel)];
    let mut ordered = vec![0.0; if tensor.rows == Rows::AsTheyAre { 0 } else { values.len() }];
    writer.begin(&tensor.hf_name)?;
    for start in (0..numel).step_by(piece_numel) {
        let end = (start + piece_numel).min(numel);
        let values = &mut values[..end - start];
        file.read_range_f32(&tensor.gguf_name, start..end, values)?;
        match tensor.rows {
            Rows::AsTheyAre => writer.append(values)?,
            Rows::Interleaved { .. } => {
                deinterleave(values, row_numel, &mut ordered);
                writer.append(&ordered)?;
            }
        }
    }
    Ok(())
}

fn torch_name(dtype: FileDType) -> &'static str {
    match dtype {
        FileDType::F64 => "float64",
        FileDType::F32 => "float32",
        FileDType::F16 => "float16",
        // What cannot be written is refused by the writer.
        _ => "bfloat16",
    }
}

fn write_json(path: &Path, json: &Value) -> Result<(), CheckpointError> {
    std::fs::write(path, format!("{json:#}\n")).map_err(|source| CheckpointError::Io {
        action: "write",
        path: path.to_owned(),
        source,
    })
}
