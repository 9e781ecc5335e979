//! How a parameter is cut over the ranks of a tensor group.
//!
//! A linear layer is cut by its output features (*column*: each rank computes some of the outputs from the whole input) or by its
//! input features (*row*: each rank has some of the inputs, and the partial outputs are summed). A block pairs them, so that only
//! the end of a pair communicates:
//!
//! ```text
//! x ─► q k v, gate up, c_fc ─► heads, activation ─► o_proj, down_proj, c_proj ─► sum over the group
//!      column: by heads or features, on the rank alone      row: by heads or features
//! ```
//!
//! | parameter | cut |
//! |---|---|
//! | embedding, head `[vocab, d]` | by tokens, the last ranks may have fewer |
//! | q, k, v `[heads * head_dim, d]`, their biases | by heads; where there are more ranks than key and value heads, ranks share a head |
//! | `c_attn` `[d, 3 d]`, its bias | the same, in each of its three blocks q, k, v |
//! | gate, up, `c_fc` and biases | by output features |
//! | `o_proj`, `down_proj`, both `c_proj` | by input features; their biases are whole, and added once, after the sum |
//! | norms, positions | whole on every rank |
//!
//! The gradient of what is whole on every rank is the same on every rank, as the input's is, unless the ranks split the sequence
//! between linear layers: then each has the gradient of its tokens, and the group sums them. The gradient of a shared head is the
//! sum over the ranks that share it ([`TensorSplit::num_sharers`]). Norms over all ranks count each once.

use std::ops::Range;

use serde::Serialize;

use crate::param::{LayerSpec, ParamSpec};

/// How one parameter is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct TensorSplit {
    /// The dimension of its shape that is cut.
    pub dim: usize,
    /// Equal blocks one after the other along the dimension, each cut by itself: 3 where q, k and v are one matrix.
    pub num_blocks: usize,
    /// What a block consists of and is cut between.
    pub units: SplitUnits,
}

/// What stays together when a block is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "of", content = "count")]
pub enum SplitUnits {
    /// Features: the degree has to divide their number.
    Features,
    /// So many heads: the degree has to divide their number.
    Heads(usize),
    /// So many key and value heads: the degree divides their number, or their number the degree, and then ranks share a head.
    SharedHeads(usize),
    /// Tokens of the vocabulary: any degree. Each rank has as many, but the last ones, which have what is left.
    Tokens,
}

/// Why a degree does not cut a parameter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{} of `{param}` cannot be cut over `{degree}` tensor-parallel ranks, expected one of {}", counted(.units, *.count), listed(.degrees))]
pub struct SplitError {
    /// The parameter.
    pub param: String,
    /// What it is made of.
    pub units: SplitUnits,
    /// How much of that.
    pub count: usize,
    /// Ranks asked for.
    pub degree: usize,
    /// Degrees that would do, in order.
    pub degrees: Vec<usize>,
}

fn counted(units: &SplitUnits, count: usize) -> String {
    let name = match units {
        SplitUnits::Features => "features",
        SplitUnits::Heads(_) => "heads",
        SplitUnits::SharedHeads(_) => "key and value heads",
        SplitUnits::Tokens => "tokens",
    };
    format!("the `{count}` {name}")
}

fn listed(degrees: &[usize]) -> String {
    degrees.iter().map(|degree| format!("`{degree}`")).collect::<Vec<_>>().join(", ")
}

impl TensorSplit {
    /// By output features of a `[out, in]` matrix or of a bias.
    pub const OUT_IN_COLUMN: TensorSplit = TensorSplit::of(0, SplitUnits::Features);
    /// By input features of an `[out, in]` matrix.
    pub const OUT_IN_ROW: TensorSplit = TensorSplit::of(1, SplitUnits::Features);
    /// By tokens of a `[vocab, d]` table.
    pub const VOCABULARY: TensorSplit = TensorSplit::of(0, SplitUnits::Tokens);

    /// Cuts `dim` between `units`.
    pub const fn of(dim: usize, units: SplitUnits) -> Self {
        TensorSplit { dim, num_blocks: 1, units }
    }

    /// The same in each of `num_blocks` blocks.
    pub const fn blocks(self, num_blocks: usize) -> Self {
        TensorSplit { num_blocks, ..self }
    }

    /// Ranks that hold the same elements: more than one where ranks share a key and value head.
    pub fn num_sharers(&self, degree: usize) -> usize {
        match self.units {
            SplitUnits::SharedHeads(heads) if degree > heads => degree / heads,
            _ => 1,
        }
    }

    /// Whether `size` elements along the dimension can be cut over `degree` ranks.
    fn allows(&self, size: usize, degree: usize) -> bool {
        let block = size / self.num_blocks;
        degree > 0
            && match self.units {
                SplitUnits::Features => block.is_multiple_of(degree),
                SplitUnits::Heads(heads) => heads.is_multiple_of(degree),
                SplitUnits::SharedHeads(heads) => {
                    heads.is_multiple_of(degree) || degree.is_multiple_of(heads)
                }
                SplitUnits::Tokens => degree <= block,
            }
    }

    /// The elements along the dimension that `rank` of `degree` has, one range for each block.
    fn ranges(&self, size: usize, degree: usize, rank: usize) -> Vec<Range<usize>> {
        let block = size / self.num_blocks;
        let range = match self.units {
            SplitUnits::Tokens => {
                let most = block.div_ceil(degree);
                (rank * most).min(block)..((rank + 1) * most).min(block)
            }
            SplitUnits::SharedHeads(heads) if degree > heads => {
                let (width, head) = (block / heads, rank / (degree / heads));
                head * width..(head + 1) * width
            }
            _ => rank * (block / degree)..(rank + 1) * (block / degree),
        };
        (0..self.num_blocks).map(|i| i * block + range.start..i * block + range.end).collect()
    }
}

impl ParamSpec {
    /// The same parameter, cut over tensor-parallel ranks in this way.
    pub fn split(self, split: TensorSplit) -> Self {
        ParamSpec { split: Some(split), ..self }
    }

    /// Whether the parameter can be cut over `degree` tensor-parallel ranks.
    ///
    /// # Errors
    /// [`SplitError`] with the degrees that would do, up to twice the one asked for.
    pub fn check_split(&self, degree: usize) -> Result<(), SplitError> {
        let Some(split) = self.split else { return Ok(()) };
        let size = self.shape[split.dim];
        if split.allows(size, degree) {
            return Ok(());
        }
        let count = match split.units {
            SplitUnits::Features | SplitUnits::Tokens => size / split.num_blocks,
            SplitUnits::Heads(heads) | SplitUnits::SharedHeads(heads) => heads,
        };
        // Nobody has use for a long list.
        let degrees =
            (1..=count.min(2 * degree.max(1))).filter(|&degree| split.allows(size, degree)).collect();
        Err(SplitError { param: self.name.clone(), units: split.units, count, degree, degrees })
    }

    /// What `rank` of `degree` has of the dimension that is cut, one range for each block; `None` if it has the whole parameter.
    ///
    /// # Errors
    /// [`SplitError`]
    pub fn split_ranges(&self, degree: usize, rank: usize) -> Result<Option<Vec<Range<usize>>>, SplitError> {
        self.check_split(degree)?;
        Ok(self.split.map(|split| split.ranges(self.shape[split.dim], degree, rank)))
    }

    /// The parameter as `rank` of `degree` has it: the same name, a smaller shape.
    ///
    /// # Errors
    /// [`SplitError`]
    pub fn local(&self, degree: usize, rank: usize) -> Result<ParamSpec, SplitError> {
        let mut local = self.clone();
        if let (Some(ranges), Some(split)) = (self.split_ranges(degree, rank)?, self.split) {
            local.shape[split.dim] = ranges.iter().map(|range| range.len()).sum();
        }
        Ok(local)
    }
}

impl LayerSpec {
    /// The layer as `rank` of `degree` tensor-parallel ranks has it.
    ///
    /// # Errors
    /// [`SplitError`] of the first parameter that cannot be cut.
    pub fn local(&self, degree: usize, rank: usize) -> Result<LayerSpec, SplitError> {
        let params = self.params.iter().map(|param| param.local(degree, rank)).collect::<Result<_, _>>()?;
        Ok(LayerSpec { name: self.name.clone(), params })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Init;

    fn param(shape: &[usize], split: TensorSplit) -> ParamSpec {
        ParamSpec::new("l", "w", shape, Init::Zeros).split(split)
    }

    #[test]
    fn cuts_columns_rows_heads_and_tokens() {
        let local = |shape: &[usize], split, degree, rank| {
            let param = param(shape, split);
            let ranges = param.split_ranges(degree, rank).unwrap().unwrap();
            let ends: Vec<_> = ranges.iter().map(|range| (range.start, range.end)).collect();
            (param.local(degree, rank).unwrap().shape, ends)
        };
        assert_eq!(local(&[8, 6], TensorSplit::OUT_IN_COLUMN, 2, 1), (vec![4, 6], vec![(4, 8)]));
        assert_eq!(local(&[8, 6], TensorSplit::OUT_IN_ROW, 3, 1), (vec![8, 2], vec![(2, 4)]));
        let fused = TensorSplit::of(1, SplitUnits::Heads(2)).blocks(3);
        assert_eq!(local(&[4, 12], fused, 2, 1), (vec![4, 6], vec![(2, 4), (6, 8), (10, 12)]));
        // 4 ranks, 2 heads of width 3: two ranks have the same.
        let shared = TensorSplit::of(0, SplitUnits::SharedHeads(2));
        assert_eq!(local(&[6, 5], shared, 4, 1), (vec![3, 5], vec![(0, 3)]));
        assert_eq!(local(&[6, 5], shared, 4, 2), (vec![3, 5], vec![(3, 6)]));
        assert_eq!((shared.num_sharers(4), shared.num_sharers(2)), (2, 1));
        assert_eq!(local(&[10, 2], TensorSplit::VOCABULARY, 4, 3), (vec![1, 2], vec![(9, 10)]));
        let whole = ParamSpec::new("l", "norm", &[5], Init::Ones);
        assert_eq!((whole.split_ranges(4, 1), whole.local(4, 1)), (Ok(None), Ok(whole)));
    }

    #[test]
    fn degrees_that_do_not_divide_are_refused_with_those_that_would() {
        let refused = |split, degree| param(&[12, 12], split).check_split(degree).unwrap_err().to_string();
        assert_eq!(
            refused(TensorSplit::of(0, SplitUnits::Heads(6)), 4),
            "the `6` heads of `l.w` cannot be cut over `4` tensor-parallel ranks, expected one of `1`, `2`, `3`, `6`"
        );
        assert!(
            refused(TensorSplit::of(0, SplitUnits::SharedHeads(2)), 3).ends_with("expected one of `1`, `2`")
        );
        assert!(
            refused(TensorSplit::OUT_IN_ROW, 0)
                .starts_with("the `12` features of `l.w` cannot be cut over `0`")
        );
        assert!(refused(TensorSplit::VOCABULARY, 13).contains("the `12` tokens"));
    }

    proptest! {
        #[test]
        fn ranks_have_every_element(
            degree in 1usize..9,
            per_rank in 1usize..5,
            num_blocks in 1usize..4,
            kind in 0usize..4,
        ) {
            let heads = degree * per_rank;
            let (block, units) = match kind {
                0 => (heads, SplitUnits::Features),
                1 => (heads * 2, SplitUnits::Heads(heads)),
                2 => (per_rank * 2, SplitUnits::SharedHeads(per_rank)),
                _ => (degree + per_rank, SplitUnits::Tokens),
            };
            let spec = param(&[block * num_blocks], TensorSplit::of(0, units).blocks(num_blocks));
            prop_assume!(spec.check_split(degree).is_ok());
            let mut seen = vec![0; block * num_blocks];
            for rank in 0..degree {
                let ranges = spec.split_ranges(degree, rank).unwrap().unwrap();
                prop_assert_eq!(ranges.iter().map(|r| r.len()).sum::<usize>(), spec.local(degree, rank).unwrap().numel());
                for i in ranges.into_iter().flatten() { seen[i] += 1; }
            }
            let sharers = TensorSplit::of(0, units).num_sharers(degree);
            prop_assert!(seen.iter().all(|&count| count == sharers), "{seen:?}");
        }
    }
}
