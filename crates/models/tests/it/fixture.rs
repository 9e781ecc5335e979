//! The tiny models beside this test, and what the transformers package computes with them.

use std::path::{Path, PathBuf};

use serde_json::Value;
use shardwise_checkpoint::HfReader;
use shardwise_comm::Group;
use shardwise_device::DType;
use shardwise_engine::{Engine, EngineOptions};
use shardwise_models::{HfSource, build, read_config};
use shardwise_plan::ZeroStage;
use shardwise_torch::{Kind, Tensor, set_num_threads};
use shardwise_zero::{AdamOptions, BiasCorrection, Optimizer, ZeroOptions};

/// Grouped queries; tied and in two files; biases, a head width of its own and Llama 3's rotary scaling; GPT-2; GPT-2
/// with the names of a bare decoder.
pub const MODELS: [&str; 5] = ["llama-gqa", "llama-tied", "llama-bias-rope", "gpt2", "gpt2-bare"];

pub fn folder(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(model)
}

/// What the transformers package says of a model.
pub struct Golden {
    /// `golden.json`.
    pub json: Value,
    /// `[batch, seq]`.
    pub ids: Tensor,
    /// `[batch, seq, vocab]`, flat.
    pub logits: Vec<f32>,
    /// Of predicting each next token.
    pub loss: f64,
}

impl Golden {
    pub fn read(model: &str) -> Self {
        let json: Value =
            serde_json::from_slice(&std::fs::read(folder(model).join("golden.json")).unwrap()).unwrap();
        let rows = json["input_ids"].as_array().unwrap();
        let ids: Vec<i64> =
            rows.iter().flat_map(|row| row.as_array().unwrap()).map(|id| id.as_i64().unwrap()).collect();
        let ids = Tensor::f_from_slice(&ids).unwrap().f_view([rows.len() as i64, -1]).unwrap();
        let logits =
            HfReader::open(folder(model).join("logits.safetensors")).unwrap().read_f32("logits").unwrap();
        let loss = json["loss"].as_f64().unwrap();
        Golden { ids, logits, loss, json }
    }

    /// All tokens but the last, and all but the first.
    pub fn next_token(&self) -> (Tensor, Tensor) {
        let seq = self.ids.size()[1];
        (self.ids.f_narrow(1, 0, seq - 1).unwrap(), self.ids.f_narrow(1, 1, seq - 1).unwrap())
    }
}

pub fn options(stage: ZeroStage, compute: DType) -> EngineOptions {
    let zero = ZeroOptions {
        compute,
        clip_grad_norm: Some(1.0),
        ..ZeroOptions::new(
            stage,
            Optimizer::AdamW(AdamOptions {
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
                weight_decay: 0.1,
                bias_correction: BiasCorrection::On,
            }),
        )
    };
    EngineOptions { seed: 5, ..EngineOptions::new(zero) }
}

/// As `generate` has it: no gradients, no optimizer states.
pub fn frozen() -> EngineOptions {
    EngineOptions { frozen: vec!["*".into()], ..options(ZeroStage::Zero, DType::F32) }
}

/// The model in `dir`.
pub fn load(dir: &Path, options: EngineOptions, group: Group) -> Engine {
    set_num_threads(1);
    let (config, _) = read_config(dir).unwrap();
    let mut source = HfSource::open(dir, &config.layers()).unwrap();
    Engine::new(build(&config).unwrap(), options, group, &mut source).unwrap()
}

pub fn numbers(tensor: &Tensor) -> Vec<f32> {
    let flat = tensor.f_to_kind(Kind::Float).unwrap().f_contiguous().unwrap().f_view([-1]).unwrap();
    Vec::try_from(&flat).unwrap()
}

pub fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    // A NaN anywhere has to come out.
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |m, d| if d > m || d.is_nan() { d } else { m })
}
