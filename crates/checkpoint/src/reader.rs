//! Reading a Hugging Face model by element range.
//!
//! Bytes come through positioned reads into a small buffer, not through a mapping: pages of a mapping count as this
//! process's memory, and a rank that reads its part of a large model must not seem to hold all of it. Reads take
//! `&self` and may run on many threads.
//!
//! `model.safetensors` wins over an index beside it, as it does in the transformers package.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::convert::Scratch;
use crate::error::IndexProblem;
use crate::header::{self, Entry};
use crate::{CheckpointError, FileDType, index};

/// The weights of one model: every tensor of one file or of all shards.
#[derive(Debug)]
pub struct HfReader {
    files: Vec<(PathBuf, File)>,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
}

/// One tensor of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    /// Its name in the file.
    pub name: String,
    /// Its element type in the file.
    pub dtype: FileDType,
    /// Its shape, row-major and contiguous; empty for a scalar.
    pub shape: Vec<usize>,
    numel: usize,
    file: usize,
    file_offset: u64,
}

impl TensorInfo {
    /// How many elements it has.
    pub fn numel(&self) -> usize {
        self.numel
    }
}

impl HfReader {
    /// Opens the weights in the folder `path`, or the one safetensors file `path`, and checks all headers.
    ///
    /// # Errors
    /// [`CheckpointError::NoWeights`], [`CheckpointError::Header`] or [`CheckpointError::Index`] for what is not
    /// there, damaged or contradictory; [`CheckpointError::Io`].
    pub fn open(path: impl AsRef<Path>) -> Result<HfReader, CheckpointError> {
        let path = path.as_ref();
        let kind = path.metadata().map_err(|source| io("open", path, source))?;
        if !kind.is_dir() {
            return Self::open_file(path);
        }
        let single = path.join(index::SINGLE_FILE);
        if single.exists() {
            return Self::open_file(&single);
        }
        let index = path.join(index::INDEX_FILE);
        if index.exists() {
            return Self::open_shards(path, &index);
        }
        Err(CheckpointError::NoWeights { dir: path.to_owned() })
    }

    fn open_file(path: &Path) -> Result<HfReader, CheckpointError> {
        let file = File::open(path).map_err(|source| io("open", path, source))?;
        let mut reader = HfReader { files: Vec::new(), tensors: Vec::new(), by_name: HashMap::new() };
        for entry in header::read(path, &file)? {
            reader.add(0, entry);
        }
        reader.files.push((path.to_owned(), file));
        Ok(reader)
    }

    fn open_shards(dir: &Path, index_path: &Path) -> Result<HfReader, CheckpointError> {
        let bad = |problem| CheckpointError::Index { path: index_path.to_owned(), problem };
        let pairs = index::read(index_path)?;

        // Files in the order in which the index first names them.
        let mut file_names: Vec<&str> = Vec::new();
        let mut file_of = HashMap::new();
        for (name, file_name) in &pairs {
            if !file_of.contains_key(file_name.as_str()) {
                if !dir.join(file_name).exists() {
                    let (name, file) = (name.clone(), file_name.clone());
                    return Err(bad(IndexProblem::MissingFile { name, file }));
                }
                file_of.insert(file_name.as_str(), file_names.len());
                file_names.push(file_name);
            }
        }
        let listed: HashMap<&str, usize> =
            pairs.iter().map(|(name, file_name)| (name.as_str(), file_of[file_name.as_str()])).collect();

        let mut reader = HfReader { files: Vec::new(), tensors: Vec::new(), by_name: HashMap::new() };
        let mut seen: HashMap<String, usize> = HashMap::new();
        for (index_of_file, file_name) in file_names.iter().enumerate() {
            let path = dir.join(file_name);
            let file = File::open(&path).map_err(|source| io("open", &path, source))?;
            for entry in header::read(&path, &file)? {
                if let Some(first) = seen.insert(entry.name.clone(), index_of_file) {
                    let (first, second) = (file_names[first].to_owned(), (*file_name).to_owned());
                    return Err(bad(IndexProblem::InTwoFiles { name: entry.name, first, second }));
                }
                // The index decides what the model consists of; a shard may hold more.
                if listed.get(entry.name.as_str()) == Some(&index_of_file) {
                    reader.add(index_of_file, entry);
                }
            }
            reader.files.push((path, file));
        }
        match pairs.iter().find(|(name, _)| !reader.by_name.contains_key(name)) {
            Some((name, file)) => {
                Err(bad(IndexProblem::NotInFile { name: name.clone(), file: file.clone() }))
            }
            None => Ok(reader),
        }
    }

    fn add(&mut self, file: usize, entry: Entry) {
        let Entry { name, dtype, shape, numel, file_offset } = entry;
        self.by_name.insert(name.clone(), self.tensors.len());
        self.tensors.push(TensorInfo { name, dtype, shape, numel, file, file_offset });
    }

    /// All tensors, by file and then in the order of their data.
    pub fn tensors(&self) -> &[TensorInfo] {
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
    pub fn info(&self, name: &str) -> Result<&TensorInfo, CheckpointError> {
        match self.by_name.get(name) {
            Some(&i) => Ok(&self.tensors[i]),
            None => Err(CheckpointError::MissingTensor {
                name: name.to_owned(),
                looked_in: self.looked_in(),
                close: close_names(name, self.tensors.iter().map(|tensor| tensor.name.as_str())),
            }),
        }
    }

    /// The same, for a tensor that must have the shape `expected`.
    ///
    /// # Errors
    /// [`CheckpointError::MissingTensor`] or [`CheckpointError::WrongShape`].
    pub fn expect(&self, name: &str, expected: &[usize]) -> Result<&TensorInfo, CheckpointError> {
        let info = self.info(name)?;
        if info.shape != expected {
            return Err(CheckpointError::WrongShape {
                name: name.to_owned(),
                path: self.files[info.file].0.clone(),
                expected: expected.to_vec(),
                got: info.shape.clone(),
            });
        }
        Ok(info)
    }

    /// Reads the elements `range` of the flattened tensor `name` into `out`, as `f32`.
    ///
    /// Touches only the bytes of these elements. `F16` and `BF16` widen exactly, `F64` rounds.
    ///
    /// # Errors
    /// [`CheckpointError::MissingTensor`], [`CheckpointError::NotFloat`], [`CheckpointError::Overflow`] (an `F64`
    /// beyond `f32`), [`CheckpointError::Io`]; [`CheckpointError::WrongRange`] if `range` is not inside the tensor or
    /// `out` has another length.
    pub fn read_range_f32(
        &self,
        name: &str,
        range: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        let info = self.info(name)?;
        if range.start > range.end || range.end > info.numel || range.end - range.start != out.len() {
            let (numel, buffer_numel) = (info.numel, out.len());
            return Err(CheckpointError::WrongRange { name: name.to_owned(), range, numel, buffer_numel });
        }
        if !info.dtype.is_convertible() {
            return Err(CheckpointError::NotFloat { name: name.to_owned(), dtype: info.dtype });
        }
        let (path, file) = &self.files[info.file];
        let element_bytes = info.dtype.size_bits() / 8;
        let offset_of = |element: usize| info.file_offset + (element * element_bytes) as u64;

        if info.dtype == FileDType::F32 {
            let bytes = bytemuck::cast_slice_mut(out);
            return file
                .read_exact_at(bytes, offset_of(range.start))
                .map_err(|source| io("read", path, source));
        }
        let mut scratch = Scratch::new(out.len() * element_bytes);
        let mut element = range.start;
        for piece in out.chunks_mut(Scratch::MAX_BYTES / element_bytes) {
            let bytes = scratch.bytes_mut(piece.len() * element_bytes);
            file.read_exact_at(bytes, offset_of(element)).map_err(|source| io("read", path, source))?;
            scratch.decode(info.dtype, piece).map_err(|lost| CheckpointError::Overflow {
                name: name.to_owned(),
                element: element + lost.element,
                value: lost.value,
                dtype: lost.dtype,
            })?;
            element += piece.len();
        }
        Ok(())
    }

    /// Reads the whole tensor `name` as `f32`.
    ///
    /// # Errors
    /// As [`HfReader::read_range_f32`].
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        let mut values = vec![0.0; self.info(name)?.numel];
        self.read_range_f32(name, 0..values.len(), &mut values)?;
        Ok(values)
    }

    fn looked_in(&self) -> String {
        match self.files.as_slice() {
            [(path, _)] => format!("`{}`", path.display()),
            files => {
                let dir = files.first().and_then(|(path, _)| path.parent()).unwrap_or(Path::new("."));
                format!("the {} files of `{}`", files.len(), dir.display())
            }
        }
    }
}

fn io(action: &'static str, path: &Path, source: std::io::Error) -> CheckpointError {
    CheckpointError::Io { action, path: path.to_owned(), source }
}

/// Up to three names like `name`: those that differ by a prefix such as `model.`, then those spelled similarly.
pub(crate) fn close_names<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> Vec<String> {
    let score = |other: &str| {
        let (long, short) = if other.len() > name.len() { (other, name) } else { (name, other) };
        let by_prefix =
            long.strip_suffix(short).is_some_and(|prefix| prefix.ends_with('.') && !short.is_empty());
        if by_prefix { 2.0 } else { strsim::normalized_damerau_levenshtein(name, other) }
    };
    let mut scored: Vec<_> =
        names.map(|other| (score(other), other)).filter(|(score, _)| *score > 0.8).collect();
    scored.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    scored.into_iter().take(3).map(|(_, other)| other.to_owned()).collect()
}
