//! Runs of two small models over any mesh, and what they leave behind.

use serde_json::{Value, json};
use shardwise_comm::nccl::{Library, Nccl, Search};
use shardwise_comm::staged::Staged;
use shardwise_comm::{Group, thread};
use shardwise_device::DType;
use shardwise_engine::{Batch, Engine, EngineError, EngineOptions, PipelineOptions, RandomInit, Ranks};
use shardwise_fake_gpu::{Eagerness, FakeGpu};
use shardwise_models::build;
use shardwise_plan::pipeline::ScheduleKind;
use shardwise_plan::zoo::{ModelConfig, SequenceParallel};
use shardwise_plan::{ActivationPolicy, ActivationRules, Mesh, ZeroStage};
use shardwise_torch::{Tensor, set_num_threads};
use shardwise_zero::{
    AdamOptions, BiasCorrection, LossScaling, Offload, Optimizer, Overlap, StatePrecision, StepOutcome,
    ZeroOptions,
};

/// Samples of a step, however it is split.
pub const GLOBAL_ROWS: usize = 16;
const SEQ: usize = 8;
/// Divides by no number of ranks.
const VOCAB: i64 = 37;

/// Grouped queries, two key-value heads for eight query heads; six blocks between embedding and head.
pub fn llama() -> Value {
    json!({"model_type": "llama", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48,
           "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2, "attention_bias": true})
}

/// Tied embedding and head, fused q, k and v, biases, learned positions.
pub fn gpt2() -> Value {
    json!({"model_type": "gpt2", "vocab_size": VOCAB, "n_positions": 8, "n_embd": 32, "n_layer": 6, "n_head": 8,
           "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
}

/// The same, dropping some everywhere.
pub fn dropping_gpt2() -> Value {
    let mut config = gpt2();
    for key in ["resid_pdrop", "embd_pdrop", "attn_pdrop"] {
        config[key] = 0.1.into();
    }
    config
}

/// Llama whose attention drops probabilities.
pub fn dropping_llama() -> Value {
    let mut config = llama();
    config["attention_dropout"] = 0.2.into();
    config
}

pub const SCHEDULES: [ScheduleKind; 4] = [
    ScheduleKind::GPipe,
    ScheduleKind::OneForwardOneBackward,
    ScheduleKind::Interleaved { num_chunks: 2 },
    ScheduleKind::ZeroBubble,
];

/// Where a run computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum On {
    Host,
    /// On fake GPUs. libtorch computes on the host, whose memory it takes for a GPU's; our kernels, the state and its copies
    /// are the GPU's.
    FakeGpu(Offload, Link),
}

/// How ranks on fake GPUs exchange memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// They share one, and copy by way of pinned memory.
    Staged,
    /// Each has its own, and an NCCL.
    Nccl,
}

/// One way to train a model.
#[derive(Debug, Clone)]
pub struct Run {
    pub model: Value,
    /// Pipeline, data, tensor.
    pub mesh: [usize; 3],
    pub stage: ZeroStage,
    pub compute: DType,
    pub accum: usize,
    pub schedule: ScheduleKind,
    pub sequence: SequenceParallel,
    pub activations: ActivationPolicy,
    pub overlap: Overlap,
    pub clip: Option<f64>,
    pub frozen: Vec<String>,
    pub num_steps: usize,
    pub optimizer: Optimizer,
    pub states: StatePrecision,
    pub on: On,
}

impl Run {
    pub fn new(model: &Value, mesh: [usize; 3], stage: ZeroStage, compute: DType) -> Self {
        Run {
            model: model.clone(),
            mesh,
            stage,
            compute,
            accum: 4.min(GLOBAL_ROWS / mesh[1]),
            schedule: ScheduleKind::OneForwardOneBackward,
            sequence: SequenceParallel::Off,
            activations: ActivationPolicy::Keep,
            overlap: Overlap::Inline,
            clip: None,
            frozen: vec![],
            num_steps: 10,
            states: StatePrecision::F32,
            on: On::Host,
            optimizer: Optimizer::AdamW(AdamOptions {
                beta1: 0.9,
                beta2: 0.99,
                eps: 1e-8,
                weight_decay: 0.1,
                bias_correction: BiasCorrection::On,
            }),
        }
    }

    pub fn options(&self) -> EngineOptions {
        let mut zero = ZeroOptions::new(self.stage, self.optimizer.clone());
        zero.compute = self.compute;
        zero.grad_accum_steps = self.accum;
        zero.clip_grad_norm = self.clip;
        zero.overlap = self.overlap;
        zero.states = self.states;
        zero.loss_scaling = (self.compute == DType::F16).then_some(LossScaling::Static(256.0));
        let mut options = EngineOptions::new(zero);
        options.activations = ActivationRules::all(self.activations);
        options.frozen = self.frozen.clone();
        options.seed = 7;
        options.pipeline = PipelineOptions { schedule: self.schedule, stages: None };
        options.sequence = self.sequence;
        options
    }

    pub fn mesh(&self) -> Mesh {
        let [pipeline, data, tensor] = self.mesh;
        Mesh::new(pipeline * data * tensor, pipeline, tensor).unwrap()
    }

    pub fn engine(&self, world: Group) -> Engine {
        self.try_engine(world).unwrap()
    }

    pub fn try_engine(&self, world: Group) -> Result<Engine, EngineError> {
        self.engine_with(world, self.options())
    }

    fn engine_with(&self, world: Group, options: EngineOptions) -> Result<Engine, EngineError> {
        self.engine_of(Ranks::new(world, self.mesh())?, options)
    }

    fn engine_of(&self, ranks: Ranks, options: EngineOptions) -> Result<Engine, EngineError> {
        set_num_threads(1);
        let config = ModelConfig::from_json(&self.model).unwrap();
        Engine::new(build(&config).unwrap(), options, ranks, &mut RandomInit { seed: 3 })
    }

    /// GPUs for all ranks, if the run is on GPUs.
    pub fn fake(&self) -> Option<FakeGpu> {
        let On::FakeGpu(_, link) = self.on else { return None };
        let fake = FakeGpu::new((1, Eagerness::Eager));
        fake.allow_host_access();
        if link == Link::Nccl {
            fake.set_devices(self.mesh().world_size() as i32);
        }
        Some(fake)
    }

    /// This rank's engine, on `fake` if the run is on GPUs.
    pub fn engine_on(&self, world: Group, fake: Option<&FakeGpu>) -> Engine {
        let (On::FakeGpu(offload, link), Some(fake)) = (self.on, fake) else { return self.engine(world) };
        let gpu = fake.open(if link == Link::Nccl { world.group_rank() as u32 } else { 0 });
        let processor = fake.processor(&gpu);
        let stream = || processor.stream().clone();
        let staged = Staged::new(world.clone(), &gpu, stream()).unwrap();
        let ranks = match link {
            Link::Staged => Ranks::new(staged, self.mesh()),
            Link::Nccl => {
                let library = Library::load(&Search { given: Some(fake.path().into()), libtorch: None });
                let nccl = Nccl::new(world, library.unwrap(), processor.clone(), stream()).unwrap();
                Ranks::with_messages(nccl, &staged, self.mesh())
            }
        };
        let mut options = self.options();
        (options.zero.gpu, options.zero.offload) = (Some(processor), offload);
        self.engine_of(ranks.unwrap(), options).unwrap()
    }

    pub fn steps(self, num_steps: usize) -> Self {
        Run { num_steps, ..self }
    }

    /// This rank's micro-batch: global batches are the same rows however they are split.
    pub fn batch(&self, engine_data: usize, step: usize, microbatch: usize) -> Batch {
        let data = self.mesh[1];
        let rows = GLOBAL_ROWS / (data * self.accum);
        batch(step * GLOBAL_ROWS + (microbatch * data + engine_data) * rows, rows, self.vocab_size())
    }

    fn vocab_size(&self) -> i64 {
        self.model["vocab_size"].as_i64().unwrap()
    }

    /// Trains on all ranks, which must end alike.
    pub fn trace(&self) -> Trace {
        let world_size = self.mesh().world_size();
        let fake = self.fake();
        let traces = thread::run(world_size, |world| {
            let mut engine = self.engine_on(world, fake.as_ref());
            let data = engine.ranks().at().data;
            let mut trace = Trace::default();
            for step in 0..self.num_steps {
                let report =
                    engine.train_step(3e-3, |microbatch| Ok(self.batch(data, step, microbatch))).unwrap();
                trace.losses.push(report.loss);
                trace.norms.push(report.step.grad_norm);
                trace.outcomes.push(report.step.outcome);
            }
            engine
                .for_each_param::<EngineError>(|param, values| {
                    trace.weights.push((param.name.clone(), values.to_vec()));
                    Ok(())
                })
                .unwrap();
            let asked = batch(99, 2, self.vocab_size());
            trace.asked = engine.evaluate(&asked.input, &asked.target).unwrap();
            let logits = engine.predict(&asked.input).unwrap();
            trace.logits = (&logits.to_kind(shardwise_torch::Kind::Float).view([-1])).try_into().unwrap();
            trace
        });
        fake.iter().for_each(FakeGpu::assert_clean);
        let mut traces = traces.into_iter();
        let first = traces.next().unwrap();
        traces.for_each(|other| other.assert_same_bits(&first, &format!("another rank of {self:?}")));
        first
    }

    /// What the ranks together have asked the driver of their GPUs for memory, after each step.
    pub fn allocations(&self) -> Vec<i64> {
        let fake = self.fake().expect("a run on GPUs");
        let counts = thread::run(self.mesh().world_size(), |world| {
            let mut engine = self.engine_on(world, Some(&fake));
            let data = engine.ranks().at().data;
            let count = |step| {
                engine.train_step(3e-3, |microbatch| Ok(self.batch(data, step, microbatch))).unwrap();
                engine.zero().drain().unwrap();
                // All have come before the first counts, and have counted before the first goes on.
                let meet = || engine.zero().exchange(&[0.0]).unwrap();
                meet();
                let count = fake.num_allocations();
                meet();
                count
            };
            (0..self.num_steps).map(count).collect::<Vec<_>>()
        });
        fake.assert_clean();
        counts.into_iter().next().expect("a rank")
    }
}

/// A parameter's name and values.
pub type Weights = (String, Vec<f32>);

/// Losses, norms, outcomes, final weights, and what the trained model says of a text.
#[derive(Debug, Clone, Default)]
pub struct Trace {
    pub losses: Vec<f64>,
    pub norms: Vec<f64>,
    pub outcomes: Vec<StepOutcome>,
    pub weights: Vec<Weights>,
    pub asked: f64,
    pub logits: Vec<f32>,
}

impl Trace {
    pub fn assert_same_bits(&self, other: &Trace, what: &str) {
        let bits = |values: &[f64]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&self.losses), bits(&other.losses), "losses, {what}");
        assert_eq!(bits(&self.norms), bits(&other.norms), "gradient norms, {what}");
        assert_eq!(self.outcomes, other.outcomes, "outcomes, {what}");
        assert_eq!(self.weights.len(), other.weights.len(), "{what}");
        for ((name, values), (other_name, others)) in self.weights.iter().zip(&other.weights) {
            assert_eq!((name, values.len()), (other_name, others.len()), "{what}");
            let same = values.iter().zip(others).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "weights of `{name}`, {what}");
        }
        assert_eq!(self.asked.to_bits(), other.asked.to_bits(), "{what}");
        let same = self.logits.iter().zip(&other.logits).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same && self.logits.len() == other.logits.len(), "logits, {what}");
    }
}

/// Rows of the run's endless line: the next token follows from the last.
pub fn batch(first_row: usize, rows: usize, vocab_size: i64) -> Batch {
    let tokens = (first_row..first_row + rows)
        .flat_map(|row| (0..SEQ).map(move |t| (row * 17 + t * t * 5) as i64 % vocab_size));
    let input = Tensor::from_slice(&tokens.collect::<Vec<_>>()).view([rows as i64, SEQ as i64]);
    let target = (&input * 3 + 1).remainder(vocab_size);
    Batch { input, target, first_row: first_row as u64 }
}
