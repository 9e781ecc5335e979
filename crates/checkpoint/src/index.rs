//! The index of a sharded model: which tensor is in which file.
//!
//! `metadata.total_size` is written but not compared when reading: published models disagree with it after
//! conversions, and the headers of the files say all that it could.

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::path::{Component, Path};

use serde::Deserialize;
use serde::de::{MapAccess, Visitor};

use crate::CheckpointError;
use crate::error::IndexProblem;

/// The weights of a model in one file.
pub(crate) const SINGLE_FILE: &str = "model.safetensors";
/// The index beside the weights of a model in several files.
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";

/// The name of file `shard` (from 0) of `num_shards`.
pub(crate) fn shard_file(shard: usize, num_shards: usize) -> String {
    format!("model-{:05}-of-{num_shards:05}.safetensors", shard + 1)
}

/// Whether a file of this name belongs to the weights of a model.
pub(crate) fn is_weights_file(name: &str) -> bool {
    let digits = |s: &str| s.len() >= 5 && s.bytes().all(|b| b.is_ascii_digit());
    let shard = name.strip_prefix("model-").and_then(|rest| rest.strip_suffix(".safetensors"));
    let is_shard =
        shard.and_then(|rest| rest.split_once("-of-")).is_some_and(|(i, n)| digits(i) && digits(n));
    name == SINGLE_FILE || name == INDEX_FILE || is_shard
}

/// Whether a name stays in the folder that it is looked up in.
pub(crate) fn is_plain_file_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(only)), None) if only == name)
}

/// The JSON text of an index.
pub(crate) fn to_json<'a>(total_bytes: u64, files: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    let weight_map: serde_json::Map<_, _> =
        files.map(|(name, file)| (name.to_owned(), file.into())).collect();
    let index = serde_json::json!({ "metadata": { "total_size": total_bytes }, "weight_map": weight_map });
    format!("{index:#}\n")
}

/// Reads and checks an index; pairs of tensor name and file name come back in its order.
pub(crate) fn read(path: &Path) -> Result<Vec<(String, String)>, CheckpointError> {
    let bad = |problem| CheckpointError::Index { path: path.to_owned(), problem };
    let json = fs::read(path).map_err(|source| CheckpointError::Io {
        action: "read",
        path: path.to_owned(),
        source,
    })?;
    let RawIndex { weight_map: Pairs(pairs) } =
        serde_json::from_slice(&json).map_err(|e| bad(IndexProblem::Json(e.to_string())))?;

    let mut names = HashSet::with_capacity(pairs.len());
    for (name, file) in &pairs {
        if !names.insert(name) {
            return Err(bad(IndexProblem::Duplicate { name: name.clone() }));
        }
        // A hostile index must not make us open files elsewhere.
        if !is_plain_file_name(file) {
            return Err(bad(IndexProblem::NotAFileName { name: name.clone(), file: file.clone() }));
        }
    }
    Ok(pairs)
}

#[derive(Deserialize)]
struct RawIndex {
    weight_map: Pairs,
}

/// A JSON object of strings, duplicates included: a map type would lose them.
struct Pairs(Vec<(String, String)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Pairs;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
