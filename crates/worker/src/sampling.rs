//! Drawing tokens from scores.

use shardwise_engine::Engine;
use shardwise_kernels::philox;
use shardwise_torch::{Kind, Tensor};

use crate::failure::Failure;

/// How tokens are drawn.
#[derive(Debug, Clone, Copy)]
pub struct Sampling {
    /// Below 1 likelier tokens, above 1 stranger ones, 0 always the likeliest.
    pub temperature: f64,
    /// Only the likeliest few are drawn from.
    pub top_k: Option<usize>,
    /// The same seed gives the same tokens.
    pub seed: u64,
}

/// Continues `tokens` by up to `max_tokens`, calling `visit` with each; stops early when that returns false.
///
/// # Collective
/// Every rank calls with the same arguments, and draws the same tokens.
pub fn continue_tokens(
    engine: &mut Engine,
    tokens: &mut Vec<i64>,
    max_tokens: usize,
    max_positions: usize,
    sampling: Sampling,
    mut visit: impl FnMut(i64) -> bool,
) -> Result<(), Failure> {
    for drawn in 0..max_tokens {
        let seen = &tokens[tokens.len().saturating_sub(max_positions)..];
        let input = Tensor::f_from_slice(seen)?.f_view([1, seen.len() as i64])?;
        let logits = engine.predict_last(&input)?;
        let scores: Vec<f32> = Vec::try_from(&logits.f_to_kind(Kind::Float)?.f_view([-1])?)?;
        let random = philox::u64_at(sampling.seed, "generate", drawn as u64);
        let token = draw(&scores, sampling, (random >> 11) as f64 / (1u64 << 53) as f64);
        tokens.push(token);
        if !visit(token) {
            break;
        }
    }
    Ok(())
}

/// The token that `uniform` (in `0..1`) picks.
fn draw(scores: &[f32], sampling: Sampling, uniform: f64) -> i64 {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    if sampling.temperature == 0.0 {
        return order[0] as i64;
    }
    order.truncate(sampling.top_k.unwrap_or(order.len()).max(1));
    let best = f64::from(scores[order[0]]);
    let weights: Vec<f64> =
        order.iter().map(|&i| ((f64::from(scores[i]) - best) / sampling.temperature).exp()).collect();
    let mut left = uniform * weights.iter().sum::<f64>();
    for (&token, weight) in order.iter().zip(&weights) {
        left -= weight;
        if left < 0.0 {
            return token as i64;
        }
    }
    order[order.len() - 1] as i64
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCORES: [f32; 4] = [0.0, 2.0, 1.0, -1.0];

    #[test]
    fn zero_temperature_takes_the_likeliest() {
        assert_eq!(draw(&SCORES, Sampling { temperature: 0.0, top_k: None, seed: 0 }, 0.999), 1);
    }

    #[test]
    fn top_k_leaves_the_others_out() {
        let sampling = Sampling { temperature: 5.0, top_k: Some(2), seed: 0 };
        let drawn: Vec<_> = (0..100).map(|i| draw(&SCORES, sampling, f64::from(i) / 100.0)).collect();
        assert!(drawn.iter().all(|token| [1, 2].contains(token)));
        assert!(drawn.contains(&2));
    }

    #[test]
    fn frequencies_follow_the_scores() {
        let sampling = Sampling { temperature: 1.0, top_k: None, seed: 0 };
        let n = 10_000;
        let count = (0..n).filter(|&i| draw(&SCORES, sampling, f64::from(i) / f64::from(n)) == 1).count();
        let expected = 2f64.exp() / SCORES.iter().map(|&s| f64::from(s).exp()).sum::<f64>();
        assert!((count as f64 / f64::from(n) - expected).abs() < 1e-3);
    }
}
