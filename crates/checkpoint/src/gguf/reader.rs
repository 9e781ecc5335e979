//! Reading tensors of a GGUF file.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::CheckpointError;
use crate::gguf::header::{self, Entry, Header};
use crate::gguf::value::decode;
use crate::gguf::{GgmlType, GgufProblem, GgufValue, blocks};

/// File bytes read at a time.
const READ_BYTES: usize = 256 * 1024;

/// An open GGUF file with a checked header.
#[derive(Debug)]
pub struct GgufReader {
    path: PathBuf,
    file: File,
    version: u32,
    header_bytes: Vec<u8>,
    entries: Vec<Entry>,
    tensors: Vec<GgufTensor>,
    by_name: HashMap<String, usize>,
}

/// One tensor of a GGUF file.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufTensor {
    /// Its name in the file.
    pub name: String,
    /// Its element type in the file.
    pub ggml_type: GgmlType,
    /// Its shape, row-major as everywhere else here; the file has it the other way round.
    pub shape: Vec<usize>,
    numel: usize,
    file_offset: u64,
}

impl GgufTensor {
    /// How many elements it has.
    pub fn numel(&self) -> usize {
        self.numel
    }
}

impl GgufReader {
    /// Opens a file and checks its header.
    ///
    /// Memory is in proportion to the bytes that the header really has, at most 128 MiB of them.
    ///
    /// # Errors
    /// [`CheckpointError::Gguf`] for what is damaged, contradictory or another format; [`CheckpointError::Io`].
    pub fn open(path: impl AsRef<Path>) -> Result<GgufReader, CheckpointError> {
        let path = path.as_ref().to_owned();
        let file = File::open(&path).map_err(|source| io("open", &path, source))?;
        let Header { version, bytes, entries, tensors } = header::read(&path, &file)?;
        let tensors: Vec<_> = tensors
            .into_iter()
            .map(|raw| GgufTensor {
                name: raw.name,
                ggml_type: raw.ggml_type,
                shape: raw.shape,
                numel: raw.numel,
                file_offset: raw.file_offset,
            })
            .collect();
        let by_name = tensors.iter().enumerate().map(|(i, tensor)| (tensor.name.clone(), i)).collect();
        Ok(GgufReader { path, file, version, header_bytes: bytes, entries, tensors, by_name })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The format's version: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// All keys with their values, in the order of the file.
    pub fn values(&self) -> impl Iterator<Item = (&str, GgufValue<'_>)> {
        self.entries.iter().map(|entry| {
            let value = decode(entry.kind, &mut &self.header_bytes[entry.value.clone()]);
            (self.key(entry), value)
        })
    }

    /// The value of a key.
    pub fn value(&self, key: &str) -> Option<GgufValue<'_>> {
        let entry = self.entries.iter().find(|entry| self.key(entry) == key)?;
        Some(decode(entry.kind, &mut &self.header_bytes[entry.value.clone()]))
    }

    fn key(&self, entry: &Entry) -> &str {
        std::str::from_utf8(&self.header_bytes[entry.key.clone()]).expect("checked when the file was opened")
    }

    /// All tensors, in the order of the header.
    pub fn tensors(&self) -> &[GgufTensor] {
        &self.tensors
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// Type and shape of a tensor.
    ///
    /// # Errors
    /// [`CheckpointError::MissingTensor`], with similar names.
    pub fn info(&self, name: &str) -> Result<&GgufTensor, CheckpointError> {
        match self.by_name.get(name) {
            Some(&i) => Ok(&self.tensors[i]),
            None => Err(CheckpointError::MissingTensor {
                name: name.to_owned(),
                looked_in: format!("`{}`", self.path.display()),
                close: crate::reader::close_names(
                    name,
                    self.tensors.iter().map(|tensor| tensor.name.as_str()),
                ),
            }),
        }
    }

    /// Reads the elements `range` of the flattened tensor `name` into `out`, as `f32`; `range` begins and ends between
    /// blocks, as whole rows do.
    ///
    /// # Errors
    /// [`CheckpointError::MissingTensor`]; [`CheckpointError::Gguf`] if the type is not readable;
    /// [`CheckpointError::WrongRange`] if `range` is not inside the tensor, cuts a block or `out` has another length;
    /// [`CheckpointError::Io`].
    pub fn read_range_f32(
        &self,
        name: &str,
        range: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        let info = self.info(name)?;
        let ggml_type = info.ggml_type;
        if !ggml_type.is_readable() {
            return Err(self.problem(GgufProblem::UnsupportedType { name: name.to_owned(), ggml_type }));
        }
        let (block_numel, block_bytes) = (ggml_type.block_numel(), ggml_type.block_bytes());
        let whole = range.start.is_multiple_of(block_numel) && range.end.is_multiple_of(block_numel);
        if range.start > range.end || range.end > info.numel || range.len() != out.len() || !whole {
            let (numel, buffer_numel) = (info.numel, out.len());
            return Err(CheckpointError::WrongRange { name: name.to_owned(), range, numel, buffer_numel });
        }
        let piece_blocks = READ_BYTES / block_bytes;
        let mut bytes = vec![0; piece_blocks.min(out.len() / block_numel) * block_bytes];
        let mut offset = info.file_offset + (range.start / block_numel * block_bytes) as u64;
        for piece in out.chunks_mut(piece_blocks * block_numel) {
            let bytes = &mut bytes[..piece.len() / block_numel * block_bytes];
            self.file.read_exact_at(bytes, offset).map_err(|source| io("read", &self.path, source))?;
            blocks::decode(ggml_type, bytes, piece);
            offset += bytes.len() as u64;
        }
        Ok(())
    }

    /// Reads the whole tensor `name` as `f32`.
    ///
    /// # Errors
    /// As [`GgufReader::read_range_f32`].
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        let mut values = vec![0.0; self.info(name)?.numel];
        self.read_range_f32(name, 0..values.len(), &mut values)?;
        Ok(values)
    }

    pub(super) fn problem(&self, problem: GgufProblem) -> CheckpointError {
        CheckpointError::Gguf { path: self.path.clone(), problem }
    }
}

fn io(action: &'static str, path: &Path, source: std::io::Error) -> CheckpointError {
    CheckpointError::Io { action, path: path.to_owned(), source }
}
