//! `shardwise eval`: becomes the worker, which holds the model code.

use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::args::EvalArgs;
use crate::worker_binary;

/// Replaces this process, so that standard streams, signals and the exit code are the worker's own. Returns only
/// if that fails.
pub fn run(args: &EvalArgs) -> anyhow::Result<std::convert::Infallible> {
    let worker = worker_binary::locate()?;
    let mut command = Command::new(&worker);
    command.arg("eval").arg(&args.dir).arg("--text").arg(&args.text);
    if let Some(seq_len) = args.seq_len {
        command.arg("--seq-len").arg(seq_len.to_string());
    }
    if let Some(max_tokens) = args.max_tokens {
        command.arg("--max-tokens").arg(max_tokens.to_string());
    }
    if args.json {
        command.arg("--json");
    }
    let error = command.exec();
    Err(anyhow::Error::new(error).context(format!("could not run `{}`", worker.display())))
}
