//! `shardwise eval` and `train --eval`: the loss on a text that the model was not trained on.
//!
//! The text is cut as training cuts it: window `i` reads tokens `i*T .. i*T+T` and predicts each one's successor, and
//! the last window is as short as it comes out. So every token but the first is predicted once. Perplexity is the
//! exponential of the mean loss over all of them.
//!
//! ```text
//! tokens    0 1 2 3 4 5 6 7 8
//! window 0  0 1 2 3              predicts 1 2 3 4
//! window 1          4 5 6 7      predicts 5 6 7 8
//! ```

use std::fmt;
use std::path::Path;

use serde_json::json;
use shardwise_data::{TokenFile, Tokenizer};
use shardwise_engine::Engine;
use shardwise_torch::Tensor;

use crate::EvalArgs;
use crate::failure::Failure;
use crate::inference::Trained;

/// Longer windows would make the scores over the vocabulary the largest thing in memory.
const DEFAULT_SEQ_LEN: usize = 1024;

/// Measures a model on one rank and prints what came out.
pub fn run(args: &EvalArgs) -> Result<(), Failure> {
    let Trained { config, tokenizer, mut engine } = Trained::load(&args.dir)?;
    let max_positions = config.max_positions();
    let seq_len = args.seq_len.unwrap_or(DEFAULT_SEQ_LEN.min(max_positions));
    if seq_len > max_positions {
        let message = format!("`--seq-len` is `{seq_len}`, the model has `{max_positions}` positions");
        return Err(Failure::usage(message, format!("give at most {max_positions}")));
    }
    let text = HeldOut::read(&args.text, &tokenizer, config.vocab_size(), seq_len, args.max_tokens)?;
    let result = text.evaluate(&mut engine)?;
    if args.json {
        let Evaluation { loss, num_tokens } = result;
        println!(
            "{}",
            json!({ "loss": loss, "perplexity": result.perplexity(), "tokens": num_tokens, "seq_len": seq_len })
        );
    } else {
        println!("{result}, in windows of {seq_len}");
    }
    Ok(())
}

/// A text to predict.
pub struct HeldOut {
    tokens: Vec<i64>,
    seq_len: usize,
}

impl HeldOut {
    /// Reads a text of which at most `max_tokens` are to be predicted.
    pub fn read(
        path: &Path,
        tokenizer: &Tokenizer,
        vocab_size: usize,
        seq_len: usize,
        max_tokens: Option<usize>,
    ) -> Result<Self, Failure> {
        let refuse = |problem: String| {
            let message = format!("held-out text `{}` {problem}", path.display());
            Failure::usage(message, "give a UTF-8 text of at least two tokens, for this model's tokenizer")
        };
        let text =
            std::fs::read_to_string(path).map_err(|error| refuse(format!("cannot be read: {error}")))?;
        let mut tokens: Vec<i64> = tokenizer.encode(&text)?.into_iter().map(i64::from).collect();
        if let Some(max_tokens) = max_tokens {
            tokens.truncate(max_tokens.saturating_add(1));
        }
        if tokens.len() < 2 {
            return Err(refuse(format!("has `{}` tokens", tokens.len())));
        }
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab_size) {
            return Err(refuse(format!("has token `{token}`, the model has `{vocab_size}`")));
        }
        Ok(HeldOut { tokens, seq_len })
    }

    /// Takes the first tokens of a file, of which at most `max_tokens` are to be predicted.
    pub fn from_tokens(file: &TokenFile, seq_len: usize, max_tokens: Option<usize>) -> Result<Self, Failure> {
        let num_tokens = max_tokens.map_or(usize::MAX, |max| max.saturating_add(1)).min(file.num_tokens());
        if num_tokens < 2 {
            let message = format!("held-out tokens `{}` are `{num_tokens}`", file.path().display());
            return Err(Failure::usage(message, "give at least two"));
        }
        let mut tokens = vec![0; num_tokens];
        file.copy_to_i64(0..num_tokens, &mut tokens)?;
        Ok(HeldOut { tokens, seq_len })
    }

    /// The mean loss over all tokens, the same on every rank. Ranks take turns at the windows.
    ///
    /// # Collective
    /// Every rank of the engine's group calls, with the same text.
    pub fn evaluate(&self, engine: &mut Engine) -> Result<Evaluation, Failure> {
        let group = engine.zero().group();
        let (rank, num_ranks) = (group.group_rank(), group.group_size());
        // Ranks that have other parts of one model run the same windows together, and one of them tells the loss.
        let at = engine.ranks().at();
        let tells = at.pipeline == 0 && at.tensor == 0;
        let num_windows = (self.tokens.len() - 1).div_ceil(self.seq_len);
        let mut mine = [0.0, 0.0];
        // In stage 3 every rank is needed for every window: one that has run out repeats the last and does not count it.
        for first in (0..num_windows).step_by(num_ranks) {
            let (input, target) = self.window((first + rank).min(num_windows - 1));
            let row = |tokens: &[i64]| Tensor::f_from_slice(tokens)?.f_view([1, tokens.len() as i64]);
            let loss = engine.evaluate(&row(input)?, &row(target)?)?;
            if tells && first + rank < num_windows {
                mine[0] += loss * target.len() as f64;
                mine[1] += target.len() as f64;
            }
        }
        let ranks = engine.zero().exchange(&mine)?;
        let sum = |i: usize| ranks.iter().map(|rank| rank[i]).sum::<f64>();
        Ok(Evaluation { loss: sum(0) / sum(1), num_tokens: sum(1) as usize })
    }

    fn window(&self, index: usize) -> (&[i64], &[i64]) {
        let start = index * self.seq_len;
        let end = (start + self.seq_len).min(self.tokens.len() - 1);
        (&self.tokens[start..end], &self.tokens[start + 1..end + 1])
    }
}

/// How well a model predicts a text.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Evaluation {
    /// Mean cross-entropy of the predicted tokens, in nats.
    pub loss: f64,
    /// Tokens predicted.
    pub num_tokens: usize,
}

impl Evaluation {
    /// Among how many equally likely tokens the model hesitates, on average.
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }
}

impl fmt::Display for Evaluation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Evaluation { loss, num_tokens } = self;
        write!(f, "loss {loss:.4}, perplexity {:.2}, over {num_tokens} tokens", self.perplexity())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_but_the_first_is_predicted_once() {
        for (num_tokens, seq_len) in [(9, 4), (10, 4), (2, 4), (5, 1), (8, 100)] {
            let text = HeldOut { tokens: (0..num_tokens).collect(), seq_len };
            let num_windows = (text.tokens.len() - 1).div_ceil(seq_len);
            let mut predicted: Vec<i64> = Vec::new();
            for (input, target) in (0..num_windows).map(|i| text.window(i)) {
                assert!(input.iter().zip(target).all(|(a, b)| a + 1 == *b) && input.len() <= seq_len);
                predicted.extend(target);
            }
            assert!(predicted.into_iter().eq(1..num_tokens), "{num_tokens} {seq_len}");
        }
    }
}
