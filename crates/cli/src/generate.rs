//! `shardwise generate`: becomes the worker, which holds the model code.

use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::args::GenerateArgs;
use crate::worker_binary;

/// Replaces this process, so that standard streams, signals and the exit code are the worker's own. Returns only
/// if that fails.
pub fn run(args: &GenerateArgs) -> anyhow::Result<std::convert::Infallible> {
    let worker = worker_binary::locate()?;
    let mut command = Command::new(&worker);
    command.arg("generate").arg(&args.dir);
    // One argument, as a text may begin with a hyphen.
    command.arg(format!("--prompt={}", args.prompt));
    command.arg("--max-tokens").arg(args.max_tokens.to_string());
    command.arg("--temperature").arg(args.temperature.to_string());
    if let Some(top_k) = args.top_k {
        command.arg("--top-k").arg(top_k.to_string());
    }
    command.arg("--seed").arg(args.seed.to_string());
    let error = command.exec();
    Err(anyhow::Error::new(error).context(format!("could not run `{}`", worker.display())))
}
