//! The small case: a model, tokens, hyperparameters, and how PyTorch and DeepSpeed train it.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny").join(name)
}

pub fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A training run of the case. All that is not set here is as `golden.json` has it.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub bf16: bool,
    pub accum: usize,
    pub steps: usize,
    pub micro_batch: usize,
    pub stage: usize,
    pub overlap_comm: bool,
}

impl Case {
    /// In fp32 and without accumulation.
    pub fn new(stage: usize) -> Self {
        Case { bf16: false, accum: 1, steps: 20, micro_batch: 4, stage, overlap_comm: false }
    }

    /// The run file.
    pub fn run_file(&self) -> Value {
        let case = read_json(&fixture("case.json"));
        json!({
            "model": { "path": fixture("model") },
            "data": {
                "tokens": fixture("tokens.bin"), "dtype": "u16", "seq_len": case["seq_len"], "order": "sequential",
            },
            "steps": self.steps,
            "seed": 0,
            "deepspeed": {
                "train_micro_batch_size_per_gpu": self.micro_batch,
                "gradient_accumulation_steps": self.accum,
                "gradient_clipping": case["clip"],
                "zero_optimization": { "stage": self.stage, "overlap_comm": self.overlap_comm },
                "bf16": { "enabled": self.bf16 },
                "optimizer": {
                    "type": "AdamW",
                    "params": {
                        "lr": case["lr"], "betas": case["betas"], "eps": case["eps"], "weight_decay": case["weight_decay"],
                    },
                },
            },
        })
    }
}

/// Loss and gradient norm of every step.
#[derive(Debug, Clone, PartialEq)]
pub struct Curve {
    pub losses: Vec<f64>,
    pub grad_norms: Vec<f64>,
}

impl Curve {
    /// The run `name` of `golden.json`.
    pub fn golden(name: &str) -> Self {
        let run = &read_json(&fixture("golden.json"))[name];
        let numbers = |key: &str| run[key].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
        Curve { losses: numbers("losses"), grad_norms: numbers("grad_norms") }
    }

    /// The largest difference of a loss, and the largest of a norm as a part of that norm.
    pub fn gaps(&self, other: &Curve) -> (f64, f64) {
        assert_eq!(self.losses.len(), other.losses.len());
        let pairs = |a: &[f64], b: &[f64]| a.iter().copied().zip(b.iter().copied()).collect::<Vec<_>>();
        // `f64::max` would lose a NaN.
        let worst = |gaps: Vec<f64>| {
            gaps.into_iter().fold(0.0, |m, gap| if gap > m || gap.is_nan() { gap } else { m })
        };
        let losses = pairs(&self.losses, &other.losses).into_iter().map(|(a, b)| (a - b).abs());
        let norms = pairs(&self.grad_norms, &other.grad_norms).into_iter().map(|(a, b)| (a - b).abs() / b);
        (worst(losses.collect()), worst(norms.collect()))
    }
}
