//! Checkpoints of a training run: written by all ranks at once, read by any number of them.
//!
//! Every rank streams the elements it owns into one safetensors file ([`ShardWriter`]); a manifest says where each
//! element of each tensor is. So a checkpoint of any mesh is read by any other with range reads of just what a rank
//! needs ([`Checkpoint`]), without a converter. `docs/checkpoint-format.md` is the format.
//!
//! ```text
//!   save                                      load
//!   rank 0 ─ ShardWriter ─► rank-00000.safetensors ─┐
//!   rank 1 ─ ShardWriter ─► rank-00001.safetensors ─┼─ Checkpoint ─► region of any tensor, on any rank
//!   rank 0 ─ Save::commit ► manifest.json ──────────┘
//! ```
//!
//! A checkpoint exists completely or not at all, whenever a process or the host dies ([`Save`]). Every byte has a
//! checksum, and what is read is verified. Nothing here knows ranks' collectives, engines or devices: the caller
//! brings bytes, agrees with the other ranks, and may do the writing on a thread ([`Background`]).

mod background;
mod chunks;
mod cover;
mod export;
mod folder;
mod manifest;
mod problem;
mod read;
mod region;
mod save;
mod sealed;
mod shard;
mod sink;
mod verify;

#[cfg(test)]
mod faults;
#[cfg(test)]
mod hostile;

pub use background::{Background, Cancel};
pub use export::{Exported, PARAM};
pub use folder::{Found, Keep};
pub use manifest::Mesh;
pub use problem::{CoverProblem, Damage, ManifestProblem, SaveProblem, SealProblem};
pub use read::{Checkpoint, StateTensor};
pub use region::{Block, Region};
pub use save::{Attachment, Committed, Contents, Save};
pub use shard::{Fragment, Progress, ShardIndex, ShardWriter};
pub use verify::{Finding, Verified};
