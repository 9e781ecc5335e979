//! A text file in pieces of bounded size, so that a text of any length needs little memory.
//!
//! Pieces end before white space, and after a letter or digit if that can be. Byte-level tokenizers (GPT-2, Llama 3,
//! those trained here) split words there in any case, so the tokens of the pieces are the tokens of the text.
//! Tokenizers that mark the beginning of a text mark it at each piece.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::DataError;

/// How much is read at once. Encodings take some 30 times the memory of their text, hence not more.
pub(crate) const PIECE_BYTES: usize = 32 * 1024;

/// The pieces of one file; ends after the first error.
#[derive(Debug)]
pub(crate) struct Pieces {
    path: PathBuf,
    file: File,
    piece_bytes: usize,
    /// Read but not handed out.
    buffer: Vec<u8>,
    /// Where `buffer` begins in the file.
    offset_bytes: u64,
    state: State,
}

#[derive(Debug, PartialEq)]
enum State {
    Reading,
    EndOfFile,
    Done,
}

impl Pieces {
    pub(crate) fn open(path: &Path) -> Result<Pieces, DataError> {
        Pieces::with_size(path, PIECE_BYTES)
    }

    fn with_size(path: &Path, piece_bytes: usize) -> Result<Pieces, DataError> {
        let file = File::open(path).map_err(|source| DataError::Io {
            action: "open",
            path: path.to_owned(),
            source,
        })?;
        let buffer = Vec::with_capacity(piece_bytes);
        Ok(Pieces {
            path: path.to_owned(),
            file,
            piece_bytes,
            buffer,
            offset_bytes: 0,
            state: State::Reading,
        })
    }

    fn next_piece(&mut self) -> Result<Option<String>, DataError> {
        if self.state == State::Reading {
            let missing = (self.piece_bytes - self.buffer.len()) as u64;
            let io = |source| DataError::Io { action: "read", path: self.path.clone(), source };
            let got = (&mut self.file).take(missing).read_to_end(&mut self.buffer).map_err(io)?;
            if (got as u64) < missing {
                self.state = State::EndOfFile;
            }
        }
        let at_end = self.state == State::EndOfFile;
        let text = match std::str::from_utf8(&self.buffer) {
            Ok(text) => text,
            // The buffer ends inside a character, whose rest is still in the file.
            Err(error) if error.error_len().is_none() && !at_end => {
                std::str::from_utf8(&self.buffer[..error.valid_up_to()]).expect("valid up to there")
            }
            Err(error) => {
                let offset_bytes = self.offset_bytes + error.valid_up_to() as u64;
                return Err(DataError::NotUtf8 { path: self.path.clone(), offset_bytes });
            }
        };
        let piece = if at_end { text } else { &text[..cut(text)] }.to_owned();
        self.buffer.drain(..piece.len());
        self.offset_bytes += piece.len() as u64;
        Ok((!piece.is_empty()).then_some(piece))
    }
}

impl Iterator for Pieces {
    type Item = Result<String, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.state == State::Done {
            return None;
        }
        let piece = self.next_piece().transpose();
        if !matches!(piece, Some(Ok(_))) {
            self.state = State::Done;
        }
        piece
    }
}

/// Where to end a piece: the last place between a letter or digit and white space; if there is none, between anything
/// else and white space; if there is none, the end.
fn cut(text: &str) -> usize {
    let mut before_space = None;
    let mut after_is_space = false;
    for (i, c) in text.char_indices().rev() {
        let after = i + c.len_utf8();
        if after_is_space && c.is_alphanumeric() {
            return after;
        }
        if after_is_space && !c.is_whitespace() && before_space.is_none() {
            before_space = Some(after);
        }
        after_is_space = c.is_whitespace();
    }
    before_space.unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Tokenizer;

    fn pieces(bytes: &[u8], piece_bytes: usize) -> Result<Vec<String>, DataError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("text.txt");
        std::fs::write(&path, bytes).unwrap();
        Pieces::with_size(&path, piece_bytes)?.collect()
    }

    #[test]
    fn pieces_end_before_white_space() {
        assert_eq!(
            pieces(b"one two\nthree four.  five", 10).unwrap(),
            ["one two", "\nthree", " four.", "  five"]
        );
        assert_eq!(pieces(b"", 8).unwrap(), [""; 0]);
    }

    #[test]
    fn a_text_without_white_space_is_cut_between_characters() {
        assert_eq!(pieces("東京東京".as_bytes(), 8).unwrap(), ["東京", "東京"]);
    }

    #[test]
    fn what_is_not_utf8_is_located() {
        for (bytes, at) in [(&b"abc\xffdef"[..], 3), (b"some words and \xc3", 15), (b"\xe6\x9d words", 0)] {
            for piece_bytes in [4, 8, 100] {
                match pieces(bytes, piece_bytes) {
                    Err(DataError::NotUtf8 { offset_bytes, path }) => {
                        assert_eq!((offset_bytes, path.ends_with("text.txt")), (at, true));
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever the text, pieces join to it, and their tokens to its tokens.
        #[test]
        fn tokens_do_not_depend_on_pieces(text in "([a-z0-9é東,.!'’_-]{0,6}[ \n\t\r]{0,3}){0,60}", size in 4usize..64) {
            let parts = pieces(text.as_bytes(), size).unwrap();
            prop_assert_eq!(parts.concat(), &text[..]);
            // Only pieces that were cut at white space promise equal tokens.
            let at_space =
                |a: &str, b: &str| !a.ends_with(char::is_whitespace) && b.starts_with(char::is_whitespace);
            if parts.windows(2).all(|pair| at_space(&pair[0], &pair[1])) {
                let tokenizer = Tokenizer::train_bpe(300, [text.clone(), text.clone()].into_iter()).unwrap();
                let tokens: Vec<u32> = parts.iter().flat_map(|part| tokenizer.encode(part).unwrap()).collect();
                prop_assert_eq!(tokens, tokenizer.encode(&text).unwrap());
            }
        }
    }
}
