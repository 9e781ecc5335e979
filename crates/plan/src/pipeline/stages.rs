//! Which layers go where.
//!
//! A model is cut into parts of consecutive layers, one for each chunk of each stage. What counts as even is a choice:
//! parameters, estimated time, layers, or layers of one kind. The cut is the best there is: the largest part is as small as
//! can be, and among those cuts the parts are as even as can be.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use serde::Serialize;

use crate::{LayerSpec, NamePattern};

/// What is spread evenly over the parts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StageCut {
    /// Elements of parameters; a tied one counts in each layer that uses it.
    Parameters,
    /// Floating-point operations, as `ModelConfig::forward_flops` counts them.
    Time,
    /// Layers.
    Uniform,
    /// Layers whose names fit; others go along.
    Pattern(NamePattern),
}

/// Why layers cannot be cut.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PartitionError {
    /// A part would have no layer.
    #[error("`{num_layers}` layers cannot be cut into `{num_parts}` parts, expected 1 to {num_layers}")]
    TooManyParts {
        /// Layers.
        num_layers: usize,
        /// Parts.
        num_parts: usize,
    },
    /// A part would have no layer of the kind.
    #[error("`{pattern}` fits `{num_matches}` layers, expected at least one for each of `{num_parts}` parts")]
    TooFewMatches {
        /// The pattern.
        pattern: String,
        /// Layers that fit.
        num_matches: usize,
        /// Parts.
        num_parts: usize,
    },
}

impl StageCut {
    /// What each layer weighs. `flops` are those of each layer.
    pub fn weights(&self, layers: &[LayerSpec], flops: &[u64]) -> Vec<u64> {
        let numel = |layer: &LayerSpec| layer.params.iter().map(|param| param.numel() as u64).sum();
        match self {
            StageCut::Parameters => layers.iter().map(numel).collect(),
            StageCut::Time => flops.to_vec(),
            StageCut::Uniform => vec![1; layers.len()],
            StageCut::Pattern(pattern) => {
                layers.iter().map(|layer| u64::from(pattern.matches(&layer.name))).collect()
            }
        }
    }
}

impl fmt::Display for StageCut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StageCut::Parameters => f.write_str("parameters"),
            StageCut::Time => f.write_str("time"),
            StageCut::Uniform => f.write_str("uniform"),
            StageCut::Pattern(pattern) => write!(f, "pattern:{}", pattern.as_str()),
        }
    }
}

impl FromStr for StageCut {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "parameters" => StageCut::Parameters,
            "time" => StageCut::Time,
            "uniform" => StageCut::Uniform,
            _ => match text.strip_prefix("pattern:") {
                Some(pattern) => StageCut::Pattern(NamePattern::new(pattern)),
                None => {
                    return Err(format!(
                        "`{text}`, expected `parameters`, `time`, `uniform` or `pattern:NAMES`"
                    ));
                }
            },
        })
    }
}

/// The layers of every chunk of every stage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Stages {
    /// Layers of each part, in order.
    parts: Vec<Range<usize>>,
    num_stages: usize,
}

/// A tied parameter that several stages hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SharedParam {
    /// Its name.
    pub name: String,
    /// The stages, in order. The first one counts it in norms and writes it.
    pub stages: Vec<usize>,
}

impl Stages {
    /// Cuts `layers` for `num_stages` stages of `num_chunks` chunks.
    ///
    /// # Errors
    /// [`PartitionError`]
    pub fn new(
        layers: &[LayerSpec],
        flops: &[u64],
        cut: &StageCut,
        num_stages: usize,
        num_chunks: usize,
    ) -> Result<Self, PartitionError> {
        let num_parts = num_stages * num_chunks;
        let weights = cut.weights(layers, flops);
        if let StageCut::Pattern(pattern) = cut {
            let num_matches = weights.iter().filter(|&&weight| weight > 0).count();
            if num_matches < num_parts {
                let pattern = pattern.as_str().to_owned();
                return Err(PartitionError::TooFewMatches { pattern, num_matches, num_parts });
            }
        }
        Ok(Stages { parts: balanced(&weights, num_parts)?, num_stages })
    }

    /// Pipeline stages.
    pub fn num_stages(&self) -> usize {
        self.num_stages
    }

    /// Layers of each part, in the order they run.
    pub fn parts(&self) -> &[Range<usize>] {
        &self.parts
    }

    /// Layers of one chunk of a stage.
    pub fn layers(&self, stage: usize, chunk: usize) -> Range<usize> {
        self.parts[chunk * self.num_stages + stage].clone()
    }

    /// All layers of a stage, chunk by chunk.
    pub fn layers_of(&self, stage: usize) -> impl Iterator<Item = usize> {
        self.parts.iter().skip(stage).step_by(self.num_stages).flat_map(|part| part.clone())
    }

    /// Parameters that more than one stage holds, in order of the names' first use.
    pub fn shared_params(&self, layers: &[LayerSpec]) -> Vec<SharedParam> {
        let mut shared: Vec<SharedParam> = Vec::new();
        let mut index: std::collections::HashMap<&str, usize> = std::collections::HashMap::new();
        for (part, range) in self.parts.iter().enumerate() {
            for param in layers[range.clone()].iter().flat_map(|layer| &layer.params) {
                let at = *index.entry(&param.name).or_insert_with(|| {
                    shared.push(SharedParam { name: param.name.clone(), stages: Vec::new() });
                    shared.len() - 1
                });
                let stage = part % self.num_stages;
                if !shared[at].stages.contains(&stage) {
                    shared[at].stages.push(stage);
                }
            }
        }
        shared.retain(|param| param.stages.len() > 1);
        shared.iter_mut().for_each(|param| param.stages.sort_unstable());
        shared
    }
}

/// Cuts a row of weights into consecutive parts, none of them empty, so that the heaviest part is as light as can be, and
/// among those cuts the sum of squares is least.
///
/// # Errors
/// [`PartitionError::TooManyParts`]
pub fn balanced(weights: &[u64], num_parts: usize) -> Result<Vec<Range<usize>>, PartitionError> {
    let n = weights.len();
    if num_parts == 0 || num_parts > n {
        return Err(PartitionError::TooManyParts { num_layers: n, num_parts });
    }
    let mut sums = vec![0u128; n + 1];
    for (i, &weight) in weights.iter().enumerate() {
        sums[i + 1] = sums[i] + u128::from(weight);
    }
    let weight = |from: usize, to: usize| sums[to] - sums[from];
    // Linear partition: the best way to cut the first `end` weights into one part more, for every `end`.
    let (heaviest, _) = cut(n, num_parts, |before, from, to| Some(before.max(weight(from, to))));
    // Squares fit: a weight has 64 bits.
    let (_, parts) = cut(n, num_parts, |before, from, to| {
        let part = weight(from, to);
        let square = part.checked_mul(part)?;
        if part <= heaviest { before.checked_add(square) } else { None }
    });
    Ok(parts)
}

/// The cheapest cut of `n` items into `num_parts` parts, where `cost(c, from, to)` is the cost of adding the part `from..to` to parts
/// that cost `c`.
fn cut(
    n: usize,
    num_parts: usize,
    cost: impl Fn(u128, usize, usize) -> Option<u128>,
) -> (u128, Vec<Range<usize>>) {
    let mut best: Vec<Option<u128>> = vec![None; n + 1];
    best[0] = Some(0);
    let mut starts = Vec::with_capacity(num_parts);
    for part in 0..num_parts {
        let mut next = vec![None; n + 1];
        let mut start = vec![0; n + 1];
        for end in part + 1..=n {
            for (from, before) in best.iter().enumerate().take(end).skip(part) {
                let Some(total) = before.and_then(|before| cost(before, from, end)) else { continue };
                // Of equals the earlier start: the first stages, which keep most activations, get the shorter parts.
                if next[end].is_none_or(|least| total < least) {
                    (next[end], start[end]) = (Some(total), from);
                }
            }
        }
        best = next;
        starts.push(start);
    }
    let mut end = n;
    let mut parts: Vec<_> = (starts.iter().rev())
        .map(|start| {
            let range = start[end]..end;
            end = range.start;
            range
        })
        .collect();
    parts.reverse();
    (best[n].expect("there is a cut: no more parts than items"), parts)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Init, ParamSpec};

    fn layers(sizes: &[usize]) -> Vec<LayerSpec> {
        let layer = |(i, &size): (usize, &usize)| LayerSpec {
            name: format!("model.layers.{i}"),
            params: vec![ParamSpec::new(&format!("model.layers.{i}"), "w", &[size], Init::Zeros)],
        };
        sizes.iter().enumerate().map(layer).collect()
    }

    fn parts(sizes: &[usize], cut: StageCut, num_stages: usize) -> Vec<Range<usize>> {
        let layers = layers(sizes);
        let flops: Vec<u64> = sizes.iter().map(|&size| 100 - size as u64).collect();
        Stages::new(&layers, &flops, &cut, num_stages, 1).unwrap().parts().to_vec()
    }

    #[test]
    fn each_measure_cuts_in_its_own_place() {
        let sizes = [50, 10, 10, 10, 10, 10];
        assert_eq!(parts(&sizes, StageCut::Parameters, 2), [0..1, 1..6]);
        assert_eq!(parts(&sizes, StageCut::Time, 2), [0..3, 3..6]);
        assert_eq!(parts(&sizes, StageCut::Uniform, 3), [0..2, 2..4, 4..6]);
        let pattern = StageCut::Pattern(NamePattern::new("*.1"));
        assert_eq!(parts(&sizes, pattern, 1).len(), 1);
        let most = StageCut::Pattern(NamePattern::new("model.layers.*"));
        assert_eq!(parts(&sizes, most, 6).len(), 6);
    }

    #[test]
    fn what_cannot_be_cut_is_refused() {
        let layers = layers(&[1, 1]);
        let error = Stages::new(&layers, &[1, 1], &StageCut::Uniform, 2, 2).unwrap_err().to_string();
        assert_eq!(error, "`2` layers cannot be cut into `4` parts, expected 1 to 2");
        let pattern: StageCut = "pattern:*.1".parse().unwrap();
        let error = Stages::new(&layers, &[1, 1], &pattern, 2, 1).unwrap_err().to_string();
        assert_eq!(error, "`*.1` fits `1` layers, expected at least one for each of `2` parts");
        for text in ["parameters", "time", "uniform", "pattern:*.1"] {
            assert_eq!(text.parse::<StageCut>().unwrap().to_string(), text);
        }
        assert!("best".parse::<StageCut>().is_err());
    }

    #[test]
    fn chunks_take_turns_and_tied_parameters_are_found() {
        let mut layers = layers(&[1; 8]);
        let tied = layers[0].params[0].clone();
        layers[7].params.push(tied);
        let stages = Stages::new(&layers, &[1; 8], &StageCut::Uniform, 2, 2).unwrap();
        assert_eq!((stages.layers(0, 1), stages.layers(1, 0)), (4..6, 2..4));
        assert_eq!(stages.layers_of(0).collect::<Vec<_>>(), [0, 1, 4, 5]);
        let name = "model.layers.0.w".to_owned();
        assert_eq!(stages.shared_params(&layers), [SharedParam { name, stages: vec![0, 1] }]);
        let one = Stages::new(&layers, &[1; 8], &StageCut::Uniform, 1, 2).unwrap();
        assert_eq!(one.shared_params(&layers), []);
    }

    /// The heaviest part and the sum of squares of every way to cut.
    fn all_cuts(weights: &[u64], num_parts: usize) -> Vec<(u64, u64)> {
        let with_head = |first: usize| {
            let head: u64 = weights[..first].iter().sum();
            let rest = match num_parts {
                1 => vec![(0, 0)],
                _ => all_cuts(&weights[first..], num_parts - 1),
            };
            rest.into_iter().map(move |(heaviest, squares)| (head.max(heaviest), head * head + squares))
        };
        let firsts =
            if num_parts == 1 { weights.len()..=weights.len() } else { 1..=weights.len() + 1 - num_parts };
        firsts.flat_map(with_head).collect()
    }

    proptest! {
        #[test]
        fn the_heaviest_part_is_as_light_as_can_be(
            weights in prop::collection::vec(0u64..20, 1..10),
            num_parts in 1usize..6,
        ) {
            prop_assume!(num_parts <= weights.len());
            let parts = balanced(&weights, num_parts).unwrap();
            prop_assert_eq!(parts.len(), num_parts);
            prop_assert_eq!((parts[0].start, parts[num_parts - 1].end), (0, weights.len()));
            prop_assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start));
            prop_assert!(parts.iter().all(|part| !part.is_empty()));
            let sums = || parts.iter().map(|part| weights[part.clone()].iter().sum::<u64>());
            let found = (sums().max().unwrap(), sums().map(|sum| sum * sum).sum::<u64>());
            prop_assert_eq!(Some(found), all_cuts(&weights, num_parts).into_iter().min());
        }
    }
}
