//! Do the pieces of a tensor make the whole, each element once?
//!
//! Pieces are grouped by their box. The ranges of one box have to tile it, and the boxes have to tile the tensor:
//! no two share an element, and together they have as many as the tensor. So a hole or a doubled element is found by
//! counting, without walking over elements.

use std::collections::HashMap;

use crate::state::problem::CoverProblem;
use crate::state::region::{Block, Region, numel};

/// Boxes of one tensor, at most: they are compared in pairs.
const MAX_BLOCKS: usize = 4096;

/// Checks that `pieces` cover a tensor of `shape` exactly. Pieces without elements do not matter.
pub(crate) fn check<'a>(
    shape: &[usize],
    pieces: impl Iterator<Item = &'a Region>,
) -> Result<(), CoverProblem> {
    let total = numel(shape).ok_or(CoverProblem::TooLarge)?;
    let mut ranges: HashMap<&Block, Vec<(usize, usize)>> = HashMap::new();
    for piece in pieces {
        if !piece.is_within(shape) {
            return Err(CoverProblem::Outside { region: piece.clone() });
        }
        if piece.numel() > 0 {
            ranges.entry(&piece.block).or_default().push((piece.range.start, piece.range.end));
        }
    }
    if ranges.len() > MAX_BLOCKS {
        return Err(CoverProblem::TooManyBlocks { count: ranges.len(), limit: MAX_BLOCKS });
    }
    let mut covered = 0;
    for (block, ranges) in &mut ranges {
        let numel = block.numel().ok_or(CoverProblem::TooLarge)?;
        tiles(numel, ranges).map_err(|problem| problem.in_block(block, shape))?;
        // Boxes inside of the tensor: their sum can exceed it only MAX_BLOCKS times.
        covered += numel as u128;
    }
    let mut blocks: Vec<_> = ranges.keys().collect();
    blocks.sort_by(|a, b| a.offset.cmp(&b.offset));
    for (i, a) in blocks.iter().enumerate() {
        if let Some(b) = blocks[i + 1..].iter().find(|b| a.intersection(b).is_some()) {
            return Err(CoverProblem::BlocksOverlap { first: (**a).clone(), second: (**b).clone() });
        }
    }
    match covered == total as u128 {
        true => Ok(()),
        false => Err(CoverProblem::Missing { numel: total - covered as usize, of: total }),
    }
}

enum Gap {
    Hole { begin: usize, end: usize },
    Twice { begin: usize, end: usize },
}

impl Gap {
    fn in_block(self, block: &Block, shape: &[usize]) -> CoverProblem {
        let block = (!block.is_whole(shape)).then(|| block.clone());
        match self {
            Gap::Hole { begin, end } => CoverProblem::Hole { begin, end, block },
            Gap::Twice { begin, end } => CoverProblem::Twice { begin, end, block },
        }
    }
}

fn tiles(numel: usize, ranges: &mut [(usize, usize)]) -> Result<(), Gap> {
    ranges.sort_unstable();
    let mut covered = 0;
    for &mut (begin, end) in ranges {
        if begin > covered {
            return Err(Gap::Hole { begin: covered, end: begin });
        }
        if begin < covered {
            return Err(Gap::Twice { begin, end: covered.min(end) });
        }
        covered = end;
    }
    if covered < numel { Err(Gap::Hole { begin: covered, end: numel }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::state::region::tests::{elements, region_of, shapes};

    fn cover(shape: &[usize], pieces: &[Region]) -> Result<(), String> {
        check(shape, pieces.iter()).map_err(|problem| problem.to_string())
    }

    #[test]
    fn shards_and_slices_make_a_whole() {
        let shape = [5, 7];
        let flat = |range| Region::flat(&shape, range);
        assert_eq!(cover(&shape, &[flat(20..35), flat(0..3), flat(3..3), flat(3..20)]), Ok(()));
        let left = Block::slice(&shape, 1, 0..3);
        let right = Block::slice(&shape, 1, 3..7);
        let part = |block: &Block, range| Region { block: block.clone(), range };
        assert_eq!(cover(&shape, &[part(&left, 0..8), part(&right, 0..20), part(&left, 8..15)]), Ok(()));
        assert_eq!(cover(&[], &[Region::whole(&[])]), Ok(()));
        assert_eq!(cover(&[0, 4], &[]), Ok(()));
    }

    #[test]
    fn holes_and_doubled_elements_are_named() {
        let shape = [2, 5];
        let flat = |range| Region::flat(&shape, range);
        for (pieces, expected) in [
            (vec![], "`10` of its `10` elements are missing"),
            (vec![flat(0..3), flat(4..10)], "elements `3..4` are missing"),
            (vec![flat(0..3), flat(3..9)], "elements `9..10` are missing"),
            (vec![flat(0..4), flat(3..10)], "elements `3..4` are there twice"),
            (vec![flat(0..10), flat(0..10)], "elements `0..10` are there twice"),
            (vec![flat(0..11)], "a piece leaves the tensor: elements `0..11` of block `[0, 0] + [2, 5]`"),
            (
                vec![flat(0..10), Region::block(Block::slice(&shape, 0, 1..2))],
                "blocks `[0, 0] + [2, 5]` and `[1, 0] + [1, 5]` overlap",
            ),
            (vec![Region::block(Block::slice(&shape, 1, 0..4))], "`2` of its `10` elements are missing"),
            (
                vec![Region { block: Block::slice(&shape, 1, 0..4), range: 0..7 }],
                "elements `7..8` of block `[0, 0] + [2, 4]` are missing",
            ),
        ] {
            assert_eq!(cover(&shape, &pieces).unwrap_err(), expected);
        }
    }

    proptest! {
        #[test]
        fn whoever_passes_covers_each_element_once(
            (shape, pieces) in shapes().prop_flat_map(|shape| {
                (Just(shape.clone()), prop::collection::vec(region_of(shape), 0..4))
            })
        ) {
            let mut all: Vec<_> = pieces.iter().flat_map(|piece| elements(piece, &shape)).collect();
            all.sort_unstable();
            let exact = all.iter().copied().eq(0..shape.iter().product());
            // A region with holes in its own box is refused even where another box fills them.
            if check(&shape, pieces.iter()).is_ok() {
                prop_assert!(exact);
            }
            let by_block = pieces.iter().all(|piece| piece.block.is_whole(&shape));
            if exact && by_block {
                prop_assert!(check(&shape, pieces.iter()).is_ok());
            }
        }
    }
}
