//! TEMPORARY
use crate::args::RunArgs;
use shardwise_monitor::PrintEvery;
use std::path::PathBuf;
pub struct RunFile {
    pub steps: u64,
    pub print_every: PrintEvery,
    pub threads_per_rank: Option<usize>,
    pub inputs: Vec<PathBuf>,
}
impl RunFile {
    pub fn load(args: &RunArgs) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(&args.run)?;
        let value: serde_json::Value = serde_json::from_str(&text)?;
        Ok(RunFile {
            steps: value["steps"].as_u64().unwrap_or(3),
            print_every: PrintEvery::Auto,
            threads_per_rank: None,
            inputs: vec![],
        })
    }
}
