//! A small model in which nothing divides, with all that makes sharding hard: a tied parameter, one without gradient, one
//! whose gradient depends on the data, a layer without parameters.

use shardwise_engine::ops::{Dropout, Rotary};
use shardwise_engine::{Context, EngineError, Layer, Params, ops};
use shardwise_plan::{Init, LayerSpec, ParamSpec};
use shardwise_torch::{Kind, Tensor};

pub const VOCAB: usize = 11;
/// A token that makes everything behind it not a number.
pub const BAD_TOKEN: i64 = 10;
const WIDTH: usize = 7;

fn uniform(layer: &str, key: &str, shape: &[usize]) -> ParamSpec {
    ParamSpec::new(layer, key, shape, Init::Uniform { bound: 0.4 })
}

/// Token vectors.
pub struct Embedding;

impl Layer for Embedding {
    fn spec(&self) -> LayerSpec {
        LayerSpec { name: "embedding".into(), params: vec![uniform("embedding", "weight", &[VOCAB, WIDTH])] }
    }

    fn forward(&self, _: &Context<'_>, params: &Params<'_>, tokens: &Tensor) -> Result<Tensor, EngineError> {
        let x = Tensor::f_embedding(params.get("weight")?, tokens, -1, false, false)?;
        let is_bad = tokens.f_eq(BAD_TOKEN)?.f_any()?.f_int64_value(&[])? != 0;
        Ok(if is_bad { x.f_mul_scalar(f64::NAN)? } else { x })
    }
}

/// `tanh(x W^T + b)`, and a parameter that it does not use.
pub struct Dense {
    pub name: &'static str,
    pub inputs: usize,
    pub outputs: usize,
}

impl Layer for Dense {
    fn spec(&self) -> LayerSpec {
        let param = |key, shape: &[usize]| uniform(self.name, key, shape);
        let weight = param("weight", &[self.outputs, self.inputs]);
        LayerSpec {
            name: self.name.into(),
            params: vec![weight, param("unused", &[5]), param("bias", &[self.outputs])],
        }
    }

    fn forward(&self, context: &Context<'_>, params: &Params<'_>, x: &Tensor) -> Result<Tensor, EngineError> {
        Ok(ops::linear(context, x, params.get("weight")?, Some(params.get("bias")?))?.f_tanh()?)
    }
}

/// A layer without parameters, whose output is a view of its input.
pub struct Flatten;

impl Layer for Flatten {
    fn spec(&self) -> LayerSpec {
        LayerSpec { name: "flatten".into(), params: vec![] }
    }

    fn forward(&self, _: &Context<'_>, _: &Params<'_>, x: &Tensor) -> Result<Tensor, EngineError> {
        let width = x.size().last().copied().unwrap_or(1);
        Ok(x.f_view([-1, width])?)
    }
}

/// Scales its input, but only for every second micro-batch or so: one rank may have a gradient of it and another none.
pub struct Sometimes;

impl Layer for Sometimes {
    fn spec(&self) -> LayerSpec {
        LayerSpec { name: "sometimes".into(), params: vec![uniform("sometimes", "scale", &[5])] }
    }

    fn forward(&self, _: &Context<'_>, params: &Params<'_>, x: &Tensor) -> Result<Tensor, EngineError> {
        let scale = params.get("scale")?;
        let is_used = x.f_select(1, 0)?.f_sum(Kind::Float)?.f_double_value(&[])? > 0.0;
        Ok(if is_used { x.f_mul(&scale.f_add_scalar(1.0)?)? } else { x.shallow_clone() })
    }
}

/// Drops some of its input.
pub struct Dropping {
    dropout: Dropout,
    name: String,
}

impl Dropping {
    fn boxed(name: &str, rate: f64) -> Box<dyn Layer> {
        Box::new(Dropping { dropout: Dropout::new(name, "input", rate), name: name.into() })
    }
}

impl Layer for Dropping {
    fn spec(&self) -> LayerSpec {
        LayerSpec { name: self.name.clone(), params: vec![] }
    }

    fn forward(&self, context: &Context<'_>, _: &Params<'_>, x: &Tensor) -> Result<Tensor, EngineError> {
        self.dropout.apply(context, x)
    }
}

/// [`model`], with elements dropped before the block and again behind it, where rows are flattened.
pub fn dropping_model(gradients: Gradients, rate: f64) -> Vec<Box<dyn Layer>> {
    let mut layers = model(gradients);
    layers.insert(4, Dropping::boxed("drop.late", rate));
    layers.insert(2, Dropping::boxed("drop.early", rate));
    layers
}

/// A decoder block of [`MID`] columns: what real models are made of, fused operations and all.
pub struct Block;

const MID: usize = 15;
const HEAD_DIM: usize = 4;
const HEADS: usize = 2;

impl Layer for Block {
    fn spec(&self) -> LayerSpec {
        let param = |key, shape: &[usize]| uniform("block", key, shape);
        let (width, kv_width) = (HEADS * HEAD_DIM, HEAD_DIM);
        let params = vec![
            ParamSpec::new("block", "norm", &[MID], Init::Ones),
            param("q", &[width, MID]),
            param("k", &[kv_width, MID]),
            param("v", &[kv_width, MID]),
            param("o", &[MID, width]),
            param("gate", &[6, MID]),
            param("up", &[6, MID]),
            param("down", &[MID, 6]),
        ];
        LayerSpec { name: "block".into(), params }
    }

    fn forward(&self, context: &Context<'_>, params: &Params<'_>, x: &Tensor) -> Result<Tensor, EngineError> {
        let (b, t, _) = x.size3()?;
        let linear = |key: &str, x: &Tensor| ops::linear(context, x, params.get(key)?, None);
        let heads = |x: Tensor| -> Result<Tensor, EngineError> {
            Ok(x.f_view([b, t, -1, HEAD_DIM as i64])?.f_transpose(1, 2)?)
        };
        let table = Rotary { head_dim: HEAD_DIM, theta: 100.0, scaling: None }.table(t as usize)?;
        let normed = ops::rms_norm(context, x, params.get("norm")?, 1e-5)?;
        let q = table.rotate(context, &heads(linear("q", &normed)?)?)?;
        let k = table.rotate(context, &heads(linear("k", &normed)?)?)?;
        let out = ops::causal_attention(&q, &k, &heads(linear("v", &normed)?)?)?;
        let x = x.f_add(&linear("o", &out.f_transpose(1, 2)?.f_reshape([b, t, -1])?)?)?;
        Ok(x.f_add(&linear("down", &ops::swiglu(context, &linear("gate", &x)?, &linear("up", &x)?)?)?)?)
    }
}

/// Scores with the embedding's own weight; with a target, their mean cross-entropy.
pub struct Head;

impl Layer for Head {
    fn spec(&self) -> LayerSpec {
        let tied = ParamSpec { key: "proj".into(), ..Embedding.spec().params.remove(0) };
        LayerSpec { name: "head".into(), params: vec![tied, uniform("head", "bias", &[WIDTH])] }
    }

    fn forward(&self, context: &Context<'_>, params: &Params<'_>, x: &Tensor) -> Result<Tensor, EngineError> {
        let x = x.f_add(params.get("bias")?)?;
        match context.target {
            Some(target) => ops::linear_cross_entropy(context, &x, params.get("proj")?, target),
            None => ops::linear(context, &x, params.get("proj")?, None),
        }
    }
}

/// Whether the model holds the layer that makes ranks differ in what has a gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gradients {
    /// Every micro-batch has the same gradients: what is split another way adds up to the same.
    Always,
    /// Some have none.
    Sometimes,
}

/// The whole model.
pub fn model(gradients: Gradients) -> Vec<Box<dyn Layer>> {
    let mut layers: Vec<Box<dyn Layer>> = vec![
        Box::new(Embedding),
        Box::new(Dense { name: "up", inputs: WIDTH, outputs: MID }),
        Box::new(Block),
        Box::new(Flatten),
        Box::new(Dense { name: "mid", inputs: MID, outputs: 17 }),
        Box::new(Dense { name: "narrow", inputs: 17, outputs: 5 }),
    ];
    if gradients == Gradients::Sometimes {
        layers.push(Box::new(Sometimes));
    }
    layers.push(Box::new(Dense { name: "down", inputs: 5, outputs: WIDTH }));
    layers.push(Box::new(Head));
    layers
}
