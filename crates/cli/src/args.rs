//! What people type.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::plan::args::{PipelineArgs, SearchArgs};

const EXAMPLES: &str = "\
Examples:
  shardwise check run.toml -n 4                   what this run file means, value by value
  shardwise plan run.toml -n 4                    what it will need, before anything is allocated
  shardwise train run.toml -n 2                   train on two ranks, output in out/run
  shardwise train run.toml -n 4 --set steps=100   the same file, one value changed
  shardwise generate out/run/model --prompt 'Once upon'
  shardwise verify out/run                        is the newest checkpoint as it was written?
  shardwise eval out/run/model --text heldout.txt  its perplexity on a text
  shardwise import model.gguf models/imported     a GGUF file as a Hugging Face folder

Exit codes: 0 done, 1 training failed, 2 bad usage or configuration.";

/// Trains models that do not fit one device.
#[derive(Debug, Parser)]
#[command(name = "shardwise", version, about, after_help = EXAMPLES, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train: start the ranks, watch them, show progress
    Train(TrainArgs),
    /// Check a run file and print every value with its source
    Check(RunArgs),
    /// Show what a run needs: units, memory and traffic of each rank
    Plan(PlanArgs),
    /// Let a trained model continue a text
    Generate(GenerateArgs),
    /// Show what is in a checkpoint: step, ranks, tensors, state of the run
    Inspect(CheckpointArgs),
    /// Read all of a checkpoint and compare it with its checksums
    Verify(CheckpointArgs),
    /// Write a checkpoint's model as a Hugging Face folder
    Export(ExportArgs),
    /// Measure a model's loss and perplexity on a text
    Eval(EvalArgs),
    /// Turn a GGUF file into a Hugging Face folder
    Import(ImportArgs),
    /// Say what this machine has: cores, worker, GPUs and their links, compiler of kernels
    Doctor(DoctorArgs),
}

#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// A run file on a number of ranks: what every command that reads one takes.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// Run file, JSON or TOML
    pub run: PathBuf,
    /// Processes to train on
    #[arg(short = 'n', long, value_name = "RANKS", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub ranks: u32,
    /// Override one value of the run file, as in `--set data.seq_len=512`; may be repeated
    #[arg(long = "set", value_name = "KEY.PATH=VALUE", value_parser = assignment)]
    pub sets: Vec<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  shardwise train run.toml -n 2
  shardwise train run.json -n 4 --out runs/first --set deepspeed.zero_optimization.stage=3

Ctrl-C stops after the current step, a second Ctrl-C at once.")]
pub struct TrainArgs {
    #[command(flatten)]
    pub run: RunArgs,
    /// Output folder [default: out/ and the run file's name]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Continue from a checkpoint: auto, never or a checkpoint folder
    #[arg(long, value_name = "CHECKPOINT", default_value = "never")]
    pub resume: OsString,
    /// Replace the earlier run that DIR holds
    #[arg(long)]
    pub overwrite: bool,
    /// Measure loss and perplexity on this text before and after training
    #[arg(long, value_name = "FILE")]
    pub eval: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  shardwise plan run.toml -n 4
  shardwise plan run.toml -n 64 --set deepspeed.zero_optimization.stage=3
  shardwise plan run.toml -n 4 --pipeline 4 --schedule zero-bubble --svg timeline.svg
  shardwise plan run.toml --set device=cuda --device-memory 16GB --host-memory 128GB --largest
  shardwise plan run.toml --ranks 1024 --device-memory 80GB --flops 400T --link 25GB/s --intra-link 300GB/s

Reads the run file and the model's config.json; data and weights need not be at hand.")]
pub struct PlanArgs {
    #[command(flatten)]
    pub run: RunArgs,
    /// Print JSON, with every parameter of every unit
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    #[command(flatten)]
    pub search: SearchArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  shardwise generate out/run/model --prompt 'Once upon a time'
  shardwise generate out/run/model --prompt 'Once' --temperature 0     the likeliest text, always the same")]
pub struct GenerateArgs {
    /// Model folder: config.json, weights and tokenizer.json
    pub dir: PathBuf,
    /// The text to continue
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, value_parser = NonEmptyStringValueParser::new())]
    pub prompt: String,
    /// Most tokens to add
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: u32,
    /// Below 1 likelier text, above 1 stranger text, 0 always the likeliest token
    #[arg(long, value_name = "F", default_value_t = 0.8, value_parser = temperature)]
    pub temperature: f64,
    /// Draw from the N likeliest tokens only [default: from all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub top_k: Option<u32>,
    /// The same seed gives the same text
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

/// A checkpoint on disk: what every command that reads one takes.
#[derive(Debug, Args)]
pub struct CheckpointArgs {
    /// Checkpoint folder; or a run's output folder, or its `checkpoints` folder: the newest one there
    #[arg(value_name = "CKPT")]
    pub path: PathBuf,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  shardwise eval out/run/model --text heldout.txt
  shardwise eval out/run/model --text heldout.txt --seq-len 256 --max-tokens 16384 --json

The text is cut into windows of N tokens, as training cuts it; the loss is the mean over all predicted tokens.")]
pub struct EvalArgs {
    /// Model folder: config.json, weights and tokenizer.json
    pub dir: PathBuf,
    /// A text that the model was not trained on
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// Tokens of one window [default: 1024, or the model's positions if these are fewer]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub seq_len: Option<u32>,
    /// Predict only the first N tokens of the text [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub max_tokens: Option<u64>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  shardwise export out/run model --dtype bf16
  shardwise export out/run/checkpoints/step-000100 model --max-shard-size 500MB

Writes safetensors with an index, config.json and the tokenizer. Holds a few MB in memory, whatever the model's size.")]
pub struct ExportArgs {
    #[command(flatten)]
    pub checkpoint: CheckpointArgs,
    /// Folder to write to; weights of another model there are replaced
    pub dir: PathBuf,
    /// Element type of the weights
    #[arg(long, value_enum, default_value_t = WeightType::Fp32)]
    pub dtype: WeightType,
    /// Most bytes of one file, as `5GB`, `500MB` or `2GiB`
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = size)]
    pub max_shard_size: u64,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  shardwise import SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2
  shardwise import model.gguf models/imported --dtype fp32 --max-shard-size 2GB

Quantised weights become plain numbers; what quantising has lost stays lost. The architecture `llama` and byte-level
BPE tokenizers are known; anything else is refused by name.")]
pub struct ImportArgs {
    /// GGUF file, version 2 or 3
    pub model: PathBuf,
    /// Folder to write: config.json, safetensors, tokenizer.json, tokenizer_config.json
    pub dir: PathBuf,
    /// Type of the weights in the folder
    #[arg(long, value_enum, default_value_t = WeightType::Bf16)]
    pub dtype: WeightType,
    /// Split the weights into files of at most this size, as in 5GB or 512MiB
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = size)]
    pub max_shard_size: u64,
    /// Leave the tokenizer out
    #[arg(long)]
    pub no_tokenizer: bool,
    /// Write into a folder that holds files already
    #[arg(long)]
    pub overwrite: bool,
}

/// A type of weights in files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WeightType {
    /// 16 bits, the range of fp32
    Bf16,
    /// 16 bits, up to 65504
    Fp16,
    /// 32 bits
    Fp32,
}

/// Bytes, with a unit of 1000 (kB, MB, GB) or 1024 (KiB, MiB, GiB).
fn size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let unit = match text[digits..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        _ => 0,
    };
    match text[..digits].parse::<u64>().ok().and_then(|number| number.checked_mul(unit)) {
        Some(bytes) if bytes > 0 => Ok(bytes),
        _ => Err("expected a size such as 5GB or 512MiB".to_owned()),
    }
}

fn assignment(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some((key, _)) if !key.trim().is_empty() => Ok(text.to_owned()),
        _ => Err("expected KEY.PATH=VALUE".to_owned()),
    }
}

fn temperature(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && value >= 0.0 => Ok(value),
        _ => Err("expected a number from 0 up".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn values_are_checked_as_they_are_read() {
        let parse = |args: &str| Cli::try_parse_from(args.split(' '));
        for good in [
            "shardwise train r.json",
            "shardwise train r.json -n 4 --set a.b=c --set d= --out x --overwrite",
            "shardwise check r.toml -n 4096",
            "shardwise plan r.toml -n 64 --set a.b=c --json",
            "shardwise plan r.toml -n 4 --pipeline 4 --schedule --svg t.svg",
            "shardwise plan r.toml -n 4 --pipeline 4 --schedule interleaved:3 --micro-batches 8 --cut pattern:*.h.*",
            "shardwise plan r.toml --ranks 1024 --device-memory 80GB --flops 400T --link 25GB/s --intra-link 300GB/s",
            "shardwise plan r.toml --device-memory 16GB --host-memory 128GB",
            "shardwise plan r.toml --device-memory 16GB --largest --json",
            "shardwise inspect d",
            "shardwise verify d",
            "shardwise export d e --dtype fp16 --max-shard-size 2GiB",
            "shardwise generate d --prompt x --temperature 0 --top-k 5 --seed 7 --max-tokens 1",
            "shardwise eval d --text t.txt",
            "shardwise eval d --text t.txt --seq-len 128 --max-tokens 1000 --json",
            "shardwise import m.gguf d",
            "shardwise import m.gguf d --dtype fp16 --max-shard-size 512MiB --no-tokenizer --overwrite",
        ] {
            assert!(parse(good).is_ok(), "{good}");
        }
        for bad in [
            "shardwise train",
            "shardwise train r.json -n 0",
            "shardwise train r.json -n -1",
            "shardwise train r.json --set novalue",
            "shardwise train r.json --set =value",
            "shardwise plan r.json --svg t.svg",
            "shardwise plan r.json --flops 400T",
            "shardwise plan r.json --host-memory 128GB",
            "shardwise plan r.json --largest",
            "shardwise plan r.json --largest --device-memory 16GB --schedule",
            "shardwise plan r.json --schedule 2f2b",
            "shardwise plan r.json --device-memory lots",
            "shardwise plan r.json --schedule --device-memory 80GB --svg t.svg",
            "shardwise inspect",
            "shardwise export d",
            "shardwise export d e --dtype int4",
            "shardwise export d e --max-shard-size 0GB",
            "shardwise export d e --max-shard-size 99999999999TB",
            "shardwise generate d",
            "shardwise generate d --prompt x --temperature nan",
            "shardwise generate d --prompt x --temperature=-1",
            "shardwise generate d --prompt x --top-k 0",
            "shardwise eval d",
            "shardwise eval d --text t.txt --seq-len 0",
            "shardwise eval d --text t.txt --max-tokens 0",
            "shardwise import m.gguf",
            "shardwise import m.gguf d --dtype int8",
            "shardwise import m.gguf d --max-shard-size 0",
            "shardwise import m.gguf d --max-shard-size 5XB",
            "shardwise import m.gguf d --max-shard-size 99999999999GB",
        ] {
            assert_eq!(parse(bad).expect_err(bad).exit_code(), 2, "{bad}");
        }
    }

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [
            ("5GB", 5_000_000_000),
            ("2GiB", 2 << 30),
            ("300", 300),
            ("7B", 7),
            ("3kB", 3_000),
            ("1 TB", 1_000_000_000_000),
            ("1gib", 1 << 30),
        ] {
            assert_eq!(size(text), Ok(bytes));
        }
        for bad in ["", "GB", "-1GB", "1.5GB", "5PB"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }
}
