//! Text to tokens and back, by a Hugging Face `tokenizer.json`.

use std::fs;
use std::path::Path;

use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, models::TrainerWrapper};

use crate::DataError;

/// The special token that ends every text of a vocabulary trained here.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// What well-known vocabularies call the end of a text, ours first.
const END_OF_TEXT_NAMES: [&str; 5] = [END_OF_TEXT, "<|end_of_text|>", "<|eot_id|>", "</s>", "<eos>"];

/// Every byte, and the end of a text.
const MIN_BPE_VOCAB: usize = 256 + 1;

/// A loaded or trained tokenizer.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    vocab_size: usize,
}

impl Tokenizer {
    /// Loads a `tokenizer.json`. Truncation and padding that it may ask for are left out: they would drop text.
    ///
    /// # Errors
    /// [`DataError::Io`], [`DataError::LoadTokenizer`].
    pub fn load(path: impl AsRef<Path>) -> Result<Tokenizer, DataError> {
        let path = path.as_ref();
        let json = fs::read(path).map_err(|source| DataError::Io {
            action: "read",
            path: path.to_owned(),
            source,
        })?;
        Tokenizer::from_json(&json, path)
    }

    /// The same from the file's bytes; `path` is for messages.
    pub(crate) fn from_json(json: &[u8], path: &Path) -> Result<Tokenizer, DataError> {
        let refused = |reason: String| DataError::LoadTokenizer { path: path.to_owned(), reason };
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(|e| refused(e.to_string()))?;
        inner.with_truncation(None).map_err(|e| refused(e.to_string()))?;
        inner.with_padding(None);
        let tokenizer = Tokenizer::new(inner);
        if tokenizer.vocab_size == 0 {
            return Err(refused("its vocabulary is empty".into()));
        }
        Ok(tokenizer)
    }

    fn new(inner: tokenizers::Tokenizer) -> Tokenizer {
        let vocab_size = inner.get_vocab(true).values().max().map_or(0, |&largest| largest as usize + 1);
        Tokenizer { inner, vocab_size }
    }

    /// Trains a byte-level BPE of at most `vocab_size` tokens on `pieces` of text. Small texts give fewer tokens.
    ///
    /// The result depends on the text alone, not on timing or threads.
    ///
    /// # Errors
    /// [`DataError::VocabTooSmall`], [`DataError::Tokenizer`].
    pub fn train_bpe(
        vocab_size: usize,
        pieces: impl Iterator<Item = String> + Send,
    ) -> Result<Tokenizer, DataError> {
        check_bpe_vocab(vocab_size)?;
        let mut inner = tokenizers::Tokenizer::new(BPE::default());
        // Words keep the space before them; no space is invented at the start of a text.
        inner.with_pre_tokenizer(Some(ByteLevel::default().add_prefix_space(false)));
        inner.with_decoder(Some(ByteLevel::default()));
        let trainer = BpeTrainer::builder()
            .vocab_size(vocab_size)
            .min_frequency(2)
            .show_progress(false)
            .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
            // All bytes, seen or not, so that any prompt can be encoded.
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        let failed = |e: tokenizers::Error| DataError::Tokenizer { action: "train", reason: e.to_string() };
        inner.train(&mut TrainerWrapper::BpeTrainer(trainer), pieces).map_err(failed)?;
        Ok(Tokenizer::new(inner))
    }

    /// The `tokenizer.json` of this tokenizer.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`].
    pub fn to_json(&self) -> Result<String, DataError> {
        let failed =
            |e: tokenizers::Error| DataError::Tokenizer { action: "serialise", reason: e.to_string() };
        self.inner.to_string(false).map_err(failed)
    }

    /// One more than the largest token id: how many embeddings a model needs.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The token that ends a text, if the vocabulary has a well-known one.
    pub fn end_of_text(&self) -> Option<u32> {
        END_OF_TEXT_NAMES.iter().find_map(|name| self.inner.token_to_id(name))
    }

    /// The tokens of `text` alone.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        self.encode_as(text, false)
    }

    /// The tokens of a prompt: those of `text`, and whatever the tokenizer itself puts before or after a text
    /// (Llama's begins each with a special token).
    ///
    /// # Errors
    /// [`DataError::Tokenizer`].
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, DataError> {
        self.encode_as(text, true)
    }

    fn encode_as(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, DataError> {
        let encoding = self.inner.encode_fast(text, add_special_tokens).map_err(encode_failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The tokens of many pieces of text, encoded on all cores.
    pub(crate) fn encode_batch(&self, pieces: Vec<String>) -> Result<Vec<tokenizers::Encoding>, DataError> {
        self.inner.encode_batch_fast(pieces, false).map_err(encode_failed)
    }

    /// The text of `tokens`, without special tokens; bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`].
    pub fn decode(&self, tokens: &[u32]) -> Result<String, DataError> {
        let failed = |e: tokenizers::Error| DataError::Tokenizer { action: "decode", reason: e.to_string() };
        self.inner.decode(tokens, true).map_err(failed)
    }

    /// Decodes tokens one at a time.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream { tokenizer: self, tokens: Vec::new(), num_read: 0 }
    }
}

/// Refuses a vocabulary that byte-level BPE cannot have.
pub(crate) fn check_bpe_vocab(vocab_size: usize) -> Result<(), DataError> {
    if vocab_size < MIN_BPE_VOCAB {
        return Err(DataError::VocabTooSmall { vocab_size, minimum: MIN_BPE_VOCAB });
    }
    Ok(())
}

fn encode_failed(error: tokenizers::Error) -> DataError {
    DataError::Tokenizer { action: "encode", reason: error.to_string() }
}

/// Text as it grows token by token, in whole characters.
///
/// A character of several bytes may be split over tokens, and a tokenizer may write a token differently at the start
/// of a text; so each token is decoded together with the one shown before it, and text that ends inside a character
/// waits for the next token.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// Tokens shown last, and tokens not shown yet.
    tokens: Vec<u32>,
    /// How many of `tokens` are shown.
    num_read: usize,
}

impl TextStream<'_> {
    /// Adds a token and returns the text that is complete now; often one word, sometimes nothing.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`].
    pub fn push(&mut self, token: u32) -> Result<String, DataError> {
        self.tokens.push(token);
        let new_text = self.unread()?;
        if new_text.is_empty() || new_text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        self.tokens.drain(..self.num_read);
        self.num_read = self.tokens.len();
        Ok(new_text)
    }

    /// Returns what still waits; an unfinished character becomes U+FFFD.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`].
    pub fn finish(self) -> Result<String, DataError> {
        self.unread()
    }

    fn unread(&self) -> Result<String, DataError> {
        let shown = self.tokenizer.decode(&self.tokens[..self.num_read])?;
        let all = self.tokenizer.decode(&self.tokens)?;
        Ok(all.get(shown.len()..).unwrap_or_default().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str =
        "the cat and the dog and the bird: naïve café, 東京, 🦀🦀. The end.\n\n\nThe  cat's end.\n";

    fn trained(vocab_size: usize) -> Tokenizer {
        Tokenizer::train_bpe(vocab_size, std::iter::repeat_n(TEXT.to_owned(), 3)).unwrap()
    }

    #[test]
    fn text_survives_the_way_there_and_back() {
        let tokenizer = trained(300);
        for text in [TEXT, "", " ", "\u{0}\u{1f600}", "words never seen, Ünïcödé"] {
            assert_eq!(tokenizer.decode(&tokenizer.encode(text).unwrap()).unwrap(), text);
        }
    }

    #[test]
    fn training_is_deterministic() {
        let json = trained(320).to_json().unwrap();
        for _ in 0..5 {
            assert_eq!(trained(320).to_json().unwrap(), json);
        }
    }

    #[test]
    fn the_vocabulary_has_the_end_of_text_and_every_byte() {
        let tokenizer = trained(280);
        assert_eq!(tokenizer.vocab_size(), 280);
        let end = tokenizer.end_of_text().unwrap();
        assert_eq!(tokenizer.encode(END_OF_TEXT).unwrap(), [end]);
        assert_eq!(tokenizer.decode(&[end]).unwrap(), "");
        // Too little text for a large vocabulary.
        assert!((257..2000).contains(&trained(5000).vocab_size()));
    }

    #[test]
    fn a_vocabulary_below_the_bytes_is_refused() {
        let error = Tokenizer::train_bpe(256, std::iter::empty()).unwrap_err();
        assert!(matches!(error, DataError::VocabTooSmall { vocab_size: 256, minimum: 257 }));
    }

    #[test]
    fn a_stream_shows_whole_characters_only() {
        let tokenizer = trained(270);
        let tokens = tokenizer.encode(TEXT).unwrap();
        let mut stream = tokenizer.stream();
        let parts: Vec<String> = tokens.iter().map(|&token| stream.push(token).unwrap()).collect();
        assert_eq!(stream.finish().unwrap(), "");
        assert_eq!(parts.concat(), TEXT);
        assert!(parts.iter().all(|part| !part.contains(char::REPLACEMENT_CHARACTER)));
        assert!(parts.contains(&"🦀".to_owned()), "{parts:?}");
        assert!(parts.iter().filter(|part| part.is_empty()).count() > 5);
    }

    #[test]
    fn a_stream_that_ends_inside_a_character_says_so() {
        let tokenizer = trained(257);
        let tokens = tokenizer.encode("a🦀").unwrap();
        let mut stream = tokenizer.stream();
        let shown: String = tokens[..3].iter().map(|&token| stream.push(token).unwrap()).collect();
        assert_eq!(shown, "a");
        assert_eq!(stream.finish().unwrap(), "\u{fffd}");
    }

    #[test]
    fn a_file_that_is_no_tokenizer_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        std::fs::write(&path, "{\"model\": 5}").unwrap();
        let error = Tokenizer::load(&path).unwrap_err().to_string();
        assert!(error.starts_with(&format!("could not load tokenizer `{}`: ", path.display())), "{error}");
        assert!(
            Tokenizer::load(dir.path().join("none")).unwrap_err().to_string().starts_with("could not read")
        );
    }

    #[test]
    fn truncation_in_the_file_does_not_drop_text() {
        let mut json: serde_json::Value = serde_json::from_str(&trained(270).to_json().unwrap()).unwrap();
        json["truncation"] = serde_json::json!({ "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0 });
        let tokenizer =
            Tokenizer::from_json(json.to_string().as_bytes(), Path::new("tokenizer.json")).unwrap();
        assert_eq!(tokenizer.decode(&tokenizer.encode(TEXT).unwrap()).unwrap(), TEXT);
    }
}
