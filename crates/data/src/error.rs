//! What can go wrong with data.

use std::ops::Range;
use std::path::PathBuf;

use crate::TokenDType;

/// Errors of texts, tokenizers, token files and samplers.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
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
    /// A token file without tokens.
    #[error("token file `{}` is empty", path.display())]
    EmptyTokenFile {
        /// The file.
        path: PathBuf,
    },
    /// A token file that ends inside a token.
    #[error(
        "token file `{}` has `{file_bytes}` bytes, expected a multiple of `{}` for tokens of type `{dtype}`",
        path.display(), dtype.size_bytes()
    )]
    PartialToken {
        /// The file.
        path: PathBuf,
        /// Its size.
        file_bytes: u64,
        /// The type it was opened with.
        dtype: TokenDType,
    },
    /// A token that the model has no embedding for.
    #[error(
        "token file `{}` has token `{token}` at byte `{offset_bytes}`, expected less than the vocabulary size \
         `{vocab_size}`; is `data.dtype` right?",
        path.display()
    )]
    TokenOutOfVocab {
        /// The file.
        path: PathBuf,
        /// The token.
        token: u32,
        /// Where it is.
        offset_bytes: u64,
        /// The vocabulary size.
        vocab_size: usize,
    },
    /// Tokens past the end were asked for.
    #[error("tokens `{range:?}` of token file `{}`, which has `{num_tokens}`", path.display())]
    RangePastEnd {
        /// The file.
        path: PathBuf,
        /// The tokens asked for.
        range: Range<usize>,
        /// Tokens in the file.
        num_tokens: usize,
    },
    /// Not even one sample.
    #[error(
        "token file `{}` has `{num_tokens}` tokens, one sample needs `{}` (`seq_len` + 1); \
         use more data or a smaller `data.seq_len`",
        path.display(), seq_len + 1
    )]
    TooFewTokens {
        /// The file.
        path: PathBuf,
        /// Tokens in it.
        num_tokens: usize,
        /// The sequence length.
        seq_len: usize,
    },
    /// A size that must be positive.
    #[error("`{name}` is 0, expected at least 1")]
    Zero {
        /// Its name.
        name: &'static str,
    },
    /// A text without characters.
    #[error("text file `{}` is empty", path.display())]
    EmptyText {
        /// The file.
        path: PathBuf,
    },
    /// No text files.
    #[error("no text files are given, expected at least one")]
    NoTexts,
    /// A text that is not UTF-8.
    #[error("text file `{}` is not UTF-8 at byte `{offset_bytes}`; convert it first", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// The first byte that is not.
        offset_bytes: u64,
    },
    /// A tokenizer file that the tokenizer library refuses.
    #[error("could not load tokenizer `{}`: {reason}", path.display())]
    LoadTokenizer {
        /// The file.
        path: PathBuf,
        /// What the library said.
        reason: String,
    },
    /// Several texts, and no token to put after each.
    #[error(
        "tokenizer `{}` has no end-of-text token to put between `{num_texts}` text files; \
         add the special token `<|endoftext|>` to it, or join the files",
        path.display()
    )]
    NoEndOfText {
        /// The tokenizer file.
        path: PathBuf,
        /// How many texts there are.
        num_texts: usize,
    },
    /// A vocabulary too small for byte-level BPE.
    #[error(
        "`vocab_size` is `{vocab_size}`, byte-level BPE needs at least `{minimum}` (256 bytes and the end of text)"
    )]
    VocabTooSmall {
        /// The size asked for.
        vocab_size: usize,
        /// The least possible.
        minimum: usize,
    },
    /// The tokenizer library failed.
    #[error("tokenizer failed to {action}: {reason}")]
    Tokenizer {
        /// What it was doing: `train`, `encode`, `decode`...
        action: &'static str,
        /// What it said.
        reason: String,
    },
    /// A cache entry that is not what was written.
    #[error("cache `{}` is damaged: {reason}; delete this folder to tokenise again", path.display())]
    DamagedCache {
        /// The entry's folder.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}
