//! The `shardwise` command.
//!
//! What people type. It checks a run file, starts one `shardwise-worker` for each rank and watches them from
//! outside, so that a crash, a kill or a hang of a rank is seen by a process that cannot be part of it. It links no
//! libtorch and starts at once.

mod args;
mod check;
mod checkpoint;
mod console;
mod doctor;
mod eval;
mod export;
mod generate;
mod import;
mod inspect;
mod out_dir;
mod plan;
mod report;
mod run_file;
mod summary;
mod supervise;
mod train;
mod verify;
mod worker_binary;

use std::process::ExitCode;

use clap::Parser;
use shardwise_config::ConfigErrors;

use crate::args::{Cli, Command};
use crate::console::UsageError;

/// How the command ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Exit {
    /// All work is done.
    Done,
    /// Training failed.
    Failed,
    /// Bad usage or configuration.
    Usage,
    /// Stopped by a signal, as shells count it: 130 after Ctrl-C.
    Interrupted { signal: i32 },
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        match exit {
            Exit::Done => ExitCode::SUCCESS,
            Exit::Failed => ExitCode::from(1),
            Exit::Usage => ExitCode::from(2),
            Exit::Interrupted { signal } => {
                ExitCode::from(128_u8.saturating_add(signal.unsigned_abs() as u8))
            }
        }
    }
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Train(args) => train::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Verify(args) => verify::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Generate(args) => generate::run(&args).map(|never| match never {}),
        Command::Eval(args) => eval::run(&args).map(|never| match never {}),
        Command::Import(args) => import::run(&args),
        Command::Doctor(args) => doctor::run(&args),
    };
    result.unwrap_or_else(|error| tell(&error)).into()
}

/// Prints an error and says how the command ends with it.
fn tell(error: &anyhow::Error) -> Exit {
    if let Some(problems) = error.downcast_ref::<ConfigErrors>() {
        problems
            .iter()
            .for_each(|problem| console::print_error(&problem.to_string(), problem.hint().as_deref()));
        Exit::Usage
    } else if let Some(usage) = error.downcast_ref::<UsageError>() {
        console::print_error(&usage.message, Some(&usage.hint));
        Exit::Usage
    } else {
        console::print_error(&format!("{error:#}"), None);
        Exit::Failed
    }
}
