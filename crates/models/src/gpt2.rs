//! GPT-2's forward pass.

use shardwise_engine::ops::Dropout;
use shardwise_engine::{Context, EngineError, Layer, Params, ops};
use shardwise_plan::LayerSpec;
use shardwise_plan::zoo::Gpt2Config;
use shardwise_torch::Tensor;

use crate::embedding::Embedding;
use crate::head::{FinalNorm, LmHead};

pub(crate) fn layers(config: &Gpt2Config) -> Vec<Box<dyn Layer>> {
    let mut specs = config.layers();
    let head = specs.pop().expect("a model ends with its head");
    let mut specs = specs.into_iter();
    let embedding = specs.next().expect("a model begins with its embeddings");
    let mut layers: Vec<Box<dyn Layer>> = vec![Box::new(Embedding {
        dropout: Dropout::new(&embedding.name, "embeddings", config.embd_pdrop),
        spec: embedding,
        token_key: "wte.weight",
        vocab_size: config.vocab_size,
        position_key: Some("wpe.weight"),
    })];
    for spec in specs {
        layers.push(Box::new(Block::new(spec, config)));
    }
    let norm = FinalNorm::Layer { eps: config.layer_norm_epsilon };
    layers.push(Box::new(LmHead { spec: head, norm, norm_key: "ln_f", vocab_size: config.vocab_size }));
    layers
}

/// One decoder block: attention and MLP, each behind a norm and beside a residual.
struct Block {
    spec: LayerSpec,
    config: Gpt2Config,
    /// Of the attention's probabilities, and of what the two branches add.
    probabilities_dropout: Dropout,
    attention_dropout: Dropout,
    mlp_dropout: Dropout,
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
        let eps = self.config.layer_norm_epsilon;
        let (weight, bias) = weight_and_bias(params, "ln_1")?;
        let [x_btd, normed] = ops::fork_layer_norm(context, x_btd, weight, bias, eps)?;
        let attended = self.attention(context, params, &normed)?;
        let attended = self.attention_dropout.apply_to_residual(context, &attended)?;
        let (weight, bias) = weight_and_bias(params, "ln_2")?;
        let [x_btd, normed] = ops::add_layer_norm(context, &x_btd, &attended, weight, bias, eps)?;
        let normed = ops::enter(context, &normed)?;
        let (weight, bias) = weight_and_bias(params, "mlp.c_fc")?;
        let hidden = ops::conv1d_gelu(context, &normed, weight, bias)?;
        let out = row_conv1d(context, params, "mlp.c_proj", &hidden)?;
        Ok(x_btd.f_add(&self.mlp_dropout.apply_to_residual(context, &out)?)?)
    }
}

impl Block {
    fn new(spec: LayerSpec, config: &Gpt2Config) -> Self {
        let dropout = |site, rate| Dropout::new(&spec.name, site, rate);
        Block {
            probabilities_dropout: dropout("probabilities", config.attn_pdrop),
            attention_dropout: dropout("attention", config.resid_pdrop),
            mlp_dropout: dropout("mlp", config.resid_pdrop),
            config: config.clone(),
            spec,
        }
    }

    fn attention(
        &self,
        context: &Context<'_>,
        params: &Params<'_>,
        x_btd: &Tensor,
    ) -> Result<Tensor, EngineError> {
        let x_btd = ops::enter(context, x_btd)?;
        let (b, t, d) = x_btd.size3()?;
        let head_dim = d / self.config.n_head as i64;
        // The heads of this rank: all of them, unless ranks split the layer.
        let qkv = conv1d(context, params, "attn.c_attn", &x_btd)?.f_chunk(3, 2)?;
        let split = |x: &Tensor| -> Result<Tensor, EngineError> { Ok(x.f_reshape([b, t, -1, head_dim])?) };
        let (q, k, v) = (split(&qkv[0])?, split(&qkv[1])?, split(&qkv[2])?);
        let out_bthe = ops::dropped_causal_attention(context, &self.probabilities_dropout, &q, &k, &v)?;
        row_conv1d(context, params, "attn.c_proj", &out_bthe.f_reshape([b, t, -1])?)
    }
}

fn weight_and_bias<'p>(params: &Params<'p>, name: &str) -> Result<(&'p Tensor, &'p Tensor), EngineError> {
    Ok((params.get(&format!("{name}.weight"))?, params.get(&format!("{name}.bias"))?))
}

/// A linear map, its matrix kept as `[in, out]`.
fn conv1d(context: &Context<'_>, params: &Params<'_>, name: &str, x: &Tensor) -> Result<Tensor, EngineError> {
    let (weight, bias) = weight_and_bias(params, name)?;
    ops::conv1d(context, x, weight, Some(bias))
}

/// The same, where ranks have split it by its inputs.
fn row_conv1d(
    context: &Context<'_>,
    params: &Params<'_>,
    name: &str,
    x: &Tensor,
) -> Result<Tensor, EngineError> {
    let (weight, bias) = weight_and_bias(params, name)?;
    ops::row_conv1d(context, x, weight, Some(bias))
}
