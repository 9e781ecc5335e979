//! `shardwise verify`: is every byte of a checkpoint what was written?

use shardwise_checkpoint::state::{Checkpoint, Finding, Verified};

use crate::args::CheckpointArgs;
use crate::checkpoint::{Meter, format_bytes, usage};
use crate::{Exit, console};

/// Names listed for one damaged stretch.
const MAX_TENSORS: usize = 10;

/// Reads all of a checkpoint and says what is damaged.
pub fn run(args: &CheckpointArgs) -> anyhow::Result<Exit> {
    let checkpoint = Checkpoint::find_to_verify(&args.path).map_err(|error| usage(&args.path, error))?;
    let mut meter = Meter::new("verified");
    let Verified { num_bytes, findings } = checkpoint.verify(|progress| meter.show(progress));
    let pace = meter.finish(num_bytes);
    let (path, size) = (checkpoint.dir().display(), format_bytes(num_bytes));
    if findings.is_empty() {
        console::print_result(&format!("{path}: step {}, {size} as written ({pace})\n", checkpoint.step()))?;
        return Ok(Exit::Done);
    }
    let text: String = findings.iter().map(describe).collect();
    console::print_error(&format!("`{path}` is damaged"), Some("go back to an older checkpoint"));
    console::print_result(&text)?;
    Ok(Exit::Failed)
}

fn describe(Finding { file, damage, tensors }: &Finding) -> String {
    let mut text = format!("{file}: {damage}\n");
    for (kind, name) in tensors.iter().take(MAX_TENSORS) {
        text += &format!("  {kind} of {name}\n");
    }
    if tensors.len() > MAX_TENSORS {
        text += &format!("  and {} more\n", tensors.len() - MAX_TENSORS);
    }
    text
}
