//! What a layer declares: its parameters, by name, shape and birth.

use serde::Serialize;

/// How a parameter's elements are born when no file provides them.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub enum Init {
    /// All zeros.
    Zeros,
    /// All ones.
    Ones,
    /// Normal with mean zero.
    Normal {
        /// Standard deviation.
        std: f32,
    },
    /// Uniform in `-bound..bound`.
    Uniform {
        /// Half the width.
        bound: f32,
    },
}

/// One parameter. Two layers that declare the same `name` share it: it is tied, and the first layer owns it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ParamSpec {
    /// Name in the whole model, as in Hugging Face files: `model.layers.0.mlp.up_proj.weight`.
    pub name: String,
    /// Name inside the layer, which its forward uses: `mlp.up_proj.weight`.
    pub key: String,
    /// Global shape.
    pub shape: Vec<usize>,
    /// How it is born.
    pub init: Init,
}

impl ParamSpec {
    /// The parameter `key` of the layer `layer`.
    pub fn new(layer: &str, key: &str, shape: &[usize], init: Init) -> Self {
        let name = if layer.is_empty() { key.to_owned() } else { format!("{layer}.{key}") };
        ParamSpec { name, key: key.to_owned(), shape: shape.to_vec(), init }
    }

    /// Elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }
}

/// One layer: its name and its parameters.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerSpec {
    /// Name in the whole model: `model.layers.0`.
    pub name: String,
    /// Parameters, in the order they lie in the unit's flat buffer.
    pub params: Vec<ParamSpec>,
}

/// Matches a parameter name against a pattern in which `*` stands for any run of characters.
pub fn matches_pattern(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((head, rest)) => name.strip_prefix(head).is_some_and(|tail| {
            (0..=tail.len()).filter(|&i| tail.is_char_boundary(i)).any(|i| matches_pattern(rest, &tail[i..]))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_names() {
        for (pattern, name, expected) in [
            ("*norm*", "model.norm.weight", true),
            ("*.bias", "a.b.bias", true),
            ("*.bias", "a.bias.x", false),
            ("model.layers.*.mlp.*", "model.layers.11.mlp.up_proj.weight", true),
            ("weight", "model.weight", false),
            ("*", "", true),
        ] {
            assert_eq!(matches_pattern(pattern, name), expected, "{pattern} {name}");
        }
    }
}
