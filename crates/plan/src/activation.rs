//! What a layer holds between its forward and its backward pass.
//!
//! A layer's graph needs what its forward pass saved. Keeping it costs memory; the alternative costs a second forward pass:
//! only the layer's input is held, and the graph is made again when its backward is due.

use serde::Serialize;

use crate::NamePattern;

/// What becomes of a layer's activations until its backward pass.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ActivationPolicy {
    /// The graph and all that it saved stay where they are.
    #[default]
    Keep,
    /// Only the layer's input stays; backward runs the forward pass again.
    Recompute,
    /// Like [`Recompute`](Self::Recompute), and meanwhile the input lies in host memory. On CPU that is where it is anyway.
    Offload,
}

impl ActivationPolicy {
    /// The name used in configurations and reports.
    pub const fn name(self) -> &'static str {
        match self {
            ActivationPolicy::Keep => "keep",
            ActivationPolicy::Recompute => "recompute",
            ActivationPolicy::Offload => "offload",
        }
    }

    /// Whether backward has to run the forward pass again.
    pub const fn recomputes(self) -> bool {
        !matches!(self, ActivationPolicy::Keep)
    }
}

/// A policy for the layers of some names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ActivationRule {
    /// Layer names, such as `model.layers.1*`.
    #[serde(rename = "match")]
    pub patterns: Vec<NamePattern>,
    /// What holds for them.
    pub policy: ActivationPolicy,
}

/// The policy of every layer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ActivationPolicies {
    /// What holds where no rule does.
    pub policy: ActivationPolicy,
    /// Exceptions; the first that matches holds.
    pub rules: Vec<ActivationRule>,
}

impl ActivationPolicies {
    /// The policy of the layer called `name`.
    pub fn of(&self, name: &str) -> ActivationPolicy {
        let rule = self.rules.iter().find(|rule| rule.patterns.iter().any(|pattern| pattern.matches(name)));
        rule.map_or(self.policy, |rule| rule.policy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_rule_that_matches_holds() {
        let rule = |patterns: &[&str], policy| ActivationRule {
            patterns: patterns.iter().map(|pattern| NamePattern::new(*pattern)).collect(),
            policy,
        };
        let policies = ActivationPolicies {
            policy: ActivationPolicy::Recompute,
            rules: vec![
                rule(&["*.10", "*.11"], ActivationPolicy::Offload),
                rule(&["*.1*"], ActivationPolicy::Keep),
            ],
        };
        let names = ["layers.0", "layers.1", "layers.10", "layers.12"];
        assert_eq!(names.map(|name| policies.of(name).name()), ["recompute", "keep", "offload", "keep"]);
        assert_eq!(ActivationPolicies::default().of("any"), ActivationPolicy::Keep);
    }
}
