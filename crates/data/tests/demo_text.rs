//! The text of the demo, through everything that a run does with it.

use std::path::Path;

use shardwise_data::{BatchShape, Loader, Order, Tokenizer, TokenizerSource, prepare_text};

#[test]
fn the_demo_text_survives_tokenising() {
    let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/demo/shakespeare.txt");
    let original = std::fs::read_to_string(&text).unwrap();
    assert!(original.len() > 1_000_000);

    let cache = tempfile::tempdir().unwrap();
    let source = TokenizerSource::TrainBpe { vocab_size: 4096 };
    let prepared = prepare_text(&[text], &source, cache.path(), &mut |_| {}).unwrap();
    assert_eq!(prepared.vocab_size, 4096);
    let tokenizer = Tokenizer::load(&prepared.tokenizer_json).unwrap();

    // All samples in order hold the whole text but for less than one sample at its end.
    let seq_len = 128;
    let shape = BatchShape { seq_len, micro_batch: 8, grad_accum_steps: 1, data_parallel: 1 };
    let num_tokens = prepared.tokens.num_tokens();
    let loader = Loader::new(prepared.tokens, Order::Sequential, shape).unwrap();
    let num_steps = loader.sampler().num_samples() / 8;
    let read: Vec<u32> = (0..num_steps)
        .flat_map(|step| loader.batch(step, 0, 0).unwrap().input)
        .map(|token| u32::try_from(token).unwrap())
        .collect();
    assert!(num_tokens - read.len() < 9 * seq_len);
    let decoded = tokenizer.decode(&read).unwrap();
    assert!(original.starts_with(&decoded) && original.len() - decoded.len() < 10_000);
    // A vocabulary of this size makes about 3.5 bytes a token of such a text.
    let bytes_per_token = original.len() as f64 / num_tokens as f64;
    assert!((3.0..4.5).contains(&bytes_per_token), "{bytes_per_token}");
}
