//! A rank among others that hold other layers, or other parts of the same ones.
//!
//! State is sharded over the *data* group: the ranks with the same layers, cut alike, that see other samples. A norm, a decision and a
//! sum of losses are over the *world*. Some elements are on several ranks of it that are not of one data group: a parameter that tensor
//! ranks do not cut, a key and value head that they share, a tied table on two pipeline stages. Their gradients are equal, and so they move
//! alike, but only the first holder *speaks* for them: what is counted over the world counts them there.
//!
//! ```text
//!            tensor rank 0              tensor rank 1
//! stage 0    table   cut    norm        table   cut    (norm)
//! stage 1   (table)  cut    norm       (table)  cut    (norm)          in brackets: spoken for by another rank
//! ```

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use shardwise_comm::{Group, solo};
use shardwise_plan::UnitLayout;

use crate::unit::{GradState, Unit};
use crate::{Zero, ZeroError};

/// The groups that a rank is in.
#[derive(Clone)]
pub struct Groups {
    /// State is sharded and gradients are reduced over these ranks.
    pub data: Group,
    /// Ranks that have the same layers, cut.
    pub tensor: Group,
    /// All ranks. With data parallelism alone this is the same handle as `data`; otherwise a group of its own, which the caller's thread
    /// uses.
    pub world: Group,
}

impl From<Group> for Groups {
    /// Data parallelism alone.
    fn from(group: Group) -> Self {
        Groups { data: group.clone(), tensor: solo(), world: group }
    }
}

/// What a rank's parameters are to the other ranks. By default they are all there are, and on the ranks of the data group only.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Placement {
    /// Parameters of this rank that another tensor rank speaks for.
    pub tensor_replicas: HashSet<String>,
    /// Parameters of this rank that an earlier pipeline stage speaks for.
    pub stage_replicas: HashSet<String>,
    /// Layer and name of every parameter of the whole model, in order; the same on all ranks, so that each can name a parameter that
    /// it does not have. If empty: those of this rank's units, unless there are pipeline stages.
    pub catalogue: Vec<(String, String)>,
}

impl Placement {
    /// The same, with a catalogue that has every parameter of `layouts`.
    ///
    /// # Errors
    /// [`ZeroError::WrongOption`] for one that lacks a parameter.
    pub(crate) fn complete(mut self, layouts: &[UnitLayout], groups: &Groups) -> Result<Self, ZeroError> {
        let wrong = |got| {
            Err(ZeroError::WrongOption { option: "catalogue", got, expected: "every parameter of the model" })
        };
        let params = layouts.iter().flat_map(|layout| layout.slots.iter().map(move |slot| (layout, slot)));
        if self.catalogue.is_empty() {
            if groups.world.group_size() > groups.data.group_size() * groups.tensor.group_size() {
                return wrong("empty".to_owned());
            }
            let names = params.map(|(layout, slot)| (layout.name.clone(), slot.param.name.clone()));
            self.catalogue = names.collect();
            return Ok(self);
        }
        let places = self.places();
        match params.map(|(_, slot)| &slot.param.name).find(|name| !places.contains_key(name.as_str())) {
            None => Ok(self),
            Some(name) => wrong(format!("without {name}")),
        }
    }

    /// Where each parameter is in the catalogue: the first place of one that several layers declare.
    pub fn places(&self) -> HashMap<&str, usize> {
        let names = self.catalogue.iter().map(|(_, param)| param.as_str());
        names.enumerate().map(|(i, name)| (name, i)).rev().collect()
    }

    /// Whether this rank's elements of `param` count here and not elsewhere.
    pub fn speaks_for(&self, param: &str) -> bool {
        !self.tensor_replicas.contains(param) && !self.stage_replicas.contains(param)
    }
}

impl Zero {
    /// Sums the unit's reduced gradient over `group` too, in rank order: for a tied parameter, whose uses are on several pipeline stages.
    /// Each sums the part that it keeps the optimizer's state of. To be called between the last micro-batch and the step.
    ///
    /// # Collective
    /// `group`, which is not the data group: ranks at the same place of their data groups, for units with the same layout.
    /// # Errors
    /// [`ZeroError::MissingGradient`] before the last micro-batch, [`ZeroError::WrongOption`] for the data group, or a failed
    /// collective.
    pub fn all_reduce_gradient(&mut self, unit: usize, group: &Group) -> Result<(), ZeroError> {
        if Arc::ptr_eq(group, self.group()) {
            let (got, expected) =
                (group.name().to_owned(), "a group of ranks with other uses of the parameters");
            return Err(ZeroError::WrongOption { option: "group", got, expected });
        }
        let expected = self.options.grad_accum_steps;
        let Unit { layout, owned, trained: Some(trained), .. } = &self.units[unit] else { return Ok(()) };
        if trained.num_reduced != expected {
            let (unit, got) = (layout.name.clone(), trained.num_reduced);
            return Err(ZeroError::MissingGradient { unit, expected, got });
        }
        let owned = owned.clone();
        self.settle(unit)?;
        let Zero { units, lane, .. } = self;
        let trained = units[unit].trained.as_mut().expect("checked above");
        let grad = match (&mut trained.offloaded, &mut trained.grad) {
            (Some(grad), _) | (None, GradState::Shard(grad)) => grad.view_mut(),
            (None, GradState::Full(full)) => full.view_mut().into_range(owned),
            _ => unreachable!("settled"),
        };
        lane.beside(group, |group| group.all_reduce(grad))
    }
}
