//! Model files and checkpoints: safetensors, read by element range and written as a stream.
//!
//! A rank reads only the elements it owns, and no file is ever held whole in memory, so a model larger than the
//! host can be loaded and written. [`HfReader`] reads a folder with `model.safetensors` or with shards and an
//! index; [`HfWriter`] writes either. Every header is checked before a tensor is read: a damaged or hostile file is
//! an error that names the file and the tensor, never a panic or a wrong number.
//!
//! [`state`] holds the checkpoints of a training run: sharded, durable, readable by any number of ranks.
//!
//! `config.json` and `tokenizer.json` beside the weights are the caller's business.

#![forbid(unsafe_code)]

#[cfg(target_endian = "big")]
compile_error!("tensors in files are little-endian, and are read without swapping bytes");

mod convert;
mod dtype;
mod error;
pub mod gguf;
mod header;
mod index;
mod reader;
pub mod state;
mod writer;

pub use dtype::FileDType;
pub use error::{CheckpointError, DeclarationProblem, HeaderProblem, IndexProblem};
pub use reader::{HfReader, TensorInfo};
pub use writer::{HfWriter, TensorMeta};
