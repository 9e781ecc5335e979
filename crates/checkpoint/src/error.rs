//! What can go wrong with model files.

use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::FileDType;
use crate::gguf::GgufProblem;
use crate::state::{Damage, ManifestProblem, Region, SaveProblem};

/// Errors of reading and writing model files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The operating system refused.
    #[error("could not {action} `{}`", path.display())]
    Io {
        /// What was tried: `open`, `read`, `write`...
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The folder has no weights in a form we read.
    #[error("`{}` holds neither `model.safetensors` nor `model.safetensors.index.json`", dir.display())]
    NoWeights {
        /// The folder.
        dir: PathBuf,
    },
    /// A safetensors file is damaged or hostile.
    #[error("`{}` is not a valid safetensors file: {problem}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: HeaderProblem,
    },
    /// The index of a sharded model is damaged or does not fit its files.
    #[error("index `{}`: {problem}", path.display())]
    Index {
        /// The index file.
        path: PathBuf,
        /// What is wrong with it.
        problem: IndexProblem,
    },
    /// A GGUF file is damaged, hostile, or asks for what is not known here.
    #[error("cannot use `{}`: {problem}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: GgufProblem,
    },
    /// No such tensor.
    #[error("no tensor `{name}` in {looked_in}{}", did_you_mean(close))]
    MissingTensor {
        /// The name asked for.
        name: String,
        /// The files that were looked at, for people.
        looked_in: String,
        /// Names that are there and look similar, most similar first.
        close: Vec<String>,
    },
    /// A tensor has another shape than the model needs.
    #[error("tensor `{name}` in `{}`: expected shape `{expected:?}`, got `{got:?}`", path.display())]
    WrongShape {
        /// The tensor.
        name: String,
        /// Its file.
        path: PathBuf,
        /// What the caller needs.
        expected: Vec<usize>,
        /// What the file has.
        got: Vec<usize>,
    },
    /// An element range goes past the tensor's end, or does not fit the caller's buffer.
    #[error("tensor `{name}`: range `{range:?}` of `{numel}` elements into a buffer of `{buffer_numel}`")]
    WrongRange {
        /// The tensor.
        name: String,
        /// The elements asked for.
        range: Range<usize>,
        /// Elements that the tensor has.
        numel: usize,
        /// Elements that the buffer has.
        buffer_numel: usize,
    },
    /// The element type cannot be read as, or written from, 32-bit floats.
    #[error("tensor `{name}` has type `{dtype}`, expected one of `F64`, `F32`, `F16`, `BF16`")]
    NotFloat {
        /// The tensor.
        name: String,
        /// Its type.
        dtype: FileDType,
    },
    /// A finite number would have become infinite.
    #[error("tensor `{name}`, element `{element}`: `{value:e}` does not fit in `{dtype}`")]
    Overflow {
        /// The tensor.
        name: String,
        /// Index of the element in the flat tensor.
        element: usize,
        /// The number.
        value: f64,
        /// The type it does not fit in.
        dtype: FileDType,
    },
    /// A tensor declared for writing cannot be laid out in a file.
    #[error("cannot write tensor `{name}`: {problem}")]
    Declaration {
        /// The tensor.
        name: String,
        /// Why not.
        problem: DeclarationProblem,
    },
    /// A tensor was not written with exactly its declared elements.
    #[error("tensor `{name}` is declared with `{expected}` elements, got `{got}`")]
    WrongNumel {
        /// The tensor.
        name: String,
        /// Elements declared.
        expected: usize,
        /// Elements written, or that would have been.
        got: usize,
    },
    /// A folder holds no complete checkpoint.
    #[error("`{}` holds no complete checkpoint{}", dir.display(), because(.newest))]
    NoCheckpoint {
        /// The folder.
        dir: PathBuf,
        /// What is wrong with the newest one that is there.
        newest: Option<Box<CheckpointError>>,
    },
    /// A checkpoint without a model.
    #[error("`{}` holds no tensor of kind `param`", dir.display())]
    NoParams {
        /// The checkpoint.
        dir: PathBuf,
    },
    /// The manifest of a checkpoint is damaged, hostile or of another program.
    #[error("`{}`: {problem}", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong with it.
        problem: Box<ManifestProblem>,
    },
    /// A file of a checkpoint is damaged.
    #[error("`{}`, which holds {holds}: {damage}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Tensors in it that are lost, for people.
        holds: String,
        /// What is wrong with it.
        damage: Damage,
    },
    /// A checkpoint and a model do not have the same tensors.
    #[error("`{}` has `{kind}` of `{name}`, which the model does not", path.display())]
    UnexpectedTensor {
        /// The tensor.
        name: String,
        /// What of it.
        kind: String,
        /// The manifest.
        path: PathBuf,
    },
    /// Elements that a tensor does not have, or that do not fit the caller's buffer.
    #[error("`{name}` of shape `{shape:?}`: {region:?} into a buffer of `{buffer_numel}` elements")]
    WrongRegion {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// The elements asked for.
        region: Box<Region>,
        /// Elements that the buffer has.
        buffer_numel: usize,
    },
    /// A checkpoint was not saved.
    #[error("checkpoint of step `{step}` was not saved: {problem}")]
    Save {
        /// Optimizer steps that it would have held.
        step: u64,
        /// Why not.
        problem: Box<SaveProblem>,
    },
}

/// What is wrong with a safetensors file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // each field is named in its message
pub enum HeaderProblem {
    /// Not even the eight bytes of the header length.
    #[error("it has `{file_bytes}` bytes, expected at least 8")]
    TooShort { file_bytes: u64 },
    /// A header length that nobody means.
    #[error("its header claims `{header_bytes}` bytes, the limit is `{limit}`")]
    TooLarge { header_bytes: u64, limit: u64 },
    /// The file ends inside its header.
    #[error("its header claims `{header_bytes}` bytes, the file has `{file_bytes}` in all (truncated?)")]
    Truncated { header_bytes: u64, file_bytes: u64 },
    /// The header does not begin as the format demands.
    #[error("its header does not begin with `{{`")]
    NotAnObject,
    /// The header is not JSON of the right form.
    #[error("its header is malformed: {0}")]
    Json(String),
    /// One name for two tensors.
    #[error("tensor `{name}` is in its header twice")]
    Duplicate { name: String },
    /// More elements than can be addressed, or a part of a byte.
    #[error("tensor `{name}`: shape `{shape:?}` of `{dtype}` is not a whole, addressable number of bytes")]
    BadShape { name: String, shape: Vec<usize>, dtype: FileDType },
    /// Offsets and shape disagree.
    #[error(
        "tensor `{name}`: shape `{shape:?}` of `{dtype}` needs `{expected}` bytes, offsets `{begin}..{end}` span others"
    )]
    WrongSize { name: String, shape: Vec<usize>, dtype: FileDType, expected: u64, begin: u64, end: u64 },
    /// A tensor's bytes lie outside of the file.
    #[error(
        "tensor `{name}`: offsets `{begin}..{end}` lie outside of the `{data_bytes}` bytes of data (truncated?)"
    )]
    OutOfFile { name: String, begin: u64, end: u64, data_bytes: u64 },
    /// Two tensors share bytes.
    #[error("tensor `{name}` begins at `{begin}`, inside of tensor `{other}`")]
    Overlap { name: String, begin: u64, other: String },
    /// Bytes that belong to no tensor.
    #[error("bytes `{begin}..{end}` of its data belong to no tensor")]
    Gap { begin: u64, end: u64 },
}

/// What is wrong with the index of a sharded model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // each field is named in its message
pub enum IndexProblem {
    /// Not JSON of the right form.
    #[error("malformed: {0}")]
    Json(String),
    /// One name, two entries.
    #[error("tensor `{name}` is listed twice")]
    Duplicate { name: String },
    /// A file name that leaves the folder.
    #[error("tensor `{name}` is in file `{file}`, expected a plain file name")]
    NotAFileName { name: String, file: String },
    /// A shard that is not there.
    #[error("tensor `{name}` is in file `{file}`, which does not exist")]
    MissingFile { name: String, file: String },
    /// A shard without the tensor.
    #[error("tensor `{name}` is not in file `{file}`")]
    NotInFile { name: String, file: String },
    /// A tensor in two shards.
    #[error("tensor `{name}` is in file `{first}` and in file `{second}`")]
    InTwoFiles { name: String, first: String, second: String },
}

/// Why a tensor cannot be laid out or begun.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeclarationProblem {
    /// Two tensors of one name.
    #[error("it is declared twice")]
    Duplicate,
    /// The format keeps this name for itself.
    #[error("the format reserves this name")]
    Reserved,
    /// More bytes than can be addressed.
    #[error("its shape is too large")]
    TooLarge,
    /// Written without being declared.
    #[error("it was not declared")]
    Undeclared,
    /// Begun again after elements were written.
    #[error("it is written already")]
    AlreadyWritten,
}

impl CheckpointError {
    pub(crate) fn save(step: u64, problem: SaveProblem) -> Self {
        CheckpointError::Save { step, problem: Box::new(problem) }
    }
}

pub(crate) fn io(action: &'static str, path: &Path, source: std::io::Error) -> CheckpointError {
    CheckpointError::Io { action, path: path.to_owned(), source }
}

fn because(newest: &Option<Box<CheckpointError>>) -> String {
    newest.as_ref().map_or(String::new(), |error| format!("; the newest: {error}"))
}

fn did_you_mean(close: &[String]) -> String {
    match close {
        [] => String::new(),
        names => format!("; did you mean `{}`?", names.join("` or `")),
    }
}
