//! `shardwise check`: what a run file means, value by value.

use crate::args::RunArgs;
use crate::{Exit, console, run_file};

/// Prints the effective configuration, and then whatever file of it is missing.
pub fn run(args: &RunArgs) -> anyhow::Result<Exit> {
    let loaded = run_file::load(args)?;
    console::print_result(&loaded.effective().to_string())?;
    loaded.check_files()?;
    Ok(Exit::Done)
}
