//! Gradients of every layer of every family, against central differences in f64; then the same gradients in fp32 and bf16, where
//! fused operations with backward passes of their own may run, against those in f64.
//!
//! Layers are called directly, with parameters given as tensors: no engine, no units.

// Helpers of tests may unwrap as tests may.
#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};
use shardwise_engine::{Context, Layer, Params, Randomness};
use shardwise_kernels::philox;
use shardwise_models::build;
use shardwise_plan::zoo::ModelConfig;
use shardwise_torch::{Kind, Tensor, autograd, no_grad};

/// Step of the differences: the error of the formula is about `STEP^2`, that of its rounding about `1e-16 / STEP`.
const STEP: f64 = 1e-5;
/// What both errors leave, on gradients of about one, with a hundredfold margin for third derivatives and sums.
const DIFFERENCES: f64 = 1e-8;
/// fp32 against f64, as a fraction of a tensor's norm: 24 bits (6e-8), some hundred roundings deep.
const F32: f64 = 5e-6;
/// bf16 against f64: 8 bits (4e-3), rounded between operations, some ten deep.
const BF16: f64 = 4e-2;

const BATCH: i64 = 2;
const SEQ: i64 = 5;

/// A layer with everything it is called with. Numbers are exact in bf16, so that every precision begins alike.
struct Case {
    name: String,
    layer: Box<dyn Layer>,
    /// Parameters by key, f64.
    params: Vec<(String, Tensor)>,
    /// Token ids, or numbers in f64.
    input: Tensor,
    target: Option<Tensor>,
}

/// Numbers of spread `std` around `mean`, the same for the same name.
fn numbers(name: &str, shape: &[i64], mean: f32, std: f32) -> Tensor {
    let mut values = vec![0f32; shape.iter().product::<i64>() as usize];
    philox::fill_normal(1, name, 0, mean, std, &mut values);
    Tensor::from_slice(&values).view(shape).to_kind(Kind::BFloat16).to_kind(Kind::Double)
}

fn tokens(name: &str, num_tokens: i64) -> Tensor {
    let scores = numbers(name, &[BATCH, SEQ], 0.0, 1.0);
    ((scores * 1e4).abs().to_kind(Kind::Int64)).remainder(num_tokens)
}

/// The layers of a model, each as a case of its own; the head twice, with and without a target.
fn cases(family: &str, config: &Value) -> Vec<Case> {
    let config = ModelConfig::from_json(config).unwrap();
    let num_tokens = config.vocab_size() as i64;
    let layers = || build(&config).unwrap();
    let num_layers = layers().len();
    let case = |index: usize, target: Option<Tensor>| {
        let layer = layers().remove(index);
        let spec = layer.spec();
        let params = spec.params.iter().map(|param| {
            let shape: Vec<i64> = param.shape.iter().map(|&dim| dim as i64).collect();
            // Norms begin at one, and biases at zero: neither must stay there to be tested.
            let is_norm = param.key.contains("norm") || param.key.contains("ln_");
            let mean = if is_norm && param.key.ends_with("weight") { 1.0 } else { 0.0 };
            (param.key.clone(), numbers(&param.name, &shape, mean, 0.3))
        });
        let params: Vec<_> = params.collect();
        let width = layers()[1].spec().params[0].shape[0] as i64; // the first norm's
        let input = match index {
            0 => tokens("input", num_tokens),
            _ => numbers(&spec.name, &[BATCH, SEQ, width], 0.0, 1.0),
        };
        let what = if target.is_some() { "loss" } else { "output" };
        Case { name: format!("{family}, {}, {what}", spec.name), layer, params, input, target }
    };
    let mut cases: Vec<_> = (0..num_layers).map(|index| case(index, None)).collect();
    cases.push(case(num_layers - 1, Some(tokens("target", num_tokens))));
    cases
}

fn all_cases() -> Vec<Case> {
    let llama = json!({
        "model_type": "llama", "vocab_size": 13, "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 8,
        "rms_norm_eps": 1e-5, "rope_theta": 100.0,
    });
    let with = |base: &Value, more: Value| {
        let mut config = base.clone();
        let object = config.as_object_mut().unwrap();
        object.extend(more.as_object().unwrap().clone());
        config
    };
    let biased = json!({"attention_bias": true, "mlp_bias": true, "tie_word_embeddings": true, "rope_scaling": {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}});
    let gpt2 = json!({
        "model_type": "gpt2", "vocab_size": 13, "n_positions": 8, "n_embd": 12, "n_layer": 1, "n_head": 3,
        "n_inner": 14, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    });
    let mut cases = cases("llama", &llama);
    cases.extend(self::cases("llama without groups", &with(&llama, json!({"num_key_value_heads": 4}))));
    cases.extend(self::cases("llama with biases, tied, scaled", &with(&llama, biased)));
    cases.extend(self::cases("gpt2", &gpt2));
    // What is dropped stays the same, so that there is a derivative.
    let dropout = json!({"resid_pdrop": 0.2, "embd_pdrop": 0.3, "attn_pdrop": 0.25});
    cases.extend(self::cases("gpt2 with dropout", &with(&gpt2, dropout)));
    cases.extend(self::cases("llama with dropout", &with(&llama, json!({"attention_dropout": 0.3}))));
    cases.extend(self::cases("gpt2, untied", &with(&gpt2, json!({"tie_word_embeddings": false}))));
    cases
}

impl Case {
    fn forward(&self, params: &[(String, Tensor)], input: &Tensor) -> Tensor {
        let random = Randomness { seed: 1, first_row: 6, num_rows: BATCH as usize };
        let context = Context { random: Some(random), ..Context::inference(self.target.as_ref()) };
        self.layer
            .forward(&context, &Params::new(params), input)
            .unwrap_or_else(|e| panic!("{}: {e}", self.name))
    }

    /// What weights the outputs in the scalar that is differentiated.
    fn weights(&self, output: &Tensor) -> Tensor {
        match output.dim() {
            0 => Tensor::from(1.0),
            _ => numbers("output", &output.size(), 0.0, 1.0),
        }
    }

    /// In one precision: the output, and the gradients of each parameter and of the input if it has one, by name.
    fn gradients(&self, kind: Kind) -> (Tensor, Vec<(String, Tensor)>) {
        let leaf = |x: &Tensor| x.to_kind(kind).detach().copy().set_requires_grad(true);
        let params: Vec<_> = self.params.iter().map(|(key, x)| (key.clone(), leaf(x))).collect();
        let input =
            if self.input.is_floating_point() { leaf(&self.input) } else { self.input.shallow_clone() };
        let output = self.forward(&params, &input);
        let weights = self.weights(&output).to_kind(output.kind());
        let mut names: Vec<_> = self.params.iter().map(|(key, _)| key.clone()).collect();
        let mut leaves: Vec<_> = params.iter().map(|(_, x)| x).collect();
        if input.requires_grad() {
            names.push("input".to_owned());
            leaves.push(&input);
        }
        let grads = autograd::grad(&[&output], &[Some(&weights)], &leaves).unwrap();
        let grads = names.into_iter().zip(grads).map(|(name, grad)| {
            let grad = grad.unwrap_or_else(|| panic!("{}: `{name}` has no gradient", self.name));
            (name, grad.to_kind(Kind::Double))
        });
        (output.to_kind(Kind::Double), grads.collect())
    }

    /// The scalar, computed in f64 without a graph.
    fn scalar(&self) -> f64 {
        let output = no_grad(|| self.forward(&self.params, &self.input));
        (&output * self.weights(&output)).sum(Kind::Double).double_value(&[])
    }

    /// The derivative of the scalar by each element of `x`, one of this case's tensors.
    fn differences(&self, x: &Tensor) -> Tensor {
        let flat = x.view(-1);
        let derivative = |i: i64| {
            let value = flat.double_value(&[i]);
            let at = |value: f64| {
                let _ = flat.get(i).fill_(value);
                self.scalar()
            };
            let difference = at(value + STEP) - at(value - STEP);
            at(value);
            difference / (2.0 * STEP)
        };
        let derivatives: Vec<_> = (0..flat.numel() as i64).map(derivative).collect();
        Tensor::from_slice(&derivatives).view_as(x)
    }
}

#[test]
fn gradients_of_every_layer_are_those_of_finite_differences() {
    shardwise_torch::set_num_threads(1);
    let mut num_elements = 0;
    for case in all_cases() {
        let (_, grads) = case.gradients(Kind::Double);
        for (name, grad) in &grads {
            let x = case.params.iter().find(|(key, _)| key == name).map_or(&case.input, |(_, x)| x);
            let expected = case.differences(x);
            let worst = (grad - &expected).abs().max().double_value(&[]);
            let scale = expected.abs().max().double_value(&[]).max(1.0);
            assert!(worst <= DIFFERENCES * scale, "{}, `{name}`: {worst:.1e} of {scale:.1e}", case.name);
            assert!(
                expected.abs().max().double_value(&[]) > 1e-3,
                "{}, `{name}`: there is a gradient",
                case.name
            );
            num_elements += x.numel();
        }
    }
    assert!(num_elements > 5000, "{num_elements} elements");
}

#[test]
fn lower_precisions_compute_the_same_outputs_and_gradients() {
    shardwise_torch::set_num_threads(1);
    for case in all_cases() {
        let (exact, exact_grads) = case.gradients(Kind::Double);
        for (kind, tolerance) in [(Kind::Float, F32), (Kind::BFloat16, BF16)] {
            let (output, grads) = case.gradients(kind);
            let pairs = std::iter::once(("output", &output, &exact)).chain(
                grads.iter().zip(&exact_grads).map(|((name, grad), (_, exact))| (name.as_str(), grad, exact)),
            );
            for (name, found, exact) in pairs {
                let error = (found - exact).norm().double_value(&[]) / exact.norm().double_value(&[]);
                assert!(error <= tolerance, "{}, `{name}`, {kind:?}: {error:.1e}", case.name);
            }
        }
    }
}
