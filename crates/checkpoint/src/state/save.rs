//! Saving: all ranks write at once, one of them commits.
//!
//! ```text
//!   every rank   Save::begin ─► ShardWriter: write, fsync, leave an index ─┐
//!   all          agree that everybody has finished (one flag in the step's exchange)
//!   rank 0       Save::commit: read indexes ─► check that pieces cover every tensor
//!                ─► manifest ─► fsync ─► rename .tmp-step-N to step-N ─► fsync ─► latest ─► remove old ones
//! ```
//!
//! Until the rename there is only a temporary folder, which no reader looks at; after it there is a complete
//! checkpoint. Nothing that exists is touched before the new one is durable. If a rank fails, rank 0 abandons the
//! save and the folder goes.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use serde_json::Value;

use crate::CheckpointError;
use crate::error::io;
use crate::state::chunks::Checksums;
use crate::state::folder::{self, Keep, Listing};
use crate::state::manifest::{self, FORMAT, FileEntry, Manifest, Mesh, PieceEntry, TensorEntry, VERSION};
use crate::state::problem::{ManifestProblem, SaveProblem};
use crate::state::shard::{self, Fragment, SaveKey, ShardIndex, ShardWriter, Written};
use crate::writer::sync_dir;

/// What one checksum covers: little enough that a rank which reads a small tensor reads little more.
const CHUNK_BYTES: usize = 1 << 20;

/// What a checkpoint says besides its tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct Contents {
    /// The program that writes it, with its version.
    pub program: String,
    /// How the ranks are arranged.
    pub mesh: Mesh,
    /// The run's effective configuration.
    pub config: Value,
    /// What continues a run besides tensors: steps, schedule, loss scale, random state, data position.
    pub run_state: Value,
    /// Small files that belong to it.
    pub attached: Vec<Attachment>,
}

/// A small file that is saved with a checkpoint, such as `config.json` or `tokenizer.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct Attachment {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its bytes; shared, since every checkpoint of a run has the same.
    pub bytes: Arc<[u8]>,
}

impl Attachment {
    /// The file `path` under its own name.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn read(path: &Path) -> Result<Self, CheckpointError> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let bytes = fs::read(path).map_err(|source| io("read", path, source))?.into();
        Ok(Attachment { name, bytes })
    }
}

/// A checkpoint that is durable.
#[derive(Debug)]
pub struct Committed {
    /// Its folder.
    pub dir: PathBuf,
    /// Bytes of all ranks' files.
    pub num_bytes: u64,
    /// Older ones that went.
    pub removed: Vec<PathBuf>,
    /// Why cleaning up after it did not work. The checkpoint itself is safe.
    pub clean_up: Result<(), CheckpointError>,
}

/// One save, as one rank sees it.
#[derive(Debug)]
pub struct Save {
    dir: PathBuf,
    temp: PathBuf,
    key: SaveKey,
    rank: usize,
    chunk_bytes: usize,
}

impl Save {
    /// Begins to save the state after step `step` into the folder `dir` of all checkpoints. Every rank calls it, at
    /// whatever moment; rank 0 also clears what dead runs left. `dir` is made if only it is missing.
    ///
    /// `nonce` is a number that all ranks of this run share and no other run has: it keeps the leftovers of one from
    /// passing for the parts of another.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn begin(dir: impl AsRef<Path>, step: u64, nonce: u64, rank: usize) -> Result<Save, CheckpointError> {
        let dir = dir.as_ref().to_owned();
        let save = format!("{nonce:016x}");
        let name = folder::unfinished_name(step, &save);
        make_dir(&dir)?;
        if rank == 0 {
            folder::clear_leftovers(&dir, Some(&name))?;
        }
        let temp = dir.join(name);
        make_dir(&temp)?;
        Ok(Save { dir, temp, key: SaveKey { save, step }, rank, chunk_bytes: CHUNK_BYTES })
    }

    /// Checksums over chunks of `chunk_bytes` instead of 1 MiB: a power of two from 64 to 64 MiB, the same on all ranks.
    pub fn chunk_bytes(mut self, chunk_bytes: usize) -> Self {
        self.chunk_bytes = chunk_bytes;
        self
    }

    /// Starts this rank's file, which will hold `fragments`. Every rank writes one, if only with no fragments.
    ///
    /// # Errors
    /// [`CheckpointError::Save`] for fragments that cannot be written, [`CheckpointError::Io`]: also if the disk has
    /// no room for all of them.
    pub fn shard_writer(&self, fragments: &[Fragment]) -> Result<ShardWriter, CheckpointError> {
        ShardWriter::create(&self.temp, &self.key, self.rank, fragments, self.chunk_bytes)
    }

    /// Makes a checkpoint of what all ranks wrote. Only rank 0 calls it, when every rank has finished its file.
    ///
    /// # Errors
    /// [`CheckpointError::Save`] if a rank's part is missing or the parts do not cover every tensor exactly once;
    /// [`CheckpointError::Io`]. Then the temporary folder is gone, and what was there before is as it was.
    ///
    /// # Panics
    /// If this is not rank 0.
    pub fn commit(self, contents: &Contents, keep: Keep) -> Result<Committed, CheckpointError> {
        assert_eq!(self.rank, 0, "rank 0 commits for all");
        let result = self.publish(contents);
        let (earlier, num_bytes) = match result {
            Ok(published) => published,
            Err(error) => {
                // The first error is the one to tell.
                let _ = folder::remove(&self.temp);
                return Err(error);
            }
        };
        let name = folder::step_name(self.key.step);
        let dir = self.dir.join(&name);
        let removed: Vec<_> = match keep {
            Keep::All => Vec::new(),
            Keep::Newest(count) => {
                let others = earlier.into_iter().filter(|path| *path != dir);
                others.skip(count.get() - 1).collect()
            }
        };
        let clean_up = folder::write_latest(&self.dir, &name, &self.key.save)
            .and_then(|()| folder::retire(&self.dir, &removed, &self.key.save));
        Ok(Committed { dir, num_bytes, removed, clean_up })
    }

    /// Gives the save up and removes what is written of it. Rank 0 calls it when a rank has failed.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn abandon(self) -> Result<(), CheckpointError> {
        folder::remove(&self.temp)
    }

    /// Everything up to the moment from which the checkpoint exists. Returns those that were there before, newest
    /// first, and the bytes of the new one.
    fn publish(&self, contents: &Contents) -> Result<(Vec<PathBuf>, u64), CheckpointError> {
        let world_size = contents.mesh.world_size;
        let indexes = (0..world_size)
            .map(|rank| shard::read_index(&self.temp, &self.key, rank))
            .collect::<Result<Vec<_>, _>>()?;
        let num_bytes = indexes.iter().map(ShardIndex::num_bytes).sum();
        let attached = contents.attached.iter().map(|file| self.attach(file)).collect::<Result<_, _>>()?;

        let earlier = Listing::of(&self.dir)?.complete;
        let sequence = earlier.iter().map(|checkpoint| checkpoint.sequence()).max().unwrap_or(0) + 1;
        let manifest = self.manifest(contents, indexes, attached, sequence)?;
        write_private(&self.temp.join(manifest::FILE_NAME), &manifest.to_bytes())?;
        for rank in 0..world_size {
            folder::remove(&self.temp.join(shard::index_name(rank)))?;
        }
        sync_dir(&self.temp)?;
        self.give_name()?;
        Ok((earlier.iter().map(|checkpoint| checkpoint.dir().to_owned()).collect(), num_bytes))
    }

    fn attach(&self, Attachment { name, bytes }: &Attachment) -> Result<FileEntry, CheckpointError> {
        let refuse = |why| Err(self.error(SaveProblem::Attachment { file: name.clone(), why }));
        if !manifest::is_file_name(name) {
            return refuse("it is no plain file name");
        }
        if name.starts_with("rank-") {
            return refuse("names that begin with `rank-` are those of the ranks");
        }
        write_private(&self.temp.join(name), bytes)?;
        let crc32c = Checksums::of(bytes, self.chunk_bytes);
        Ok(FileEntry { name: name.clone(), bytes: bytes.len() as u64, crc32c })
    }

    fn manifest(
        &self,
        contents: &Contents,
        indexes: Vec<ShardIndex>,
        attached: Vec<FileEntry>,
        sequence: u64,
    ) -> Result<Manifest, CheckpointError> {
        let Contents { program, mesh, config, run_state, .. } = contents.clone();
        let mut tensors = Tensors::default();
        let mut files = Vec::with_capacity(indexes.len());
        for (rank, index) in indexes.into_iter().enumerate() {
            if index.chunk_bytes != self.chunk_bytes {
                let why =
                    format!("its chunks have `{}` bytes, not `{}`", index.chunk_bytes, self.chunk_bytes);
                return Err(self.error(SaveProblem::Index { rank, why }));
            }
            files.push(index.file);
            for written in index.fragments {
                tensors.add(rank, written).map_err(|problem| self.error(problem))?;
            }
        }
        // The same order whatever the mesh: layers by number, kinds of one tensor together.
        tensors.entries.sort_by(|a, b| natural(&a.name, &b.name));
        let manifest = Manifest {
            format: FORMAT.to_owned(),
            version: VERSION,
            program,
            save: self.key.save.clone(),
            sequence,
            step: self.key.step,
            mesh,
            chunk_bytes: self.chunk_bytes,
            config,
            run_state,
            files,
            attached,
            tensors: tensors.entries,
        };
        match manifest.check() {
            Ok(()) => Ok(manifest),
            Err(problem) => Err(self.error(SaveProblem::Parts(problem.into()))),
        }
    }

    /// Gives the finished folder its name. A checkpoint of the same step, of an earlier way of the run, changes
    /// places with it and then goes.
    fn give_name(&self) -> Result<(), CheckpointError> {
        let path = self.dir.join(folder::step_name(self.key.step));
        let failed = |error: Errno| io("rename a finished checkpoint to", &path, error.into());
        match renameat_with(CWD, &self.temp, CWD, &path, RenameFlags::NOREPLACE) {
            Ok(()) => return sync_dir(&self.dir),
            Err(Errno::EXIST) => {}
            // File systems without these flags, NFS for one.
            Err(Errno::INVAL | Errno::NOSYS) if !path.exists() => {
                fs::rename(&self.temp, &path)
                    .map_err(|source| io("rename a finished checkpoint to", &path, source))?;
                return sync_dir(&self.dir);
            }
            Err(Errno::INVAL | Errno::NOSYS) => {}
            Err(error) => return Err(failed(error)),
        }
        match renameat_with(CWD, &self.temp, CWD, &path, RenameFlags::EXCHANGE) {
            Ok(()) => {
                sync_dir(&self.dir)?;
                // From here on the new one exists; the old one under the temporary name is a leftover.
                let _ = folder::remove(&self.temp);
                Ok(())
            }
            // Without an exchange the old one has to go first. A crash in between loses it, and no other.
            Err(Errno::INVAL | Errno::NOSYS) => {
                folder::retire(&self.dir, std::slice::from_ref(&path), &self.key.save)?;
                fs::rename(&self.temp, &path)
                    .map_err(|source| io("rename a finished checkpoint to", &path, source))?;
                sync_dir(&self.dir)
            }
            Err(error) => Err(failed(error)),
        }
    }

    fn error(&self, problem: SaveProblem) -> CheckpointError {
        CheckpointError::save(self.key.step, problem)
    }
}

/// The pieces of all ranks by tensor.
#[derive(Default)]
struct Tensors {
    entries: Vec<TensorEntry>,
    by_key: HashMap<(String, String), usize>,
}

impl Tensors {
    fn add(&mut self, rank: usize, written: Written) -> Result<(), SaveProblem> {
        let Written { name, kind, dtype, shape, range, block, offset } = written;
        let next = self.entries.len();
        let index = *self.by_key.entry((name.clone(), kind.clone())).or_insert(next);
        if index == next {
            let shape = shape.clone();
            self.entries.push(TensorEntry { name, kind, dtype, shape, pieces: Vec::new() });
        }
        let entry = &mut self.entries[index];
        if entry.dtype != dtype || entry.shape != shape {
            let TensorEntry { name, kind, .. } = entry.clone();
            let why = "ranks do not agree on its shape and type";
            return Err(SaveProblem::Parts(ManifestProblem::Tensor { name, kind, dtype, why }.into()));
        }
        // A piece without elements is only needed to say that its tensor has none.
        if range.0 < range.1 {
            entry.pieces.push(PieceEntry { file: rank, offset, range, block });
        }
        Ok(())
    }
}

/// `layers.2` before `layers.10`.
fn natural(a: &str, b: &str) -> Ordering {
    // Equal but for leading zeros, names still have an order.
    parts(a).cmp(parts(b)).then_with(|| a.cmp(b))
}

/// The numbers in a name, and the texts between them: a longer number is greater than a shorter one.
fn parts(name: &str) -> impl Iterator<Item = (usize, &str)> {
    let is_digit = |c: char| c.is_ascii_digit();
    name.as_bytes().chunk_by(|a, b| a.is_ascii_digit() == b.is_ascii_digit()).scan(0, move |start, part| {
        let text = &name[*start..*start + part.len()];
        *start += part.len();
        let number = text.trim_start_matches('0');
        Some(if text.starts_with(is_digit) { (number.len(), number) } else { (0, text) })
    })
}

/// Makes a folder of this user alone, durably; one that is there is taken as it is.
fn make_dir(path: &Path) -> Result<(), CheckpointError> {
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => match path.parent() {
            Some(parent) if parent.as_os_str().is_empty() => sync_dir(Path::new(".")),
            Some(parent) => sync_dir(parent),
            None => Ok(()),
        },
        Err(error) if error.kind() == ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(error) => Err(io("create", path, error)),
    }
}

/// Writes a small file of this user alone, durably.
pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    let write = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|source| io("write", path, source))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_names_count_as_numbers() {
        let mut names = ["a.10.w", "a.9.w", "a.w", "b", "a", "a.9.b", "", "a.09.b", "7", "a.9"];
        names.sort_by(|a, b| natural(a, b));
        assert_eq!(names, ["", "a", "a.9", "a.09.b", "a.9.b", "a.9.w", "a.10.w", "a.w", "b", "7"]);
    }
}
