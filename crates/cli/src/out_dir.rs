//! The output folder of a run: made, checked and held before any rank starts.

use std::fs::{DirBuilder, File};
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use rustix::fs::{FlockOperation, flock};
use shardwise_monitor::RunDir;

use crate::console::UsageError;

/// What to do with the run that the folder already holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    Refuse,
    Replace,
    /// It goes on.
    Continue,
}

/// A folder that this process alone writes a run to, as long as the value lives.
#[derive(Debug)]
pub struct OutDir {
    run: RunDir,
    /// The kernel drops the lock with the process, however it ends.
    _lock: File,
}

impl OutDir {
    /// Makes the folder, private to this user, and takes it. `inputs` are the files and folders that the new run
    /// reads: it may start from the model that an earlier run left here.
    pub fn prepare(folder: &Path, existing: Existing, inputs: &[PathBuf]) -> anyhow::Result<Self> {
        let run = RunDir::new(folder);
        if existing == Existing::Refuse && run.metrics().exists() {
            return Err(UsageError::new(
                format!("`{}` already holds a run", folder.display()),
                "choose another folder with `--out`, or pass `--overwrite` to replace that run",
            )
            .into());
        }
        DirBuilder::new().recursive(true).mode(0o700).create(run.ranks()).map_err(|error| {
            UsageError::new(
                format!("could not make the output folder `{}`: {error}", folder.display()),
                "choose a folder you can write to with `--out`",
            )
        })?;
        let lock = lock(&run)?;
        let clear = || format!("could not clear `{}`", folder.display());
        if existing == Existing::Continue {
            return Ok(OutDir { run, _lock: lock });
        }
        let mut earlier = attempt(&run).with_context(clear)?;
        if existing == Existing::Replace {
            earlier.extend(results(&run).with_context(clear)?);
            refuse_to_remove_inputs(&earlier, inputs)?;
        }
        earlier.iter().try_for_each(|path| remove(path)).with_context(clear)?;
        Ok(OutDir { run, _lock: lock })
    }

    pub fn run(&self) -> &RunDir {
        &self.run
    }
}

fn lock(run: &RunDir) -> anyhow::Result<File> {
    let ranks =
        File::open(run.ranks()).with_context(|| format!("could not open `{}`", run.ranks().display()))?;
    match flock(&ranks, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(ranks),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(UsageError::new(
            format!("another run is writing to `{}`", run.path().display()),
            "wait for it to end, or choose another folder with `--out`",
        )
        .into()),
        Err(error) => Err(error).with_context(|| format!("could not lock `{}`", run.ranks().display())),
    }
}

/// What even a run that never completed a step leaves: a new run starts with new logs.
fn attempt(run: &RunDir) -> std::io::Result<Vec<PathBuf>> {
    Ok([run.rank_logs()?, run.event_files()?].concat())
}

/// The results of a run, by name, and nothing else: the folder may hold the user's own files.
fn results(run: &RunDir) -> std::io::Result<Vec<PathBuf>> {
    Ok([vec![run.metrics(), run.effective_config()], checkpoints(run)?, run.model_files()?].concat())
}

fn refuse_to_remove_inputs(earlier: &[PathBuf], inputs: &[PathBuf]) -> anyhow::Result<()> {
    let inputs: Vec<_> = inputs.iter().filter_map(|input| input.canonicalize().ok()).collect();
    for path in earlier.iter().filter_map(|path| path.canonicalize().ok()) {
        if inputs.iter().any(|input| input.starts_with(&path) || path.starts_with(input)) {
            return Err(UsageError::new(
                format!("`--overwrite` would remove `{}`, which this run reads", path.display()),
                "choose another folder with `--out`",
            )
            .into());
        }
    }
    Ok(())
}

fn remove(path: &Path) -> std::io::Result<()> {
    let removed = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// `checkpoints/step-NNNNNN` folders.
fn checkpoints(run: &RunDir) -> std::io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(run.checkpoints()) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let step = name.to_str().and_then(|name| name.strip_prefix("step-"));
        let is_step = step.is_some_and(|step| step.parse::<u64>().is_ok()) && entry.file_type()?.is_dir();
        // Saves that were cut off, and the name of the newest.
        let is_left = name.to_str().is_some_and(|name| name == "latest" || name.starts_with(".tmp-step-"));
        if is_step || is_left {
            found.push(entry.path());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn folders_are_private_and_taken_once() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("out/run");
        let held = OutDir::prepare(&folder, Existing::Refuse, &[]).unwrap();
        for path in [folder.clone(), held.run().ranks()] {
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        }
        let second = OutDir::prepare(&folder, Existing::Replace, &[]).unwrap_err();
        assert!(second.to_string().starts_with("another run is writing to"), "{second}");
        drop(held);
        OutDir::prepare(&folder, Existing::Refuse, &[]).unwrap();
    }

    #[test]
    fn logs_of_an_attempt_without_results_make_way() {
        let root = tempfile::tempdir().unwrap();
        let run = RunDir::new(root.path());
        std::fs::create_dir(run.ranks()).unwrap();
        std::fs::write(run.rank_log(0), "old").unwrap();
        OutDir::prepare(root.path(), Existing::Refuse, &[]).unwrap();
        assert!(!run.rank_log(0).exists());
    }

    #[test]
    fn an_earlier_run_is_kept_unless_it_is_to_be_replaced() {
        let root = tempfile::tempdir().unwrap();
        let run = RunDir::new(root.path());
        let ours = [
            run.metrics(),
            run.effective_config(),
            run.path().join("events.out.tfevents.1.h"),
            run.rank_log(3),
            run.checkpoints().join("step-000010/a.safetensors"),
            run.model().join("config.json"),
            run.model().join("model-00001-of-00002.safetensors"),
        ];
        let theirs = [
            run.path().join("notes.txt"),
            run.ranks().join("mine.log"),
            run.checkpoints().join("best/a.bin"),
            run.model().join("README.md"),
        ];
        for path in ours.iter().chain(&theirs) {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "x").unwrap();
        }
        let refused = OutDir::prepare(root.path(), Existing::Refuse, &[]).unwrap_err();
        assert!(refused.to_string().ends_with("already holds a run"), "{refused}");
        // A run that reads one of the results, or the folder of one, cannot replace them.
        for input in [run.model(), run.metrics(), run.checkpoints().join("step-000010/a.safetensors")] {
            let refused = OutDir::prepare(root.path(), Existing::Replace, &[input]).unwrap_err();
            assert!(refused.to_string().ends_with("which this run reads"), "{refused}");
        }
        assert!(ours.iter().all(|path| path.exists()));
        OutDir::prepare(root.path(), Existing::Replace, &theirs).unwrap();
        assert!(ours.iter().all(|path| !path.exists()));
        assert!(theirs.iter().all(|path| path.exists()));
    }
}
