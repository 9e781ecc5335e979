//! What becomes of a layer's activations between its forward and its backward.
//!
//! A layer's backward needs what its forward computed. It can be kept, or computed again from the layer's input:
//!
//! | policy | between forward and backward | at the backward |
//! |---|---|---|
//! | keep | everything that the graph saved | nothing |
//! | recompute | the input | the forward pass once more |
//! | offload | the input, in host memory | the input comes back, then as recompute |
//!
//! All three give the same bits. The last layer, which makes the loss, follows the schedule, whatever the rules say. Where its backward
//! comes right after its forward it is kept: nothing would be saved. Where other micro-batches come in between (GPipe), it is
//! recomputed: a head makes its gradients within the forward pass, and they would be held for each micro-batch.
//!
//! On CPU host memory is where activations are anyway: offloading moves nothing there, and needs what recomputing needs.

use serde::Serialize;

use crate::NamePattern;

/// How a layer's activations survive until its backward.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ActivationPolicy {
    /// What the graph saved stays.
    #[default]
    Keep,
    /// The input stays, the rest is computed again.
    Recompute,
    /// The input waits in host memory, the rest is computed again.
    Offload,
}

impl ActivationPolicy {
    /// Whether the forward pass runs a second time.
    pub fn recomputes(self) -> bool {
        self != ActivationPolicy::Keep
    }
}

/// When the backward of the layer that makes the loss comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LossTurn {
    /// Right after its forward.
    AtOnce,
    /// After those of other micro-batches.
    Later,
}

/// A policy for each layer, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ActivationRules {
    /// For layers that no rule names.
    pub default: ActivationPolicy,
    /// Patterns of layers' names; the first that fits decides.
    pub rules: Vec<(NamePattern, ActivationPolicy)>,
}

impl ActivationRules {
    /// The same policy for all layers.
    pub fn all(policy: ActivationPolicy) -> Self {
        ActivationRules { default: policy, rules: Vec::new() }
    }

    /// The policy of each layer of a model, in order.
    pub fn policies<'a>(
        &self,
        layers: impl IntoIterator<Item = &'a str>,
        loss: LossTurn,
    ) -> Vec<ActivationPolicy> {
        let policy_of = |layer: &str| {
            let rule = self.rules.iter().find(|(pattern, _)| pattern.matches(layer));
            rule.map_or(self.default, |(_, policy)| *policy)
        };
        let mut policies: Vec<_> = layers.into_iter().map(policy_of).collect();
        if let Some(last) = policies.last_mut() {
            *last = match loss {
                LossTurn::AtOnce => ActivationPolicy::Keep,
                LossTurn::Later => ActivationPolicy::Recompute,
            };
        }
        policies
    }

    /// The first rule that names none of the layers.
    pub fn stray<'a>(&self, layers: impl IntoIterator<Item = &'a str> + Clone) -> Option<&NamePattern> {
        let names_none =
            |pattern: &&NamePattern| !layers.clone().into_iter().any(|name| pattern.matches(name));
        self.rules.iter().map(|(pattern, _)| pattern).find(names_none)
    }
}

#[cfg(test)]
mod tests {
    use super::ActivationPolicy::{Keep, Offload, Recompute};
    use super::*;

    const LAYERS: [&str; 5] = ["embed", "h.0", "h.1", "h.2", "head"];

    #[test]
    fn the_first_rule_that_fits_decides_and_the_last_layer_follows_the_schedule() {
        let rules = ActivationRules {
            default: Recompute,
            rules: vec![(NamePattern::new("h.1"), Keep), (NamePattern::new("h.*"), Offload)],
        };
        let (once, later) = (LossTurn::AtOnce, LossTurn::Later);
        assert_eq!(rules.policies(LAYERS, once), [Recompute, Offload, Keep, Offload, Keep]);
        assert_eq!(
            ActivationRules::all(Offload).policies(LAYERS, once),
            [Offload, Offload, Offload, Offload, Keep]
        );
        assert_eq!(ActivationRules::default().policies(LAYERS, once), [Keep; 5]);
        assert_eq!(ActivationRules::default().policies(LAYERS, later), [Keep, Keep, Keep, Keep, Recompute]);
        assert!(ActivationRules::all(Recompute).policies([], later).is_empty());
    }

    #[test]
    fn a_rule_that_names_no_layer_is_found() {
        let mut rules = ActivationRules { default: Keep, rules: vec![(NamePattern::new("h.*"), Offload)] };
        assert_eq!(rules.stray(LAYERS), None);
        rules.rules.push((NamePattern::new("block.*"), Recompute));
        assert_eq!(rules.stray(LAYERS).map(NamePattern::as_str), Some("block.*"));
    }
}
