//! Llama's forward pass.
//!
//! Shape letters: B batch, T sequence, D hidden size, H heads, K key-value heads, E head width, F MLP width.

use std::sync::{Arc, Mutex};

use shardwise_engine::ops::{Dropout, Rotary, RotaryTable};
use shardwise_engine::{Context, EngineError, Layer, Params, ops};
use shardwise_plan::LayerSpec;
use shardwise_plan::zoo::LlamaConfig;
use shardwise_torch::Tensor;

use crate::ModelError;
use crate::embedding::Embedding;
use crate::head::{FinalNorm, LmHead};

pub(crate) fn layers(config: &LlamaConfig) -> Result<Vec<Box<dyn Layer>>, ModelError> {
    let rotary = Rotary { head_dim: config.head_dim, theta: config.rope_theta, scaling: config.rope_scaling };
    let table = Arc::new(Mutex::new(rotary.table(config.max_position_embeddings)?));
    let mut specs = config.layers();
    let head = specs.pop().expect("a model ends with its head");
    let mut specs = specs.into_iter();
    let embedding = specs.next().expect("a model begins with its embedding");
    let mut layers: Vec<Box<dyn Layer>> = vec![Box::new(Embedding {
        dropout: Dropout::new(&embedding.name, "embeddings", 0.0),
        spec: embedding,
        token_key: "weight",
        vocab_size: config.vocab_size,
        position_key: None,
    })];
    for spec in specs {
        let dropout = Dropout::new(&spec.name, "probabilities", config.attention_dropout);
        layers.push(Box::new(Block { spec, config: config.clone(), table: table.clone(), dropout }));
    }
    let norm = FinalNorm::Rms { eps: config.rms_norm_eps };
    layers.push(Box::new(LmHead { spec: head, norm, norm_key: "norm", vocab_size: config.vocab_size }));
    Ok(layers)
}

/// One decoder block: attention and MLP, each behind a norm and beside a residual.
struct Block {
    spec: LayerSpec,
    config: LlamaConfig,
    /// Shared by all blocks of this model. Tensors are not `Sync`, hence the lock; nobody ever waits for it.
    table: Arc<Mutex<RotaryTable>>,
    /// Of the attention's probabilities.
    dropout: Dropout,
}

impl Layer for Block {
    fn spec(&self) -> LayerSpec {
        self.spec.clone()
    }

    fn forward(
        &self,
        context: &Context<'_>,
        params: &Params<'_>,
        x_btd: &Tensor,
    ) -> Result<Tensor, EngineError> {
        let eps = self.config.rms_norm_eps;
        let weight = params.get("input_layernorm.weight")?;
        let [x_btd, normed] = ops::fork_rms_norm(context, x_btd, weight, eps)?;
        let attended = self.attention(context, params, &normed)?;
        let weight = params.get("post_attention_layernorm.weight")?;
        let [x_btd, normed] = ops::add_rms_norm(context, &x_btd, &attended, weight, eps)?;
        Ok(x_btd.f_add(&self.mlp(context, params, &normed)?)?)
    }
}

impl Block {
    fn attention(
        &self,
        context: &Context<'_>,
        params: &Params<'_>,
        x_btd: &Tensor,
    ) -> Result<Tensor, EngineError> {
        let x_btd = ops::enter(context, x_btd)?;
        let (b, t, _) = x_btd.size3()?;
        // The heads of this rank: all of them, unless ranks split the layer.
        let heads = |name: &str| -> Result<Tensor, EngineError> {
            let x = self.linear(context, params, &format!("self_attn.{name}"), &x_btd)?;
            Ok(x.f_view([b, t, -1, self.config.head_dim as i64])?)
        };
        let table = self.table.lock().expect("nobody panics while holding the table");
        let (q_bthe, k_btke) =
            (table.rotate(context, &heads("q_proj")?)?, table.rotate(context, &heads("k_proj")?)?);
        drop(table);
        let v_btke = heads("v_proj")?;
        let out_bthe = ops::dropped_causal_attention(context, &self.dropout, &q_bthe, &k_btke, &v_btke)?;
        self.row_linear(context, params, "self_attn.o_proj", &out_bthe.f_view([b, t, -1])?)
    }

    fn mlp(&self, context: &Context<'_>, params: &Params<'_>, x_btd: &Tensor) -> Result<Tensor, EngineError> {
        let x_btd = ops::enter(context, x_btd)?;
        let gate_btf = self.linear(context, params, "mlp.gate_proj", &x_btd)?;
        let up_btf = self.linear(context, params, "mlp.up_proj", &x_btd)?;
        self.row_linear(context, params, "mlp.down_proj", &ops::swiglu(context, &gate_btf, &up_btf)?)
    }

    fn linear(
        &self,
        context: &Context<'_>,
        params: &Params<'_>,
        name: &str,
        x: &Tensor,
    ) -> Result<Tensor, EngineError> {
        let (weight, bias) = (params.get(&format!("{name}.weight"))?, params.find(&format!("{name}.bias")));
        ops::linear(context, x, weight, bias)
    }

    /// The same, where ranks have split it by its inputs.
    fn row_linear(
        &self,
        context: &Context<'_>,
        params: &Params<'_>,
        name: &str,
        x: &Tensor,
    ) -> Result<Tensor, EngineError> {
        let (weight, bias) = (params.get(&format!("{name}.weight"))?, params.find(&format!("{name}.bias")));
        ops::row_linear(context, x, weight, bias)
    }
}
