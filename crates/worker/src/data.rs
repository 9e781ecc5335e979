//! The run's tokens, from a token file or from text.

use std::path::PathBuf;

use shardwise_config::{DataSource, Loaded, RunConfig, SampleOrder, TokenDType, TokenizerSource};
use shardwise_data::{self as data, BatchShape, Loader, Order, TokenFile, Tokenizer};

use crate::failure::Failure;
use crate::telemetry::Telemetry;

/// What to read from, and the tokenizer if the run reads text.
pub struct Tokens {
    pub file: TokenFile,
    pub tokenizer: Option<TextTokenizer>,
}

/// The tokenizer of a run that reads text.
pub struct TextTokenizer {
    pub path: PathBuf,
    pub tokenizer: Tokenizer,
}

/// Opens another token file of the run, with ids as wide as those it trains on.
pub fn open_tokens(path: &std::path::Path, run: &RunConfig) -> Result<TokenFile, Failure> {
    match &run.data.source {
        DataSource::Tokens { dtype, .. } => Ok(TokenFile::open(path, width(*dtype))?),
        DataSource::Text { .. } => Err(Failure::usage(
            "`eval.tokens` needs `data.tokens`",
            "give `eval.text`, as the run reads text",
        )),
    }
}

fn width(dtype: TokenDType) -> data::TokenDType {
    match dtype {
        TokenDType::U16 => data::TokenDType::U16,
        TokenDType::U32 => data::TokenDType::U32,
    }
}

/// Opens the token file, or makes it from text: once, whoever of the ranks comes first, into the cache.
pub fn open(loaded: &Loaded, cache: &std::path::Path, telemetry: &Telemetry) -> Result<Tokens, Failure> {
    match &loaded.config.data.source {
        DataSource::Tokens { tokens, dtype } => {
            Ok(Tokens { file: TokenFile::open(tokens, width(*dtype))?, tokenizer: None })
        }
        DataSource::Text { tokenizer, .. } => {
            telemetry.phase("preparing text");
            let files = loaded.text_files().map_err(Failure::configuration)?;
            let source = match tokenizer {
                TokenizerSource::TrainBpe { vocab_size } => {
                    data::TokenizerSource::TrainBpe { vocab_size: *vocab_size }
                }
                TokenizerSource::File(path) => data::TokenizerSource::File(path.clone()),
            };
            let prepared = data::prepare_text(&files, &source, cache, &mut |_| {})?;
            let path = prepared.tokenizer_json;
            let tokenizer = Tokenizer::load(&path)?;
            Ok(Tokens { file: prepared.tokens, tokenizer: Some(TextTokenizer { path, tokenizer }) })
        }
    }
}

/// Batches for this run's shape.
pub fn loader(config: &RunConfig, tokens: TokenFile, vocab_size: usize) -> Result<Loader, Failure> {
    let order = match config.data.order {
        SampleOrder::Sequential => Order::Sequential,
        SampleOrder::Shuffled => Order::Shuffled { seed: config.data.seed },
    };
    let shape = BatchShape {
        seq_len: config.data.seq_len,
        micro_batch: config.batch.micro_batch,
        grad_accum_steps: config.batch.grad_accum_steps,
        data_parallel: config.parallel.data,
    };
    Ok(Loader::new(tokens.with_vocab_size(vocab_size), order, shape)?)
}
