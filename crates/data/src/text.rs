//! Text files to a token file, once.
//!
//! The result lies in the cache under a name made of everything that it depends on: the bytes of the texts, the
//! tokenizer or how to train one, and the version of this procedure. So it can never be stale, and nothing needs to
//! be compared but names.
//!
//! ```text
//! CACHE/<hash>/tokenizer.json   as given, or trained
//! CACHE/<hash>/tokens.bin       all texts, each followed by the end-of-text token
//! CACHE/<hash>/cache.json       how many tokens, of which type
//! ```
//!
//! Ranks that start together may all call this. One holds a lock and works, the others wait and find its result. The
//! folder is renamed into place when it is complete, so where the file system has no locks the work is merely done
//! several times. Only this user can read the cache.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::pieces::{PIECE_BYTES, Pieces};
use crate::tokenizer::check_bpe_vocab;
use crate::{DataError, TokenDType, TokenFile, Tokenizer};

/// To be raised when the same texts and tokenizer would give another token file.
const PROCEDURE: &str = "shardwise tokens 1";

/// Pieces that are encoded together: enough for all cores, and few enough for some 15 MB of encodings.
const PIECES_PER_BATCH: usize = 16;

/// Where the tokenizer comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenizerSource {
    /// A `tokenizer.json`.
    File(PathBuf),
    /// A byte-level BPE trained on the texts.
    TrainBpe {
        /// Tokens at most, special ones included.
        vocab_size: usize,
    },
}

/// Tokenised texts, ready to be read.
#[derive(Debug)]
pub struct PreparedText {
    /// The tokens; one outside of the vocabulary is an error when it is read.
    pub tokens: TokenFile,
    /// The tokenizer that made them.
    pub tokenizer_json: PathBuf,
    /// One more than the largest token id that the tokenizer has.
    pub vocab_size: usize,
}

/// What is going on, for a progress line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Progress {
    /// Texts are read, to look for their tokens in the cache.
    Reading {
        /// Bytes of text read.
        done_bytes: u64,
        /// Bytes of text in all.
        total_bytes: u64,
    },
    /// Not in the cache. Another process may be at it, and is waited for.
    Locking,
    /// A tokenizer is trained.
    Training,
    /// Texts are tokenised.
    Tokenizing {
        /// Bytes of text tokenised.
        done_bytes: u64,
        /// Bytes of text in all.
        total_bytes: u64,
    },
}

/// Tokenises `files`, or finds in `cache_dir` that this was done already. `progress` is told what is going on.
///
/// # Errors
/// A text that cannot be read, is empty or not UTF-8, a tokenizer that cannot be loaded: each names its file. Also
/// [`DataError::NoEndOfText`], [`DataError::DamagedCache`].
pub fn prepare_text(
    files: &[PathBuf],
    tokenizer: &TokenizerSource,
    cache_dir: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<PreparedText, DataError> {
    if files.is_empty() {
        return Err(DataError::NoTexts);
    }
    let source = Source::open(tokenizer)?;
    let mut total_bytes = 0;
    for path in files {
        total_bytes += fs::metadata(path).map_err(|e| io("open", path, e))?.len();
    }
    let texts = Texts { files, total_bytes };

    let entry = cache_dir.join(texts.cache_key(&source, progress)?);
    if let Some(prepared) = open_entry(&entry)? {
        return Ok(prepared);
    }
    fs::create_dir_all(cache_dir).map_err(|e| io("create", cache_dir, e))?;
    progress(Progress::Locking);
    let cache = File::open(cache_dir).map_err(|e| io("open", cache_dir, e))?;
    // Released when `cache` is dropped, or by the system when we die. A file system without locks costs work done
    // twice, not correctness, so a refusal is no error.
    let _ = cache.lock();
    if let Some(prepared) = open_entry(&entry)? {
        return Ok(prepared);
    }
    texts.build_entry(source, &entry, progress)?;
    let missing = || DataError::DamagedCache { path: entry.clone(), reason: "it vanished".into() };
    open_entry(&entry)?.ok_or_else(missing)
}

/// A tokenizer source whose file is read.
enum Source<'a> {
    File { path: &'a Path, json: Vec<u8> },
    TrainBpe { vocab_size: usize },
}

impl Source<'_> {
    fn open(source: &TokenizerSource) -> Result<Source<'_>, DataError> {
        match source {
            TokenizerSource::File(path) => {
                Ok(Source::File { path, json: fs::read(path).map_err(|e| io("read", path, e))? })
            }
            TokenizerSource::TrainBpe { vocab_size } => {
                check_bpe_vocab(*vocab_size)?;
                Ok(Source::TrainBpe { vocab_size: *vocab_size })
            }
        }
    }
}

struct Texts<'a> {
    files: &'a [PathBuf],
    total_bytes: u64,
}

impl Texts<'_> {
    /// The name of the cache entry; reads all texts, and refuses those that are empty or not UTF-8.
    fn cache_key(&self, source: &Source, progress: &mut dyn FnMut(Progress)) -> Result<String, DataError> {
        let mut hash = Sha256::new();
        hash.update(PROCEDURE);
        match source {
            Source::File { json, .. } => {
                hash.update("file");
                hash.update((json.len() as u64).to_le_bytes());
                hash.update(json);
            }
            Source::TrainBpe { vocab_size } => {
                hash.update("train_bpe");
                hash.update((*vocab_size as u64).to_le_bytes());
            }
        }
        let mut done_bytes = 0;
        for path in self.files {
            let mut text_hash = Sha256::new();
            let mut has_text = false;
            for piece in Pieces::open(path)? {
                let piece = piece?;
                has_text = has_text || !piece.trim().is_empty();
                text_hash.update(&piece);
                done_bytes += piece.len() as u64;
                if done_bytes % (64 * PIECE_BYTES as u64) < PIECE_BYTES as u64 {
                    progress(Progress::Reading { done_bytes, total_bytes: self.total_bytes });
                }
            }
            if !has_text {
                return Err(DataError::EmptyText { path: path.clone() });
            }
            // Hashes of texts, not texts: where one ends and the next begins matters too.
            hash.update(text_hash.finalize());
        }
        Ok(hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect())
    }

    /// Makes the folder `entry`, unless another process has made it meanwhile.
    fn build_entry(
        &self,
        source: Source,
        entry: &Path,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), DataError> {
        let cache_dir = entry.parent().expect("an entry is in the cache folder");
        // Readable for this user only, and deleted again if anything fails.
        let temp = tempfile::Builder::new()
            .prefix(".partial-")
            .tempdir_in(cache_dir)
            .map_err(|e| io("create a folder in", cache_dir, e))?;

        let (tokenizer, json) = match source {
            Source::File { path, json } => {
                let tokenizer = Tokenizer::from_json(&json, path)?;
                if self.files.len() > 1 && tokenizer.end_of_text().is_none() {
                    return Err(DataError::NoEndOfText { path: path.to_owned(), num_texts: self.files.len() });
                }
                (tokenizer, json)
            }
            Source::TrainBpe { vocab_size } => {
                progress(Progress::Training);
                let tokenizer = self.train_bpe(vocab_size)?;
                let json = tokenizer.to_json()?.into_bytes();
                (tokenizer, json)
            }
        };
        write_synced(&temp.path().join(TOKENIZER_FILE), |file| file.write_all(&json))?;

        let description = self.write_tokens(&tokenizer, &temp.path().join(TOKENS_FILE), progress)?;
        let description = serde_json::to_vec(&description).expect("numbers and names are JSON");
        write_synced(&temp.path().join(DESCRIPTION_FILE), |file| file.write_all(&description))?;

        match fs::rename(temp.path(), entry) {
            // There is no folder left to delete under the old name.
            Ok(()) => drop(temp.keep()),
            Err(_) if entry.exists() => {}
            Err(e) => return Err(io("rename a finished folder to", entry, e)),
        }
        File::open(cache_dir).and_then(|dir| dir.sync_all()).map_err(|e| io("sync", cache_dir, e))
    }

    fn train_bpe(&self, vocab_size: usize) -> Result<Tokenizer, DataError> {
        let pieces: Vec<Pieces> = self.files.iter().map(|path| Pieces::open(path)).collect::<Result<_, _>>()?;
        let mut failure = None;
        let good = pieces.into_iter().flatten().map_while(|piece| piece.map_err(|e| failure = Some(e)).ok());
        let tokenizer = Tokenizer::train_bpe(vocab_size, good)?;
        match failure {
            Some(error) => Err(error),
            None => Ok(tokenizer),
        }
    }

    /// Writes the tokens of all texts, each followed by the end of text if the tokenizer has one.
    fn write_tokens(
        &self,
        tokenizer: &Tokenizer,
        path: &Path,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Description, DataError> {
        let dtype = TokenDType::for_vocab(tokenizer.vocab_size());
        let mut file = BufWriter::new(File::create_new(path).map_err(|e| io("create", path, e))?);
        let mut num_tokens = 0;
        let mut write = |tokens: &[u32]| {
            num_tokens += tokens.len();
            tokens.iter().try_for_each(|&token| match dtype {
                TokenDType::U16 => file.write_all(&(token as u16).to_le_bytes()),
                TokenDType::U32 => file.write_all(&token.to_le_bytes()),
            })
        };
        let mut done_bytes = 0;
        for text in self.files {
            let mut pieces = Pieces::open(text)?;
            loop {
                let batch: Vec<String> = pieces.by_ref().take(PIECES_PER_BATCH).collect::<Result<_, _>>()?;
                if batch.is_empty() {
                    break;
                }
                done_bytes += batch.iter().map(|piece| piece.len() as u64).sum::<u64>();
                for encoding in tokenizer.encode_batch(batch)? {
                    write(encoding.get_ids()).map_err(|e| io("write", path, e))?;
                }
                progress(Progress::Tokenizing { done_bytes, total_bytes: self.total_bytes });
            }
            if let Some(end) = tokenizer.end_of_text() {
                write(&[end]).map_err(|e| io("write", path, e))?;
            }
        }
        let file = file.into_inner().map_err(|e| io("write", path, e.into_error()))?;
        file.sync_all().map_err(|e| io("sync", path, e))?;
        Ok(Description { num_tokens, vocab_size: tokenizer.vocab_size() })
    }
}

const TOKENIZER_FILE: &str = "tokenizer.json";
const TOKENS_FILE: &str = "tokens.bin";
const DESCRIPTION_FILE: &str = "cache.json";

/// What `cache.json` says.
#[derive(Debug, Serialize, Deserialize)]
struct Description {
    num_tokens: usize,
    vocab_size: usize,
}

/// Opens a cache entry if it is there.
fn open_entry(entry: &Path) -> Result<Option<PreparedText>, DataError> {
    if !entry.exists() {
        return Ok(None);
    }
    let damaged = |reason: String| DataError::DamagedCache { path: entry.to_owned(), reason };
    let description = fs::read(entry.join(DESCRIPTION_FILE)).map_err(|e| damaged(e.to_string()))?;
    let Description { num_tokens, vocab_size } =
        serde_json::from_slice(&description).map_err(|e| damaged(e.to_string()))?;
    let tokens = TokenFile::open(entry.join(TOKENS_FILE), TokenDType::for_vocab(vocab_size))
        .map_err(|e| damaged(e.to_string()))?
        .with_vocab_size(vocab_size);
    if tokens.num_tokens() != num_tokens {
        return Err(damaged(format!("it has `{}` tokens, expected `{num_tokens}`", tokens.num_tokens())));
    }
    let tokenizer_json = entry.join(TOKENIZER_FILE);
    if !tokenizer_json.exists() {
        return Err(damaged(format!("`{TOKENIZER_FILE}` is missing")));
    }
    Ok(Some(PreparedText { tokens, tokenizer_json, vocab_size }))
}

fn write_synced(path: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) -> Result<(), DataError> {
    let mut file = File::create_new(path).map_err(|e| io("create", path, e))?;
    write(&mut file).and_then(|()| file.sync_all()).map_err(|e| io("write", path, e))
}

fn io(action: &'static str, path: &Path, source: io::Error) -> DataError {
    DataError::Io { action, path: path.to_owned(), source }
}
