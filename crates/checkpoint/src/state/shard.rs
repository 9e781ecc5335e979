//! One rank's part of a checkpoint: a safetensors file, and an index that says what is in it.
//!
//! All sizes are known before the first byte, so the header goes first and the data follows as a stream: from the
//! caller's slices straight to the file where they are large, through one buffer where they are small. Checksums are
//! taken on the way, while the bytes are in the cache. [`ShardWriter::finish`] makes the file durable and only then
//! leaves the index, by which rank 0 knows that the part is whole.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::error::io;
use crate::header::METADATA_KEY;
use crate::state::background::Cancel;
use crate::state::chunks::Checksums;
use crate::state::manifest::{FORMAT, FileEntry, check_tensor, piece_key};
use crate::state::problem::SaveProblem;
use crate::state::region::{Block, Region};
use crate::state::sealed;
use crate::state::sink::{DiskFile, Sink};
use crate::{CheckpointError, FileDType};

/// What is gathered before it is written, and the most that is written between two looks at [`Cancel`].
const BUFFER_BYTES: usize = 4 << 20;
/// Small enough to be still in the cache when it is written after its checksum was taken.
const STEP_BYTES: usize = 256 << 10;
/// Data begins at a multiple of this, as readers that map the file like it.
const ALIGNMENT: usize = 64;

/// Some elements of one tensor, to be written by one rank.
#[derive(Debug, Clone, PartialEq)]
pub struct Fragment {
    /// The tensor, as the engine calls it.
    pub name: String,
    /// What of it: `param`, `exp_avg`, `exp_avg_sq`, or whatever an optimizer keeps.
    pub kind: String,
    /// Element type in the file, at least a byte wide.
    pub dtype: FileDType,
    /// Shape of the whole tensor.
    pub shape: Vec<usize>,
    /// The elements.
    pub region: Region,
}

impl Fragment {
    fn num_bytes(&self) -> u64 {
        (self.region.numel() * self.dtype.size_bits() / 8) as u64
    }
}

/// How far a shard is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes given to the system.
    pub done_bytes: u64,
    /// Bytes of the whole file.
    pub total_bytes: u64,
}

/// Which save a file belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SaveKey {
    pub save: String,
    pub step: u64,
}

/// What one rank wrote, as its index file tells rank 0.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardIndex {
    pub(crate) save: String,
    pub(crate) step: u64,
    pub(crate) rank: usize,
    pub(crate) chunk_bytes: usize,
    pub(crate) file: FileEntry,
    pub(crate) fragments: Vec<Written>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Written {
    pub name: String,
    pub kind: String,
    pub dtype: FileDType,
    pub shape: Vec<usize>,
    pub range: (usize, usize),
    pub block: Option<Block>,
    pub offset: u64,
}

impl ShardIndex {
    /// Bytes of the rank's file.
    pub fn num_bytes(&self) -> u64 {
        self.file.bytes
    }
}

/// The file of rank `rank`.
pub(crate) fn file_name(rank: usize) -> String {
    format!("rank-{rank:05}.safetensors")
}

/// The index beside it, until the checkpoint is committed.
pub(crate) fn index_name(rank: usize) -> String {
    format!("rank-{rank:05}.index.json")
}

/// Streams one rank's fragments into its file.
pub struct ShardWriter {
    dir: PathBuf,
    path: PathBuf,
    sink: Box<dyn Sink>,
    index: ShardIndex,
    /// Fragments by their place in the file: index into the caller's list, and bytes.
    order: Vec<(usize, u64)>,
    /// The place in `order` that is being written, and how many of its bytes are.
    place: usize,
    in_fragment: u64,
    buffer: Vec<u8>,
    checksums: Checksums,
    progress: Progress,
    on_progress: Option<Box<dyn FnMut(Progress) + Send>>,
    cancel: Cancel,
}

impl std::fmt::Debug for ShardWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ShardWriter")
            .field("path", &self.path)
            .field("progress", &self.progress)
            .finish_non_exhaustive()
    }
}

impl ShardWriter {
    pub(crate) fn create(
        dir: &Path,
        key: &SaveKey,
        rank: usize,
        fragments: &[Fragment],
        chunk_bytes: usize,
    ) -> Result<Self, CheckpointError> {
        let open = |path: &Path, num_bytes| {
            let file = DiskFile::create(path, num_bytes).map_err(|source| io("create", path, source))?;
            Ok(Box::new(file) as Box<dyn Sink>)
        };
        Self::create_in(dir, key, rank, fragments, chunk_bytes, open)
    }

    /// The same, with a sink of the caller's.
    pub(crate) fn create_in(
        dir: &Path,
        key: &SaveKey,
        rank: usize,
        fragments: &[Fragment],
        chunk_bytes: usize,
        open: impl FnOnce(&Path, u64) -> Result<Box<dyn Sink>, CheckpointError>,
    ) -> Result<Self, CheckpointError> {
        let layout =
            Layout::of(key, rank, fragments).map_err(|problem| CheckpointError::save(key.step, problem))?;
        let path = dir.join(file_name(rank));
        let sink = open(&path, layout.total_bytes)?;
        let file = FileEntry { name: file_name(rank), bytes: layout.total_bytes, crc32c: Vec::new() };
        let SaveKey { save, step } = key.clone();
        let mut writer = ShardWriter {
            dir: dir.to_owned(),
            path,
            sink,
            index: ShardIndex { save, step, rank, chunk_bytes, file, fragments: layout.written },
            order: layout.order,
            place: 0,
            in_fragment: 0,
            buffer: Vec::new(),
            checksums: Checksums::new(chunk_bytes),
            progress: Progress { done_bytes: 0, total_bytes: layout.total_bytes },
            on_progress: None,
            cancel: Cancel::default(),
        };
        writer.push(&layout.header)?;
        Ok(writer)
    }

    /// Calls `report` after each few MiB.
    pub fn on_progress(mut self, report: impl FnMut(Progress) + Send + 'static) -> Self {
        self.on_progress = Some(Box::new(report));
        self
    }

    /// Lets `cancel` end the writing early, with an error.
    pub fn cancelled_by(mut self, cancel: &Cancel) -> Self {
        self.cancel = cancel.clone();
        self
    }

    /// Bytes of the whole file.
    pub fn total_bytes(&self) -> u64 {
        self.progress.total_bytes
    }

    /// The order in which fragments have to come, as indices into the list the writer was made with: wider element
    /// types first, which keeps all aligned, otherwise as listed.
    pub fn order(&self) -> impl Iterator<Item = usize> + '_ {
        self.order.iter().map(|&(fragment, _)| fragment)
    }

    /// Writes the whole next fragment, which must be number `fragment` of the list.
    ///
    /// # Errors
    /// [`CheckpointError::Save`] if it is another one's turn, if `bytes` are too many or too few, or if the save was
    /// cancelled; [`CheckpointError::Io`].
    pub fn write(&mut self, fragment: usize, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.begin(fragment)?;
        self.append(bytes)?;
        self.end_fragment()
    }

    /// Starts the next fragment; its bytes are then appended.
    ///
    /// # Errors
    /// [`CheckpointError::Save`] if it is another one's turn or the one before is not complete.
    pub fn begin(&mut self, fragment: usize) -> Result<(), CheckpointError> {
        if self.in_fragment > 0 {
            self.end_fragment()?;
        }
        // Fragments without elements need no call.
        while self.order.get(self.place).is_some_and(|&(next, num_bytes)| num_bytes == 0 && next != fragment)
        {
            self.place += 1;
        }
        match self.order.get(self.place) {
            Some(&(next, _)) if next == fragment => Ok(()),
            _ => {
                let place = self.order.iter().position(|&(listed, _)| listed == fragment);
                let Written { name, kind, .. } =
                    &self.index.fragments[place.expect("the caller counts its own fragments")];
                let (name, kind) = (name.clone(), kind.clone());
                Err(self.error(SaveProblem::Order { name, kind }))
            }
        }
    }

    /// Writes the next bytes of the fragment begun last.
    ///
    /// # Errors
    /// As [`ShardWriter::write`].
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        let got = self.in_fragment + bytes.len() as u64;
        match self.order.get(self.place) {
            Some(&(_, expected)) if got <= expected => {}
            _ => return Err(self.wrong_bytes(got)),
        }
        self.in_fragment = got;
        self.push(bytes)
    }

    fn end_fragment(&mut self) -> Result<(), CheckpointError> {
        let (_, expected) = self.order[self.place];
        if self.in_fragment != expected {
            return Err(self.wrong_bytes(self.in_fragment));
        }
        self.place += 1;
        self.in_fragment = 0;
        Ok(())
    }

    /// Makes the file durable and leaves the index.
    ///
    /// # Errors
    /// [`CheckpointError::Save`] if a fragment is missing or incomplete, or if the save was cancelled;
    /// [`CheckpointError::Io`].
    pub fn finish(mut self) -> Result<ShardIndex, CheckpointError> {
        if self.in_fragment > 0 {
            self.end_fragment()?;
        }
        while let Some(&(_, num_bytes)) = self.order.get(self.place) {
            if num_bytes > 0 {
                return Err(self.wrong_bytes(0));
            }
            self.place += 1;
        }
        self.flush()?;
        self.sink.sync().map_err(|source| io("sync", &self.path, source))?;
        let mut index = self.index;
        index.file.crc32c = self.checksums.finish();
        write_index(&self.dir, &index)?;
        Ok(index)
    }

    fn push(&mut self, mut bytes: &[u8]) -> Result<(), CheckpointError> {
        while !bytes.is_empty() {
            if self.buffer.is_empty() && bytes.len() >= BUFFER_BYTES {
                let (now, rest) = bytes.split_at(BUFFER_BYTES);
                self.write_out(now)?;
                bytes = rest;
                continue;
            }
            let (now, rest) = bytes.split_at(bytes.len().min(BUFFER_BYTES - self.buffer.len()));
            self.buffer.extend_from_slice(now);
            bytes = rest;
            if self.buffer.len() == BUFFER_BYTES {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), CheckpointError> {
        let mut buffer = std::mem::take(&mut self.buffer);
        self.write_out(&buffer)?;
        buffer.clear();
        self.buffer = buffer;
        Ok(())
    }

    fn write_out(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        if self.cancel.is_cancelled() {
            return Err(self.error(SaveProblem::Cancelled));
        }
        for step in bytes.chunks(STEP_BYTES) {
            self.checksums.update(step);
            self.sink.write(step).map_err(|source| io("write", &self.path, source))?;
        }
        self.progress.done_bytes += bytes.len() as u64;
        if let Some(report) = &mut self.on_progress {
            report(self.progress);
        }
        Ok(())
    }

    fn wrong_bytes(&self, got: u64) -> CheckpointError {
        match (self.order.get(self.place), self.index.fragments.get(self.place)) {
            (Some(&(_, expected)), Some(Written { name, kind, .. })) => {
                let (name, kind) = (name.clone(), kind.clone());
                self.error(SaveProblem::FragmentBytes { name, kind, expected, got })
            }
            _ => {
                let (name, kind) = ("(after the last fragment)".to_owned(), "bytes".to_owned());
                self.error(SaveProblem::FragmentBytes { name, kind, expected: 0, got })
            }
        }
    }

    fn error(&self, problem: SaveProblem) -> CheckpointError {
        CheckpointError::save(self.index.step, problem)
    }
}

/// Where everything goes in a file.
struct Layout {
    header: Vec<u8>,
    written: Vec<Written>,
    order: Vec<(usize, u64)>,
    total_bytes: u64,
}

impl Layout {
    fn of(key: &SaveKey, rank: usize, fragments: &[Fragment]) -> Result<Layout, SaveProblem> {
        let mut order: Vec<(usize, u64)> = Vec::with_capacity(fragments.len());
        for (i, fragment) in fragments.iter().enumerate() {
            let Fragment { name, kind, dtype, shape, region } = fragment;
            let bad = |why: String| SaveProblem::Fragment { name: name.clone(), kind: kind.clone(), why };
            check_tensor(name, kind, *dtype, shape).map_err(|problem| bad(problem.to_string()))?;
            if !region.is_within(shape) {
                return Err(bad(format!("{region:?} leaves its shape `{shape:?}`")));
            }
            order.push((i, fragment.num_bytes()));
        }
        order.sort_by_key(|&(i, _)| std::cmp::Reverse(fragments[i].dtype.size_bits()));

        let metadata = json!({
            "format": FORMAT, "save": key.save, "step": key.step.to_string(), "rank": rank.to_string(),
        });
        let mut entries = serde_json::Map::from_iter([(METADATA_KEY.to_owned(), metadata)]);
        let mut written = Vec::with_capacity(fragments.len());
        let mut end = 0;
        for &(i, num_bytes) in &order {
            let Fragment { name, kind, dtype, shape, region } = &fragments[i];
            let (begin, block) = (end, &region.block);
            end += num_bytes;
            let is_whole_block = block.numel() == Some(region.numel());
            let shape_in_file = if is_whole_block { block.shape.clone() } else { vec![region.numel()] };
            let entry =
                json!({ "dtype": dtype.name(), "shape": shape_in_file, "data_offsets": [begin, end] });
            if entries.insert(piece_key(kind, name, shape, region), entry).is_some() {
                let (name, kind) = (name.clone(), kind.clone());
                return Err(SaveProblem::Fragment { name, kind, why: "it is listed twice".to_owned() });
            }
            written.push(Written {
                name: name.clone(),
                kind: kind.clone(),
                dtype: *dtype,
                shape: shape.clone(),
                range: (region.range.start, region.range.end),
                block: (!block.is_whole(shape)).then(|| block.clone()),
                offset: begin,
            });
        }
        let json = serde_json::Value::Object(entries).to_string();
        let data_start = (8 + json.len()).next_multiple_of(ALIGNMENT);
        let mut header = ((data_start - 8) as u64).to_le_bytes().to_vec();
        header.extend(json.into_bytes());
        header.resize(data_start, b' ');
        written.iter_mut().for_each(|written| written.offset += data_start as u64);
        Ok(Layout { header, written, order, total_bytes: data_start as u64 + end })
    }
}

/// Leaves the index under its name only when it is whole. It need not outlive a crash of the host: no temporary
/// folder does.
fn write_index(dir: &Path, index: &ShardIndex) -> Result<(), CheckpointError> {
    let path = dir.join(index_name(index.rank));
    let temp = dir.join(format!("{}.partial", index_name(index.rank)));
    fs::write(&temp, sealed::seal(&[("index", sealed::to_value(index))]))
        .and_then(|()| fs::rename(&temp, &path))
        .map_err(|source| io("write", &path, source))
}

/// Reads what rank `rank` left in `dir`.
pub(crate) fn read_index(dir: &Path, key: &SaveKey, rank: usize) -> Result<ShardIndex, CheckpointError> {
    #[derive(Deserialize)]
    struct Sealed {
        index: ShardIndex,
    }
    let path = dir.join(index_name(rank));
    let bad = |why: String| CheckpointError::save(key.step, SaveProblem::Index { rank, why });
    let mut bytes = match fs::read(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(CheckpointError::save(key.step, SaveProblem::NoIndex { rank, path }));
        }
        other => other.map_err(|source| io("read", &path, source))?,
    };
    let json = sealed::open(&mut bytes).map_err(|problem| bad(problem.to_string()))?;
    let Sealed { index } = serde_json::from_slice(json).map_err(|error| bad(error.to_string()))?;
    if (index.rank, index.step, &index.save) != (rank, key.step, &key.save) {
        return Err(bad(format!(
            "it is of rank `{}`, step `{}`, save `{}`",
            index.rank, index.step, index.save
        )));
    }
    let file = dir.join(&index.file.name);
    let got = fs::metadata(&file).map_err(|source| io("read the size of", &file, source))?.len();
    if index.file.name != file_name(rank) || got != index.file.bytes {
        let FileEntry { name, bytes, .. } = &index.file;
        return Err(bad(format!("it speaks of `{bytes}` bytes in `{name}`, there are `{got}`")));
    }
    Ok(index)
}
