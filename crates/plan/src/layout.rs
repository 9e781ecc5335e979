//! The flat layout of a unit.
//!
//! A unit is one layer's trainable (or one layer's frozen) parameters in one flat buffer. Each parameter starts at a
//! multiple of [`ALIGNMENT`] elements, so that kernels see aligned rows, and the tail is padded so that the buffer
//! splits into equal, aligned shards, one for each data-parallel rank. A parameter may straddle shards.
//!
//! ```text
//! | q_proj ........ | k_proj ... |gap| norm |   padding   |      gaps and padding are zero, always
//! |   shard 0   |   shard 1   |   shard 2   |   shard 3   |
//! ```

use std::collections::HashSet;
use std::ops::Range;

use serde::Serialize;

use crate::param::{LayerSpec, ParamSpec};

/// Elements to which parameters and shards are aligned: 64 bytes of a 16-bit type.
pub const ALIGNMENT: usize = 32;

/// A parameter and where it lies in its unit.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ParamSlot {
    /// The parameter.
    pub param: ParamSpec,
    /// First element in the flat buffer.
    pub offset: usize,
}

impl ParamSlot {
    /// The parameter's elements in the flat buffer.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.param.numel()
    }
}

/// The part of one parameter that lies in some range of the flat buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fragment {
    /// Index of the parameter in [`UnitLayout::slots`].
    pub slot: usize,
    /// Elements of the parameter, counted from its own start.
    pub param_range: Range<usize>,
    /// The same elements, counted from the start of the range asked for.
    pub local_range: Range<usize>,
}

/// One flat buffer: what lies where, and how it splits.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct UnitLayout {
    /// The layer's name.
    pub name: String,
    /// Whether its parameters are trained; frozen ones have no gradient and no optimizer state.
    pub trainable: bool,
    /// Parameters in order.
    pub slots: Vec<ParamSlot>,
    /// Elements with gaps and padding: `num_shards * shard_numel`.
    pub padded_numel: usize,
    /// Equal parts, one for each rank of the data-parallel group.
    pub num_shards: usize,
}

impl UnitLayout {
    /// Lays out `params` one after the other for `num_shards` ranks.
    pub fn new(name: &str, trainable: bool, params: Vec<ParamSpec>, num_shards: usize) -> Self {
        let mut end = 0usize;
        let slots = params
            .into_iter()
            .map(|param| {
                let offset = end.next_multiple_of(ALIGNMENT);
                end = offset + param.numel();
                ParamSlot { param, offset }
            })
            .collect();
        let padded_numel = end.next_multiple_of(ALIGNMENT * num_shards);
        UnitLayout { name: name.to_owned(), trainable, slots, padded_numel, num_shards }
    }

    /// Elements of the parameters themselves.
    pub fn numel(&self) -> usize {
        self.slots.iter().map(|slot| slot.param.numel()).sum()
    }

    /// Elements of one shard.
    pub fn shard_numel(&self) -> usize {
        self.padded_numel / self.num_shards
    }

    /// The elements of rank `group_rank`'s shard.
    pub fn shard_range(&self, group_rank: usize) -> Range<usize> {
        let numel = self.shard_numel();
        group_rank * numel..(group_rank + 1) * numel
    }

    /// The parts of parameters that lie in `range` of the flat buffer, in order.
    pub fn fragments(&self, range: Range<usize>) -> Vec<Fragment> {
        self.slots
            .iter()
            .enumerate()
            .filter_map(|(slot, s)| {
                let (start, end) = (s.offset.max(range.start), s.range().end.min(range.end));
                (start < end).then(|| Fragment {
                    slot,
                    param_range: start - s.offset..end - s.offset,
                    local_range: start - range.start..end - range.start,
                })
            })
            .collect()
    }
}

/// Splits layers into units: for each layer its trainable and its frozen parameters, without those that an earlier
/// layer owns (tied) and without empty units.
pub fn units_of(
    layers: &[LayerSpec],
    num_shards: usize,
    is_frozen: impl Fn(&str) -> bool,
) -> Vec<UnitLayout> {
    units_on_stage(layers, &HashSet::new(), num_shards, is_frozen)
}

/// Splits the layers of one pipeline stage into units as [`units_of`] does, but for parameters that other stages hold too:
/// each of those is a unit of its own, after the units of the first layer here that declares it. It is named like the
/// parameter and the same on every stage, so that its state moves alike there and its gradients can be summed.
pub fn units_on_stage(
    layers: &[LayerSpec],
    shared: &HashSet<String>,
    num_shards: usize,
    is_frozen: impl Fn(&str) -> bool,
) -> Vec<UnitLayout> {
    let mut owned = HashSet::new();
    let mut units = Vec::new();
    for layer in layers {
        let first_here = layer.params.iter().filter(|param| owned.insert(param.name.clone())).cloned();
        let (shared, own): (Vec<_>, Vec<_>) = first_here.partition(|param| shared.contains(&param.name));
        let (frozen, trainable): (Vec<_>, Vec<_>) = own.into_iter().partition(|param| is_frozen(&param.name));
        for (params, is_trainable) in [(trainable, true), (frozen, false)] {
            if !params.is_empty() {
                units.push(UnitLayout::new(&layer.name, is_trainable, params, num_shards));
            }
        }
        for param in shared {
            let (name, is_trainable) = (param.name.clone(), !is_frozen(&param.name));
            units.push(UnitLayout::new(&name, is_trainable, vec![param], num_shards));
        }
    }
    units
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::param::Init;

    fn layer(name: &str, shapes: &[(&str, &[usize])]) -> LayerSpec {
        let params =
            shapes.iter().map(|(key, shape)| ParamSpec::new(name, key, shape, Init::Zeros)).collect();
        LayerSpec { name: name.to_owned(), params }
    }

    #[test]
    fn a_tied_parameter_belongs_to_its_first_layer() {
        let embed = layer("embed", &[("weight", &[10, 4])]);
        let mut head = layer("head", &[("norm", &[4])]);
        head.params.push(ParamSpec { key: "proj".into(), ..embed.params[0].clone() });
        let units = units_of(&[embed, head], 2, |name| name == "head.norm");
        let names: Vec<_> = units.iter().map(|u| (u.name.as_str(), u.trainable, u.numel())).collect();
        assert_eq!(names, [("embed", true, 40), ("head", false, 4)]);
    }

    #[test]
    fn a_parameter_of_several_stages_is_the_same_unit_on_each() {
        let embed = layer("embed", &[("weight", &[10, 4]), ("positions", &[6, 4])]);
        let mut head = layer("head", &[("norm", &[4])]);
        head.params.push(ParamSpec { key: "proj".into(), ..embed.params[0].clone() });
        let shared = HashSet::from(["embed.weight".to_owned()]);
        for is_frozen in [false, true] {
            let on_stage = |layer: &LayerSpec| {
                units_on_stage(std::slice::from_ref(layer), &shared, 2, |name| {
                    is_frozen && name == "embed.weight"
                })
            };
            let (first, last) = (on_stage(&embed), on_stage(&head));
            let told = |units: &[UnitLayout]| -> Vec<_> {
                units.iter().map(|u| (u.name.clone(), u.trainable, u.numel())).collect()
            };
            let table = ("embed.weight".to_owned(), !is_frozen, 40);
            assert_eq!(told(&first), [("embed".to_owned(), true, 24), table.clone()]);
            assert_eq!(told(&last), [("head".to_owned(), true, 4), table]);
            assert_eq!(first[1].padded_numel, last[1].padded_numel);
        }
    }

    proptest! {
        #[test]
        fn shards_cover_every_element_once(
            sizes in prop::collection::vec(0usize..200, 1..8),
            num_shards in prop::sample::select(vec![1usize, 2, 3, 4, 5, 7, 8]),
        ) {
            let params = sizes.iter().enumerate()
                .map(|(i, &n)| ParamSpec::new("l", &format!("p{i}"), &[n], Init::Zeros)).collect();
            let unit = UnitLayout::new("l", true, params, num_shards);
            prop_assert_eq!(unit.numel(), sizes.iter().sum::<usize>());
            let mut seen: Vec<Vec<u8>> = sizes.iter().map(|&n| vec![0; n]).collect();
            for rank in 0..num_shards {
                let range = unit.shard_range(rank);
                prop_assert_eq!(range.start % ALIGNMENT, 0);
                for f in unit.fragments(range.clone()) {
                    let slot = &unit.slots[f.slot];
                    prop_assert_eq!(slot.offset + f.param_range.start, range.start + f.local_range.start);
                    prop_assert_eq!(f.param_range.len(), f.local_range.len());
                    prop_assert!(f.local_range.end <= range.len());
                    for i in f.param_range { seen[f.slot][i] += 1; }
                }
            }
            prop_assert!(seen.iter().flatten().all(|&count| count == 1));
            prop_assert_eq!(unit.shard_range(num_shards - 1).end, unit.padded_numel);
        }
    }
}
