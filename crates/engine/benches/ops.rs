//! Forward and backward of each operation, one thread, at the shapes of a decoder block.
//!
//!     cargo bench -p shardwise-engine --bench ops [-- HIDDEN MLP HEADS BATCH SEQ VOCAB]

use std::time::Instant;

use shardwise_engine::{Context, Randomness, ops};
use shardwise_plan::zoo::RopeScaling;
use shardwise_torch::{Device, Kind, Tensor, autograd, memory, set_num_threads};

fn leaf(shape: &[i64]) -> Tensor {
    (Tensor::randn(shape, (Kind::Float, Device::Cpu)) * 0.5).to_kind(Kind::BFloat16).set_requires_grad(true)
}

/// Median milliseconds of forward, and of backward.
fn time(name: &str, inputs: &[&Tensor], run: impl Fn() -> Tensor) {
    let (mut forward, mut backward) = (Vec::new(), Vec::new());
    for _ in 0..15 {
        let start = Instant::now();
        let y = run();
        forward.push(start.elapsed().as_secs_f64() * 1e3);
        let dy = y.ones_like();
        let start = Instant::now();
        let grads = autograd::grad(&[&y], &[Some(&dy)], inputs).expect("the operation has a backward");
        backward.push(start.elapsed().as_secs_f64() * 1e3);
        drop(grads);
    }
    let median = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    println!("{name:26} forward {:8.3} ms   backward {:8.3} ms", median(forward), median(backward));
}

fn main() {
    let numbers: Vec<i64> = std::env::args().skip(1).filter_map(|arg| arg.parse().ok()).collect();
    let [hidden, mlp, heads, batch, seq, vocab] =
        <[i64; 6]>::try_from(numbers).unwrap_or([512, 1408, 8, 4, 256, 8192]);
    memory::install();
    set_num_threads(1);
    let x = leaf(&[batch, seq, hidden]);
    let width = leaf(&[hidden]);
    let asking = Context::inference(None);
    time("rms_norm", &[&x, &width], || ops::rms_norm(&asking, &x, &width, 1e-5).expect("shapes fit"));
    for (name, out, input) in
        [("linear d -> d", hidden, hidden), ("linear d -> f", mlp, hidden), ("linear f -> d", hidden, mlp)]
    {
        let (x, w) = (leaf(&[batch, seq, input]), leaf(&[out, input]));
        time(name, &[&x, &w], || ops::linear(&asking, &x, &w, None).expect("shapes fit"));
    }
    let head_dim = hidden / heads;
    let rotary = ops::Rotary { head_dim: head_dim as usize, theta: 1e4, scaling: None::<RopeScaling> };
    let table = rotary.table(seq as usize).expect("a table fits");
    let q = leaf(&[batch, seq, heads, head_dim]);
    let (k, v) = (q.detach().set_requires_grad(true), q.detach().set_requires_grad(true));
    time("rotary", &[&q], || table.rotate(&asking, &q).expect("shapes fit"));
    time("causal_attention", &[&q, &k, &v], || ops::causal_attention(&q, &k, &v).expect("shapes fit"));
    time("  plain", &[&q, &k, &v], || ops::causal_attention_plain(&q, &k, &v).expect("shapes fit"));
    let (gate, up) = (leaf(&[batch, seq, mlp]), leaf(&[batch, seq, mlp]));
    time("swiglu", &[&gate, &up], || ops::swiglu(&asking, &gate, &up).expect("shapes fit"));
    let residual = leaf(&[batch, seq, hidden]);
    time("residual", &[&x, &residual], || &x + &residual);
    let random = Randomness { seed: 1, first_row: 0, num_rows: batch as usize };
    let learning = Context { random: Some(random), ..Context::inference(None) };
    let dropout = ops::Dropout::new("layer", "site", 0.1);
    time("dropout", &[&x], || dropout.apply(&learning, &x).expect("shapes fit"));
    time("causal_attention, dropout", &[&q, &k, &v], || {
        ops::dropped_causal_attention(&learning, &dropout, &q, &k, &v).expect("shapes fit")
    });
    let w = leaf(&[vocab, hidden]);
    let target = Tensor::randint(vocab, [batch, seq], (Kind::Int64, Device::Cpu));
    time("head with loss", &[&x, &w], || {
        ops::linear_cross_entropy(&asking, &x, &w, &target).expect("shapes fit")
    });
    time("head with loss, plain", &[&x, &w], || {
        ops::linear_cross_entropy_plain(&x, &w, &target).expect("shapes fit")
    });
    let tokens = Tensor::randint(vocab, [batch, seq], (Kind::Int64, Device::Cpu));
    time("embedding", &[&w], || Tensor::embedding(&w, &tokens, -1, false, false));
}
