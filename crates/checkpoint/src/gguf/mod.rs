//! Models in a GGUF file, and how they become Hugging Face folders.
//!
//! A GGUF file is one header (keys with values, then names, shapes, types and places of tensors) and one block of
//! data. [`GgufReader`] checks all of the header before a tensor is read; [`import`] turns a Llama, tokenizer
//! included, into what [`crate::HfReader`] and the transformers package read.
//!
//! ```text
//! model.gguf                                DIR
//!   llama.* keys ───────── llama.rs ──────► config.json
//!   tokenizer.* keys ───── tokenizer.rs ──► tokenizer.json, tokenizer_config.json
//!   tensors ── blocks.rs ─ import.rs ─────► model.safetensors, or shards with an index
//! ```
//!
//! What a file asks for that is not known here (a tensor type, a way to split text) is refused by name: a guess would
//! give a model that runs and is wrong.

mod blocks;
mod error;
mod ggml_type;
mod header;
mod import;
mod llama;
mod reader;
mod tokenizer;
mod value;

pub use error::GgufProblem;
pub use ggml_type::GgmlType;
pub use import::{ImportOptions, Imported, TokenizerImport, import};
pub use reader::{GgufReader, GgufTensor};
pub use value::{GgufArray, GgufValue};
