//! What a run trains on: text, tokens, and which sample is read when.
//!
//! Text is tokenised once into a file of token ids; the file is mapped, cut into samples of `seq_len + 1` tokens,
//! and each step, rank and row reads the sample that a pure function names. So there is nothing to save for an
//! exact resume but the step, and the samples of a step do not depend on how many ranks read them.
//!
//! ```text
//! text files --prepare_text--> TokenFile --Loader--> Batch { input, target }
//!                                            ^
//!                     Sampler: (step, accumulation, data-parallel rank, row) -> sample
//! ```

#[cfg(target_endian = "big")]
compile_error!("token files are little-endian, and are read without swapping bytes");

mod error;
mod loader;
mod permutation;
mod pieces;
mod sampler;
mod text;
mod tokenizer;
mod tokens;

pub use error::DataError;
pub use loader::{Batch, Loader};
pub use permutation::Permutation;
pub use sampler::{BatchShape, Order, Sampler};
pub use text::{PreparedText, Progress, TokenizerSource, prepare_text};
pub use tokenizer::{END_OF_TEXT, TextStream, Tokenizer};
pub use tokens::{TokenDType, TokenFile};
