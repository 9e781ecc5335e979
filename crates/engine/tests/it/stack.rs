//! A stack of layers for any mesh, each of which can be made to fail or to spoil its gradient, on one rank and when it is told.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use shardwise_comm::{Options, thread};
use shardwise_device::DType;
use shardwise_engine::{
    Batch, Context, Engine, EngineError, EngineOptions, Layer, Params, PipelineOptions, RandomInit, Ranks,
    ops,
};
use shardwise_plan::pipeline::ScheduleKind;
use shardwise_plan::{Init, LayerSpec, Mesh, ParamSpec, TensorSplit, ZeroStage};
use shardwise_torch::function::link;
use shardwise_torch::{Kind, Tensor, TorchError, no_grad, set_num_threads};
use shardwise_zero::{Optimizer, Overlap};

use crate::runs::{LR, options};

const WIDTH: usize = 6;
/// Divides by 2 tensor ranks and not by the number of data-parallel ones.
const HIDDEN: usize = 10;
pub const NUM_PAIRS: usize = 6;

/// What a layer does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mishap {
    Forward,
    Backward,
    /// The gradient of its first matrix is not a number; what goes on to other layers is as it should be.
    Gradient,
}

/// Tells the layers of a rank what to do wrong; empty: nothing.
pub type Told = Arc<Mutex<Option<(&'static str, Mishap)>>>;

/// `x + down(tanh(up(x)))`, the first matrix cut by its outputs, the second by its inputs.
struct Pair {
    name: &'static str,
    told: Told,
}

impl Layer for Pair {
    fn spec(&self) -> LayerSpec {
        let param = |key, shape: &[usize], split| {
            ParamSpec::new(self.name, key, shape, Init::Uniform { bound: 0.4 }).split(split)
        };
        let up = param("up", &[HIDDEN, WIDTH], TensorSplit::OUT_IN_COLUMN);
        let down = param("down", &[WIDTH, HIDDEN], TensorSplit::OUT_IN_ROW);
        let bias = ParamSpec::new(self.name, "bias", &[WIDTH], Init::Zeros);
        LayerSpec { name: self.name.into(), params: vec![up, down, bias] }
    }

    fn forward(&self, context: &Context<'_>, params: &Params<'_>, x: &Tensor) -> Result<Tensor, EngineError> {
        let mishap = self.told.lock().unwrap().filter(|(name, _)| *name == self.name || *name == "*");
        let mut up = params.get("up")?.shallow_clone();
        match mishap.map(|(_, mishap)| mishap) {
            None => {}
            Some(Mishap::Forward) => return params.get("spark").map(Tensor::shallow_clone),
            Some(Mishap::Backward) => {
                let message = || "all burnt".to_owned();
                up = tap(&up, move |_| Err(TorchError::Shim { operation: "burn", message: message() }))?;
            }
            Some(Mishap::Gradient) => up = tap(&up, |grad| Ok(grad.f_mul_scalar(f64::NAN)?))?,
        }
        let hidden = ops::linear(context, &ops::enter(context, x)?, &up, None)?.f_tanh()?;
        let out = ops::row_linear(context, &hidden, params.get("down")?, Some(params.get("bias")?))?;
        Ok(x.f_add(&out)?)
    }
}

/// The same tensor, whose gradient goes through `backward`.
pub fn tap(
    x: &Tensor,
    backward: impl Fn(Tensor) -> Result<Tensor, TorchError> + Send + 'static,
) -> Result<Tensor, EngineError> {
    let y = no_grad(|| x.f_mul_scalar(1.0))?;
    link(&[x], &[&y], &[], move |mut args| match args.grads.remove(0) {
        Some(grad) => Ok(vec![Some(backward(grad)?)]),
        None => Ok(vec![None]),
    })?;
    Ok(y)
}

/// The mean of the squared distance to the target.
struct Distance;

impl Layer for Distance {
    fn spec(&self) -> LayerSpec {
        LayerSpec { name: "distance".into(), params: vec![] }
    }

    fn forward(&self, context: &Context<'_>, _: &Params<'_>, x: &Tensor) -> Result<Tensor, EngineError> {
        let Some(target) = context.target else { return Ok(x.shallow_clone()) };
        Ok(x.f_sub(&target.f_to_kind(x.kind())?)?.f_square()?.f_mean(Kind::Float)?)
    }
}

/// One way to train the stack.
#[derive(Debug, Clone)]
pub struct StackRun {
    /// Pipeline, data, tensor.
    pub mesh: [usize; 3],
    pub stage: ZeroStage,
    pub accum: usize,
    pub schedule: ScheduleKind,
    pub overlap: Overlap,
    pub frozen: Vec<String>,
    pub clip: Option<f64>,
    pub optimizer: Optimizer,
    pub lr: f64,
}

impl StackRun {
    pub fn new(mesh: [usize; 3], stage: ZeroStage) -> Self {
        StackRun {
            mesh,
            stage,
            accum: 4,
            schedule: ScheduleKind::OneForwardOneBackward,
            overlap: Overlap::Inline,
            frozen: vec![],
            clip: None,
            optimizer: options(stage, DType::F32).zero.optimizer,
            lr: LR,
        }
    }

    pub fn options(&self) -> EngineOptions {
        let mut options = options(self.stage, DType::F32);
        options.zero.grad_accum_steps = self.accum;
        options.zero.overlap = self.overlap;
        options.zero.clip_grad_norm = self.clip;
        options.zero.groups.clear();
        options.zero.optimizer = self.optimizer.clone();
        options.frozen = self.frozen.clone();
        options.pipeline = PipelineOptions { schedule: self.schedule, stages: None };
        options
    }

    pub fn engine(&self, ranks: Ranks, told: &Told) -> Engine {
        set_num_threads(1);
        let names: [_; NUM_PAIRS] = ["pair.0", "pair.1", "pair.2", "pair.3", "pair.4", "pair.5"];
        let pair = |name| Box::new(Pair { name, told: told.clone() }) as Box<dyn Layer>;
        let mut layers: Vec<_> = names.into_iter().map(pair).collect();
        layers.push(Box::new(Distance));
        Engine::new(layers, self.options(), ranks, &mut RandomInit { seed: 3 }).unwrap()
    }

    /// Micro-batches are 2 rows on each data-parallel rank.
    pub fn batch(&self, data: usize, step: usize, microbatch: usize) -> Batch {
        const ROWS: usize = 2;
        let first = ((step * self.accum + microbatch) * self.mesh[1] + data) * ROWS;
        let values =
            (first * WIDTH..(first + ROWS) * WIDTH).map(|i| ((i * i * 7 + i) % 23) as f32 / 11.0 - 1.0);
        let input = Tensor::from_slice(&values.collect::<Vec<_>>()).view([ROWS as i64, WIDTH as i64]);
        let target = input.flip([1]);
        Batch { input, target, first_row: first as u64 }
    }
}

/// Ranks that wait as long as this were not told: the tests then fail with `Stalled`.
pub fn impatient() -> Options {
    Options { deadline: Duration::from_secs(10), ..Options::default() }
}

/// Calls `f` on each rank of a mesh of pipeline, data and tensor ranks.
pub fn on_mesh<T: Send>([pipeline, data, tensor]: [usize; 3], f: impl Fn(Ranks) -> T + Sync) -> Vec<T> {
    let mesh = Mesh::new(pipeline * data * tensor, pipeline, tensor).unwrap();
    thread::run_with(mesh.world_size(), impatient(), |world| f(Ranks::new(world, mesh).unwrap()))
}
