//! Parameter name patterns: `*` stands for any run of characters, everything else for itself.

use serde::Serialize;

/// A pattern over parameter names, such as `*.norm.weight`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct NamePattern(String);

impl NamePattern {
    /// A pattern from its text.
    pub fn new(text: impl Into<String>) -> NamePattern {
        NamePattern(text.into())
    }

    /// The text of the pattern.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the whole name fits the pattern.
    pub fn matches(&self, name: &str) -> bool {
        matches_pattern(&self.0, name)
    }
}

/// Whether the whole of `name` fits `pattern`.
pub fn matches_pattern(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or("");
    let Some(mut rest) = name.strip_prefix(first) else { return false };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    // Taking each inner part at its first occurrence leaves the most room for those after it.
    for part in parts {
        match rest.find(part) {
            Some(found) => rest = &rest[found + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_star_is_any_run_of_characters() {
        let fits = |pattern: &str, name: &str| NamePattern::new(pattern).matches(name);
        assert!(fits("model.norm.weight", "model.norm.weight"));
        assert!(!fits("model.norm.weight", "model.norm.weights"));
        assert!(!fits("norm.weight", "model.norm.weight"));
        assert!(fits("*.norm.weight", "model.norm.weight"));
        assert!(fits("*", "") && fits("*", "anything"));
        assert!(fits("*bias", "bias") && fits("a**b", "ab"));
        assert!(fits("model.layers.*.mlp.*", "model.layers.3.mlp.up.weight"));
        assert!(!fits("ab*ba", "aba"), "the two ends must not overlap");
        assert!(fits("a*b*c", "aXbYbZc") && !fits("a*b*c", "aXcYb"));
        assert!(fits("", "") && !fits("", "a"));
    }

    /// The textbook definition, exponential but plain.
    fn reference(pattern: &[u8], name: &[u8]) -> bool {
        match pattern.split_first() {
            None => name.is_empty(),
            Some((b'*', rest)) => (0..=name.len()).any(|cut| reference(rest, &name[cut..])),
            Some((byte, rest)) => name.first() == Some(byte) && reference(rest, &name[1..]),
        }
    }

    proptest! {
        #[test]
        fn agrees_with_the_plain_definition(pattern in "[ab*]{0,8}", name in "[ab]{0,8}") {
            let expected = reference(pattern.as_bytes(), name.as_bytes());
            prop_assert_eq!(NamePattern::new(pattern).matches(&name), expected);
        }
    }
}
