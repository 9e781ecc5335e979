//! The header of a GGUF file, checked strictly.
//!
//! ```text
//! "GGUF" | version u32 | tensors u64 | keys u64
//! keys x    name | type u32 | value                  a name and a text: length u64, bytes
//! tensors x name | dimensions u32 | sizes u64.. | type u32 | offset u64
//! padding to the alignment | data
//! ```
//!
//! The header does not say how long it is. Its bytes are kept as they are, fetched piece by piece as the walk over it
//! needs them; values stay in them until someone asks. So memory grows with what the file really holds, never with
//! what it claims, and a count is believed only as far as the bytes for it are there.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::CheckpointError;
use crate::gguf::value::ValueType;
use crate::gguf::{GgmlType, GgufProblem};

/// Vocabularies of 256 K tokens with their merges take 20 MB.
const MAX_HEADER_BYTES: u64 = 128 << 20;
/// Bytes fetched at a time.
const CHUNK_BYTES: u64 = 1 << 20;
/// Nobody nests arrays; the format allows it.
const MAX_NESTING: usize = 4;
const MAX_DIMS: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;
const ALIGNMENT_KEY: &str = "general.alignment";
/// The shortest key: an empty name, a type, a byte.
const MIN_KEY_BYTES: u64 = 8 + 4 + 1;
/// The shortest tensor: an empty name, no sizes, a type, an offset.
const MIN_TENSOR_BYTES: u64 = 8 + 4 + 4 + 8;

/// A checked header.
#[derive(Debug)]
pub(super) struct Header {
    pub version: u32,
    /// Its bytes; keys and values are ranges of them.
    pub bytes: Vec<u8>,
    pub entries: Vec<Entry>,
    pub tensors: Vec<RawTensor>,
}

/// One key with its value.
#[derive(Debug)]
pub(super) struct Entry {
    pub key: Range<usize>,
    pub kind: ValueType,
    pub value: Range<usize>,
}

/// One tensor, whose bytes are known to lie in the file.
#[derive(Debug)]
pub(super) struct RawTensor {
    pub name: String,
    pub ggml_type: GgmlType,
    /// Slowest dimension first.
    pub shape: Vec<usize>,
    pub numel: usize,
    pub file_offset: u64,
    num_bytes: u64,
}

/// Reads and checks the header of `file`.
pub(super) fn read(path: &Path, file: &File) -> Result<Header, CheckpointError> {
    let io = |action, source| CheckpointError::Io { action, path: path.to_owned(), source };
    let file_bytes = file.metadata().map_err(|source| io("read the size of", source))?.len();
    let mut walk = Walk { file, file_bytes, bytes: Vec::new(), at: 0 };
    walk.header().map_err(|stop| match stop {
        Stop::Io(source) => io("read", source),
        Stop::Problem(problem) => CheckpointError::Gguf { path: path.to_owned(), problem },
    })
}

enum Stop {
    Io(std::io::Error),
    Problem(GgufProblem),
}

impl From<GgufProblem> for Stop {
    fn from(problem: GgufProblem) -> Self {
        Stop::Problem(problem)
    }
}

/// A place in the header, and all bytes up to some way beyond it.
struct Walk<'a> {
    file: &'a File,
    file_bytes: u64,
    bytes: Vec<u8>,
    at: usize,
}

impl Walk<'_> {
    fn header(&mut self) -> Result<Header, Stop> {
        if self.take(4, "its magic")? != *b"GGUF" {
            return Err(GgufProblem::NotGguf.into());
        }
        let version = self.u32("its version")?;
        match version {
            2 | 3 => {}
            _ if (1..1 << 16).contains(&version.swap_bytes()) => return Err(GgufProblem::BigEndian.into()),
            _ => return Err(GgufProblem::Version { version }.into()),
        }
        let num_tensors = self.count("tensors", MIN_TENSOR_BYTES)?;
        let num_keys = self.count("keys", MIN_KEY_BYTES)?;

        let mut entries = Vec::new();
        for _ in 0..num_keys {
            let key = self.text("a key")?;
            let kind = self.value_type(&key)?;
            let start = self.at;
            self.value(&key, kind, 0)?;
            entries.push(Entry { key, kind, value: start..self.at });
        }
        self.refuse_equal_keys(&entries)?;
        let alignment = self.alignment(&entries)?;

        let mut tensors = Vec::new();
        for _ in 0..num_tensors {
            tensors.push(self.tensor(alignment)?);
        }
        let data_start = (self.at as u64).next_multiple_of(alignment);
        place(&mut tensors, data_start, self.file_bytes.saturating_sub(data_start))?;
        self.bytes.truncate(self.at);
        Ok(Header { version, bytes: std::mem::take(&mut self.bytes), entries, tensors })
    }

    /// One tensor; its offset is still that in the data.
    fn tensor(&mut self, alignment: u64) -> Result<RawTensor, Stop> {
        let name = self.text("a tensor's name")?;
        let name = self.str(&name).to_owned();
        let num_dims = self.u32("a tensor's dimensions")?;
        if num_dims > MAX_DIMS {
            return Err(GgufProblem::Dimensions { name, num_dims }.into());
        }
        let mut sizes = Vec::with_capacity(num_dims as usize);
        for _ in 0..num_dims {
            sizes.push(self.u64("a tensor's sizes")?);
        }
        let id = self.u32("a tensor's type")?;
        let Some(ggml_type) = GgmlType::from_id(id) else {
            return Err(GgufProblem::TensorType { name, id }.into());
        };
        let offset = self.u64("a tensor's offset")?;
        if !offset.is_multiple_of(alignment) {
            return Err(GgufProblem::Misaligned { name, offset, alignment }.into());
        }
        let Some((numel, num_bytes)) = ggml_type.tensor_bytes(&sizes) else {
            return Err(GgufProblem::BadShape { name, shape: sizes, ggml_type }.into());
        };
        let shape = sizes.iter().rev().map(|&size| size as usize).collect();
        Ok(RawTensor { name, ggml_type, shape, numel, file_offset: offset, num_bytes })
    }

    /// Walks over one value and checks all of it.
    fn value(&mut self, key: &Range<usize>, kind: ValueType, depth: usize) -> Result<(), Stop> {
        match kind {
            ValueType::Str => {
                self.text("a text")?;
            }
            ValueType::Bool => self.bools(key, 1)?,
            ValueType::Array if depth == MAX_NESTING => {
                return Err(GgufProblem::Nesting { key: self.str(key).to_owned(), limit: MAX_NESTING }.into());
            }
            ValueType::Array => {
                let kind = self.value_type(key)?;
                let len = self.count("values in an array", kind.min_bytes() as u64)?;
                match kind {
                    ValueType::Str | ValueType::Array => {
                        for _ in 0..len {
                            self.value(key, kind, depth + 1)?;
                        }
                    }
                    ValueType::Bool => self.bools(key, len)?,
                    // `count` has seen that so many bytes are in the file.
                    fixed => {
                        self.take(len * fixed.min_bytes() as u64, "an array")?;
                    }
                }
            }
            fixed => {
                self.take(fixed.min_bytes() as u64, "a value")?;
            }
        }
        Ok(())
    }

    fn bools(&mut self, key: &Range<usize>, len: u64) -> Result<(), Stop> {
        match self.take(len, "a boolean")?.iter().copied().find(|&byte| byte > 1) {
            Some(byte) => Err(GgufProblem::Bool { key: self.str(key).to_owned(), byte }.into()),
            None => Ok(()),
        }
    }

    fn value_type(&mut self, key: &Range<usize>) -> Result<ValueType, Stop> {
        let id = self.u32("the type of a value")?;
        ValueType::from_id(id)
            .ok_or_else(|| GgufProblem::ValueType { key: self.str(key).to_owned(), id }.into())
    }

    fn refuse_equal_keys(&self, entries: &[Entry]) -> Result<(), Stop> {
        let mut keys: Vec<&str> = entries.iter().map(|entry| self.str(&entry.key)).collect();
        keys.sort_unstable();
        match keys.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(GgufProblem::DuplicateKey { key: pair[0].to_owned() }.into()),
            None => Ok(()),
        }
    }

    fn alignment(&self, entries: &[Entry]) -> Result<u64, Stop> {
        let Some(entry) = entries.iter().find(|entry| self.str(&entry.key) == ALIGNMENT_KEY) else {
            return Ok(DEFAULT_ALIGNMENT);
        };
        let value = super::value::decode(entry.kind, &mut &self.bytes[entry.value.clone()]);
        match value.as_u64() {
            Some(alignment) if alignment.is_power_of_two() && alignment <= CHUNK_BYTES => Ok(alignment),
            _ => Err(GgufProblem::WrongValue {
                key: ALIGNMENT_KEY.into(),
                got: value.to_string(),
                expected: format!("a power of two up to {CHUNK_BYTES}"),
            }
            .into()),
        }
    }

    fn str(&self, range: &Range<usize>) -> &str {
        std::str::from_utf8(&self.bytes[range.clone()]).expect("`text` has checked it")
    }

    /// A text with its length before it; where its bytes are.
    fn text(&mut self, what: &'static str) -> Result<Range<usize>, Stop> {
        let len = self.u64(what)?;
        let start = self.at;
        if std::str::from_utf8(self.take(len, what)?).is_err() {
            return Err(GgufProblem::Utf8 { what, at: start as u64 }.into());
        }
        Ok(start..self.at)
    }

    /// A count of things of at least `min_bytes` each, for which there are bytes enough in the file.
    fn count(&mut self, what: &'static str, min_bytes: u64) -> Result<u64, Stop> {
        let count = self.u64("a count")?;
        let left = self.file_bytes.saturating_sub(self.at as u64);
        match count.checked_mul(min_bytes) {
            Some(needed) if needed <= left => Ok(count),
            _ => Err(GgufProblem::Count { what, count }.into()),
        }
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, Stop> {
        let bytes = self.take(4, what)?;
        Ok(u32::from_le_bytes(bytes.try_into().expect("4 bytes were asked for")))
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, Stop> {
        let bytes = self.take(8, what)?;
        Ok(u64::from_le_bytes(bytes.try_into().expect("8 bytes were asked for")))
    }

    /// The next `num_bytes`, fetched if they have not been.
    fn take(&mut self, num_bytes: u64, what: &'static str) -> Result<&[u8], Stop> {
        let at = self.at as u64;
        let (file_bytes, needed) = (self.file_bytes, num_bytes);
        let end = match at.checked_add(num_bytes) {
            Some(end) if end <= file_bytes => end,
            _ => return Err(GgufProblem::Truncated { what, at, needed, file_bytes }.into()),
        };
        if end > MAX_HEADER_BYTES {
            return Err(GgufProblem::HeaderTooLarge { limit: MAX_HEADER_BYTES }.into());
        }
        let have = self.bytes.len() as u64;
        if end > have {
            let fetched = end.next_multiple_of(CHUNK_BYTES).min(file_bytes);
            self.bytes.resize(fetched as usize, 0);
            self.file.read_exact_at(&mut self.bytes[have as usize..], have).map_err(Stop::Io)?;
        }
        self.at = end as usize;
        Ok(&self.bytes[at as usize..end as usize])
    }
}

/// Gives each tensor its place in the file, if these are places in the file, and no two share a byte.
fn place(tensors: &mut [RawTensor], data_start: u64, data_bytes: u64) -> Result<(), GgufProblem> {
    for RawTensor { name, file_offset: offset, num_bytes, .. } in tensors.iter() {
        if offset.checked_add(*num_bytes).is_none_or(|end| end > data_bytes) {
            let (name, offset, num_bytes) = (name.clone(), *offset, *num_bytes);
            return Err(GgufProblem::OutOfFile { name, offset, num_bytes, data_bytes });
        }
    }
    let mut order: Vec<&RawTensor> = tensors.iter().collect();
    order.sort_unstable_by_key(|tensor| &tensor.name);
    if let Some(pair) = order.windows(2).find(|pair| pair[0].name == pair[1].name) {
        return Err(GgufProblem::DuplicateTensor { name: pair[0].name.clone() });
    }
    order.sort_unstable_by_key(|tensor| tensor.file_offset);
    if let Some(pair) =
        order.windows(2).find(|pair| pair[0].file_offset + pair[0].num_bytes > pair[1].file_offset)
    {
        let (name, other) = (pair[1].name.clone(), pair[0].name.clone());
        return Err(GgufProblem::Overlap { name, offset: pair[1].file_offset, other });
    }
    tensors.iter_mut().for_each(|tensor| tensor.file_offset += data_start);
    Ok(())
}
