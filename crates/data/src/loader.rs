//! Batches of a run: the sampler's samples, read from a token file.

use crate::{BatchShape, DataError, Order, Sampler, TokenFile};

/// Input and target tokens of one forward pass of one rank.
///
/// # Shapes
/// Both `[rows, seq_len]`, row-major; a target is the input one token later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Tokens the model sees.
    pub input: Vec<i64>,
    /// Tokens it has to predict.
    pub target: Vec<i64>,
    /// Samples.
    pub rows: usize,
    /// Tokens of a sample.
    pub seq_len: usize,
}

/// Reads batches. Has no state: any step can be read at any time, and a resumed run just goes on at its step.
#[derive(Debug)]
pub struct Loader {
    tokens: TokenFile,
    sampler: Sampler,
}

impl Loader {
    /// Batches of `shape` from `tokens`. Sample `i` is `tokens[i * seq_len ..= (i + 1) * seq_len]`: neighbours share
    /// one token, which is the last target of one and the first input of the next.
    ///
    /// # Errors
    /// [`DataError::TooFewTokens`] if there is not one sample, [`DataError::Zero`] if a number of `shape` is 0.
    pub fn new(tokens: TokenFile, order: Order, shape: BatchShape) -> Result<Loader, DataError> {
        let (num_tokens, seq_len) = (tokens.num_tokens(), shape.seq_len);
        if seq_len == 0 {
            return Err(DataError::Zero { name: "seq_len" });
        }
        let num_samples = (num_tokens - 1) / seq_len;
        if num_samples == 0 {
            return Err(DataError::TooFewTokens { path: tokens.path().to_owned(), num_tokens, seq_len });
        }
        let sampler = Sampler::new(num_samples as u64, order, shape)?;
        Ok(Loader { tokens, sampler })
    }

    /// Which samples it reads when.
    pub fn sampler(&self) -> &Sampler {
        &self.sampler
    }

    /// The batch of data-parallel rank `dp_rank` in accumulation `accum` of optimizer step `step` (from 0).
    ///
    /// # Errors
    /// [`DataError::TokenOutOfVocab`].
    /// # Panics
    /// If `accum` or `dp_rank` is not inside the batch shape.
    pub fn batch(&self, step: u64, accum: usize, dp_rank: usize) -> Result<Batch, DataError> {
        let BatchShape { seq_len, micro_batch: rows, .. } = self.sampler.shape();
        let mut input = vec![0; rows * seq_len];
        let mut target = vec![0; rows * seq_len];
        let mut sample = vec![0; seq_len + 1];
        for (row, index) in self.sampler.sample_indices(step, accum, dp_rank).enumerate() {
            let first = index as usize * seq_len;
            self.tokens.copy_to_i64(first..first + seq_len + 1, &mut sample)?;
            input[row * seq_len..][..seq_len].copy_from_slice(&sample[..seq_len]);
            target[row * seq_len..][..seq_len].copy_from_slice(&sample[1..]);
        }
        Ok(Batch { input, target, rows, seq_len })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TokenDType;

    fn tokens(num_tokens: u16) -> (tempfile::TempDir, TokenFile) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens.bin");
        let bytes: Vec<u8> = (0..num_tokens).flat_map(u16::to_le_bytes).collect();
        std::fs::write(&path, bytes).unwrap();
        let file = TokenFile::open(path, TokenDType::U16).unwrap();
        (dir, file)
    }

    fn shape(seq_len: usize, micro_batch: usize, data_parallel: usize) -> BatchShape {
        BatchShape { seq_len, micro_batch, grad_accum_steps: 1, data_parallel }
    }

    #[test]
    fn targets_are_inputs_one_token_later() {
        let (_dir, tokens) = tokens(17);
        let loader = Loader::new(tokens, Order::Sequential, shape(4, 2, 2)).unwrap();
        assert_eq!(loader.sampler().num_samples(), 4);
        let batch = loader.batch(0, 0, 1).unwrap();
        assert_eq!((batch.rows, batch.seq_len), (2, 4));
        assert_eq!(batch.input, [8, 9, 10, 11, 12, 13, 14, 15]);
        assert_eq!(batch.target, [9, 10, 11, 12, 13, 14, 15, 16]);
    }

    #[test]
    fn a_last_part_of_a_sample_is_left_out() {
        let (_dir, tokens) = tokens(16);
        let loader = Loader::new(tokens, Order::Shuffled { seed: 1 }, shape(4, 30, 1)).unwrap();
        assert_eq!(loader.sampler().num_samples(), 3);
        assert!(loader.batch(11, 0, 0).unwrap().target.iter().all(|&token| (1..=12).contains(&token)));
    }

    #[test]
    fn too_few_tokens_for_one_sample() {
        let (_dir, tokens) = tokens(8);
        let error = Loader::new(tokens, Order::Sequential, shape(8, 1, 1)).unwrap_err().to_string();
        assert!(error.contains("has `8` tokens, one sample needs `9`"), "{error}");
    }

    #[test]
    fn a_token_outside_of_the_vocabulary_is_an_error_when_read() {
        let (_dir, tokens) = tokens(9);
        let loader = Loader::new(tokens.with_vocab_size(8), Order::Sequential, shape(4, 1, 1)).unwrap();
        loader.batch(0, 0, 0).unwrap();
        assert!(matches!(loader.batch(1, 0, 0), Err(DataError::TokenOutOfVocab { token: 8, .. })));
    }
}
