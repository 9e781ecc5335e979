//! The Llama family: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

use serde::Serialize;
use serde_json::{Value, json};

use super::reader::{Reader, invalid};
use super::{ModelConfigError, normal};
use crate::param::{Init, LayerSpec, ParamSpec};
use crate::tensor::{SplitUnits, TensorSplit};

/// What a Llama `config.json` says.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LlamaConfig {
    /// Token ids.
    pub vocab_size: usize,
    /// Width between layers.
    pub hidden_size: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads, each shared by a group of query heads.
    pub num_key_value_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// Added to the mean square.
    pub rms_norm_eps: f64,
    /// Base of the rotary angles.
    pub rope_theta: f64,
    /// Stretching of the rotary angles for long sequences.
    pub rope_scaling: Option<RopeScaling>,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether q, k, v and o have biases.
    pub attention_bias: bool,
    /// Whether the MLP has biases.
    pub mlp_bias: bool,
    /// Standard deviation of new weights.
    pub initializer_range: f64,
    /// Dropout of the attention's probabilities while training.
    pub attention_dropout: f64,
}

/// Llama 3's scaling of rotary frequencies.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct RopeScaling {
    /// How much the long wavelengths are stretched.
    pub factor: f64,
    /// Wavelengths above `original / low_freq_factor` are stretched whole.
    pub low_freq_factor: f64,
    /// Wavelengths below `original / high_freq_factor` stay as they are.
    pub high_freq_factor: f64,
    /// Longest sequence of the original training.
    pub original_max_position_embeddings: usize,
}

impl LlamaConfig {
    /// Reads the content of a `config.json`.
    ///
    /// # Errors
    /// [`ModelConfigError`], which names the key.
    pub fn from_json(json: &Value) -> Result<Self, ModelConfigError> {
        let read = Reader(json);
        read.only("hidden_act", &[json!("silu"), json!("swish")], "the MLP is gated with `silu`")?;
        read.only("pretraining_tp", &[json!(1)], "only `1` computes what a plain matrix product does")?;
        let hidden_size = read.size("hidden_size")?;
        let num_attention_heads = read.size("num_attention_heads")?;
        let num_key_value_heads = read.size_or("num_key_value_heads", Some(num_attention_heads))?;
        let head_dim = read.size_or("head_dim", Some((hidden_size / num_attention_heads).max(1)))?;
        if read.value("head_dim").is_none() && !hidden_size.is_multiple_of(num_attention_heads) {
            let expected = format!("a divisor of `hidden_size`, which is {hidden_size}");
            return Err(invalid("num_attention_heads", &json!(num_attention_heads), expected));
        }
        if !head_dim.is_multiple_of(2) {
            return Err(invalid("head_dim", &json!(head_dim), "an even number, for rotary positions"));
        }
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            let expected = format!("a divisor of `num_attention_heads`, which is {num_attention_heads}");
            return Err(invalid("num_key_value_heads", &json!(num_key_value_heads), expected));
        }
        // Newer files keep both rotary settings in one block.
        let rope = read.value("rope_parameters").or(read.value("rope_scaling"));
        let rope_theta = match read.value("rope_parameters") {
            Some(block) if block.get("rope_theta").is_some() => {
                Reader(block).number_or("rope_theta", 10_000.0)?
            }
            _ => read.number_or("rope_theta", 10_000.0)?,
        };
        Ok(LlamaConfig {
            vocab_size: read.size("vocab_size")?,
            hidden_size,
            intermediate_size: read.size("intermediate_size")?,
            num_hidden_layers: read.size("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            max_position_embeddings: read.size_or("max_position_embeddings", Some(2048))?,
            rms_norm_eps: read.number_or("rms_norm_eps", 1e-6)?,
            rope_theta,
            rope_scaling: rope.map(rope_scaling).transpose()?.flatten(),
            tie_word_embeddings: read.flag_or("tie_word_embeddings", false)?,
            attention_bias: read.flag_or("attention_bias", false)?,
            mlp_bias: read.flag_or("mlp_bias", false)?,
            initializer_range: read.number_or("initializer_range", 0.02)?,
            attention_dropout: read.dropout_or("attention_dropout", 0.0)?,
        })
    }

    /// Embedding, blocks, head (with the final norm).
    pub fn layers(&self) -> Vec<LayerSpec> {
        let embed = "model.embed_tokens";
        let embedding = ParamSpec::new(embed, "weight", &[self.vocab_size, self.hidden_size], self.init())
            .split(TensorSplit::VOCABULARY);
        let mut head = LayerSpec {
            name: "lm_head".into(),
            params: vec![ParamSpec {
                key: "norm.weight".into(),
                ..ParamSpec::new("model", "norm.weight", &[self.hidden_size], Init::Ones)
            }],
        };
        head.params.push(match self.tie_word_embeddings {
            true => ParamSpec { key: "weight".into(), ..embedding.clone() },
            false => ParamSpec::new("lm_head", "weight", &[self.vocab_size, self.hidden_size], self.init())
                .split(TensorSplit::VOCABULARY),
        });
        let mut layers = vec![LayerSpec { name: embed.into(), params: vec![embedding] }];
        layers.extend((0..self.num_hidden_layers).map(|i| self.block(i)));
        layers.push(head);
        layers
    }

    fn block(&self, index: usize) -> LayerSpec {
        let name = format!("model.layers.{index}");
        let (d, f) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim);
        let mut params = vec![ParamSpec::new(&name, "input_layernorm.weight", &[d], Init::Ones)];
        let mut linear = |key: &str, [out, input]: [usize; 2], bias: bool, split: TensorSplit| {
            let weight = ParamSpec::new(&name, &format!("{key}.weight"), &[out, input], self.init());
            params.push(weight.split(split));
            if bias {
                let bias = ParamSpec::new(&name, &format!("{key}.bias"), &[out], Init::Zeros);
                // Where inputs are cut, the bias is whole: it is added once, to the sum.
                params.push(if split.dim == 0 { bias.split(split) } else { bias });
            }
        };
        let heads = TensorSplit::of(0, SplitUnits::Heads(self.num_attention_heads));
        let kv_heads = TensorSplit::of(0, SplitUnits::SharedHeads(self.num_key_value_heads));
        let by_heads = TensorSplit { dim: 1, ..heads };
        linear("self_attn.q_proj", [q, d], self.attention_bias, heads);
        linear("self_attn.k_proj", [kv, d], self.attention_bias, kv_heads);
        linear("self_attn.v_proj", [kv, d], self.attention_bias, kv_heads);
        linear("self_attn.o_proj", [d, q], self.attention_bias, by_heads);
        linear("mlp.gate_proj", [f, d], self.mlp_bias, TensorSplit::OUT_IN_COLUMN);
        linear("mlp.up_proj", [f, d], self.mlp_bias, TensorSplit::OUT_IN_COLUMN);
        linear("mlp.down_proj", [d, f], self.mlp_bias, TensorSplit::OUT_IN_ROW);
        params.push(ParamSpec::new(&name, "post_attention_layernorm.weight", &[d], Init::Ones));
        LayerSpec { name, params }
    }

    fn init(&self) -> Init {
        normal(self.initializer_range)
    }
}

fn rope_scaling(block: &Value) -> Result<Option<RopeScaling>, ModelConfigError> {
    let read = Reader(block);
    let kind = read.value("rope_type").or(read.value("type")).and_then(Value::as_str).unwrap_or("default");
    match kind {
        "default" => Ok(None),
        "llama3" => {
            let positive = |key: &'static str| match read.number_or(key, 0.0)? {
                number if number > 0.0 => Ok(number),
                number => Err(invalid(key, &json!(number), "a positive number in `rope_scaling`")),
            };
            let scaling = RopeScaling {
                factor: positive("factor")?,
                low_freq_factor: positive("low_freq_factor")?,
                high_freq_factor: positive("high_freq_factor")?,
                original_max_position_embeddings: read.size("original_max_position_embeddings")?,
            };
            if scaling.high_freq_factor <= scaling.low_freq_factor {
                let expected = "more than `low_freq_factor`";
                return Err(invalid("high_freq_factor", &json!(scaling.high_freq_factor), expected));
            }
            Ok(Some(scaling))
        }
        other => Err(ModelConfigError::Unsupported {
            key: "rope_scaling.rope_type",
            got: other.to_owned(),
            instead: "`default` and `llama3` are",
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn llama() -> Value {
        json!({"model_type": "llama", "vocab_size": 16384, "hidden_size": 1024, "intermediate_size": 2816,
               "num_hidden_layers": 12, "num_attention_heads": 16})
    }

    #[test]
    fn counts_the_medium_case() {
        let config = LlamaConfig::from_json(&llama()).unwrap();
        let numel: usize = config.layers().iter().flat_map(|l| &l.params).map(ParamSpec::numel).sum();
        assert_eq!(numel, 187_720_704);
        assert_eq!((config.num_key_value_heads, config.head_dim), (16, 64));
    }

    #[test]
    fn reads_llama_3_rope_in_both_places() {
        let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 8192, "rope_theta": 500000.0});
        let mut old = llama();
        old["rope_scaling"] = scaling.clone();
        old["rope_theta"] = json!(500000.0);
        let mut new = llama();
        new["rope_parameters"] = scaling;
        let (old, new) = (LlamaConfig::from_json(&old).unwrap(), LlamaConfig::from_json(&new).unwrap());
        assert_eq!(old, new);
        assert_eq!(old.rope_theta, 500_000.0);
        assert_eq!(old.rope_scaling.unwrap().factor, 8.0);
    }

    #[test]
    fn what_the_forward_pass_does_not_follow_is_refused_by_name() {
        for (key, value, expected) in [
            ("hidden_act", json!("gelu"), "`hidden_act` is `gelu`, which is not supported yet"),
            ("rope_scaling", json!({"type": "yarn"}), "`rope_scaling.rope_type` is `yarn`"),
            ("attention_dropout", json!(1.5), "`attention_dropout` is `1.5`, expected a number from 0"),
            ("num_key_value_heads", json!(5), "`num_key_value_heads` is `5`, expected a divisor"),
            ("num_attention_heads", json!(7), "`num_attention_heads` is `7`, expected a divisor"),
            ("hidden_size", json!("big"), "`hidden_size` is `big`, expected a positive whole number"),
            ("vocab_size", json!(null), "`vocab_size` is missing"),
        ] {
            let mut config = llama();
            config[key] = value;
            let error = LlamaConfig::from_json(&config).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
