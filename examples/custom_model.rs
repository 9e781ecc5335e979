//! A model of your own in one file: a small MLP learns `sin(x)` on two ranks with ZeRO-3.
//!
//!     cargo run --release -p shardwise-engine --example custom_model

use shardwise_comm::thread;
use shardwise_engine::{Batch, Context, Engine, EngineError, EngineOptions, Layer, Params, RandomInit, ops};
use shardwise_plan::{Init, LayerSpec, NamePattern, ParamSpec, ZeroStage};
use shardwise_torch::tch::Reduction;
use shardwise_torch::{Kind, Tensor};
use shardwise_zero::{AdamOptions, Optimizer, ParamGroup, ZeroOptions};

/// `tanh(x W^T + b)`; the last one has no `tanh` and compares with the target instead.
struct Dense {
    name: String,
    inputs: usize,
    outputs: usize,
    is_last: bool,
}

impl Layer for Dense {
    fn spec(&self) -> LayerSpec {
        let bound = 1.0 / (self.inputs as f32).sqrt();
        let weight =
            ParamSpec::new(&self.name, "weight", &[self.outputs, self.inputs], Init::Uniform { bound });
        let bias = ParamSpec::new(&self.name, "bias", &[self.outputs], Init::Uniform { bound });
        LayerSpec { name: self.name.clone(), params: vec![weight, bias] }
    }

    fn forward(&self, context: &Context<'_>, params: &Params<'_>, x: &Tensor) -> Result<Tensor, EngineError> {
        let y = ops::linear(context, x, params.get("weight")?, Some(params.get("bias")?))?;
        match context.target {
            _ if !self.is_last => Ok(y.f_tanh()?),
            Some(target) => Ok(y.f_mse_loss(target, Reduction::Mean)?),
            None => Ok(y),
        }
    }
}

/// Points on the curve: another set for each step and rank.
fn batch(step: usize, rank: usize) -> Result<Batch, EngineError> {
    let x: Vec<f32> = (0..64).map(|i| ((i * 37 + step * 11 + rank * 5) % 64) as f32 / 10.0 - 3.2).collect();
    let input = Tensor::f_from_slice(&x)?.f_view([64, 1])?.f_to_kind(Kind::Float)?;
    // Where the rows stand in the run: dropout would want to know.
    let first_row = 64 * (2 * step + rank) as u64;
    Ok(Batch { target: input.f_sin()?, input, first_row })
}

fn main() {
    let losses = thread::run(2, |group| {
        let sizes = [1, 64, 64, 1];
        let layers = (0..3).map(|i| {
            let (inputs, outputs) = (sizes[i], sizes[i + 1]);
            Box::new(Dense { name: format!("dense.{i}"), inputs, outputs, is_last: i == 2 }) as Box<dyn Layer>
        });
        let adamw = Optimizer::AdamW(AdamOptions::default());
        let no_decay = ParamGroup::no_decay(vec![NamePattern::new("*.bias")]);
        let zero = ZeroOptions {
            clip_grad_norm: Some(1.0),
            groups: vec![no_decay],
            ..ZeroOptions::new(ZeroStage::Three, adamw)
        };
        let rank = group.group_rank();
        let options = EngineOptions::new(zero);
        let mut engine = Engine::new(layers.collect(), options, group, &mut RandomInit { seed: 0 })?;
        (0..300).map(|step| Ok(engine.train_step(1e-2, |_| Ok(batch(step, rank)?))?.loss)).collect()
    });
    let losses: Result<Vec<Vec<f64>>, EngineError> = losses.into_iter().collect();
    match losses {
        Ok(losses) => println!("loss {:.4} -> {:.6}", losses[0][0], losses[0][299]),
        Err(error) => eprintln!("error: {error}"),
    }
}
