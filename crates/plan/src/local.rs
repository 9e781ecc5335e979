//! Where the elements of a cut parameter are in the whole one.
//!
//! A tensor rank has a parameter under the same name with a smaller shape ([`ParamSpec::local`]), and everything about state (units,
//! shards, fragments) counts in elements of that. Files and births count in elements of the whole. In between:
//!
//! ```text
//! whole [2, 6], cut along the last dimension inside of each of 2 blocks, 3 ranks, rank 1
//!
//!   . a . | . b .        local:  a b        block 0: offset [0, 1], shape [2, 1], at [0, 0] of the local [2, 2]
//!   . c . | . d .                c d        block 1: offset [0, 4], shape [2, 1], at [0, 1]
//! ```
//! A [`LocalBlock`] is a box of both. Both flatten row by row, so the elements of a block that lie in a range of the flat local
//! parameter are neighbours in the flat block ([`LocalBlock::within`]), though not in the local parameter ([`LocalBlock::runs`]).

use std::ops::Range;

use crate::ParamSpec;
use crate::tensor::SplitError;

/// A box of a whole parameter, and where it is in the parameter as one tensor rank has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalBlock {
    /// First index of each dimension in the whole parameter.
    pub offset: Vec<usize>,
    /// Length of each dimension.
    pub shape: Vec<usize>,
    /// First index of each dimension in the local parameter.
    pub local_offset: Vec<usize>,
    /// Shape of the local parameter.
    pub local_shape: Vec<usize>,
}

impl LocalBlock {
    /// Elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Which elements of the flat block lie in `local_range` of the flat local parameter.
    pub fn within(&self, local_range: Range<usize>) -> Range<usize> {
        self.num_before(local_range.start)..self.num_before(local_range.end)
    }

    /// The same elements as runs that are contiguous in both: the first in the local parameter, the first in the block, and how
    /// many. In ascending order of both.
    pub fn runs(&self, local_range: Range<usize>) -> impl Iterator<Item = (usize, usize, usize)> {
        let row_numel = self.row_numel();
        let Range { start: mut at, end } = self.within(local_range);
        std::iter::from_fn(move || {
            (at < end).then(|| {
                let len = (row_numel - at % row_numel).min(end - at);
                let run = (self.local_index(at), at, len);
                at += len;
                run
            })
        })
    }

    /// How many elements of the block come before element `at` of the flat local parameter, which may be its end.
    fn num_before(&self, at: usize) -> usize {
        let local_numel: usize = self.local_shape.iter().product();
        if at >= local_numel {
            return self.numel();
        }
        let (mut rest, mut local_stride, mut stride, mut before) = (at, local_numel, self.numel(), 0);
        for dim in 0..self.shape.len() {
            // No dimension of the local parameter is empty, as it has an element `at`; one of the block may be.
            local_stride /= self.local_shape[dim];
            stride = stride.checked_div(self.shape[dim]).unwrap_or(0);
            let index = rest / local_stride;
            rest %= local_stride;
            let Some(inside) = index.checked_sub(self.local_offset[dim]) else { return before };
            before += inside.min(self.shape[dim]) * stride;
            if inside >= self.shape[dim] {
                return before;
            }
        }
        before
    }

    /// Where element `at` of the flat block is in the flat local parameter.
    fn local_index(&self, mut at: usize) -> usize {
        let (mut index, mut stride) = (0, 1);
        for dim in (0..self.shape.len()).rev() {
            index += (self.local_offset[dim] + at % self.shape[dim]) * stride;
            at /= self.shape[dim];
            stride *= self.local_shape[dim];
        }
        index
    }

    /// Elements of the block that are neighbours in the local parameter too: dimensions that it has whole, and the next.
    fn row_numel(&self) -> usize {
        let mut numel = 1;
        for dim in (0..self.shape.len()).rev() {
            numel *= self.shape[dim];
            if self.shape[dim] != self.local_shape[dim] {
                break;
            }
        }
        numel
    }
}

impl ParamSpec {
    /// Which boxes of this whole parameter `rank` of `degree` tensor-parallel ranks has, and where: one, or one for each block
    /// that is cut by itself. The box is empty on a rank without tokens.
    ///
    /// # Errors
    /// [`SplitError`]
    pub fn local_blocks(&self, degree: usize, rank: usize) -> Result<Vec<LocalBlock>, SplitError> {
        let whole = LocalBlock {
            offset: vec![0; self.shape.len()],
            shape: self.shape.clone(),
            local_offset: vec![0; self.shape.len()],
            local_shape: self.shape.clone(),
        };
        let (Some(ranges), Some(split)) = (self.joined_ranges(degree, rank)?, self.split) else {
            return Ok(vec![whole]);
        };
        let dim = split.dim;
        let local_size = ranges.iter().map(|range| range.len()).sum();
        let mut local_start = 0;
        let block = |range: Range<usize>| {
            let mut block = whole.clone();
            (block.offset[dim], block.shape[dim]) = (range.start, range.len());
            (block.local_offset[dim], block.local_shape[dim]) = (local_start, local_size);
            local_start += range.len();
            block
        };
        Ok(ranges.into_iter().map(block).collect())
    }

    /// The elements `local_range` of this parameter as `rank` of `degree` tensor-parallel ranks has it, flat: where they are in the
    /// whole one, flat, in runs as long as can be, each beside its place in the local one. In ascending order of both.
    ///
    /// # Errors
    /// [`SplitError`]
    pub fn whole_runs(
        &self,
        degree: usize,
        rank: usize,
        local_range: Range<usize>,
    ) -> Result<impl Iterator<Item = (Range<usize>, Range<usize>)> + use<>, SplitError> {
        // Seen as rows of blocks: what is before the dimension that is cut, the dimension, and what is after it in one number.
        let (ranges, size): (Vec<_>, usize) = match (self.joined_ranges(degree, rank)?, self.split) {
            (Some(ranges), Some(split)) => {
                let inner: usize = self.shape[split.dim + 1..].iter().product();
                let flat = |range: Range<usize>| range.start * inner..range.end * inner;
                (ranges.into_iter().map(flat).collect(), self.shape[split.dim] * inner)
            }
            _ => (std::iter::once(0..self.numel()).collect(), self.numel()),
        };
        let local_size: usize = ranges.iter().map(|range| range.len()).sum();
        let Range { start: mut at, end } = local_range;
        Ok(std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let (row, mut in_row) = (at / local_size, at % local_size);
            let range = ranges.iter().find(|range| {
                let is_here = in_row < range.len();
                in_row -= if is_here { 0 } else { range.len() };
                is_here
            });
            let range = range.expect("ranges add up to a row");
            let len = (range.len() - in_row).min(end - at);
            let start = row * size + range.start + in_row;
            let run = (start..start + len, at..at + len);
            at += len;
            Some(run)
        }))
    }

    /// Whether an earlier tensor-parallel rank has all that `rank` of `degree` has of the parameter. That one speaks for it: norms
    /// over all ranks count each element once, and files hold it once.
    pub fn is_spoken_for(&self, degree: usize, rank: usize) -> bool {
        self.split.map_or(rank > 0, |split| !rank.is_multiple_of(split.num_sharers(degree)))
    }

    /// [`ParamSpec::split_ranges`] with neighbours as one, as blocks that are not cut are no blocks; `None` if that is the whole
    /// parameter.
    fn joined_ranges(&self, degree: usize, rank: usize) -> Result<Option<Vec<Range<usize>>>, SplitError> {
        let (Some(ranges), Some(split)) = (self.split_ranges(degree, rank)?, self.split) else {
            return Ok(None);
        };
        let mut joined: Vec<Range<usize>> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match joined.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => joined.push(range),
            }
        }
        let is_whole = joined.len() == 1 && joined[0].len() == self.shape[split.dim];
        Ok((!is_whole).then_some(joined))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Init, SplitUnits, TensorSplit};

    fn param(shape: &[usize], split: Option<TensorSplit>) -> ParamSpec {
        ParamSpec { split, ..ParamSpec::new("l", "w", shape, Init::Zeros) }
    }

    /// The whole index of each local element, one by one.
    fn whole_indices(param: &ParamSpec, degree: usize, rank: usize) -> Vec<usize> {
        let (dim, kept) = match (param.split_ranges(degree, rank).unwrap(), param.split) {
            (Some(ranges), Some(split)) => (split.dim, ranges),
            _ => return (0..param.numel()).collect(),
        };
        let inner: usize = param.shape[dim + 1..].iter().product();
        let index = |flat: &usize| flat / inner % param.shape[dim];
        (0..param.numel()).filter(|flat| kept.iter().any(|range| range.contains(&index(flat)))).collect()
    }

    fn runs(param: &ParamSpec, degree: usize, rank: usize, range: Range<usize>) -> Vec<[usize; 3]> {
        let runs = param.whole_runs(degree, rank, range).unwrap();
        runs.map(|(whole, local)| {
            assert_eq!(whole.len(), local.len());
            [whole.start, local.start, whole.len()]
        })
        .collect()
    }

    #[test]
    fn fused_matrices_are_cut_in_each_block() {
        let fused = TensorSplit::of(1, SplitUnits::Features).blocks(2);
        let matrix = param(&[2, 6], Some(fused));
        let blocks = matrix.local_blocks(3, 1).unwrap();
        let corners: Vec<_> = blocks.iter().map(|b| (b.offset.clone(), b.local_offset.clone())).collect();
        assert_eq!(corners, [(vec![0, 1], vec![0, 0]), (vec![0, 4], vec![0, 1])]);
        assert!(blocks.iter().all(|b| b.shape == [2, 1] && b.local_shape == [2, 2]));
        assert_eq!(runs(&matrix, 3, 1, 1..4), [[4, 1, 1], [7, 2, 1], [10, 3, 1]]);
        assert_eq!(blocks[1].within(1..4), 0..2);
        assert_eq!(blocks[1].runs(1..4).collect::<Vec<_>>(), [(1, 0, 1), (3, 1, 1)]);
    }

    #[test]
    fn what_is_contiguous_is_one_run_and_one_block() {
        let fused = TensorSplit::of(1, SplitUnits::Heads(2)).blocks(3);
        for (split, degree, rank, start) in [
            (None, 4, 3, 0),
            (Some(TensorSplit::OUT_IN_COLUMN), 2, 1, 72),
            (Some(TensorSplit::of(0, SplitUnits::SharedHeads(2))), 4, 3, 72),
            (Some(fused), 1, 0, 0),
        ] {
            let param = param(&[12, 12], split);
            let numel = param.local(degree, rank).unwrap().numel();
            assert_eq!(runs(&param, degree, rank, 0..numel), [[start, 0, numel]], "{split:?}");
            let blocks = param.local_blocks(degree, rank).unwrap();
            assert_eq!((blocks.len(), blocks[0].runs(0..numel).count()), (1, 1), "{split:?}");
        }
    }

    #[test]
    fn a_rank_without_tokens_has_an_empty_block() {
        let table = param(&[5, 3], Some(TensorSplit::VOCABULARY));
        let blocks = table.local_blocks(4, 3).unwrap();
        assert_eq!((blocks.len(), blocks[0].numel(), blocks[0].within(0..0)), (1, 0, 0..0));
        assert_eq!((blocks[0].runs(0..0).count(), runs(&table, 4, 3, 0..0)), (0, vec![]));
        assert_eq!(runs(&table, 4, 2, 0..3), [[12, 0, 3]]);
    }

    #[test]
    fn degrees_that_do_not_divide_are_refused() {
        let row = param(&[4, 6], Some(TensorSplit::OUT_IN_ROW));
        assert!(row.local_blocks(4, 0).is_err() && row.whole_runs(4, 0, 0..1).is_err());
    }

    #[test]
    fn the_first_rank_that_has_an_element_speaks_for_it() {
        let silent = |split, degree| -> Vec<usize> {
            let param = param(&[12, 12], split);
            (0..degree).filter(|&rank| param.is_spoken_for(degree, rank)).collect()
        };
        assert_eq!(silent(None, 3), [1, 2]);
        assert_eq!(silent(None, 1), [0; 0]);
        assert_eq!(silent(Some(TensorSplit::OUT_IN_ROW), 4), [0; 0]);
        let shared = Some(TensorSplit::of(0, SplitUnits::SharedHeads(2)));
        assert_eq!((silent(shared, 4), silent(shared, 2)), (vec![1, 3], vec![]));
    }

    /// Any parameter, and a degree that cuts it.
    fn case() -> impl Strategy<Value = (ParamSpec, usize)> {
        let dims = prop::collection::vec(1usize..5, 0..3);
        (dims, any::<prop::sample::Index>(), 1usize..7, 1usize..4, 1usize..4, 0usize..5).prop_map(
            |(mut shape, dim, degree, per_rank, num_blocks, kind)| {
                if kind == 4 {
                    return (param(&shape, None), degree);
                }
                let dim = dim.index(shape.len() + 1);
                let heads = degree * per_rank;
                let (block, units) = match kind {
                    0 => (heads, SplitUnits::Features),
                    1 => (heads * 2, SplitUnits::Heads(heads)),
                    // Ranks share heads where there are more of them.
                    2 if degree % 2 == 0 => (degree, SplitUnits::SharedHeads(degree / 2)),
                    2 => (2, SplitUnits::SharedHeads(1)),
                    _ => (degree + per_rank, SplitUnits::Tokens),
                };
                shape.insert(dim, block * num_blocks);
                (param(&shape, Some(TensorSplit::of(dim, units).blocks(num_blocks))), degree)
            },
        )
    }

    proptest! {
        #[test]
        fn every_local_element_is_told_once_and_where_it_is(
            (param, degree) in case(),
            a in any::<prop::sample::Index>(),
            b in any::<prop::sample::Index>(),
        ) {
            let mut seen = vec![0; param.numel()];
            let mut spoken = vec![0; param.numel()];
            for rank in 0..degree {
                let expected = whole_indices(&param, degree, rank);
                prop_assert_eq!(expected.len(), param.local(degree, rank).unwrap().numel());
                let blocks = param.local_blocks(degree, rank).unwrap();
                let (a, b) = (a.index(expected.len() + 1), b.index(expected.len() + 1));
                for range in [0..expected.len(), a.min(b)..a.max(b)] {
                    let runs = runs(&param, degree, rank, range.clone());
                    let told: Vec<_> = runs.iter().flat_map(|[whole, _, len]| *whole..whole + len).collect();
                    prop_assert_eq!(&told, &expected[range.clone()]);
                    let local: Vec<_> = runs.iter().flat_map(|[_, local, len]| *local..local + len).collect();
                    prop_assert_eq!(local, range.clone().collect::<Vec<_>>());
                    for pair in runs.windows(2) {
                        prop_assert!(pair[0][0] + pair[0][2] < pair[1][0], "{:?} could be one", pair);
                    }
                    let mut by_block = vec![None; expected.len()];
                    for block in &blocks {
                        let (mut next, mut last) = (block.within(range.clone()).start, None);
                        for (local, in_block, len) in block.runs(range.clone()) {
                            prop_assert_eq!(in_block, next);
                            prop_assert!(len > 0 && last.is_none_or(|last| last < local));
                            (next, last) = (in_block + len, Some(local + len));
                            for i in 0..len {
                                let whole = whole_index(block, &param.shape, in_block + i);
                                prop_assert!(by_block[local + i].replace(whole).is_none(), "told twice");
                            }
                        }
                        prop_assert_eq!(next, block.within(range.clone()).end);
                    }
                    for (local, whole) in by_block.into_iter().enumerate() {
                        prop_assert_eq!(whole, range.contains(&local).then(|| expected[local]));
                    }
                }
                for i in expected {
                    seen[i] += 1;
                    spoken[i] += usize::from(!param.is_spoken_for(degree, rank));
                }
            }
            let copies = param.split.map_or(degree, |split| split.num_sharers(degree));
            prop_assert!(seen.iter().all(|&count| count == copies), "{:?}", seen);
            prop_assert!(spoken.iter().all(|&count| count == 1), "{:?}", spoken);
        }
    }

    /// Where element `at` of the flat block is in the flat whole parameter, by its indices.
    fn whole_index(block: &LocalBlock, shape: &[usize], mut at: usize) -> usize {
        let (mut index, mut stride) = (0, 1);
        for dim in (0..shape.len()).rev() {
            index += (block.offset[dim] + at % block.shape[dim]) * stride;
            at /= block.shape[dim];
            stride *= shape[dim];
        }
        index
    }
}
