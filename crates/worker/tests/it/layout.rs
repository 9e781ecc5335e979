//! One training run, laid out over any mesh: the same global batch, whatever the ranks.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::case::Case;
use crate::ranks::Ranks;

/// Samples of a step, in every layout.
const GLOBAL_BATCH: usize = 8;

/// Which model is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Model {
    /// The small case's: two key and value heads, a head of its own.
    Llama,
    /// One table for embedding and head, whose tokens no degree divides; q, k and v in one matrix; dropout.
    Gpt2,
}

/// How a run is laid out.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    pub model: Model,
    pub bf16: bool,
    /// Pipeline, data, tensor.
    pub mesh: [usize; 3],
    pub micro_batch: usize,
    /// Of ZeRO.
    pub stage: usize,
    pub schedule: &'static str,
    pub sequence: bool,
}

impl Layout {
    pub const ALONE: Layout = Layout {
        model: Model::Llama,
        bf16: false,
        mesh: [1, 1, 1],
        micro_batch: 8,
        stage: 0,
        schedule: "1f1b",
        sequence: false,
    };

    /// `mesh` in the ZeRO stage `stage`. A pipeline has four micro-batches, or two if there are other ranks to share the samples.
    pub fn new(mesh: [usize; 3], stage: usize) -> Self {
        let [pipeline, data, _] = mesh;
        let accum = if pipeline == 1 { 1 } else { 4 / data };
        Layout { mesh, stage, micro_batch: GLOBAL_BATCH / data / accum, ..Layout::ALONE }
    }

    pub fn num_ranks(&self) -> usize {
        self.mesh.iter().product()
    }

    /// The run file of `steps` steps.
    pub fn run_file(&self, steps: usize) -> Value {
        let [pipeline, data, tensor] = self.mesh;
        let accum = GLOBAL_BATCH / data / self.micro_batch;
        let (bf16, micro_batch) = (self.bf16, self.micro_batch);
        let case = Case { bf16, accum, micro_batch, steps, ..Case::new(self.stage) };
        let mut run = case.run_file();
        run["parallel"] = json!({ "pipeline": pipeline, "tensor": tensor, "sequence": self.sequence });
        if pipeline > 1 {
            run["parallel"]["schedule"] = self.schedule.into();
        }
        // Well above what gradients are off by: some are zero but for rounding, as that of the keys' bias, and AdamW would make steps of it.
        run["deepspeed"]["optimizer"]["params"]["eps"] = 1e-5.into();
        if self.model == Model::Gpt2 {
            run["model"] = json!({ "config": {
                "model_type": "gpt2", "vocab_size": 1027, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64,
            }});
        }
        run
    }

    /// A new run of `steps` steps.
    pub fn ranks(&self, steps: usize) -> Ranks {
        Ranks::new(&self.run_file(steps), self.num_ranks())
    }
}

/// The largest difference of two elements that should be the same.
pub fn gap(a: &BTreeMap<String, Vec<f32>>, b: &BTreeMap<String, Vec<f32>>) -> f32 {
    assert!(a.keys().eq(b.keys()), "{:?} {:?}", a.keys(), b.keys());
    let gap = |(a, b): (&Vec<f32>, &Vec<f32>)| {
        assert_eq!(a.len(), b.len());
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, nan_or_max)
    };
    a.values().zip(b.values()).map(gap).fold(0.0, nan_or_max)
}

/// `f32::max` would lose a NaN.
fn nan_or_max(a: f32, b: f32) -> f32 {
    if a.is_nan() || a > b { a } else { b }
}
