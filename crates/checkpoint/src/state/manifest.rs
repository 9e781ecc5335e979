//! `manifest.json`: what a checkpoint consists of, and where every element of it is.
//!
//! Nothing in it is believed before it is checked: names stay inside of the folder, pieces inside of their files,
//! no two pieces share a byte, every tensor is covered exactly, and no arithmetic overflows.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::state::chunks;
use crate::state::problem::ManifestProblem;
use crate::state::region::{Block, Region};
use crate::state::{cover, sealed};
use crate::{FileDType, index};

/// The version this program writes; it reads all up to it.
pub(crate) const VERSION: u32 = 1;
pub(crate) const FORMAT: &str = "shardwise-checkpoint";
pub(crate) const FILE_NAME: &str = "manifest.json";
/// A manifest lists tensors, it does not hold them.
pub(crate) const MAX_BYTES: u64 = 1 << 30;
/// What one chunk may have: the largest is held in memory while it is verified.
const CHUNK_BYTES: std::ops::RangeInclusive<usize> = 64..=64 << 20;

/// How the ranks that wrote a checkpoint were arranged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mesh {
    /// Ranks in all.
    pub world_size: usize,
    /// ZeRO stage, 0 to 3.
    pub zero_stage: u8,
    /// Pipeline degree.
    pub pipeline: usize,
    /// Data-parallel degree.
    pub data: usize,
    /// Tensor-parallel degree.
    pub tensor: usize,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Manifest {
    pub format: String,
    pub version: u32,
    pub program: String,
    pub save: String,
    pub sequence: u64,
    pub step: u64,
    pub mesh: Mesh,
    pub chunk_bytes: usize,
    pub config: Value,
    pub run_state: Value,
    /// One for each rank, in rank order.
    pub files: Vec<FileEntry>,
    pub attached: Vec<FileEntry>,
    pub tensors: Vec<TensorEntry>,
}

/// A file and the checksums of its chunks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FileEntry {
    pub name: String,
    pub bytes: u64,
    #[serde(with = "chunks::hex")]
    pub crc32c: Vec<u32>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TensorEntry {
    pub name: String,
    pub kind: String,
    pub dtype: FileDType,
    pub shape: Vec<usize>,
    pub pieces: Vec<PieceEntry>,
}

/// Where some elements of a tensor are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PieceEntry {
    /// Index into the files.
    pub file: usize,
    /// First byte, from the start of the file.
    pub offset: u64,
    /// Elements of the flattened block.
    pub range: (usize, usize),
    /// The whole tensor, if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block: Option<Block>,
}

/// What is read before all else: a later version may have other keys.
#[derive(Deserialize)]
struct Version {
    format: String,
    version: u32,
}

impl PieceEntry {
    pub(crate) fn region(&self, shape: &[usize]) -> Region {
        let block = self.block.clone().unwrap_or_else(|| Block::whole(shape));
        Region { block, range: self.range.0..self.range.1 }
    }

    pub(crate) fn numel(&self) -> usize {
        self.range.1.saturating_sub(self.range.0)
    }

    /// Bytes of its file.
    pub(crate) fn bytes(&self, dtype: FileDType) -> Option<(u64, u64)> {
        let end = self.offset.checked_add(dtype.num_bytes(self.numel())? as u64)?;
        Some((self.offset, end))
    }
}

/// The key of a piece in its safetensors file: `KIND/NAME`, and which elements unless it is all of them.
pub(crate) fn piece_key(kind: &str, name: &str, shape: &[usize], region: &Region) -> String {
    let mut key = format!("{kind}/{name}");
    let block = &region.block;
    if !block.is_whole(shape) {
        let dims: Vec<_> =
            block.offset.iter().zip(&block.shape).map(|(o, len)| format!("{o}:{}", o + len)).collect();
        key += &format!("[{}]", dims.join(","));
    }
    if Some(region.numel()) != block.numel() {
        key += &format!("@{}..{}", region.range.start, region.range.end);
    }
    key
}

/// Whether a file in a checkpoint may have this name.
pub(crate) fn is_file_name(name: &str) -> bool {
    index::is_plain_file_name(name) && name != FILE_NAME && !name.starts_with('.')
}

impl Manifest {
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let Value::Object(entries) = sealed::to_value(self) else { unreachable!("a structure is an object") };
        let entries: Vec<_> = entries.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
        sealed::seal(&entries)
    }

    /// Reads and checks the bytes of a manifest.
    pub(crate) fn parse(bytes: &mut [u8]) -> Result<Manifest, ManifestProblem> {
        let json = sealed::open(bytes)?;
        let malformed = |error: serde_json::Error| ManifestProblem::Json(error.to_string());
        let Version { format, version } = serde_json::from_slice(json).map_err(malformed)?;
        if format != FORMAT {
            return Err(ManifestProblem::Format { got: format });
        }
        if !(1..=VERSION).contains(&version) {
            return Err(ManifestProblem::Version { got: version, newest: VERSION });
        }
        let manifest: Manifest = serde_json::from_slice(json).map_err(malformed)?;
        manifest.check()?;
        Ok(manifest)
    }

    pub(crate) fn check(&self) -> Result<(), ManifestProblem> {
        self.check_head()?;
        self.check_files()?;
        self.check_tensors()
    }

    fn check_head(&self) -> Result<(), ManifestProblem> {
        let Mesh { world_size, zero_stage, pipeline, data, tensor } = self.mesh;
        let value = |key, got: &dyn std::fmt::Display, expected| {
            Err(ManifestProblem::Value { key, got: got.to_string(), expected })
        };
        if zero_stage > 3 {
            return value("mesh.zero_stage", &zero_stage, "0 to 3");
        }
        let product = pipeline.checked_mul(data).and_then(|ranks| ranks.checked_mul(tensor));
        if world_size == 0 || product != Some(world_size) {
            return value("mesh.world_size", &world_size, "the product of the degrees");
        }
        if !CHUNK_BYTES.contains(&self.chunk_bytes) || !self.chunk_bytes.is_power_of_two() {
            return value("chunk_bytes", &self.chunk_bytes, "a power of two from 64 to 67108864");
        }
        if self.files.len() != world_size {
            return Err(ManifestProblem::Ranks { got: self.files.len(), world_size });
        }
        Ok(())
    }

    fn check_files(&self) -> Result<(), ManifestProblem> {
        let mut names = HashSet::new();
        for FileEntry { name, bytes, crc32c } in self.files.iter().chain(&self.attached) {
            if !is_file_name(name) {
                return Err(ManifestProblem::FileName { file: name.clone() });
            }
            if !names.insert(name) {
                return Err(ManifestProblem::FileTwice { file: name.clone() });
            }
            let expected = bytes.div_ceil(self.chunk_bytes as u64);
            if crc32c.len() as u64 != expected {
                let (file, bytes, got) = (name.clone(), *bytes, crc32c.len());
                return Err(ManifestProblem::Checksums { file, bytes, got, expected });
            }
        }
        Ok(())
    }

    fn check_tensors(&self) -> Result<(), ManifestProblem> {
        let mut keys = HashSet::new();
        // Bytes of each file, with the tensor that they are of.
        let mut used: Vec<Vec<(u64, u64, usize)>> = vec![Vec::new(); self.files.len()];
        for (i, tensor) in self.tensors.iter().enumerate() {
            let TensorEntry { name, kind, dtype, shape, pieces } = tensor;
            check_tensor(name, kind, *dtype, shape)?;
            if !keys.insert((kind, name)) {
                return Err(ManifestProblem::Duplicate { name: name.clone(), kind: kind.clone() });
            }
            let regions: Vec<_> = pieces.iter().map(|piece| piece.region(shape)).collect();
            cover::check(shape, regions.iter()).map_err(|problem| ManifestProblem::Cover {
                name: name.clone(),
                kind: kind.clone(),
                problem: Box::new(problem),
            })?;
            for piece in pieces {
                let file = self.files.get(piece.file);
                match (file, piece.bytes(*dtype)) {
                    (Some(file), Some((begin, end))) if end <= file.bytes => {
                        if begin < end {
                            used[piece.file].push((begin, end, i));
                        }
                    }
                    (file, bytes) => {
                        let file = file.map_or(format!("number {}", piece.file), |file| file.name.clone());
                        let (name, kind) = (name.clone(), kind.clone());
                        let (begin, end) = bytes.unwrap_or((piece.offset, u64::MAX));
                        return Err(ManifestProblem::OutOfFile { name, kind, file, begin, end });
                    }
                }
            }
        }
        for (file, mut used) in self.files.iter().zip(used) {
            used.sort_unstable();
            if let Some(pair) = used.windows(2).find(|pair| pair[1].0 < pair[0].1) {
                let TensorEntry { name, kind, .. } = &self.tensors[pair[1].2];
                return Err(ManifestProblem::SharedBytes {
                    name: name.clone(),
                    kind: kind.clone(),
                    file: file.name.clone(),
                    begin: pair[1].0,
                });
            }
        }
        Ok(())
    }
}

/// Checks what a tensor is called and made of.
pub(crate) fn check_tensor(
    name: &str,
    kind: &str,
    dtype: FileDType,
    shape: &[usize],
) -> Result<(), ManifestProblem> {
    let bad = |why| Err(ManifestProblem::Tensor { name: name.to_owned(), kind: kind.to_owned(), dtype, why });
    if name.is_empty() {
        return bad("it has no name");
    }
    if kind.is_empty() || kind.contains(['/', '@', '[']) {
        return bad("its kind is empty or has one of `/`, `@`, `[`");
    }
    if dtype.size_bits() < 8 {
        return bad("its elements are no whole bytes");
    }
    match crate::state::region::numel(shape).and_then(|numel| dtype.num_bytes(numel)) {
        Some(_) => Ok(()),
        None => bad("its shape is too large"),
    }
}
