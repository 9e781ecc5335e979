//! The run file as the commands here need it: checked in full, with every problem told at once.

use std::path::PathBuf;

use shardwise_config::{ConfigErrors, DataSource, Loaded, ModelSource, RunConfig, TokenizerSource};
use shardwise_monitor::PrintEvery;

use crate::args::RunArgs;

/// Reads and checks the run file for this number of ranks. Does not look for the files it names.
pub fn load(args: &RunArgs) -> Result<Loaded, ConfigErrors> {
    RunConfig::load(&args.run, &args.sets, args.ranks as usize)
}

/// Everything that the run reads, apart from the run file itself.
pub fn inputs(loaded: &Loaded) -> Result<Vec<PathBuf>, ConfigErrors> {
    let mut inputs = loaded.text_files()?;
    if let ModelSource::Path(folder) = &loaded.config.model.source {
        inputs.push(folder.clone());
    }
    match &loaded.config.data.source {
        DataSource::Tokens { tokens, .. } => inputs.push(tokens.clone()),
        DataSource::Text { tokenizer: TokenizerSource::File(file), .. } => inputs.push(file.clone()),
        DataSource::Text { tokenizer: TokenizerSource::TrainBpe { .. }, .. } => {}
    }
    Ok(inputs)
}

/// Which steps get a line where there is no terminal.
pub fn print_every(config: &RunConfig) -> PrintEvery {
    config.report.steps_per_print.map_or(PrintEvery::Auto, PrintEvery::Steps)
}
