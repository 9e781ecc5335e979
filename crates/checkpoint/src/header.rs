//! The header of a safetensors file, checked strictly.
//!
//! ```text
//! | 8 bytes: header length n | n bytes of JSON: name -> dtype, shape, [begin, end) | data |
//! ```
//!
//! A header is accepted only if its tensors tile the data exactly: no two share a byte, no byte is left over, each
//! spans what its shape needs. The reference crate would do the same from a mapped file, but takes the last of two
//! equal names in silence; a test holds that whatever we accept, it accepts with the same meaning.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Error as _, MapAccess, Visitor};

use crate::error::HeaderProblem;
use crate::{CheckpointError, FileDType};

/// Length of the length.
pub(crate) const LENGTH_BYTES: u64 = 8;
/// The reference's limit; a header names tensors, it does not hold them.
pub(crate) const MAX_HEADER_BYTES: u64 = 100_000_000;
/// The key that is not a tensor.
pub(crate) const METADATA_KEY: &str = "__metadata__";

/// One tensor of one file.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Entry {
    pub name: String,
    pub dtype: FileDType,
    pub shape: Vec<usize>,
    pub numel: usize,
    /// Where its first byte is, from the start of the file.
    pub file_offset: u64,
}

/// Reads and checks the header of `file`; tensors come back in the order of their data.
pub(crate) fn read(path: &Path, file: &File) -> Result<Vec<Entry>, CheckpointError> {
    let io = |action, source| CheckpointError::Io { action, path: path.to_owned(), source };
    let bad = |problem| CheckpointError::Header { path: path.to_owned(), problem };

    let file_bytes = file.metadata().map_err(|e| io("read the size of", e))?.len();
    if file_bytes < LENGTH_BYTES {
        return Err(bad(HeaderProblem::TooShort { file_bytes }));
    }
    let mut length = [0; LENGTH_BYTES as usize];
    file.read_exact_at(&mut length, 0).map_err(|e| io("read", e))?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > MAX_HEADER_BYTES {
        return Err(bad(HeaderProblem::TooLarge { header_bytes, limit: MAX_HEADER_BYTES }));
    }
    let data_start = LENGTH_BYTES + header_bytes;
    if data_start > file_bytes {
        return Err(bad(HeaderProblem::Truncated { header_bytes, file_bytes }));
    }
    let mut json = vec![0; header_bytes as usize];
    file.read_exact_at(&mut json, LENGTH_BYTES).map_err(|e| io("read", e))?;
    parse(&json, data_start, file_bytes - data_start).map_err(bad)
}

/// Checks the JSON of a header against `data_bytes` of data that begin at `data_start`.
fn parse(json: &[u8], data_start: u64, data_bytes: u64) -> Result<Vec<Entry>, HeaderProblem> {
    if json.first() != Some(&b'{') {
        return Err(HeaderProblem::NotAnObject);
    }
    let RawHeader(mut raw) = serde_json::from_slice(json).map_err(|e| HeaderProblem::Json(e.to_string()))?;

    let mut names = HashSet::with_capacity(raw.len());
    if let Some((name, _)) = raw.iter().find(|(name, _)| !names.insert(name.as_str())) {
        return Err(HeaderProblem::Duplicate { name: name.clone() });
    }

    raw.sort_by_key(|(_, tensor)| tensor.data_offsets);
    let mut covered = 0;
    let mut entries: Vec<Entry> = Vec::with_capacity(raw.len());
    for (name, RawTensor { dtype, shape, data_offsets: (begin, end) }) in raw {
        if begin > end || end > data_bytes {
            return Err(HeaderProblem::OutOfFile { name, begin, end, data_bytes });
        }
        let numel = shape.iter().try_fold(1usize, |numel, &size| numel.checked_mul(size));
        let Some((numel, expected)) = numel.and_then(|numel| Some((numel, dtype.num_bytes(numel)? as u64)))
        else {
            return Err(HeaderProblem::BadShape { name, shape, dtype });
        };
        if end - begin != expected {
            return Err(HeaderProblem::WrongSize { name, shape, dtype, expected, begin, end });
        }
        if begin > covered {
            return Err(HeaderProblem::Gap { begin: covered, end: begin });
        }
        if begin < covered {
            let other = entries.last().map(|entry| entry.name.clone()).unwrap_or_default();
            return Err(HeaderProblem::Overlap { name, begin, other });
        }
        covered = end;
        entries.push(Entry { name, dtype, shape, numel, file_offset: data_start + begin });
    }
    if covered < data_bytes {
        return Err(HeaderProblem::Gap { begin: covered, end: data_bytes });
    }
    Ok(entries)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: FileDType,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// Every tensor as the header has it, duplicates included: a map type would lose them.
struct RawHeader(Vec<(String, RawTensor)>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut tensors = Vec::new();
                let mut metadata: Option<HashMap<String, String>> = None;
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA_KEY {
                        if metadata.replace(map.next_value()?).is_some() {
                            return Err(A::Error::custom(format!("`{METADATA_KEY}` is there twice")));
                        }
                    } else {
                        let tensor = map
                            .next_value()
                            .map_err(|e| A::Error::custom(format!("tensor `{name}`: {e}")))?;
                        tensors.push((name, tensor));
                    }
                }
                Ok(RawHeader(tensors))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
