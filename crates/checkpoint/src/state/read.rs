//! Reading a checkpoint: just the elements that a rank wants, in bounded memory, every byte of them verified.
//!
//! The manifest says which pieces share elements with a wanted region; their runs are read chunk by chunk. A chunk
//! that is wanted whole goes straight to the caller's buffer. Of others one is kept, so that small neighbours are
//! read once.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde_json::Value;

use crate::convert::Scratch;
use crate::error::io;
use crate::header::{LENGTH_BYTES, MAX_HEADER_BYTES};
use crate::reader::close_names;
use crate::state::folder;
use crate::state::manifest::{self, FileEntry, Manifest, Mesh, TensorEntry};
use crate::state::problem::{Damage, ManifestProblem};
use crate::state::region::{self, Region};
use crate::{CheckpointError, FileDType};

/// Files kept open at a time: a checkpoint of thousands of ranks must not use up a process's descriptors.
const MAX_OPEN: usize = 64;

/// A checkpoint with a valid manifest and files of the right sizes.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    pub(crate) manifest: Manifest,
    by_kind: HashMap<String, HashMap<String, usize>>,
    state: Mutex<ReadState>,
}

/// A tensor of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateTensor<'a> {
    /// Its name.
    pub name: &'a str,
    /// What of it: `param`, `exp_avg`...
    pub kind: &'a str,
    /// Its element type in the files.
    pub dtype: FileDType,
    /// Its shape, whole.
    pub shape: &'a [usize],
    /// Into how many pieces it is cut.
    pub num_pieces: usize,
}

impl StateTensor<'_> {
    /// How many elements it has.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// How many bytes they are.
    pub fn num_bytes(&self) -> u64 {
        (self.numel() * self.dtype.size_bits() / 8) as u64
    }
}

/// Open files, and the chunk read last.
#[derive(Debug, Default)]
struct ReadState {
    open: HashMap<usize, File>,
    chunk: Option<(usize, u64)>,
    bytes: Vec<u8>,
}

impl Checkpoint {
    /// Opens the checkpoint in the folder `dir`, checks its manifest, and that every file has its size.
    ///
    /// # Errors
    /// [`CheckpointError::Manifest`] and [`CheckpointError::Damaged`], which name the file; [`CheckpointError::Io`].
    pub fn open(dir: impl AsRef<Path>) -> Result<Checkpoint, CheckpointError> {
        let checkpoint = Self::open_manifest(dir.as_ref())?;
        for index in 0..checkpoint.num_files() {
            checkpoint.check_size(index, None)?;
        }
        Ok(checkpoint)
    }

    /// Checks the manifest only.
    pub(crate) fn open_manifest(dir: &Path) -> Result<Checkpoint, CheckpointError> {
        let path = dir.join(manifest::FILE_NAME);
        let bad = |problem| CheckpointError::Manifest { path: path.clone(), problem: Box::new(problem) };
        let kind = fs::metadata(&path).map_err(|source| io("open", &path, source))?;
        if !kind.is_file() || kind.len() > manifest::MAX_BYTES {
            let limit = manifest::MAX_BYTES;
            return Err(bad(ManifestProblem::TooLarge { bytes: kind.len(), limit }));
        }
        let mut bytes = Vec::with_capacity(kind.len() as usize);
        let file = File::open(&path).map_err(|source| io("open", &path, source))?;
        file.take(manifest::MAX_BYTES).read_to_end(&mut bytes).map_err(|source| io("read", &path, source))?;
        let manifest = Manifest::parse(&mut bytes).map_err(bad)?;
        let name = dir.file_name().and_then(|name| name.to_str());
        if let Some(expected) = name.and_then(folder::step_of)
            && expected != manifest.step
        {
            return Err(bad(ManifestProblem::OtherStep { got: manifest.step, expected }));
        }
        let mut by_kind: HashMap<String, HashMap<String, usize>> = HashMap::new();
        for (i, tensor) in manifest.tensors.iter().enumerate() {
            by_kind.entry(tensor.kind.clone()).or_default().insert(tensor.name.clone(), i);
        }
        Ok(Checkpoint { dir: dir.to_owned(), manifest, by_kind, state: Mutex::default() })
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Optimizer steps that it holds.
    pub fn step(&self) -> u64 {
        self.manifest.step
    }

    /// Greater than that of every checkpoint saved before it in its folder.
    pub fn sequence(&self) -> u64 {
        self.manifest.sequence
    }

    /// Which run saved it.
    pub fn save(&self) -> &str {
        &self.manifest.save
    }

    /// The program that wrote it.
    pub fn program(&self) -> &str {
        &self.manifest.program
    }

    /// The version of its format.
    pub fn version(&self) -> u32 {
        self.manifest.version
    }

    /// How the ranks that wrote it were arranged.
    pub fn mesh(&self) -> &Mesh {
        &self.manifest.mesh
    }

    /// The effective configuration of its run.
    pub fn config(&self) -> &Value {
        &self.manifest.config
    }

    /// What continues the run besides tensors, as the worker wrote it.
    pub fn run_state(&self) -> &Value {
        &self.manifest.run_state
    }

    /// Bytes of all files of ranks.
    pub fn num_bytes(&self) -> u64 {
        self.manifest.files.iter().map(|file| file.bytes).sum()
    }

    /// All tensors by name, numbers in names as numbers.
    pub fn tensors(&self) -> impl Iterator<Item = StateTensor<'_>> {
        self.manifest.tensors.iter().map(of_entry)
    }

    /// One tensor.
    ///
    /// # Errors
    /// [`CheckpointError::MissingTensor`], with similar names.
    pub fn tensor(&self, name: &str, kind: &str) -> Result<StateTensor<'_>, CheckpointError> {
        self.entry(name, kind).map(of_entry)
    }

    /// Whether there is such a tensor.
    pub fn contains(&self, name: &str, kind: &str) -> bool {
        self.by_kind.get(kind).is_some_and(|names| names.contains_key(name))
    }

    /// Checks that the tensors of one kind are exactly these, with these shapes: what a load that is not partial
    /// needs.
    ///
    /// # Errors
    /// [`CheckpointError::MissingTensor`], [`CheckpointError::WrongShape`], [`CheckpointError::UnexpectedTensor`].
    pub fn expect_exactly<'a>(
        &self,
        kind: &str,
        expected: impl IntoIterator<Item = (&'a str, &'a [usize])>,
    ) -> Result<(), CheckpointError> {
        let path = || self.dir.join(manifest::FILE_NAME);
        let mut rest: HashMap<&str, usize> = self
            .by_kind
            .get(kind)
            .map(|names| names.iter().map(|(name, &i)| (name.as_str(), i)).collect())
            .unwrap_or_default();
        for (name, shape) in expected {
            let entry = self.entry(name, kind)?;
            if entry.shape != shape {
                let (expected, got) = (shape.to_vec(), entry.shape.clone());
                return Err(CheckpointError::WrongShape {
                    name: name.to_owned(),
                    path: path(),
                    expected,
                    got,
                });
            }
            rest.remove(name);
        }
        match rest.into_iter().min_by_key(|&(_, i)| i) {
            None => Ok(()),
            Some((name, _)) => Err(CheckpointError::UnexpectedTensor {
                name: name.to_owned(),
                kind: kind.to_owned(),
                path: path(),
            }),
        }
    }

    /// Reads the elements `region` of a tensor into `out` as `f32`; 16-bit floats widen exactly.
    ///
    /// # Errors
    /// As [`Checkpoint::read_bytes`]; [`CheckpointError::NotFloat`].
    pub fn read_f32(
        &self,
        name: &str,
        kind: &str,
        region: &Region,
        out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        let entry = self.entry(name, kind)?;
        check_region(entry, region, out.len())?;
        match entry.dtype {
            FileDType::F32 => self.read(entry, region, bytemuck::cast_slice_mut(out)),
            dtype if dtype.is_convertible() => {
                let element_bytes = dtype.size_bits() / 8;
                let mut scratch = Scratch::new(out.len() * element_bytes);
                let mut start = region.range.start;
                for piece in out.chunks_mut(Scratch::MAX_BYTES / element_bytes) {
                    let part = Region { block: region.block.clone(), range: start..start + piece.len() };
                    self.read(entry, &part, scratch.bytes_mut(piece.len() * element_bytes))?;
                    scratch.decode(dtype, piece).map_err(|lost| CheckpointError::Overflow {
                        name: name.to_owned(),
                        element: start + lost.element,
                        value: lost.value,
                        dtype: lost.dtype,
                    })?;
                    start += piece.len();
                }
                Ok(())
            }
            dtype => Err(CheckpointError::NotFloat { name: name.to_owned(), dtype }),
        }
    }

    /// Reads the elements `region` of a tensor into `out`, in the type they have in the file.
    ///
    /// # Errors
    /// [`CheckpointError::MissingTensor`]; [`CheckpointError::WrongRegion`] if the tensor has no such elements or
    /// `out` is not as long as they are; [`CheckpointError::Damaged`] if a chunk that holds them is not what was
    /// written; [`CheckpointError::Io`].
    pub fn read_bytes(
        &self,
        name: &str,
        kind: &str,
        region: &Region,
        out: &mut [u8],
    ) -> Result<(), CheckpointError> {
        let entry = self.entry(name, kind)?;
        let element_bytes = entry.dtype.size_bits() / 8;
        let numel =
            if out.len().is_multiple_of(element_bytes) { out.len() / element_bytes } else { usize::MAX };
        check_region(entry, region, numel)?;
        self.read(entry, region, out)
    }

    /// Names of the files that were saved with it.
    pub fn attached(&self) -> impl Iterator<Item = &str> {
        self.manifest.attached.iter().map(|file| file.name.as_str())
    }

    /// The content of a file that was saved with it, verified; `None` if there is none of this name.
    ///
    /// # Errors
    /// [`CheckpointError::Damaged`], [`CheckpointError::Io`].
    pub fn read_attached(&self, name: &str) -> Result<Option<Vec<u8>>, CheckpointError> {
        let Some(place) = self.manifest.attached.iter().position(|file| file.name == name) else {
            return Ok(None);
        };
        let index = self.manifest.files.len() + place;
        let mut bytes = vec![0; self.manifest.attached[place].bytes as usize];
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.read_file(&mut state, index, 0, &mut bytes, None)?;
        Ok(Some(bytes))
    }

    fn entry(&self, name: &str, kind: &str) -> Result<&TensorEntry, CheckpointError> {
        let names = self.by_kind.get(kind);
        match names.and_then(|names| names.get(name)) {
            Some(&i) => Ok(&self.manifest.tensors[i]),
            None => Err(CheckpointError::MissingTensor {
                name: name.to_owned(),
                looked_in: format!("`{}` of `{}`", kind, self.dir.display()),
                close: names
                    .map(|names| close_names(name, names.keys().map(String::as_str)))
                    .unwrap_or_default(),
            }),
        }
    }

    fn read(&self, entry: &TensorEntry, region: &Region, out: &mut [u8]) -> Result<(), CheckpointError> {
        let element_bytes = entry.dtype.size_bits() / 8;
        // A panic elsewhere leaves at worst a chunk that is read again.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for piece in &entry.pieces {
            for run in region::overlap(&piece.region(&entry.shape), region) {
                let to = run.wanted * element_bytes..(run.wanted + run.numel) * element_bytes;
                let offset = piece.offset + (run.stored * element_bytes) as u64;
                self.read_file(&mut state, piece.file, offset, &mut out[to], Some(entry))?;
            }
        }
        Ok(())
    }

    /// Reads bytes of one file, verifying every chunk that holds some of them.
    fn read_file(
        &self,
        state: &mut ReadState,
        index: usize,
        mut offset: u64,
        mut out: &mut [u8],
        wanted: Option<&TensorEntry>,
    ) -> Result<(), CheckpointError> {
        let chunk_bytes = self.manifest.chunk_bytes as u64;
        let ReadState { open, chunk: kept, bytes } = state;
        while !out.is_empty() {
            let chunk = offset / chunk_bytes;
            let range = self.chunk_range(index, chunk);
            let len = out.len().min((range.end - offset) as usize);
            let (now, rest) = std::mem::take(&mut out).split_at_mut(len);
            if *kept != Some((index, chunk)) && len as u64 == range.end - range.start {
                self.read_chunk(open, index, chunk, now, wanted)?;
            } else {
                if *kept != Some((index, chunk)) {
                    *kept = None;
                    bytes.resize((range.end - range.start) as usize, 0);
                    self.read_chunk(open, index, chunk, bytes, wanted)?;
                    *kept = Some((index, chunk));
                }
                let within = (offset - range.start) as usize;
                now.copy_from_slice(&bytes[within..within + len]);
            }
            offset += len as u64;
            out = rest;
        }
        Ok(())
    }

    fn read_chunk(
        &self,
        open: &mut HashMap<usize, File>,
        index: usize,
        chunk: u64,
        out: &mut [u8],
        wanted: Option<&TensorEntry>,
    ) -> Result<(), CheckpointError> {
        let entry = self.file(index);
        let path = self.dir.join(&entry.name);
        if !open.contains_key(&index) {
            if open.len() >= MAX_OPEN {
                open.clear();
            }
            self.check_size(index, wanted)?;
            open.insert(index, File::open(&path).map_err(|source| io("open", &path, source))?);
        }
        let file = &open[&index];
        let range = self.chunk_range(index, chunk);
        match file.read_exact_at(out, range.start) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                let got = file.metadata().map_err(|source| io("read the size of", &path, source))?.len();
                return Err(self.damaged(index, wanted, Damage::Size { got, expected: entry.bytes }));
            }
            other => other.map_err(|source| io("read", &path, source))?,
        }
        if crc32c::crc32c(out) == entry.crc32c[chunk as usize] {
            return Ok(());
        }
        Err(self.damaged(index, wanted, self.what_happened(index, file, range)))
    }

    /// Why bytes of a file are not what was written.
    pub(crate) fn what_happened(&self, index: usize, file: &File, range: Range<u64>) -> Damage {
        let Manifest { save, step, .. } = &self.manifest;
        if let Some(identity) = (index < self.manifest.files.len()).then(|| identity(file)).flatten() {
            let of = |key: &str| identity.get(key).cloned().unwrap_or_default();
            let (rank, of_step, of_save) = (of("rank"), of("step"), of("save"));
            if (&rank, &of_step, &of_save) != (&index.to_string(), &step.to_string(), save) {
                return Damage::Foreign { rank, step: of_step, save: of_save };
            }
        }
        Damage::Altered { begin: range.start, end: range.end }
    }

    /// File `index` of all: those of the ranks, then attached ones.
    pub(crate) fn file(&self, index: usize) -> &FileEntry {
        let num_ranks = self.manifest.files.len();
        self.manifest.files.get(index).unwrap_or_else(|| &self.manifest.attached[index - num_ranks])
    }

    pub(crate) fn num_files(&self) -> usize {
        self.manifest.files.len() + self.manifest.attached.len()
    }

    pub(crate) fn chunk_range(&self, index: usize, chunk: u64) -> Range<u64> {
        let chunk_bytes = self.manifest.chunk_bytes as u64;
        let begin = chunk * chunk_bytes;
        begin..self.file(index).bytes.min(begin + chunk_bytes)
    }

    pub(crate) fn check_size(
        &self,
        index: usize,
        wanted: Option<&TensorEntry>,
    ) -> Result<(), CheckpointError> {
        let FileEntry { name, bytes, .. } = self.file(index);
        let path = self.dir.join(name);
        let damage = match fs::metadata(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Damage::Missing,
            Err(source) => return Err(io("read the size of", &path, source)),
            // Opening a pipe could wait for ever.
            Ok(kind) if !kind.is_file() => Damage::NotAFile,
            Ok(kind) if kind.len() != *bytes => Damage::Size { got: kind.len(), expected: *bytes },
            Ok(_) => return Ok(()),
        };
        Err(self.damaged(index, wanted, damage))
    }

    fn damaged(&self, index: usize, wanted: Option<&TensorEntry>, damage: Damage) -> CheckpointError {
        let holds = match wanted {
            Some(entry) => format!("`{}` of `{}`", entry.kind, entry.name),
            None => self.holds(index),
        };
        CheckpointError::Damaged { path: self.dir.join(&self.file(index).name), holds, damage }
    }

    /// Tensors that have elements in these bytes of a file.
    pub(crate) fn tensors_in(&self, index: usize, bytes: Range<u64>) -> Vec<StateTensor<'_>> {
        let touches = |entry: &TensorEntry| {
            entry.pieces.iter().filter(|piece| piece.file == index).any(|piece| {
                piece.bytes(entry.dtype).is_some_and(|(begin, end)| begin < bytes.end && bytes.start < end)
            })
        };
        self.manifest.tensors.iter().filter(|entry| touches(entry)).map(of_entry).collect()
    }

    fn holds(&self, index: usize) -> String {
        if index >= self.manifest.files.len() {
            return "a file saved with the model".to_owned();
        }
        match self.tensors_in(index, 0..u64::MAX).as_slice() {
            [] => "no tensor".to_owned(),
            [only] => format!("`{}` of `{}`", only.kind, only.name),
            [first, rest @ ..] => format!("`{}` of `{}` and {} more", first.kind, first.name, rest.len()),
        }
    }
}

fn of_entry(entry: &TensorEntry) -> StateTensor<'_> {
    let TensorEntry { name, kind, dtype, shape, pieces } = entry;
    StateTensor { name, kind, dtype: *dtype, shape, num_pieces: pieces.len() }
}

fn check_region(entry: &TensorEntry, region: &Region, buffer_numel: usize) -> Result<(), CheckpointError> {
    if region.is_within(&entry.shape) && region.numel() == buffer_numel {
        return Ok(());
    }
    let (name, shape, region) = (entry.name.clone(), entry.shape.clone(), region.clone().into());
    Err(CheckpointError::WrongRegion { name, shape, region, buffer_numel })
}

/// What a file of ours says about itself, if its header can be read at all.
fn identity(file: &File) -> Option<HashMap<String, String>> {
    #[derive(serde::Deserialize)]
    struct Header {
        #[serde(rename = "__metadata__")]
        metadata: HashMap<String, String>,
    }
    let mut length = [0; LENGTH_BYTES as usize];
    file.read_exact_at(&mut length, 0).ok()?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES || length > file.metadata().ok()?.len() {
        return None;
    }
    let mut json = vec![0; length as usize];
    file.read_exact_at(&mut json, LENGTH_BYTES).ok()?;
    serde_json::from_slice::<Header>(&json).ok().map(|header| header.metadata)
}
