//! Writing a Hugging Face model as a stream.
//!
//! All sizes are known before the first element, so headers go first and every element then goes straight to its
//! place; the writer holds one small buffer. Tensors may come in any order and in pieces. Nothing has its final name
//! before [`HfWriter::finish`] has made all of it durable; a writer that is dropped leaves nothing behind.
//!
//! Inside a file, wider element types go first (then the declared order), which keeps every tensor aligned for
//! readers that map the file.

use std::collections::HashMap;
use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde_json::json;
use tempfile::NamedTempFile;

use crate::convert::Scratch;
use crate::error::{DeclarationProblem, io};
use crate::header::{LENGTH_BYTES, METADATA_KEY};
use crate::{CheckpointError, FileDType, index};

/// More than any file system holds, and far from overflowing an offset.
const MAX_BYTES: u64 = 1 << 60;

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorMeta {
    /// Its name in the file.
    pub name: String,
    /// Its shape, row-major; empty for a scalar.
    pub shape: Vec<usize>,
    /// Its element type in the file: `F64`, `F32`, `F16` or `BF16`.
    pub dtype: FileDType,
}

/// Streams the tensors of one model into a folder.
#[derive(Debug)]
pub struct HfWriter {
    dir: PathBuf,
    shards: Vec<Shard>,
    slots: Vec<Slot>,
    by_name: HashMap<String, usize>,
    current: Option<usize>,
    total_bytes: u64,
}

#[derive(Debug)]
struct Shard {
    file_name: String,
    temp: NamedTempFile,
}

/// A tensor's place.
#[derive(Debug)]
struct Slot {
    name: String,
    dtype: FileDType,
    numel: usize,
    shard: usize,
    file_offset: u64,
    written_numel: usize,
}

impl HfWriter {
    /// Lays `tensors` out in files of at most `max_shard_bytes` of data each, in their order, and writes the headers.
    ///
    /// A tensor larger than that gets a file of its own. One file is named `model.safetensors`; several are named
    /// `model-00001-of-00002.safetensors` and so on, with an index. `dir` is made if it does not exist.
    ///
    /// # Errors
    /// [`CheckpointError::Declaration`] and [`CheckpointError::NotFloat`] for tensors that cannot be written,
    /// [`CheckpointError::Io`].
    pub fn create(
        dir: impl AsRef<Path>,
        tensors: &[TensorMeta],
        max_shard_bytes: u64,
    ) -> Result<HfWriter, CheckpointError> {
        let dir = dir.as_ref().to_owned();
        fs::create_dir_all(&dir).map_err(|source| io("create", &dir, source))?;

        let mut writer = HfWriter {
            dir,
            shards: Vec::new(),
            slots: Vec::with_capacity(tensors.len()),
            by_name: HashMap::with_capacity(tensors.len()),
            current: None,
            total_bytes: 0,
        };
        let mut members: Vec<Vec<usize>> = vec![Vec::new()];
        let mut shard_bytes = 0;
        for (i, tensor) in tensors.iter().enumerate() {
            let (numel, num_bytes) = check(tensor)?;
            if writer.by_name.insert(tensor.name.clone(), i).is_some() {
                return Err(declaration(&tensor.name, DeclarationProblem::Duplicate));
            }
            if shard_bytes > 0 && shard_bytes + num_bytes > max_shard_bytes {
                members.push(Vec::new());
                shard_bytes = 0;
            }
            shard_bytes += num_bytes;
            writer.total_bytes += num_bytes;
            if writer.total_bytes > MAX_BYTES {
                return Err(declaration(&tensor.name, DeclarationProblem::TooLarge));
            }
            let shard = members.len() - 1;
            members[shard].push(i);
            let (name, dtype) = (tensor.name.clone(), tensor.dtype);
            writer.slots.push(Slot { name, dtype, numel, shard, file_offset: 0, written_numel: 0 });
        }
        let num_shards = members.len();
        for (shard, members) in members.into_iter().enumerate() {
            let file_name = if num_shards == 1 {
                index::SINGLE_FILE.into()
            } else {
                index::shard_file(shard, num_shards)
            };
            let temp = writer.start_shard(tensors, members)?;
            writer.shards.push(Shard { file_name, temp });
        }
        Ok(writer)
    }

    /// Gives the tensors `members` their places in one new file and writes its header.
    fn start_shard(
        &mut self,
        tensors: &[TensorMeta],
        mut members: Vec<usize>,
    ) -> Result<NamedTempFile, CheckpointError> {
        members.sort_by_key(|&i| std::cmp::Reverse(tensors[i].dtype.size_bits()));
        let mut header = serde_json::Map::from_iter([(METADATA_KEY.to_owned(), json!({ "format": "pt" }))]);
        let mut end = 0;
        for &i in &members {
            let TensorMeta { name, shape, dtype } = &tensors[i];
            let begin = end;
            end += (self.slots[i].numel * dtype.size_bits() / 8) as u64;
            self.slots[i].file_offset = begin;
            let entry = json!({ "dtype": dtype.name(), "shape": shape, "data_offsets": [begin, end] });
            header.insert(name.clone(), entry);
        }
        let mut header = serde_json::Value::Object(header).to_string().into_bytes();
        // Spaces up to a multiple of 8, so that the data is aligned as well.
        header.resize(header.len().next_multiple_of(8), b' ');
        let data_start = LENGTH_BYTES + header.len() as u64;
        for &i in &members {
            self.slots[i].file_offset += data_start;
        }

        // Weights are for sharing, unlike scratch files: the user's umask decides who may read them.
        let mut temp = tempfile::Builder::new()
            .prefix(".model-")
            .suffix(".partial")
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(&self.dir)
            .map_err(|source| io("create a file in", &self.dir, source))?;
        let result = temp
            .write_all(&(header.len() as u64).to_le_bytes())
            .and_then(|()| temp.write_all(&header))
            .and_then(|()| temp.as_file().set_len(data_start + end));
        result.map_err(|source| io("write", temp.path(), source))?;
        Ok(temp)
    }

    /// Starts the tensor `name`; the next elements appended are its first.
    ///
    /// # Errors
    /// [`CheckpointError::WrongNumel`] if the tensor before is not complete, [`CheckpointError::Declaration`] if
    /// `name` was not declared or is written already.
    pub fn begin(&mut self, name: &str) -> Result<(), CheckpointError> {
        if let Some(before) = self.current {
            self.slots[before].check_complete()?;
        }
        let Some(&next) = self.by_name.get(name) else {
            return Err(declaration(name, DeclarationProblem::Undeclared));
        };
        if self.slots[next].written_numel > 0 {
            return Err(declaration(name, DeclarationProblem::AlreadyWritten));
        }
        self.current = Some(next);
        Ok(())
    }

    /// Writes the next elements of the tensor begun last.
    ///
    /// # Panics
    /// If no tensor was begun: a mistake in the calling code, not in its data.
    /// # Errors
    /// [`CheckpointError::WrongNumel`] if these are too many, [`CheckpointError::Overflow`], [`CheckpointError::Io`].
    pub fn append(&mut self, values: &[f32]) -> Result<(), CheckpointError> {
        let slot = &mut self.slots[self.current.expect("`begin` comes before `append`")];
        let got = slot.written_numel + values.len();
        if got > slot.numel {
            return Err(CheckpointError::WrongNumel { name: slot.name.clone(), expected: slot.numel, got });
        }
        let temp = &self.shards[slot.shard].temp;
        let element_bytes = slot.dtype.size_bits() / 8;
        let mut scratch = Scratch::new(values.len() * element_bytes);
        for piece in values.chunks(Scratch::MAX_BYTES / element_bytes) {
            scratch.encode(slot.dtype, piece).map_err(|lost| CheckpointError::Overflow {
                name: slot.name.clone(),
                element: slot.written_numel + lost.element,
                value: lost.value,
                dtype: lost.dtype,
            })?;
            let offset = slot.file_offset + (slot.written_numel * element_bytes) as u64;
            let bytes = scratch.bytes_mut(piece.len() * element_bytes);
            temp.as_file().write_all_at(bytes, offset).map_err(|source| io("write", temp.path(), source))?;
            slot.written_numel += piece.len();
        }
        Ok(())
    }

    /// Writes the whole tensor `name`.
    ///
    /// # Errors
    /// As [`HfWriter::begin`] and [`HfWriter::append`]; [`CheckpointError::WrongNumel`] also if these are too few.
    pub fn write(&mut self, name: &str, values: &[f32]) -> Result<(), CheckpointError> {
        self.begin(name)?;
        self.append(values)?;
        self.slots[self.by_name[name]].check_complete()
    }

    /// Makes all files durable, gives them their names, and returns these.
    ///
    /// Weights of another model in the folder are replaced: what is left of them is deleted last, so that until then
    /// the folder opens as the old model or as the new one. Only if both are sharded into equally many files can a
    /// crash inside this call leave a mixture; write to a fresh folder where that matters.
    ///
    /// # Errors
    /// [`CheckpointError::WrongNumel`] if a tensor is not complete (nothing is replaced then),
    /// [`CheckpointError::Io`].
    pub fn finish(self) -> Result<Vec<PathBuf>, CheckpointError> {
        for slot in &self.slots {
            slot.check_complete()?;
        }
        for Shard { temp, .. } in &self.shards {
            temp.as_file().sync_all().map_err(|source| io("sync", temp.path(), source))?;
        }
        let mut files = Vec::with_capacity(self.shards.len() + 1);
        let index = (self.shards.len() > 1).then(|| {
            let of_slot = |slot: &Slot| self.shards[slot.shard].file_name.clone();
            let pairs: Vec<_> = self.slots.iter().map(|slot| (slot.name.as_str(), of_slot(slot))).collect();
            index::to_json(self.total_bytes, pairs.iter().map(|(name, file)| (*name, file.as_str())))
        });
        for Shard { file_name, temp } in self.shards {
            files.push(persist(temp, self.dir.join(file_name))?);
        }
        if let Some(json) = index {
            let path = self.dir.join(index::INDEX_FILE);
            let mut temp = tempfile::Builder::new()
                .permissions(Permissions::from_mode(0o666))
                .tempfile_in(&self.dir)
                .map_err(|source| io("create a file in", &self.dir, source))?;
            let result = temp.write_all(json.as_bytes()).and_then(|()| temp.as_file().sync_all());
            result.map_err(|source| io("write", &path, source))?;
            files.push(persist(temp, path)?);
        }
        sync_dir(&self.dir)?;
        remove_leftovers(&self.dir, &files)?;
        Ok(files)
    }
}

impl Slot {
    fn check_complete(&self) -> Result<(), CheckpointError> {
        if self.written_numel == self.numel {
            return Ok(());
        }
        let (expected, got) = (self.numel, self.written_numel);
        Err(CheckpointError::WrongNumel { name: self.name.clone(), expected, got })
    }
}

/// Elements and bytes of a tensor that can be written.
fn check(tensor: &TensorMeta) -> Result<(usize, u64), CheckpointError> {
    let TensorMeta { name, shape, dtype } = tensor;
    if name == METADATA_KEY {
        return Err(declaration(name, DeclarationProblem::Reserved));
    }
    if !dtype.is_convertible() {
        return Err(CheckpointError::NotFloat { name: name.clone(), dtype: *dtype });
    }
    let numel = shape.iter().try_fold(1usize, |numel, &size| numel.checked_mul(size));
    match numel.and_then(|numel| Some((numel, dtype.num_bytes(numel)? as u64))) {
        Some((numel, num_bytes)) if num_bytes <= MAX_BYTES => Ok((numel, num_bytes)),
        _ => Err(declaration(name, DeclarationProblem::TooLarge)),
    }
}

fn declaration(name: &str, problem: DeclarationProblem) -> CheckpointError {
    CheckpointError::Declaration { name: name.to_owned(), problem }
}

fn persist(temp: NamedTempFile, path: PathBuf) -> Result<PathBuf, CheckpointError> {
    match temp.persist(&path) {
        Ok(_) => Ok(path),
        Err(error) => Err(io("rename a finished file to", &path, error.error)),
    }
}

/// Makes renames in `dir` durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<(), CheckpointError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(|source| io("sync", dir, source))
}

/// Deletes weight files in `dir` that are not in `keep`, the index first: shards without an index mislead nobody.
fn remove_leftovers(dir: &Path, keep: &[PathBuf]) -> Result<(), CheckpointError> {
    let list = fs::read_dir(dir).map_err(|source| io("list", dir, source))?;
    let mut leftovers = Vec::new();
    for entry in list {
        let entry = entry.map_err(|source| io("list", dir, source))?;
        if entry.file_name().to_str().is_some_and(index::is_weights_file) && !keep.contains(&entry.path()) {
            leftovers.push(entry.path());
        }
    }
    leftovers.sort_by_key(|path| !path.ends_with(index::INDEX_FILE));
    for path in leftovers {
        fs::remove_file(&path).map_err(|source| io("delete", &path, source))?;
    }
    Ok(())
}
