//! Which elements of a tensor a rank holds, and which of them another rank wants.
//!
//! A [`Block`] is a box of the tensor (tensor parallelism cuts along a dimension). A [`Region`] is a range of the
//! box's elements in row-major order (ZeRO cuts the flat box, anywhere). Any rank of any mesh holds regions, so
//! loading one layout into another is the overlap of two regions:
//!
//! ```text
//!   tensor [3, 8]        stored: block [0..3, 0..4],      wanted: block [1..3, 2..8],     overlap, as runs
//!   . . . . . . . .      flat range 2..10                 flat range 0..9
//!   . . . . . . . .      . . s s|. . . .                  . . . . . . . .                 . . . . . . . .
//!   . . . . . . . .      s s s s|. . . .                  . .|w w w w w w                 . . x x . . . .
//!                        s s . .|. . . .                  . .|w w w . . .                 . . . . . . . .
//! ```
//!
//! A run is contiguous in both. Rows of the common box come in the order of both, so the first and the last row
//! that matter are found by bisection, and reading moves forward through the file.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// A box of a tensor: where it begins in each dimension, and how long it is there.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Block {
    /// First index of each dimension.
    pub offset: Vec<usize>,
    /// Length of each dimension.
    pub shape: Vec<usize>,
}

impl Block {
    /// All of a tensor.
    pub fn whole(shape: &[usize]) -> Self {
        Block { offset: vec![0; shape.len()], shape: shape.to_vec() }
    }

    /// The indices `range` of dimension `dim`, and all of the others.
    pub fn slice(shape: &[usize], dim: usize, range: Range<usize>) -> Self {
        let mut block = Block::whole(shape);
        block.offset[dim] = range.start;
        block.shape[dim] = range.len();
        block
    }

    /// How many elements it has; `None` if that overflows.
    pub fn numel(&self) -> Option<usize> {
        numel(&self.shape)
    }

    /// Whether it is a box of a tensor of this shape.
    pub fn is_within(&self, shape: &[usize]) -> bool {
        let dims = self.offset.iter().zip(&self.shape).zip(shape);
        self.offset.len() == shape.len()
            && self.shape.len() == shape.len()
            && dims.fold(true, |fits, ((&offset, &len), &size)| {
                fits && offset.checked_add(len).is_some_and(|end| end <= size)
            })
    }

    /// Whether it is all of a tensor of this shape.
    pub fn is_whole(&self, shape: &[usize]) -> bool {
        self.shape == shape && self.offset.iter().all(|&offset| offset == 0)
    }

    /// The common box of two boxes of one tensor.
    pub(crate) fn intersection(&self, other: &Block) -> Option<Block> {
        let mut common = Block { offset: Vec::new(), shape: Vec::new() };
        for dim in 0..self.offset.len() {
            let begin = self.offset[dim].max(other.offset[dim]);
            let end = (self.offset[dim] + self.shape[dim]).min(other.offset[dim] + other.shape[dim]);
            if begin >= end {
                return None;
            }
            common.offset.push(begin);
            common.shape.push(end - begin);
        }
        Some(common)
    }
}

/// A range of a block's elements, counted in row-major order.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Region {
    /// The box.
    pub block: Block,
    /// Elements of the flattened box.
    pub range: Range<usize>,
}

impl Region {
    /// All of a tensor.
    ///
    /// # Panics
    /// If the tensor has more elements than can be counted.
    pub fn whole(shape: &[usize]) -> Self {
        Region::block(Block::whole(shape))
    }

    /// The elements `range` of a flattened tensor: what a ZeRO shard holds of it.
    pub fn flat(shape: &[usize], range: Range<usize>) -> Self {
        Region { block: Block::whole(shape), range }
    }

    /// All of a box.
    ///
    /// # Panics
    /// If the box has more elements than can be counted.
    pub fn block(block: Block) -> Self {
        let numel = block.numel().expect("a tensor in memory has a countable number of elements");
        Region { block, range: 0..numel }
    }

    /// How many elements it has.
    pub fn numel(&self) -> usize {
        self.range.len()
    }

    /// Whether it lies inside of a tensor of this shape.
    pub fn is_within(&self, shape: &[usize]) -> bool {
        self.block.is_within(shape)
            && self.range.start <= self.range.end
            && self.block.numel().is_some_and(|numel| self.range.end <= numel)
    }
}

/// Elements that two regions share, contiguous in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// Where they are in the stored region, from its first element.
    pub stored: usize,
    /// Where they are in the wanted region, from its first element.
    pub wanted: usize,
    pub numel: usize,
}

/// What two regions of one tensor share, in ascending order of both. Both must lie inside of the tensor.
pub(crate) fn overlap<'a>(stored: &'a Region, wanted: &'a Region) -> impl Iterator<Item = Run> + 'a {
    let rows = Rows::new(&stored.block, &wanted.block);
    let range = rows.as_ref().map_or(0..0, |rows| rows.that_matter(&stored.range, &wanted.range));
    range.filter_map(move |row| {
        let rows = rows.as_ref()?;
        let (s, w) = rows.starts(row);
        // Both starts are below the ranges' ends here, or the row would not matter.
        let skip = stored.range.start.saturating_sub(s).max(wanted.range.start.saturating_sub(w));
        let end = rows.len.min(stored.range.end - s).min(wanted.range.end - w);
        (skip < end).then(|| Run {
            stored: s + skip - stored.range.start,
            wanted: w + skip - wanted.range.start,
            numel: end - skip,
        })
    })
}

/// The rows of the common box of two boxes: as long as they are contiguous in both.
struct Rows {
    /// Dimensions that are walked, outermost first: how long the common box is, and how far apart neighbours are in
    /// the flattened boxes.
    outer: Vec<(usize, usize, usize)>,
    count: usize,
    len: usize,
    /// Where the first row is in each flattened box.
    first: (usize, usize),
}

impl Rows {
    fn new(stored: &Block, wanted: &Block) -> Option<Rows> {
        let common = stored.intersection(wanted)?;
        let num_dims = common.shape.len();
        let (mut first, mut strides) = ((0, 0), (1, 1));
        let (mut outer, mut len) = (Vec::new(), 1);
        let mut is_contiguous = true;
        for dim in (0..num_dims).rev() {
            first.0 += (common.offset[dim] - stored.offset[dim]) * strides.0;
            first.1 += (common.offset[dim] - wanted.offset[dim]) * strides.1;
            if is_contiguous {
                len *= common.shape[dim];
            } else {
                outer.insert(0, (common.shape[dim], strides.0, strides.1));
            }
            is_contiguous &= common.shape[dim] == stored.shape[dim] && common.shape[dim] == wanted.shape[dim];
            strides.0 *= stored.shape[dim];
            strides.1 *= wanted.shape[dim];
        }
        let count = outer.iter().map(|&(len, ..)| len).product();
        Some(Rows { outer, count, len, first })
    }

    /// Where row `row` begins in each flattened box.
    fn starts(&self, mut row: usize) -> (usize, usize) {
        let (mut stored, mut wanted) = self.first;
        for &(len, stored_stride, wanted_stride) in self.outer.iter().rev() {
            let index = row % len;
            row /= len;
            stored += index * stored_stride;
            wanted += index * wanted_stride;
        }
        (stored, wanted)
    }

    /// The rows that reach into both ranges. Starts grow with the row in both boxes, so both ends are bisected.
    fn that_matter(&self, stored: &Range<usize>, wanted: &Range<usize>) -> Range<usize> {
        let first = self.bisect(|(s, w)| s + self.len <= stored.start || w + self.len <= wanted.start);
        let end = self.bisect(|(s, w)| s < stored.end && w < wanted.end);
        first..end
    }

    /// The first row for which `before` does not hold.
    fn bisect(&self, before: impl Fn((usize, usize)) -> bool) -> usize {
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low + (high - low) / 2;
            if before(self.starts(middle)) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low
    }
}

pub(crate) fn numel(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |numel, &size| numel.checked_mul(size))
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Flat global indices of a region's elements, one by one: the plain form of what [`overlap`] does by runs.
    pub(crate) fn elements(region: &Region, shape: &[usize]) -> Vec<usize> {
        let Block { offset, shape: block } = &region.block;
        region
            .range
            .clone()
            .map(|mut flat| {
                let (mut global, mut stride) = (0, 1);
                for dim in (0..shape.len()).rev() {
                    global += (offset[dim] + flat % block[dim]) * stride;
                    flat /= block[dim];
                    stride *= shape[dim];
                }
                global
            })
            .collect()
    }

    pub(crate) fn shapes() -> impl Strategy<Value = Vec<usize>> {
        prop::collection::vec(1usize..6, 0..4)
    }

    pub(crate) fn region_of(shape: Vec<usize>) -> impl Strategy<Value = Region> {
        let dims: Vec<_> = shape.into_iter().map(|size| (0..=size, 0..=size)).collect();
        (dims, any::<(u16, u16)>()).prop_map(|(ends, (a, b))| {
            let (offset, shape) = ends.into_iter().map(|(a, b)| (a.min(b), a.abs_diff(b))).unzip();
            let block = Block { offset, shape };
            let numel = block.numel().unwrap();
            let (a, b) = (usize::from(a) % (numel + 1), usize::from(b) % (numel + 1));
            Region { block, range: a.min(b)..a.max(b) }
        })
    }

    fn two_regions() -> impl Strategy<Value = (Vec<usize>, Region, Region)> {
        shapes().prop_flat_map(|shape| (Just(shape.clone()), region_of(shape.clone()), region_of(shape)))
    }

    proptest! {
        #[test]
        fn runs_are_the_common_elements((shape, stored, wanted) in two_regions()) {
            prop_assert!(stored.is_within(&shape) && wanted.is_within(&shape));
            let (s, w) = (elements(&stored, &shape), elements(&wanted, &shape));
            let expected: Vec<_> =
                (0..w.len()).filter_map(|i| Some((s.iter().position(|&e| e == w[i])?, i))).collect();
            let runs: Vec<_> = overlap(&stored, &wanted).collect();
            let got: Vec<_> =
                runs.iter().flat_map(|run| (0..run.numel).map(|i| (run.stored + i, run.wanted + i))).collect();
            prop_assert_eq!(got, expected);
        }
    }

    #[test]
    fn neighbouring_rows_are_one_run() {
        let shape = [4, 3, 5];
        let (stored, wanted) = (Region::flat(&shape, 7..50), Region::flat(&shape, 20..60));
        let runs: Vec<_> = overlap(&stored, &wanted).collect();
        assert_eq!(runs, [Run { stored: 13, wanted: 0, numel: 30 }]);
        // Halves of the second dimension: one run for each index of the first.
        let stored = Region::block(Block::slice(&shape, 1, 1..3));
        assert_eq!(overlap(&stored, &Region::whole(&shape)).count(), 4);
    }

    #[test]
    fn boxes_that_leave_the_tensor_are_seen() {
        let block =
            |offset: &[usize], shape: &[usize]| Block { offset: offset.to_vec(), shape: shape.to_vec() };
        assert!(block(&[1, 0], &[1, 3]).is_within(&[2, 3]));
        for bad in [
            block(&[1, 0], &[2, 3]),
            block(&[0], &[2]),
            block(&[0, 0], &[2]),
            block(&[usize::MAX, 0], &[2, 3]),
        ] {
            assert!(!bad.is_within(&[2, 3]), "{bad:?}");
        }
        assert!(!Region::flat(&[2, 3], 0..7).is_within(&[2, 3]));
    }
}
