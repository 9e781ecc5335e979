//! One rank of a training run.
//!
//! `shardwise train` starts one of these for each rank; so can torchrun, srun or mpirun. What it is told by whom:
//! the run file says what to train, the environment (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR`,
//! `MASTER_PORT`) which rank it is, and the environment is read here and nowhere else.
//!
//! A testing aid: `SHARDWISE_FAULT=kill:rank=1,step=3,phase=backward` makes a rank kill, stop or panic itself at that point ([`fault`]).
//!
//! `shardwise-worker generate` samples from a trained model and `shardwise-worker eval` measures it, on one rank.

mod cores;
mod data;
mod eval;
mod failure;
mod fault;
mod generate;
mod gpu;
mod inference;
mod launch;
mod model;
mod options;
mod resume;
mod sampling;
mod saving;
mod telemetry;
mod trace;
mod train;

use std::ffi::OsString;
use std::io::Write;
use std::panic;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use clap::{Args, Parser, Subcommand};

use crate::failure::Failure;
use crate::launch::Launch;
use crate::train::End;

/// One rank of a training run.
#[derive(Debug, Parser)]
#[command(name = "shardwise-worker", version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    train: Option<TrainArgs>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Let a trained model continue a text
    Generate(GenerateArgs),
    /// Measure a trained model's loss and perplexity on a text
    Eval(EvalArgs),
    /// Say where libtorch is and whether it has CUDA, for `shardwise doctor`
    #[command(hide = true)]
    Libtorch,
}

#[derive(Debug, Args)]
struct TrainArgs {
    /// Run file, JSON or TOML
    run: PathBuf,
    /// Output folder
    #[arg(long, value_name = "DIR", default_value = "out")]
    out: PathBuf,
    /// Continue from a checkpoint
    #[arg(long, value_name = "CHECKPOINT", default_value = "never")]
    resume: OsString,
    /// Override one value of the run file
    #[arg(long = "set", value_name = "KEY.PATH=VALUE")]
    sets: Vec<String>,
    /// Measure the loss on this text before and after training
    #[arg(long, value_name = "FILE")]
    eval: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct GenerateArgs {
    /// Model folder: config.json, weights and tokenizer.json
    dir: PathBuf,
    /// The text to continue
    #[arg(long, allow_hyphen_values = true)]
    prompt: String,
    /// Most tokens to add
    #[arg(long, default_value_t = 128)]
    max_tokens: usize,
    /// Below 1 likelier text, above 1 stranger text, 0 always the likeliest token
    #[arg(long, default_value_t = 0.8)]
    temperature: f64,
    /// Draw from the N likeliest tokens only
    #[arg(long)]
    top_k: Option<usize>,
    /// The same seed gives the same text
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

#[derive(Debug, Args)]
struct EvalArgs {
    /// Model folder: config.json, weights and tokenizer.json
    dir: PathBuf,
    /// A text that the model was not trained on
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Tokens of one window [default: 1024, or the model's positions if these are fewer]
    #[arg(long, value_name = "N", value_parser = positive)]
    seq_len: Option<usize>,
    /// Predict only the first N tokens of the text [default: all]
    #[arg(long, value_name = "N", value_parser = positive)]
    max_tokens: Option<usize>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&number| number > 0).ok_or_else(|| "expected a whole number from 1".into())
}

/// As shells count a process that SIGTERM has ended.
const STOPPED: u8 = 128 + signal_hook::consts::SIGTERM as u8;

fn main() -> ExitCode {
    let cli = Cli::parse();
    // SAFETY: there is no other thread yet.
    unsafe { launch::prepare_environment() };
    // Unwinding, a rank leaves its groups and tells them so; then it tells the supervisor.
    let panic_place = note_panics();
    let outcome = panic::catch_unwind(|| match (cli.command, cli.train) {
        (Some(Command::Generate(args)), _) => generate::run(&args).map(|()| End::Finished),
        (Some(Command::Eval(args)), _) => eval::run(&args).map(|()| End::Finished),
        (Some(Command::Libtorch), _) => tell_libtorch().map(|()| End::Finished),
        (None, Some(args)) => Launch::from_env().and_then(|launch| train::run(&args, &launch)),
        (None, None) => Err(Failure::usage("no run file was given", "shardwise-worker RUN.json")),
    });
    let outcome = outcome.unwrap_or_else(|panic| {
        let place = panic_place.lock().unwrap_or_else(PoisonError::into_inner);
        Err(Failure::panicked(&*panic, &place))
    });
    match outcome {
        Ok(End::Finished) => ExitCode::SUCCESS,
        Ok(End::Stopped) => ExitCode::from(STOPPED),
        Err(failure) => failure.report(),
    }
}

/// Prints the folder of libtorch, then what can be said of CUDA, a line each.
fn tell_libtorch() -> Result<(), Failure> {
    let cuda = match shardwise_torch::cuda::load(0) {
        Ok(()) => "it sees GPUs".to_owned(),
        Err(error) => error.to_string(),
    };
    let folder = gpu::libtorch().unwrap_or_default();
    writeln!(std::io::stdout(), "{}\n{}", folder.display(), cuda.replace('\n', " "))?;
    Ok(())
}

/// Has every panic leave its place in the sources behind; otherwise it is told as ever.
fn note_panics() -> Arc<Mutex<String>> {
    let place = Arc::<Mutex<String>>::default();
    let (noted, tell) = (Arc::clone(&place), panic::take_hook());
    panic::set_hook(Box::new(move |info| {
        let location = info.location().map(ToString::to_string);
        *noted.lock().unwrap_or_else(PoisonError::into_inner) = location.unwrap_or_default();
        tell(info);
    }));
    place
}
