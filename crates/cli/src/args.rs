//! What people type.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Parser, Subcommand};

use crate::plan::args::{PipelineArgs, SearchArgs};

const EXAMPLES: &str = "\
Examples:
  shardwise check run.toml -n 4                   what this run file means, value by value
  shardwise plan run.toml -n 4                    what it will need, before anything is allocated
  shardwise train run.toml -n 2                   train on two ranks, output in out/run
  shardwise train run.toml -n 4 --set steps=100   the same file, one value changed
  shardwise generate out/run/model --prompt 'Once upon'

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
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  shardwise plan run.toml -n 4
  shardwise plan run.toml -n 64 --set deepspeed.zero_optimization.stage=3
  shardwise plan run.toml -n 4 --pipeline 4 --schedule zero-bubble --svg timeline.svg
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
            "shardwise generate d --prompt x --temperature 0 --top-k 5 --seed 7 --max-tokens 1",
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
            "shardwise plan r.json --schedule 2f2b",
            "shardwise plan r.json --device-memory lots",
            "shardwise plan r.json --schedule --device-memory 80GB --svg t.svg",
            "shardwise generate d",
            "shardwise generate d --prompt x --temperature nan",
            "shardwise generate d --prompt x --temperature=-1",
            "shardwise generate d --prompt x --top-k 0",
        ] {
            assert_eq!(parse(bad).expect_err(bad).exit_code(), 2, "{bad}");
        }
    }
}
