//! Verifying all of a checkpoint: every byte of every file, and that the files say what the manifest says.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::state::manifest::piece_key;
use crate::state::problem::Damage;
use crate::state::read::{Checkpoint, StateTensor};
use crate::state::shard::Progress;
use crate::{CheckpointError, header};

/// What is wrong with one file, or with a stretch of it.
#[derive(Debug)]
pub struct Finding {
    /// The file's name in the checkpoint.
    pub file: String,
    /// What is wrong.
    pub damage: Damage,
    /// `KIND` and name of the tensors that are lost with it.
    pub tensors: Vec<(String, String)>,
}

/// The result of [`Checkpoint::verify`].
#[derive(Debug)]
pub struct Verified {
    /// Bytes that were read.
    pub num_bytes: u64,
    /// What is wrong; nothing, one hopes.
    pub findings: Vec<Finding>,
}

impl Checkpoint {
    /// Reads everything and compares it with the checksums. `report` is called after each chunk.
    pub fn verify(&self, mut report: impl FnMut(Progress)) -> Verified {
        let total_bytes = (0..self.num_files()).map(|index| self.file(index).bytes).sum();
        let mut verified = Verified { num_bytes: 0, findings: Vec::new() };
        for index in 0..self.num_files() {
            let result = self.verify_file(index, |num_bytes| {
                verified.num_bytes += num_bytes;
                report(Progress { done_bytes: verified.num_bytes, total_bytes });
            });
            let found = result.unwrap_or_else(|damage| vec![(0..u64::MAX, damage)]);
            verified.findings.extend(found.into_iter().map(|(bytes, damage)| Finding {
                file: self.file(index).name.clone(),
                damage,
                tensors: lost(&self.tensors_in(index, bytes)),
            }));
        }
        verified
    }

    /// Damaged stretches of a file, or what is wrong with all of it.
    fn verify_file(
        &self,
        index: usize,
        mut report: impl FnMut(u64),
    ) -> Result<Vec<(Range<u64>, Damage)>, Damage> {
        let entry = self.file(index);
        let path = self.dir().join(&entry.name);
        let unreadable = |error: std::io::Error| Damage::Unreadable { why: error.to_string() };
        self.check_size(index, None).map_err(|error| match error {
            CheckpointError::Damaged { damage, .. } => damage,
            CheckpointError::Io { source, .. } => unreadable(source),
            other => Damage::Unreadable { why: other.to_string() },
        })?;
        let file = File::open(&path).map_err(unreadable)?;
        let mut found: Vec<(Range<u64>, Damage)> = Vec::new();
        let mut buffer = Vec::new();
        for (chunk, &expected) in entry.crc32c.iter().enumerate() {
            let range = self.chunk_range(index, chunk as u64);
            buffer.resize((range.end - range.start) as usize, 0);
            file.read_exact_at(&mut buffer, range.start).map_err(unreadable)?;
            report(range.end - range.start);
            if crc32c::crc32c(&buffer) == expected {
                continue;
            }
            match found.last_mut() {
                Some((bytes, Damage::Altered { end, .. })) if bytes.end == range.start => {
                    (bytes.end, *end) = (range.end, range.end);
                }
                _ => match self.what_happened(index, &file, range.clone()) {
                    foreign @ Damage::Foreign { .. } => return Err(foreign),
                    damage => found.push((range, damage)),
                },
            }
        }
        if found.is_empty() && index < self.manifest.files.len() {
            self.verify_header(index, &file)?;
        }
        Ok(found)
    }

    /// Whether other readers of the file see the tensors that the manifest speaks of.
    fn verify_header(&self, index: usize, file: &File) -> Result<(), Damage> {
        let path = self.dir().join(&self.file(index).name);
        let entries =
            header::read(&path, file).map_err(|error| Damage::Unreadable { why: error.to_string() })?;
        let by_key: HashMap<_, _> = entries.iter().map(|entry| (entry.name.as_str(), entry)).collect();
        for tensor in &self.manifest.tensors {
            for piece in tensor.pieces.iter().filter(|piece| piece.file == index) {
                let region = piece.region(&tensor.shape);
                let key = piece_key(&tensor.kind, &tensor.name, &tensor.shape, &region);
                let listed = by_key.get(key.as_str()).is_some_and(|entry| {
                    (entry.dtype, entry.numel, entry.file_offset)
                        == (tensor.dtype, region.numel(), piece.offset)
                });
                if !listed {
                    return Err(Damage::Header { what: format!("`{key}`") });
                }
            }
        }
        Ok(())
    }
}

fn lost(tensors: &[StateTensor<'_>]) -> Vec<(String, String)> {
    tensors.iter().map(|tensor| (tensor.kind.to_owned(), tensor.name.to_owned())).collect()
}
