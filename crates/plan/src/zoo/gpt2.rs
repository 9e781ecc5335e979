//! The GPT-2 family: LayerNorm, learned positions, multi-head attention, GELU.
//!
//! Hugging Face keeps its matrices as `[in, out]`; so do we, since the files are read element by element.

use serde::Serialize;
use serde_json::{Value, json};

use super::reader::{Reader, invalid};
use super::{ModelConfigError, normal};
use crate::param::{Init, LayerSpec, ParamSpec};
use crate::tensor::{SplitUnits, TensorSplit};

/// What a GPT-2 `config.json` says.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Gpt2Config {
    /// Token ids.
    pub vocab_size: usize,
    /// Longest sequence: positions are learned.
    pub n_positions: usize,
    /// Width between layers.
    pub n_embd: usize,
    /// Blocks.
    pub n_layer: usize,
    /// Heads.
    pub n_head: usize,
    /// Width of the MLP.
    pub n_inner: usize,
    /// Added to the variance.
    pub layer_norm_epsilon: f64,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Standard deviation of new weights.
    pub initializer_range: f64,
    /// Dropout, while training, of what a block's two branches add to the residual.
    pub resid_pdrop: f64,
    /// Of the sum of the embeddings.
    pub embd_pdrop: f64,
    /// Of the attention's probabilities.
    pub attn_pdrop: f64,
}

impl Gpt2Config {
    /// Reads the content of a `config.json`.
    ///
    /// # Errors
    /// [`ModelConfigError`], which names the key.
    pub fn from_json(json: &Value) -> Result<Self, ModelConfigError> {
        let read = Reader(json);
        let gelu = [json!("gelu_new"), json!("gelu_pytorch_tanh")];
        read.only("activation_function", &gelu, "the MLP uses `gelu_new`")?;
        read.only("scale_attn_weights", &[json!(true)], "scores are scaled by the head's width")?;
        read.only(
            "scale_attn_by_inverse_layer_idx",
            &[json!(false)],
            "scores are scaled alike in every layer",
        )?;
        read.only("add_cross_attention", &[json!(false)], "only the decoder is built")?;
        let (n_embd, n_head) = (read.size("n_embd")?, read.size("n_head")?);
        if !n_embd.is_multiple_of(n_head) {
            return Err(invalid(
                "n_head",
                &json!(n_head),
                format!("a divisor of `n_embd`, which is {n_embd}"),
            ));
        }
        Ok(Gpt2Config {
            vocab_size: read.size("vocab_size")?,
            n_positions: read.size_or("n_positions", Some(1024))?,
            n_embd,
            n_layer: read.size("n_layer")?,
            n_head,
            n_inner: read.size_or("n_inner", Some(4 * n_embd))?,
            layer_norm_epsilon: read.number_or("layer_norm_epsilon", 1e-5)?,
            tie_word_embeddings: read.flag_or("tie_word_embeddings", true)?,
            initializer_range: read.number_or("initializer_range", 0.02)?,
            resid_pdrop: read.dropout_or("resid_pdrop", 0.1)?,
            embd_pdrop: read.dropout_or("embd_pdrop", 0.1)?,
            attn_pdrop: read.dropout_or("attn_pdrop", 0.1)?,
        })
    }

    /// Embeddings, blocks, head (with the final norm).
    pub fn layers(&self) -> Vec<LayerSpec> {
        let d = self.n_embd;
        let embedding = ParamSpec::new("transformer", "wte.weight", &[self.vocab_size, d], self.init())
            .split(TensorSplit::VOCABULARY);
        let positions = ParamSpec::new("transformer", "wpe.weight", &[self.n_positions, d], self.init());
        let mut head = LayerSpec {
            name: "lm_head".into(),
            params: vec![
                ParamSpec::new("transformer", "ln_f.weight", &[d], Init::Ones),
                ParamSpec::new("transformer", "ln_f.bias", &[d], Init::Zeros),
            ],
        };
        head.params.push(match self.tie_word_embeddings {
            true => ParamSpec { key: "weight".into(), ..embedding.clone() },
            false => ParamSpec::new("lm_head", "weight", &[self.vocab_size, d], self.init())
                .split(TensorSplit::VOCABULARY),
        });
        let mut layers =
            vec![LayerSpec { name: "transformer.embeddings".into(), params: vec![embedding, positions] }];
        layers.extend((0..self.n_layer).map(|i| self.block(i)));
        layers.push(head);
        layers
    }

    fn block(&self, index: usize) -> LayerSpec {
        let name = format!("transformer.h.{index}");
        let (d, f) = (self.n_embd, self.n_inner);
        // Residual branches are born smaller, by the square root of how many there are.
        let residual = normal(self.initializer_range / (2.0 * self.n_layer as f64).sqrt());
        let mut params = Vec::new();
        let mut push = |key: &str, shape: &[usize], init, split: Option<TensorSplit>| {
            params.push(ParamSpec { split, ..ParamSpec::new(&name, key, shape, init) });
        };
        // Matrices are `[in, out]`. Biases of those that are cut by their inputs are whole: they are added once, to the sum.
        let heads = TensorSplit::of(0, SplitUnits::Heads(self.n_head));
        let features = TensorSplit::of(0, SplitUnits::Features);
        let by_outputs = |split: TensorSplit| Some(TensorSplit { dim: 1, ..split });
        push("ln_1.weight", &[d], Init::Ones, None);
        push("ln_1.bias", &[d], Init::Zeros, None);
        push("attn.c_attn.weight", &[d, 3 * d], self.init(), by_outputs(heads.blocks(3)));
        push("attn.c_attn.bias", &[3 * d], Init::Zeros, Some(heads.blocks(3)));
        push("attn.c_proj.weight", &[d, d], residual, Some(heads));
        push("attn.c_proj.bias", &[d], Init::Zeros, None);
        push("ln_2.weight", &[d], Init::Ones, None);
        push("ln_2.bias", &[d], Init::Zeros, None);
        push("mlp.c_fc.weight", &[d, f], self.init(), by_outputs(features));
        push("mlp.c_fc.bias", &[f], Init::Zeros, Some(features));
        push("mlp.c_proj.weight", &[f, d], residual, Some(features));
        push("mlp.c_proj.bias", &[d], Init::Zeros, None);
        LayerSpec { name, params }
    }

    fn init(&self) -> Init {
        normal(self.initializer_range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_gpt2_124m() {
        let json = json!({"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
                          "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0});
        let layers = Gpt2Config::from_json(&json).unwrap().layers();
        let units = crate::layout::units_of(&layers, 1, |_| false);
        assert_eq!(units.iter().map(|u| u.numel()).sum::<usize>(), 124_439_808);
    }

    #[test]
    fn dropout_is_a_tenth_unless_the_file_says_otherwise() {
        let mut json = json!({"vocab_size": 10, "n_embd": 4, "n_layer": 1, "n_head": 2, "embd_pdrop": 0.0});
        let config = Gpt2Config::from_json(&json).unwrap();
        assert_eq!((config.resid_pdrop, config.embd_pdrop, config.attn_pdrop), (0.1, 0.0, 0.1));
        for (rate, shown) in [(json!(1.0), "`1.0`"), (json!(-0.1), "`-0.1`"), (json!("no"), "`no`")] {
            json["attn_pdrop"] = rate;
            let error = Gpt2Config::from_json(&json).unwrap_err().to_string();
            assert!(error.starts_with(&format!("`attn_pdrop` is {shown}, expected a number")), "{error}");
        }
    }
}
