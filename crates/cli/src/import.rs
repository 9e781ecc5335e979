//! `shardwise import`: a GGUF file becomes a Hugging Face folder.

use std::path::Path;

use anyhow::Context;
use serde_json::Value;
use shardwise_checkpoint::gguf::{GgufProblem, GgufReader, ImportOptions, Imported, TokenizerImport, import};
use shardwise_checkpoint::{CheckpointError, FileDType};
use shardwise_monitor::format_count;
use shardwise_plan::zoo::ModelConfig;

use crate::args::{ImportArgs, WeightType};
use crate::console::UsageError;
use crate::{Exit, console};

/// Imports, and says what came of it.
pub fn run(args: &ImportArgs) -> anyhow::Result<Exit> {
    if !args.overwrite && holds_files(&args.dir)? {
        return Err(UsageError::new(
            format!("`{}` holds files already", args.dir.display()),
            "give another folder, or `--overwrite` to replace the model in it",
        )
        .into());
    }
    let options = ImportOptions {
        dtype: match args.dtype {
            WeightType::Bf16 => FileDType::Bf16,
            WeightType::Fp16 => FileDType::F16,
            WeightType::Fp32 => FileDType::F32,
        },
        max_shard_bytes: args.max_shard_size,
        tokenizer: if args.no_tokenizer { TokenizerImport::LeaveOut } else { TokenizerImport::Needed },
    };
    let imported = GgufReader::open(&args.model)
        .map_err(anyhow::Error::from)
        .and_then(|file| import(&file, &args.dir, &options, |config| check(&args.model, config)))
        .map_err(explain)?;
    console::print_result(&summary(args, &imported))?;
    Ok(Exit::Done)
}

/// Whether what was imported is a model that can be trained here.
fn check(model: &Path, config: &Value) -> anyhow::Result<()> {
    ModelConfig::from_json(config).map(drop).map_err(|error| {
        UsageError::new(
            format!("cannot use `{}`: {error}", model.display()),
            "a whole GGUF file of a `llama` model is needed",
        )
        .into()
    })
}

/// Makes an error that another file or option would mend one of usage.
fn explain(error: anyhow::Error) -> anyhow::Error {
    let hint = match error.downcast_ref::<CheckpointError>() {
        Some(CheckpointError::Gguf { problem: GgufProblem::Tokenizer { .. }, .. }) => {
            "`--no-tokenizer` imports the weights alone; put the model's own tokenizer.json beside them"
        }
        Some(CheckpointError::Gguf { problem: GgufProblem::UnsupportedType { .. }, .. }) => {
            "look for the same model in another quantisation"
        }
        Some(
            CheckpointError::Gguf { .. }
            | CheckpointError::MissingTensor { .. }
            | CheckpointError::WrongShape { .. },
        ) => "a whole GGUF file of a `llama` model is needed",
        Some(CheckpointError::Overflow { .. }) => "`--dtype bf16` has the range of fp32",
        Some(CheckpointError::Io { action: "open", .. }) => "check the path",
        _ => return error,
    };
    UsageError::new(format!("{error:#}"), hint).into()
}

fn summary(args: &ImportArgs, imported: &Imported) -> String {
    let Imported { num_params, num_tensors, num_tokens } = imported;
    let tokenizer = match num_tokens {
        Some(num_tokens) => format!("tokenizer of {} tokens", format_count(*num_tokens as u64)),
        None => "no tokenizer".to_owned(),
    };
    let dtype = match args.dtype {
        WeightType::Bf16 => "bf16",
        WeightType::Fp16 => "fp16",
        WeightType::Fp32 => "fp32",
    };
    format!(
        "imported into `{}`: llama, {} parameters in {num_tensors} tensors, {dtype}, {tokenizer}\n",
        args.dir.display(),
        format_count(*num_params as u64),
    )
}

fn holds_files(dir: &Path) -> anyhow::Result<bool> {
    match std::fs::read_dir(dir) {
        Ok(mut entries) => Ok(entries.next().is_some()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| format!("could not open `{}`", dir.display())),
    }
}
