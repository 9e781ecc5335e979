//! Tests of the crate as its callers see it: files in, configuration or messages out.

mod effective;
mod gpu;
mod messages;
mod parallel;
mod planning;
mod run_file;
mod tables;
mod templates;
mod training;

use std::fs;

use crate::{Loaded, RunConfig};

/// A folder of configuration files.
struct Files(tempfile::TempDir);

impl Files {
    fn new(files: &[(&str, &str)]) -> Files {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        Files(folder)
    }

    /// Loads `name`; messages come back as text in which paths start at this folder.
    fn load(&self, name: &str, overrides: &[&str], world_size: usize) -> Result<Loaded, String> {
        let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
        RunConfig::load(&self.0.path().join(name), &overrides, world_size)
            .map_err(|errors| self.relative(errors))
    }

    fn relative(&self, text: impl ToString) -> String {
        text.to_string().replace(&format!("{}/", self.0.path().display()), "")
    }
}

/// A small DeepSpeed configuration with more members.
fn deepspeed(more: &str) -> String {
    format!(
        r#"{{"train_micro_batch_size_per_gpu": 2, "optimizer": {{"type": "AdamW", "params": {{"lr": 0.001}}}}{more}}}"#
    )
}

/// A small run file around a DeepSpeed configuration, which starts on line 5.
fn run_with(deepspeed: &str) -> String {
    format!(
        r#"{{
"model": {{"path": "model"}},
"data": {{"tokens": "tokens.bin", "dtype": "u16", "seq_len": 64}},
"steps": 10,
"deepspeed": {deepspeed}
}}"#
    )
}

fn load(run: &str, overrides: &[&str], world_size: usize) -> Result<Loaded, String> {
    Files::new(&[("run.json", run)]).load("run.json", overrides, world_size)
}
