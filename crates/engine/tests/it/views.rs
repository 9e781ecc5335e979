//! What libtorch may do with memory: outputs that are views of parameters, gradients laid out in other ways, or sparse.

use shardwise_comm::{solo, thread};
use shardwise_device::DType;
use shardwise_engine::{Batch, Context, EngineError, Layer, Params};
use shardwise_plan::{Init, LayerSpec, ParamSpec, ZeroStage};
use shardwise_torch::{Kind, Tensor};

use crate::layers::{Dense, Embedding, Flatten, Head};
use crate::runs::{LR, Run, engine, options, weights};

/// Its output is its parameter, seen in another shape.
struct Latents;

impl Layer for Latents {
    fn spec(&self) -> LayerSpec {
        let param = ParamSpec::new("latents", "weight", &[5, 3], Init::Normal { std: 1.0 });
        LayerSpec { name: "latents".into(), params: vec![param] }
    }

    fn forward(&self, _: &Context<'_>, params: &Params<'_>, x: &Tensor) -> Result<Tensor, EngineError> {
        Ok(params.get("weight")?.f_narrow(0, 1, 4)?.f_expand([x.size()[0], 4, 3], false)?)
    }
}

struct Sum;

impl Layer for Sum {
    fn spec(&self) -> LayerSpec {
        LayerSpec { name: "sum".into(), params: vec![ParamSpec::new("sum", "weight", &[3], Init::Ones)] }
    }

    fn forward(&self, _: &Context<'_>, params: &Params<'_>, x: &Tensor) -> Result<Tensor, EngineError> {
        let y = x.f_mul(params.get("weight")?)?;
        Ok(y.f_mul(&y)?.f_mean(Kind::Float)?)
    }
}

/// A layer may hand out its parameter: the next layer must not read memory that was released or has moved.
#[test]
fn an_output_that_is_a_view_of_a_parameter_survives_its_release() {
    let train = |stage| {
        let run = Run::new(2, stage, DType::F32);
        thread::run(2, |group| {
            let rank = group.group_rank();
            let layers: Vec<Box<dyn Layer>> = vec![Box::new(Latents), Box::new(Sum)];
            let mut engine = engine(layers, options(stage, DType::F32), group).unwrap();
            let reports: Vec<_> = (0..4)
                .map(|step| {
                    engine.train_step(LR, |microbatch| Ok(run.batch(rank, step, microbatch))).unwrap()
                })
                .collect();
            let asked = engine.predict(&run.batch(0, 0, 0).input).unwrap().double_value(&[]);
            (reports, asked, weights(&mut engine))
        })
    };
    let expected = train(ZeroStage::Zero);
    assert!(expected[0].0[3].loss < expected[0].0[0].loss);
    for stage in ZeroStage::ALL {
        assert!(train(stage) == expected, "stage {stage}");
    }
}

/// `x W`, or `x W^T` and the mean square of that: one weight, whose two gradients libtorch lays out differently.
struct Tied {
    is_last: bool,
}

impl Layer for Tied {
    fn spec(&self) -> LayerSpec {
        let weight = ParamSpec::new("", "shared", &[6, 4], Init::Normal { std: 1.0 });
        LayerSpec { name: if self.is_last { "second" } else { "first" }.into(), params: vec![weight] }
    }

    fn forward(&self, _: &Context<'_>, params: &Params<'_>, x: &Tensor) -> Result<Tensor, EngineError> {
        let weight = params.get("shared")?;
        if !self.is_last {
            return Ok(x.f_matmul(weight)?);
        }
        let y = x.f_matmul(&weight.f_tr()?)?;
        Ok(y.f_mul(&y)?.f_mean(Kind::Float)?)
    }
}

#[test]
fn gradients_of_any_layout_reach_their_elements() {
    let numbers = [0.5f32, -1.0, 2.0, 1.0, 0.25, -0.75, 1.5, 0.1, -0.4, 0.9, -2.0, 0.3];
    let first = || Box::new(Tied { is_last: false }) as Box<dyn Layer>;
    let second = || Box::new(Tied { is_last: true }) as Box<dyn Layer>;
    for (layers, rows, width) in [(vec![second()], 3, 4), (vec![first(), second()], 2, 6)] {
        let is_tied = layers.len() == 2;
        let input = Tensor::from_slice(&numbers).view([rows, width]);
        let batch = || Batch { input: input.shallow_clone(), target: input.shallow_clone(), first_row: 0 };
        let mut engine = engine(layers, options(ZeroStage::Three, DType::F32), solo()).unwrap();
        let before = weights(&mut engine).remove(0).1;
        engine.train_step(LR, |_| Ok(batch())).unwrap();
        let after = weights(&mut engine).remove(0).1;

        // The same in one graph, and AdamW's first step by hand.
        let w = Tensor::from_slice(&before).view([6, 4]).set_requires_grad(true);
        let x = if is_tied { input.matmul(&w) } else { input.shallow_clone() };
        let y = x.matmul(&w.tr());
        (&y * &y).mean(Kind::Float).backward();
        let grads = Vec::<f32>::try_from(w.grad().contiguous().view(-1)).unwrap();
        for ((before, after), g) in before.iter().zip(after).zip(grads) {
            let expected = before * (1.0 - LR as f32 * 0.1) - LR as f32 * g / (g.abs() + 1e-8);
            assert!((after - expected).abs() < 1e-6, "{after}, expected {expected}");
        }
    }
}

/// As [`Embedding`], with a gradient that holds only the rows in use.
struct SparseEmbedding;

impl Layer for SparseEmbedding {
    fn spec(&self) -> LayerSpec {
        Embedding.spec()
    }

    fn forward(&self, _: &Context<'_>, params: &Params<'_>, tokens: &Tensor) -> Result<Tensor, EngineError> {
        Ok(Tensor::f_embedding(params.get("weight")?, tokens, -1, false, true)?)
    }
}

#[test]
fn sparse_gradients_are_made_dense() {
    let train = |is_sparse: bool| {
        let run = Run::new(2, ZeroStage::Two, DType::F32);
        thread::run(2, |group| {
            let rank = group.group_rank();
            let embedding: Box<dyn Layer> =
                if is_sparse { Box::new(SparseEmbedding) } else { Box::new(Embedding) };
            let middle = Dense { name: "mid", inputs: 7, outputs: 7 };
            let layers = vec![embedding, Box::new(Flatten), Box::new(middle), Box::new(Head)];
            let mut engine = engine(layers, options(ZeroStage::Two, DType::F32), group).unwrap();
            let step =
                |step| engine.train_step(LR, |microbatch| Ok(run.batch(rank, step, microbatch))).unwrap();
            let reports: Vec<_> = (0..3).map(step).collect();
            (reports[2].loss, weights(&mut engine))
        })
    };
    for ((loss, weights), (dense_loss, dense_weights)) in train(true).into_iter().zip(train(false)) {
        assert!((loss - dense_loss).abs() < 1e-6, "{loss} {dense_loss}");
        for ((name, values), (_, dense)) in weights.iter().zip(&dense_weights) {
            // Rows that occur twice are added in another order.
            let worst = values.iter().zip(dense).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-5, "`{name}`: {worst}");
        }
    }
}
