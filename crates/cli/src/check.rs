//! TEMPORARY
use crate::Exit;
use crate::args::RunArgs;
pub fn run(args: &RunArgs) -> anyhow::Result<Exit> {
    crate::run_file::RunFile::load(args)?;
    Ok(Exit::Done)
}
