//! What a layer declares: its parameters, by name, shape and birth.

use serde::Serialize;

use crate::tensor::TensorSplit;

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
    /// How it is cut over tensor-parallel ranks; without, every rank has it whole.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub split: Option<TensorSplit>,
}

impl ParamSpec {
    /// The parameter `key` of the layer `layer`.
    pub fn new(layer: &str, key: &str, shape: &[usize], init: Init) -> Self {
        let name = if layer.is_empty() { key.to_owned() } else { format!("{layer}.{key}") };
        ParamSpec { name, key: key.to_owned(), shape: shape.to_vec(), init, split: None }
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
