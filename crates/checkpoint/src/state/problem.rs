//! What can be wrong with a checkpoint of a run, as facts.

use std::path::PathBuf;

use crate::FileDType;
use crate::state::region::{Block, Region};

/// What is wrong with a file that carries its own checksum.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // each field is named in its message
pub enum SealProblem {
    /// The first line is not that of such a file.
    #[error("it does not begin with a checksum (truncated, or no file of ours)")]
    NoChecksum,
    /// Some byte is not what was written.
    #[error("its checksum is `{got:08x}`, expected `{expected:08x}` (altered or truncated)")]
    Altered { expected: u32, got: u32 },
}

/// What is wrong with `manifest.json`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // each field is named in its message
pub enum ManifestProblem {
    /// Damaged.
    #[error(transparent)]
    Seal(#[from] SealProblem),
    /// More bytes than a manifest has.
    #[error("it has `{bytes}` bytes, the limit is `{limit}`")]
    TooLarge { bytes: u64, limit: u64 },
    /// Not JSON of the right form.
    #[error("malformed: {0}")]
    Json(String),
    /// Some other program's file.
    #[error("its format is `{got}`, expected `shardwise-checkpoint`")]
    Format { got: String },
    /// Written by a newer program.
    #[error(
        "its format version is `{got}`, this program reads up to `{newest}`; use the program that wrote it"
    )]
    Version { got: u32, newest: u32 },
    /// A number that makes no sense.
    #[error("`{key}` is `{got}`, expected {expected}")]
    Value { key: &'static str, got: String, expected: &'static str },
    /// A manifest in the folder of another step.
    #[error("it is of step `{got}`, its folder is of step `{expected}` (copied from another checkpoint?)")]
    OtherStep { got: u64, expected: u64 },
    /// A file name that leaves the folder, or that has another meaning there.
    #[error("`{file}` cannot be the name of a file in a checkpoint")]
    FileName { file: String },
    /// Two files of one name.
    #[error("file `{file}` is listed twice")]
    FileTwice { file: String },
    /// Size and checksums disagree.
    #[error("file `{file}` of `{bytes}` bytes has `{got}` checksums, expected `{expected}`")]
    Checksums { file: String, bytes: u64, got: usize, expected: u64 },
    /// Ranks do not match the files.
    #[error("it lists the files of `{got}` ranks, the mesh has `{world_size}`")]
    Ranks { got: usize, world_size: usize },
    /// One name and kind for two tensors.
    #[error("`{kind}` of `{name}` is listed twice")]
    Duplicate { name: String, kind: String },
    /// A tensor without a usable name, kind or type.
    #[error("`{kind}` of `{name}`, type `{dtype}`: {why}")]
    Tensor { name: String, kind: String, dtype: FileDType, why: &'static str },
    /// The pieces of a tensor do not make the whole.
    #[error("`{kind}` of `{name}`: {problem}")]
    Cover { name: String, kind: String, problem: Box<CoverProblem> },
    /// A piece that is not in its file.
    #[error("`{kind}` of `{name}`: bytes `{begin}..{end}` are not inside of file `{file}`")]
    OutOfFile { name: String, kind: String, file: String, begin: u64, end: u64 },
    /// Two pieces that share bytes.
    #[error("`{kind}` of `{name}` begins at byte `{begin}` of file `{file}`, inside of another tensor")]
    SharedBytes { name: String, kind: String, file: String, begin: u64 },
}

/// Why pieces do not make a whole tensor.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // each field is named in its message
pub enum CoverProblem {
    /// More elements than can be counted.
    #[error("its shape is too large")]
    TooLarge,
    /// A piece that is not of this tensor.
    #[error("a piece leaves the tensor: elements `{:?}` of {}", .region.range, of_block(&.region.block))]
    Outside { region: Region },
    /// Hostile, or cut very oddly.
    #[error("it is cut into `{count}` blocks, the limit is `{limit}`")]
    TooManyBlocks { count: usize, limit: usize },
    /// Nobody holds these.
    #[error("elements `{begin}..{end}`{} are missing", of_some(.block))]
    Hole { begin: usize, end: usize, block: Option<Block> },
    /// Two hold these.
    #[error("elements `{begin}..{end}`{} are there twice", of_some(.block))]
    Twice { begin: usize, end: usize, block: Option<Block> },
    /// Two boxes share elements.
    #[error("blocks {} and {} overlap", show(.first), show(.second))]
    BlocksOverlap { first: Block, second: Block },
    /// The boxes leave elements out.
    #[error("`{numel}` of its `{of}` elements are missing")]
    Missing { numel: usize, of: usize },
}

/// What is wrong with a file of a checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // each field is named in its message
pub enum Damage {
    /// It is not there.
    #[error("it is missing")]
    Missing,
    /// A folder, a pipe...
    #[error("it is no plain file")]
    NotAFile,
    /// Cut short, or grown.
    #[error("it has `{got}` bytes, expected `{expected}`")]
    Size { got: u64, expected: u64 },
    /// Some bytes are not what was written.
    #[error("bytes `{begin}..{end}` are not what was written (altered)")]
    Altered { begin: u64, end: u64 },
    /// The system cannot read it.
    #[error("it cannot be read: {why}")]
    Unreadable { why: String },
    /// Right size, other checkpoint or other rank.
    #[error("it is the file of rank `{rank}` of step `{step}`, save `{save}` (swapped?)")]
    Foreign { rank: String, step: String, save: String },
    /// The header of the file and the manifest disagree.
    #[error("its header does not list {what} as the manifest does")]
    Header { what: String },
}

/// Why a checkpoint was not saved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // each field is named in its message
pub enum SaveProblem {
    /// A rank has not finished its part.
    #[error("rank `{rank}` has left no index `{}`: its part is not written", path.display())]
    NoIndex { rank: usize, path: PathBuf },
    /// An index is damaged or of another save.
    #[error("the index of rank `{rank}`: {why}")]
    Index { rank: usize, why: String },
    /// What the ranks wrote does not fit together.
    #[error("the ranks' parts do not fit together: {0}")]
    Parts(Box<ManifestProblem>),
    /// A fragment that cannot be written.
    #[error("`{kind}` of `{name}`: {why}")]
    Fragment { name: String, kind: String, why: String },
    /// A fragment was not written with exactly its declared bytes.
    #[error("`{kind}` of `{name}`: `{expected}` bytes are declared, got `{got}`")]
    FragmentBytes { name: String, kind: String, expected: u64, got: u64 },
    /// Fragments out of order.
    #[error("`{kind}` of `{name}` was written out of order")]
    Order { name: String, kind: String },
    /// A file that cannot be attached.
    #[error("`{file}` cannot be attached: {why}")]
    Attachment { file: String, why: &'static str },
    /// Whoever asked for it does not want it any more.
    #[error("it was cancelled")]
    Cancelled,
    /// Our mistake, caught.
    #[error("writing it panicked: {0}")]
    Panicked(String),
    /// The one before is still under way.
    #[error("the save before is still being written")]
    Busy,
}

fn of_some(block: &Option<Block>) -> String {
    block.as_ref().map_or(String::new(), |block| format!(" of {}", of_block(block)))
}

fn of_block(block: &Block) -> String {
    format!("block {}", show(block))
}

fn show(block: &Block) -> String {
    format!("`{:?} + {:?}`", block.offset, block.shape)
}
