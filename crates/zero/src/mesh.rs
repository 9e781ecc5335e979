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

use shardwise_comm::{Group, solo};
use shardwise_plan::UnitLayout;

use crate::ZeroError;

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
    /// it does not have. If empty: those of this rank's units.
    pub catalogue: Vec<(String, String)>,
}

impl Placement {
    /// The same, with a catalogue that has every parameter of `layouts`.
    ///
    /// # Errors
    /// [`ZeroError::WrongOption`] for one that lacks a parameter.
    pub(crate) fn complete(mut self, layouts: &[UnitLayout]) -> Result<Self, ZeroError> {
        let params = layouts.iter().flat_map(|layout| layout.slots.iter().map(move |slot| (layout, slot)));
        if self.catalogue.is_empty() {
            let name = |(layout, slot): (&UnitLayout, &shardwise_plan::ParamSlot)| {
                (layout.name.clone(), slot.param.name.clone())
            };
            self.catalogue = params.map(name).collect();
            return Ok(self);
        }
        let places = self.places();
        match params.map(|(_, slot)| &slot.param.name).find(|name| !places.contains_key(name.as_str())) {
            None => Ok(self),
            Some(name) => Err(ZeroError::WrongOption {
                option: "catalogue",
                got: format!("without {name}"),
                expected: "every parameter of the model",
            }),
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
