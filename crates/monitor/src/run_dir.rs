//! Where things stand in a run's output folder.

use std::path::{Path, PathBuf};

/// The output folder of one run and the names in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunDir(PathBuf);

impl RunDir {
    /// The run that lives in `folder`.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        RunDir(folder.into())
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// One JSON object for each step.
    pub fn metrics(&self) -> PathBuf {
        self.0.join("metrics.jsonl")
    }

    /// Every value of the configuration, and where it came from.
    pub fn effective_config(&self) -> PathBuf {
        self.0.join("effective-config.json")
    }

    /// The trained model as a Hugging Face folder.
    pub fn model(&self) -> PathBuf {
        self.0.join("model")
    }

    /// The files in [`RunDir::model`] that belong to a Hugging Face model: configuration, tokenizer, weights.
    ///
    /// # Errors
    /// As [`RunDir::event_files`].
    pub fn model_files(&self) -> std::io::Result<Vec<PathBuf>> {
        const NAMES: [&str; 4] =
            ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"];
        Self::named(&self.model(), |name| {
            NAMES.contains(&name)
                || name.ends_with(".safetensors")
                || name.ends_with(".safetensors.index.json")
        })
    }

    /// The folder of checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.0.join("checkpoints")
    }

    /// The folder of the ranks' logs.
    pub fn ranks(&self) -> PathBuf {
        self.0.join("ranks")
    }

    /// What one rank wrote on standard error.
    pub fn rank_log(&self, rank: usize) -> PathBuf {
        self.ranks().join(format!("rank-{rank}.log"))
    }

    /// TensorBoard event files, oldest first.
    ///
    /// # Errors
    /// What the system says if the folder cannot be listed; a folder that is not there holds none.
    pub fn event_files(&self) -> std::io::Result<Vec<PathBuf>> {
        Self::named(&self.0, |name| name.starts_with("events.out.tfevents."))
    }

    /// Logs of all ranks.
    ///
    /// # Errors
    /// As [`RunDir::event_files`].
    pub fn rank_logs(&self) -> std::io::Result<Vec<PathBuf>> {
        Self::named(&self.ranks(), |name| {
            let rank = name.strip_prefix("rank-").and_then(|rest| rest.strip_suffix(".log"));
            rank.is_some_and(|rank| rank.parse::<usize>().is_ok())
        })
    }

    fn named(folder: &Path, ours: impl Fn(&str) -> bool) -> std::io::Result<Vec<PathBuf>> {
        let entries = match std::fs::read_dir(folder) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut paths = Vec::new();
        for entry in entries {
            let entry = entry?;
            if entry.file_name().to_str().is_some_and(&ours) {
                paths.push(entry.path());
            }
        }
        paths.sort();
        Ok(paths)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_only_what_a_run_writes() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::new(folder.path());
        assert!(run.rank_logs().unwrap().is_empty());
        std::fs::create_dir(run.ranks()).unwrap();
        for name in ["events.out.tfevents.2.h", "events.out.tfevents.1.h", "notes.txt"] {
            std::fs::write(run.path().join(name), "").unwrap();
        }
        for name in ["rank-0.log", "rank-x.log", "rank-1.txt", "other.log"] {
            std::fs::write(run.ranks().join(name), "").unwrap();
        }
        let names = |paths: Vec<PathBuf>| -> Vec<String> {
            paths.iter().map(|p| p.file_name().unwrap().to_str().unwrap().to_owned()).collect()
        };
        assert_eq!(names(run.event_files().unwrap()), ["events.out.tfevents.1.h", "events.out.tfevents.2.h"]);
        assert_eq!(names(run.rank_logs().unwrap()), ["rank-0.log"]);
        assert_eq!(run.rank_log(0), run.ranks().join("rank-0.log"));
    }
}
