//! The folder of a run's checkpoints: which are there, which is the newest, which go.
//!
//! ```text
//! checkpoints/
//!   step-000100/                 complete, or it would not have this name
//!   step-000200/
//!   .tmp-step-000300-<nonce>/    being written, or left by a run that died
//!   .old-step-000000-<nonce>/    being removed
//!   latest                       the name of the newest, for people and scripts
//! ```
//!
//! The newest is the one saved last, not the one with most steps: a run that went back and took another way has
//! later checkpoints of fewer steps. So manifests carry a sequence number, and `latest`, which a crash can leave one
//! behind, is not asked.

use std::fs;
use std::io::ErrorKind;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use crate::CheckpointError;
use crate::error::io;
use crate::state::manifest;
use crate::state::read::Checkpoint;
use crate::writer::sync_dir;

/// How many checkpoints stay when a new one is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// All.
    All,
    /// The newest so many, the new one included.
    Newest(NonZeroUsize),
}

/// A checkpoint that was looked for, and those that were passed over.
#[derive(Debug)]
pub struct Found {
    /// The newest complete one.
    pub checkpoint: Checkpoint,
    /// Folders that look like checkpoints and are damaged, with the reason. Worth a warning.
    pub damaged: Vec<(PathBuf, CheckpointError)>,
}

const UNFINISHED: &str = ".tmp-";
const REMOVED: &str = ".old-";
const LATEST: &str = "latest";

pub(crate) fn step_name(step: u64) -> String {
    format!("step-{step:06}")
}

/// The step of a folder with such a name.
pub(crate) fn step_of(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (step_name(step) == name).then_some(step)
}

pub(crate) fn unfinished_name(step: u64, save: &str) -> String {
    format!("{UNFINISHED}{}-{save}", step_name(step))
}

/// All checkpoints of a folder: complete ones, newest first, and damaged ones.
pub(crate) struct Listing {
    pub complete: Vec<Checkpoint>,
    pub damaged: Vec<(PathBuf, CheckpointError)>,
}

impl Listing {
    /// A folder that is not there holds none.
    pub(crate) fn of(dir: &Path) -> Result<Listing, CheckpointError> {
        let mut listing = Listing { complete: Vec::new(), damaged: Vec::new() };
        for name in names(dir)? {
            if step_of(&name).is_none() {
                continue;
            }
            let path = dir.join(name);
            match Checkpoint::open(&path) {
                Ok(checkpoint) => listing.complete.push(checkpoint),
                // A run that goes on may have removed it meanwhile.
                Err(_) if !path.exists() => {}
                Err(error) => listing.damaged.push((path, error)),
            }
        }
        listing
            .complete
            .sort_by_key(|checkpoint| std::cmp::Reverse((checkpoint.sequence(), checkpoint.step())));
        listing.damaged.sort_by(|(a, _), (b, _)| b.cmp(a));
        Ok(listing)
    }
}

impl Checkpoint {
    /// The newest complete checkpoint of a run's folder, or of its `checkpoints` folder; `None` if there is none.
    ///
    /// What a crash left unfinished is not looked at.
    ///
    /// # Errors
    /// [`CheckpointError::NoCheckpoint`] if all that are there are damaged: starting anew would hide that.
    pub fn newest(folder: impl AsRef<Path>) -> Result<Option<Found>, CheckpointError> {
        let folder = folder.as_ref();
        let inner = folder.join("checkpoints");
        let dir = if inner.is_dir() { &inner } else { folder };
        let Listing { complete, mut damaged } = Listing::of(dir)?;
        match complete.into_iter().next() {
            Some(checkpoint) => Ok(Some(Found { checkpoint, damaged })),
            None if damaged.is_empty() => Ok(None),
            None => {
                let newest = Some(Box::new(damaged.remove(0).1));
                Err(CheckpointError::NoCheckpoint { dir: dir.to_owned(), newest })
            }
        }
    }

    /// The checkpoint `path`, or the newest of the folder `path`: what people mean when they name either.
    ///
    /// # Errors
    /// [`CheckpointError::NoCheckpoint`], and those of [`Checkpoint::open`].
    pub fn find(path: impl AsRef<Path>) -> Result<Found, CheckpointError> {
        let path = path.as_ref();
        if looks_like_one(path) {
            return Ok(Found { checkpoint: Checkpoint::open(path)?, damaged: Vec::new() });
        }
        fs::metadata(path).map_err(|source| io("open", path, source))?;
        Self::newest(path)?
            .ok_or_else(|| CheckpointError::NoCheckpoint { dir: path.to_owned(), newest: None })
    }

    /// As [`Checkpoint::find`], without looking at the files of the ranks: [`Checkpoint::verify`] says what is wrong
    /// with them. A damaged checkpoint of more steps than every complete one is not passed over.
    ///
    /// # Errors
    /// As [`Checkpoint::find`], except for missing files and wrong sizes.
    pub fn find_to_verify(path: impl AsRef<Path>) -> Result<Checkpoint, CheckpointError> {
        let path = path.as_ref();
        if looks_like_one(path) {
            return Checkpoint::open_manifest(path);
        }
        let step = |path: &Path| step_of(path.file_name()?.to_str()?);
        match Self::find(path) {
            Ok(Found { checkpoint, damaged }) => match damaged.first() {
                Some((path, _)) if step(path) > Some(checkpoint.step()) => Checkpoint::open_manifest(path),
                _ => Ok(checkpoint),
            },
            Err(CheckpointError::NoCheckpoint { dir, newest: Some(_) }) => {
                let Listing { damaged, .. } = Listing::of(&dir)?;
                let (path, _) = damaged.first().ok_or(CheckpointError::NoCheckpoint { dir, newest: None })?;
                Checkpoint::open_manifest(path)
            }
            Err(error) => Err(error),
        }
    }
}

fn looks_like_one(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    path.join(manifest::FILE_NAME).exists()
        || name.is_some_and(|name| step_of(name).is_some()) && path.is_dir()
}

/// Removes what dead runs left: temporary folders except `but`, and checkpoints whose removal was cut short.
///
/// Only whoever is about to save may call it, never a reader: another run may be writing.
pub(crate) fn clear_leftovers(dir: &Path, but: Option<&str>) -> Result<(), CheckpointError> {
    for name in names(dir)? {
        let is_leftover = name.starts_with(UNFINISHED)
            || name.starts_with(REMOVED)
            || name.strip_prefix('.').is_some_and(|name| name.starts_with(LATEST));
        if is_leftover && Some(name.as_str()) != but {
            remove(&dir.join(name))?;
        }
    }
    Ok(())
}

/// Removes a folder or file; one that is gone already is no error.
pub(crate) fn remove(path: &Path) -> Result<(), CheckpointError> {
    let is_dir = fs::symlink_metadata(path).is_ok_and(|kind| kind.is_dir());
    let removed = if is_dir { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other.map_err(|source| io("remove", path, source)),
    }
}

/// Takes checkpoints away: first all their names, durably, so that no half one is ever offered.
pub(crate) fn retire(dir: &Path, old: &[PathBuf], save: &str) -> Result<(), CheckpointError> {
    let mut removed = Vec::with_capacity(old.len());
    for path in old {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let hidden = dir.join(format!("{REMOVED}{name}-{save}"));
        fs::rename(path, &hidden).map_err(|source| io("rename", path, source))?;
        removed.push(hidden);
    }
    if !removed.is_empty() {
        sync_dir(dir)?;
    }
    removed.iter().try_for_each(|path| remove(path))
}

/// Points `latest` at a checkpoint, in one step.
pub(crate) fn write_latest(dir: &Path, name: &str, save: &str) -> Result<(), CheckpointError> {
    let (temp, path) = (dir.join(format!(".{LATEST}-{save}")), dir.join(LATEST));
    remove(&temp)?;
    crate::state::save::write_private(&temp, format!("{name}\n").as_bytes())?;
    fs::rename(&temp, &path).map_err(|source| io("rename", &path, source))?;
    sync_dir(dir)
}

fn names(dir: &Path) -> Result<Vec<String>, CheckpointError> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(|source| io("list", dir, source))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|source| io("list", dir, source))?;
        // Names that are no text are none of ours.
        names.extend(entry.file_name().into_string().ok());
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_steps() {
        for (step, name) in [(0, "step-000000"), (120, "step-000120"), (12_345_678, "step-12345678")] {
            assert_eq!(step_name(step), name);
            assert_eq!(step_of(name), Some(step));
        }
        for name in ["step-1", "step-0000001", "step-+00001", "step-", "best", ".tmp-step-000001-a"] {
            assert_eq!(step_of(name), None, "{name}");
        }
    }
}
