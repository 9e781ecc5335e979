//! Text files to a token file, once.
//!
//! The result lies in the cache under a name made of everything that it depends on: the bytes of the texts, the
//! tokenizer or how to train one, and the version of this procedure. So it can never be stale, and nothing needs to
//! be compared but names.
//!
//! ```text
//! CACHE/<hash>/tokenizer.json   as given, or trained
//! CACHE/<hash>/tokens.bin       all texts, each followed by the end-of-text token
//! CACHE/<hash>/cache.json       how many tokens, of what vocabulary
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
                    return Err(DataError::NoEndOfText {
                        path: path.to_owned(),
                        num_texts: self.files.len(),
                    });
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
        let pieces: Vec<Pieces> =
            self.files.iter().map(|path| Pieces::open(path)).collect::<Result<_, _>>()?;
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

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str =
        "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n";
    const TWO: &str =
        "The slings and arrows of outrageous fortune,\nOr to take arms against a sea of troubles\n";

    struct Scratch {
        dir: tempfile::TempDir,
    }

    impl Scratch {
        fn new() -> Scratch {
            Scratch { dir: tempfile::tempdir().unwrap() }
        }

        fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
            let path = self.dir.path().join(name);
            fs::write(&path, content).unwrap();
            path
        }

        fn cache(&self) -> PathBuf {
            self.dir.path().join("cache/of/tokens")
        }

        fn prepare(&self, files: &[PathBuf], source: &TokenizerSource) -> Result<PreparedText, DataError> {
            prepare_text(files, source, &self.cache(), &mut |_| {})
        }

        fn num_entries(&self) -> usize {
            fs::read_dir(self.cache()).unwrap().count()
        }
    }

    const TRAIN: TokenizerSource = TokenizerSource::TrainBpe { vocab_size: 300 };

    fn read_all(prepared: &PreparedText) -> Vec<i64> {
        let mut tokens = vec![0; prepared.tokens.num_tokens()];
        prepared.tokens.copy_to_i64(0..tokens.len(), &mut tokens).unwrap();
        tokens
    }

    #[test]
    fn texts_are_tokenised_once_and_end_with_the_end_of_text() {
        let scratch = Scratch::new();
        let files = [scratch.file("one.txt", ONE.repeat(500)), scratch.file("two.txt", TWO)];
        let mut seen = Vec::new();
        let prepared = prepare_text(&files, &TRAIN, &scratch.cache(), &mut |p| seen.push(p)).unwrap();
        assert!(seen.contains(&Progress::Training));
        let total_bytes = (ONE.len() * 500 + TWO.len()) as u64;
        assert_eq!(seen.last(), Some(&Progress::Tokenizing { done_bytes: total_bytes, total_bytes }));

        let tokenizer = Tokenizer::load(&prepared.tokenizer_json).unwrap();
        assert_eq!((prepared.vocab_size, tokenizer.vocab_size()), (300, 300));
        assert_eq!(prepared.tokens.dtype(), TokenDType::U16);
        let end = tokenizer.end_of_text().unwrap();
        let expected: Vec<i64> = [ONE.repeat(500).as_str(), TWO]
            .iter()
            .flat_map(|text| tokenizer.encode(text).unwrap().into_iter().chain([end]))
            .map(i64::from)
            .collect();
        assert!(read_all(&prepared) == expected);

        seen.clear();
        let again = prepare_text(&files, &TRAIN, &scratch.cache(), &mut |p| seen.push(p)).unwrap();
        assert!(seen.iter().all(|p| matches!(p, Progress::Reading { .. })), "{seen:?}");
        assert_eq!(again.tokens.path(), prepared.tokens.path());
        assert_eq!(scratch.num_entries(), 1);
    }

    #[test]
    fn whatever_matters_makes_another_entry() {
        let scratch = Scratch::new();
        let (one, two) = (scratch.file("one.txt", ONE), scratch.file("two.txt", TWO));
        let joined = scratch.file("joined.txt", format!("{ONE}{TWO}"));
        let json =
            fs::read(scratch.prepare(std::slice::from_ref(&one), &TRAIN).unwrap().tokenizer_json).unwrap();
        let given = TokenizerSource::File(scratch.file("tokenizer.json", json));
        scratch.prepare(&[one.clone(), two.clone()], &TRAIN).unwrap();
        scratch.prepare(&[two, one.clone()], &TRAIN).unwrap();
        scratch.prepare(&[joined], &TRAIN).unwrap();
        scratch.prepare(std::slice::from_ref(&one), &TokenizerSource::TrainBpe { vocab_size: 301 }).unwrap();
        scratch.prepare(std::slice::from_ref(&one), &given).unwrap();
        assert_eq!(scratch.num_entries(), 6);
        // A name does not matter.
        scratch.prepare(&[scratch.file("renamed.txt", ONE)], &TRAIN).unwrap();
        assert_eq!(scratch.num_entries(), 6);
    }

    #[test]
    fn ranks_that_race_agree() {
        let scratch = Scratch::new();
        let files = [scratch.file("one.txt", ONE.repeat(50))];
        let tokens: Vec<_> = std::thread::scope(|scope| {
            let ranks: Vec<_> =
                (0..8).map(|_| scope.spawn(|| read_all(&scratch.prepare(&files, &TRAIN).unwrap()))).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        assert!(tokens.windows(2).all(|pair| pair[0] == pair[1]));
        assert_eq!(scratch.num_entries(), 1);
    }

    #[test]
    fn a_loser_of_the_race_without_locks_uses_the_winners_entry() {
        let scratch = Scratch::new();
        let files = [scratch.file("one.txt", ONE)];
        let first = scratch.prepare(&files, &TRAIN).unwrap();
        let entry = first.tokens.path().parent().unwrap();
        let texts = Texts { files: &files, total_bytes: ONE.len() as u64 };
        texts.build_entry(Source::TrainBpe { vocab_size: 300 }, entry, &mut |_| {}).unwrap();
        assert_eq!(scratch.num_entries(), 1);
    }

    #[test]
    fn texts_that_cannot_be_used_are_named() {
        let scratch = Scratch::new();
        let good = scratch.file("good.txt", ONE);
        let message =
            |path: &Path| scratch.prepare(&[good.clone(), path.to_owned()], &TRAIN).unwrap_err().to_string();
        let (empty, blank) = (scratch.file("empty.txt", ""), scratch.file("blank.txt", " \n\n"));
        assert_eq!(message(&empty), format!("text file `{}` is empty", empty.display()));
        assert_eq!(message(&blank), format!("text file `{}` is empty", blank.display()));
        let latin1 = scratch.file("latin1.txt", b"caf\xe9 au lait");
        assert!(message(&latin1).contains("latin1.txt` is not UTF-8 at byte `3`"));
        let missing = scratch.dir.path().join("missing.txt");
        assert_eq!(message(&missing), format!("could not open `{}`", missing.display()));
        assert!(message(scratch.dir.path()).starts_with("could not read `"));
        assert!(matches!(scratch.prepare(&[], &TRAIN), Err(DataError::NoTexts)));
        assert!(!scratch.cache().exists());
    }

    #[test]
    fn a_failure_leaves_nothing_in_the_cache() {
        let scratch = Scratch::new();
        let given = TokenizerSource::File(scratch.file("tokenizer.json", "{}"));
        let error = scratch.prepare(&[scratch.file("one.txt", ONE)], &given).unwrap_err();
        assert!(matches!(error, DataError::LoadTokenizer { .. }), "{error}");
        assert_eq!(scratch.num_entries(), 0);
    }

    #[test]
    fn several_texts_need_an_end_of_text() {
        let scratch = Scratch::new();
        let trained = scratch.prepare(&[scratch.file("one.txt", ONE)], &TRAIN).unwrap();
        let json = fs::read_to_string(trained.tokenizer_json).unwrap().replace("<|endoftext|>", "<|other|>");
        let given = TokenizerSource::File(scratch.file("tokenizer.json", json));
        let files = [scratch.file("one.txt", ONE), scratch.file("two.txt", TWO)];
        scratch.prepare(&files[..1], &given).unwrap();
        assert!(matches!(scratch.prepare(&files, &given), Err(DataError::NoEndOfText { num_texts: 2, .. })));
    }

    #[test]
    fn a_damaged_entry_is_an_error() {
        let scratch = Scratch::new();
        let files = [scratch.file("one.txt", ONE)];
        let path = scratch.prepare(&files, &TRAIN).unwrap().tokens.path().to_owned();
        let half = fs::metadata(&path).unwrap().len() / 4 * 2;
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(half).unwrap();
        let error = scratch.prepare(&files, &TRAIN).unwrap_err().to_string();
        assert!(error.contains("is damaged: it has") && error.contains("delete this folder"), "{error}");
    }
}
