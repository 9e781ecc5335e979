//! Parameter groups, and the pieces that a unit's owned range falls into.
//!
//! A piece is what one call of a kernel moves: neighbouring parameters that are told the same, one parameter where its states
//! are rounded at random, or the part of one parameter in one shard where an optimizer looks at whole parameters (LAMB, Muon). Each
//! piece has its own states.

use std::ops::Range;

use shardwise_device::{Buffer, DType};
use shardwise_plan::pattern::NamePattern;
use shardwise_plan::{ParamSpec, UnitLayout, ZeroStage};

use crate::algorithm::{Settings, not_negative};
use crate::tiers::Tiers;
use crate::zero::FILL_NUMEL;
use crate::{StatePrecision, ZeroError, ZeroOptions};

/// Parameters that are trained otherwise than the rest.
#[derive(Debug, Clone, PartialEq)]
pub struct ParamGroup {
    /// Names of parameters. A parameter belongs to the first group with a pattern that fits.
    pub patterns: Vec<NamePattern>,
    /// The learning rate, as a multiple of what each step is told.
    pub lr_scale: f64,
    /// The weight decay; if none, the optimizer's.
    pub weight_decay: Option<f64>,
}

impl ParamGroup {
    /// Parameters whose weights do not decay.
    pub fn no_decay(patterns: Vec<NamePattern>) -> Self {
        ParamGroup { patterns, lr_scale: 1.0, weight_decay: Some(0.0) }
    }

    /// Whether `param` belongs here, if to no earlier group.
    pub fn matches(&self, param: &str) -> bool {
        self.patterns.iter().any(|pattern| pattern.matches(param))
    }

    pub(crate) fn check(&self) -> Result<(), ZeroError> {
        not_negative("groups.lr_scale", self.lr_scale)?;
        self.weight_decay.map_or(Ok(()), |decay| not_negative("groups.weight_decay", decay))
    }
}

/// A part of a unit that is moved in one call.
pub(crate) struct Piece {
    /// Elements, counted from the start of the owned range.
    pub range: Range<usize>,
    pub settings: Settings,
    /// The parameter's index, where it matters.
    pub slot: usize,
    /// The shard in which it lies, where it matters.
    pub shard: usize,
    pub states: Vec<State>,
}

/// One number for each element of a piece.
pub(crate) struct State {
    pub name: &'static str,
    pub values: Buffer,
}

impl ZeroOptions {
    pub(crate) fn settings(&self, param: &ParamSpec) -> Settings {
        let mut settings = self.optimizer.settings(param);
        if let Some(group) = self.groups.iter().find(|group| group.matches(&param.name)) {
            settings.lr_scale *= group.lr_scale;
            settings.weight_decay = group.weight_decay.unwrap_or(settings.weight_decay);
        }
        settings
    }

    /// The pieces of the owned range, in order. Element-wise ones take gaps and padding with them, which are zero and stay so.
    pub(crate) fn pieces(
        &self,
        layout: &UnitLayout,
        owned: Range<usize>,
        tiers: &Tiers,
    ) -> Result<Vec<Piece>, ZeroError> {
        let mut pieces: Vec<(Range<usize>, Settings, usize, usize)> = Vec::new();
        for shard in shards(self.stage, layout, &owned) {
            let shard_range = layout.shard_range(shard);
            let offset = shard_range.start - owned.start;
            for fragment in layout.fragments(shard_range) {
                let settings = self.settings(&layout.slots[fragment.slot].param);
                let range = fragment.local_range.start + offset..fragment.local_range.end + offset;
                let moves_with = |slot| slot == fragment.slot || self.states == StatePrecision::F32;
                match pieces.last_mut() {
                    Some((last, same, slot, _))
                        if *same == settings && settings.algorithm.is_element_wise() && moves_with(*slot) =>
                    {
                        last.end = range.end;
                    }
                    _ => pieces.push((range, settings, fragment.slot, shard)),
                }
            }
        }
        for i in 0..pieces.len() {
            if pieces[i].1.algorithm.is_element_wise() {
                pieces[i].0.end = pieces.get(i + 1).map_or(owned.len(), |next| next.0.start);
                pieces[i].0.start = if i == 0 { 0 } else { pieces[i].0.start };
            }
        }
        if let (true, Some(slot)) =
            (pieces.is_empty() && !owned.is_empty(), layout.slots.len().checked_sub(1))
        {
            // A shard of nothing but padding keeps as much state as the others: that is what plans count.
            let settings = self.settings(&layout.slots[slot].param);
            if settings.algorithm.is_element_wise() {
                pieces.push((0..owned.len(), settings, slot, 0));
            }
        }
        let pieces = pieces.into_iter().map(|(range, settings, slot, shard)| {
            let states = self.states(&settings, range.len(), tiers)?;
            Ok(Piece { range, settings, slot, shard, states })
        });
        pieces.collect()
    }

    fn states(&self, settings: &Settings, numel: usize, tiers: &Tiers) -> Result<Vec<State>, ZeroError> {
        let names = settings.algorithm.state_names().iter();
        let states = names.map(|&name| {
            let mut values = Buffer::allocate(self.states.dtype(), numel, &tiers.state_memory())?;
            let first = settings.algorithm.first_value();
            if first != 0.0 {
                let some = vec![first; FILL_NUMEL.min(numel)];
                for start in (0..numel).step_by(FILL_NUMEL) {
                    let count = FILL_NUMEL.min(numel - start);
                    tiers.store(&some[..count], values.view_mut().into_range(start..start + count))?;
                }
            }
            Ok(State { name, values })
        });
        states.collect()
    }
}

impl StatePrecision {
    /// The type of the states' elements.
    pub fn dtype(self) -> DType {
        match self {
            StatePrecision::F32 => DType::F32,
            StatePrecision::Bf16 { .. } => DType::Bf16,
        }
    }
}

/// The shards that lie in the owned range: one, or all of them.
fn shards(stage: ZeroStage, layout: &UnitLayout, owned: &Range<usize>) -> Range<usize> {
    if stage.shards_optimizer() {
        let shard = owned.start.checked_div(layout.shard_numel()).unwrap_or(0);
        shard..shard + 1
    } else {
        0..layout.num_shards
    }
}
