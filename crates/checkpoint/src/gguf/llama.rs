//! A Llama in llama.cpp's terms: its keys, its names of tensors, its order of rows.
//!
//! Rotary positions turn pairs of a head's channels. Hugging Face's files pair channel `i` with `i + width/2`;
//! llama.cpp pairs neighbours, so its converter interleaves the two halves of every head in the rows of q and k. On the
//! way in that has to be undone, or the model runs and talks nonsense.
//!
//! ```text
//! rows of one head of width 6    Hugging Face   0 1 2 3 4 5
//!                                GGUF           0 3 1 4 2 5
//! ```

use serde_json::{Value, json};

use crate::CheckpointError;
use crate::gguf::{GgufProblem, GgufReader, GgufValue};

/// The shape of a Llama, as the keys of a GGUF file give it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Llama {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_layers: usize,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    max_positions: usize,
    rms_norm_eps: f64,
    rope_theta: f64,
    has_head: bool,
    attention_bias: bool,
    mlp_bias: bool,
}

/// One tensor to import.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Wanted {
    pub gguf_name: String,
    pub hf_name: String,
    pub shape: Vec<usize>,
    pub rows: Rows,
}

/// The order of a tensor's rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rows {
    AsTheyAre,
    /// The two halves of each head are interleaved.
    Interleaved {
        head_dim: usize,
    },
}

impl Llama {
    /// Reads the keys of a model and refuses what its arithmetic would need that is not known here.
    pub(super) fn read(file: &GgufReader) -> Result<Llama, CheckpointError> {
        let keys = Keys(file);
        match keys.get("general.architecture")? {
            GgufValue::Str("llama") => {}
            other => return Err(keys.wrong("general.architecture", other, "`llama`")),
        }
        for key in ["llama.expert_count", "llama.expert_used_count"] {
            keys.only(key, |value| value.as_u64() == Some(0), "0: mixtures of experts are not supported")?;
        }
        let unscaled = "`none`: scaled rotary positions are not supported";
        keys.only("llama.rope.scaling.type", |value| value == GgufValue::Str("none"), unscaled)?;
        keys.only("llama.rope.scale_linear", |value| value.as_f64() == Some(1.0), "1")?;

        let hidden_size = keys.size("llama.embedding_length")?;
        let num_heads = keys.size("llama.attention.head_count")?;
        let num_kv_heads = keys.size_or("llama.attention.head_count_kv", num_heads)?;
        let head_dim = keys.size_or("llama.attention.key_length", hidden_size / num_heads)?;
        let model = Llama {
            // Padded or not, the embedding decides.
            vocab_size: file.info("token_embd.weight")?.shape.first().copied().unwrap_or(0),
            hidden_size,
            intermediate_size: keys.size("llama.feed_forward_length")?,
            num_layers: keys.size("llama.block_count")?,
            num_heads,
            num_kv_heads,
            head_dim,
            max_positions: keys.size("llama.context_length")?,
            rms_norm_eps: keys.positive("llama.attention.layer_norm_rms_epsilon", None)?,
            rope_theta: keys.positive("llama.rope.freq_base", Some(10_000.0))?,
            has_head: file.contains("output.weight"),
            attention_bias: file.contains("blk.0.attn_q.bias"),
            mlp_bias: file.contains("blk.0.ffn_gate.bias"),
        };
        let whole_head = |value: GgufValue<'_>| value.as_u64() == Some(head_dim as u64);
        let expected = format!("the width of a head, {head_dim}");
        keys.only("llama.rope.dimension_count", whole_head, &expected)?;
        keys.only("llama.attention.value_length", whole_head, &expected)?;
        if head_dim == 0 || head_dim % 2 != 0 {
            let heads = GgufValue::Unsigned(num_heads as u64);
            return Err(keys.wrong("llama.attention.head_count", heads, "heads of an even width"));
        }
        // Every block has tensors in the file, so this bounds what follows.
        if model.num_layers > file.tensors().len() {
            let layers = GgufValue::Unsigned(model.num_layers as u64);
            return Err(keys.wrong("llama.block_count", layers, "at most the number of tensors"));
        }
        Ok(model)
    }

    /// `config.json`, but for the tokens that the tokenizer names.
    pub(super) fn config(&self) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": self.attention_bias,
            "attention_dropout": 0.0,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_positions,
            "mlp_bias": self.mlp_bias,
            "model_type": "llama",
            "num_attention_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "pretraining_tp": 1,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": null,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": !self.has_head,
            "use_cache": true,
            "vocab_size": self.vocab_size,
        })
    }

    /// All tensors of the model in the order of its layers; one without a place among them is refused.
    pub(super) fn tensors(&self, file: &GgufReader) -> Result<Vec<Wanted>, CheckpointError> {
        let (d, f) = (self.hidden_size, self.intermediate_size);
        // A width that overflows is no tensor's.
        let width = |num_heads: usize| num_heads.saturating_mul(self.head_dim);
        let (q, kv) = (width(self.num_heads), width(self.num_kv_heads));
        let interleaved = Rows::Interleaved { head_dim: self.head_dim };
        let wanted = |gguf_name: String, hf_name: String, shape: &[usize], rows| Wanted {
            gguf_name,
            hf_name,
            shape: shape.to_vec(),
            rows,
        };
        let whole =
            |gguf: &str, hf: &str, shape: &[usize]| wanted(gguf.into(), hf.into(), shape, Rows::AsTheyAre);

        let mut tensors =
            vec![whole("token_embd.weight", "model.embed_tokens.weight", &[self.vocab_size, d])];
        for layer in 0..self.num_layers {
            for (gguf, hf) in [("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")] {
                let gguf = format!("blk.{layer}.{gguf}.weight");
                let hf = format!("model.layers.{layer}.{hf}.weight");
                tensors.push(wanted(gguf, hf, &[d], Rows::AsTheyAre));
            }
            for (gguf, hf, out, input, rows, bias) in [
                ("attn_q", "self_attn.q_proj", q, d, interleaved, self.attention_bias),
                ("attn_k", "self_attn.k_proj", kv, d, interleaved, self.attention_bias),
                ("attn_v", "self_attn.v_proj", kv, d, Rows::AsTheyAre, self.attention_bias),
                ("attn_output", "self_attn.o_proj", d, q, Rows::AsTheyAre, self.attention_bias),
                ("ffn_gate", "mlp.gate_proj", f, d, Rows::AsTheyAre, self.mlp_bias),
                ("ffn_up", "mlp.up_proj", f, d, Rows::AsTheyAre, self.mlp_bias),
                ("ffn_down", "mlp.down_proj", d, f, Rows::AsTheyAre, self.mlp_bias),
            ] {
                let [weight, of_bias] = ["weight", "bias"].map(|part| {
                    (format!("blk.{layer}.{gguf}.{part}"), format!("model.layers.{layer}.{hf}.{part}"))
                });
                tensors.push(wanted(weight.0, weight.1, &[out, input], rows));
                if bias {
                    tensors.push(wanted(of_bias.0, of_bias.1, &[out], rows));
                }
            }
        }
        tensors.push(whole("output_norm.weight", "model.norm.weight", &[d]));
        if self.has_head {
            tensors.push(whole("output.weight", "lm_head.weight", &[self.vocab_size, d]));
        }
        check(file, &tensors)?;
        Ok(tensors)
    }
}

/// Whether the file holds just these tensors, in their shapes and readable.
fn check(file: &GgufReader, wanted: &[Wanted]) -> Result<(), CheckpointError> {
    let mut places = std::collections::HashSet::with_capacity(wanted.len());
    for tensor in wanted {
        let info = file.info(&tensor.gguf_name)?;
        if info.shape != tensor.shape {
            return Err(CheckpointError::WrongShape {
                name: tensor.gguf_name.clone(),
                path: file.path().to_owned(),
                expected: tensor.shape.clone(),
                got: info.shape.clone(),
            });
        }
        if !info.ggml_type.is_readable() {
            let (name, ggml_type) = (tensor.gguf_name.clone(), info.ggml_type);
            return Err(file.problem(GgufProblem::UnsupportedType { name, ggml_type }));
        }
        places.insert(tensor.gguf_name.as_str());
    }
    match file.tensors().iter().find(|tensor| !places.contains(tensor.name.as_str())) {
        Some(stray) => Err(file.problem(GgufProblem::StrayTensor { name: stray.name.clone() })),
        None => Ok(()),
    }
}

/// Puts the rows of one head back in order: `rows` of `row_numel` elements each, from `interleaved`.
pub(super) fn deinterleave(interleaved: &[f32], row_numel: usize, rows: &mut [f32]) {
    let half = rows.len() / row_numel / 2;
    for (i, row) in rows.chunks_exact_mut(row_numel).enumerate() {
        let from = 2 * (i % half) + i / half;
        row.copy_from_slice(&interleaved[from * row_numel..][..row_numel]);
    }
}

/// Typed access to keys.
struct Keys<'a>(&'a GgufReader);

impl Keys<'_> {
    fn get(&self, key: &str) -> Result<GgufValue<'_>, CheckpointError> {
        self.0.value(key).ok_or_else(|| self.0.problem(GgufProblem::MissingKey { key: key.to_owned() }))
    }

    /// A size: a whole number from 1 that later products can hold.
    fn size(&self, key: &str) -> Result<usize, CheckpointError> {
        let value = self.get(key)?;
        match value.as_u64() {
            Some(size @ 1..=0xffff_ffff) => Ok(size as usize),
            _ => Err(self.wrong(key, value, "a whole number from 1")),
        }
    }

    fn size_or(&self, key: &str, default: usize) -> Result<usize, CheckpointError> {
        self.0.value(key).map_or(Ok(default), |_| self.size(key))
    }

    fn positive(&self, key: &str, default: Option<f64>) -> Result<f64, CheckpointError> {
        if let (None, Some(default)) = (self.0.value(key), default) {
            return Ok(default);
        }
        let value = self.get(key)?;
        match value.as_f64() {
            Some(number) if number.is_finite() && number > 0.0 => Ok(number),
            _ => Err(self.wrong(key, value, "a number above 0")),
        }
    }

    /// Refuses a value that is there and is not good.
    fn only(
        &self,
        key: &str,
        is_good: impl Fn(GgufValue<'_>) -> bool,
        expected: &str,
    ) -> Result<(), CheckpointError> {
        match self.0.value(key) {
            Some(value) if !is_good(value) => Err(self.wrong(key, value, expected)),
            _ => Ok(()),
        }
    }

    fn wrong(&self, key: &str, got: GgufValue<'_>, expected: &str) -> CheckpointError {
        let (key, got, expected) = (key.to_owned(), got.to_string(), expected.to_owned());
        self.0.problem(GgufProblem::WrongValue { key, got, expected })
    }
}
