//! A file of token ids, mapped.
//!
//! Plain little-endian integers without a header, as numpy writes them. Pages come from the page cache when they are
//! read, shared by all ranks of a host.

use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::DataError;

/// The integer type of a token file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TokenDType {
    /// 16 bits: vocabularies of up to 65,536 tokens.
    U16,
    /// 32 bits.
    U32,
}

impl TokenDType {
    /// Bytes of one token.
    pub const fn size_bytes(self) -> usize {
        match self {
            TokenDType::U16 => 2,
            TokenDType::U32 => 4,
        }
    }

    /// The smallest type that holds every token of a vocabulary.
    pub const fn for_vocab(vocab_size: usize) -> TokenDType {
        if vocab_size <= 1 << 16 { TokenDType::U16 } else { TokenDType::U32 }
    }
}

impl fmt::Display for TokenDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TokenDType::U16 => "u16",
            TokenDType::U32 => "u32",
        })
    }
}

/// A mapped file of token ids.
#[derive(Debug)]
pub struct TokenFile {
    path: PathBuf,
    map: Mmap,
    dtype: TokenDType,
    vocab_size: Option<usize>,
}

impl TokenFile {
    /// Maps the file `path` of tokens of type `dtype`.
    ///
    /// # Errors
    /// [`DataError::Io`], [`DataError::EmptyTokenFile`], [`DataError::PartialToken`].
    pub fn open(path: impl AsRef<Path>, dtype: TokenDType) -> Result<TokenFile, DataError> {
        let path = path.as_ref().to_owned();
        let io = |action, source| DataError::Io { action, path: path.clone(), source };
        let file = File::open(&path).map_err(|e| io("open", e))?;
        let file_bytes = file.metadata().map_err(|e| io("read the size of", e))?.len();
        if file_bytes == 0 {
            return Err(DataError::EmptyTokenFile { path });
        }
        if !file_bytes.is_multiple_of(dtype.size_bytes() as u64) {
            return Err(DataError::PartialToken { path, file_bytes, dtype });
        }
        // SAFETY: the mapping is only ever read as plain bytes, so a writer elsewhere can change token values but not
        // break a type. Cutting the file short while it is mapped would raise SIGBUS: a token file must not be
        // replaced in place during a run (our own are renamed into place, which leaves a mapping whole).
        let map = unsafe { Mmap::map(&file) }.map_err(|e| io("map", e))?;
        Ok(TokenFile { path, map, dtype, vocab_size: None })
    }

    /// The same file, but reading a token of `vocab_size` or more is an error.
    pub fn with_vocab_size(self, vocab_size: usize) -> TokenFile {
        TokenFile { vocab_size: Some(vocab_size), ..self }
    }

    /// How many tokens the file has; at least one.
    pub fn num_tokens(&self) -> usize {
        self.map.len() / self.dtype.size_bytes()
    }

    /// The type of its tokens.
    pub fn dtype(&self) -> TokenDType {
        self.dtype
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Copies the tokens `range` into `out`.
    ///
    /// # Errors
    /// [`DataError::RangePastEnd`]; [`DataError::TokenOutOfVocab`] if a vocabulary size was given.
    /// # Panics
    /// If `out` has another length than `range`, like slice copying.
    pub fn copy_to_i64(&self, range: Range<usize>, out: &mut [i64]) -> Result<(), DataError> {
        let num_tokens = self.num_tokens();
        if range.start > range.end || range.end > num_tokens {
            return Err(DataError::RangePastEnd { path: self.path.clone(), range, num_tokens });
        }
        assert_eq!(range.len(), out.len(), "tokens and places for them");
        let size = self.dtype.size_bytes();
        // A mapping begins at a page, so it is aligned for its tokens.
        let bytes = &self.map[range.start * size..range.end * size];
        let largest = match self.dtype {
            TokenDType::U16 => copy(bytemuck::cast_slice::<u8, u16>(bytes), out),
            TokenDType::U32 => copy(bytemuck::cast_slice::<u8, u32>(bytes), out),
        };
        match self.vocab_size {
            Some(vocab_size) if largest >= vocab_size as i64 => {
                Err(self.out_of_vocab(range.start, out, vocab_size))
            }
            _ => Ok(()),
        }
    }

    /// The error for the first of `tokens`, which begin at token `first`, that is not in the vocabulary.
    fn out_of_vocab(&self, first: usize, tokens: &[i64], vocab_size: usize) -> DataError {
        let at = tokens.iter().position(|&token| token >= vocab_size as i64).unwrap_or(0);
        DataError::TokenOutOfVocab {
            path: self.path.clone(),
            token: tokens[at] as u32,
            offset_bytes: ((first + at) * self.dtype.size_bytes()) as u64,
            vocab_size,
        }
    }
}

/// Copies and returns the largest, or -1 if there is none.
fn copy<T: Copy + Into<i64>>(tokens: &[T], out: &mut [i64]) -> i64 {
    let mut largest = -1;
    for (out, &token) in out.iter_mut().zip(tokens) {
        *out = token.into();
        largest = largest.max(*out);
    }
    largest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens.bin");
        std::fs::write(&path, bytes).unwrap();
        (dir, path)
    }

    #[test]
    fn tokens_are_little_endian() {
        let (_dir, path) = file(&[1, 0, 0, 1, 255, 255, 2, 0]);
        let mut out = [0; 3];
        let tokens = TokenFile::open(&path, TokenDType::U16).unwrap();
        assert_eq!(tokens.num_tokens(), 4);
        tokens.copy_to_i64(1..4, &mut out).unwrap();
        assert_eq!(out, [256, 65535, 2]);

        let tokens = TokenFile::open(&path, TokenDType::U32).unwrap();
        assert_eq!(tokens.num_tokens(), 2);
        tokens.copy_to_i64(0..2, &mut out[..2]).unwrap();
        assert_eq!(out[..2], [0x0100_0001, 0x0002_ffff]);
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = TokenFile::open("/nowhere/tokens.bin", TokenDType::U16).unwrap_err();
        assert_eq!(error.to_string(), "could not open `/nowhere/tokens.bin`");
    }

    #[test]
    fn an_empty_file_is_refused() {
        let (_dir, path) = file(&[]);
        assert!(matches!(TokenFile::open(path, TokenDType::U16), Err(DataError::EmptyTokenFile { .. })));
    }

    #[test]
    fn a_part_of_a_token_is_refused() {
        let (_dir, path) = file(&[0; 6]);
        let error = TokenFile::open(&path, TokenDType::U32).unwrap_err().to_string();
        assert!(
            error.ends_with("has `6` bytes, expected a multiple of `4` for tokens of type `u32`"),
            "{error}"
        );
    }

    #[test]
    fn a_token_outside_of_the_vocabulary_is_located() {
        let (_dir, path) = file(&[9, 0, 10, 0, 3, 0, 10, 0]);
        let tokens = TokenFile::open(&path, TokenDType::U16).unwrap().with_vocab_size(10);
        tokens.copy_to_i64(2..3, &mut [0]).unwrap();
        let error = tokens.copy_to_i64(2..4, &mut [0; 2]).unwrap_err().to_string();
        assert!(
            error.contains("token `10` at byte `6`, expected less than the vocabulary size `10`"),
            "{error}"
        );
        assert!(TokenFile::open(&path, TokenDType::U16).unwrap().copy_to_i64(0..4, &mut [0; 4]).is_ok());
    }

    #[test]
    fn a_range_past_the_end_is_refused() {
        let (_dir, path) = file(&[0; 4]);
        let tokens = TokenFile::open(&path, TokenDType::U16).unwrap();
        assert!(matches!(tokens.copy_to_i64(1..3, &mut [0; 2]), Err(DataError::RangePastEnd { .. })));
    }

    #[test]
    fn the_type_follows_the_vocabulary() {
        assert_eq!(TokenDType::for_vocab(65_536), TokenDType::U16);
        assert_eq!(TokenDType::for_vocab(65_537), TokenDType::U32);
    }
}
