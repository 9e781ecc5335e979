//! How near attention comes to the speed of its matrix products alone.
//!
//! The measure is the rate of products that are needed below the diagonal: half of the full matrices, two products
//! forward and five backward.

use std::time::Instant;

use half::bf16;
use shardwise_kernels::attention::{self, Operand, OperandMut, Shape, Strides};
use shardwise_kernels::{Threads, philox};

const ROUNDS: usize = 20;

const SHAPES: [Shape; 9] = [
    shape(4, 8, 8, 256, 64),
    shape(1, 16, 16, 256, 64),
    shape(16, 8, 8, 64, 64),
    shape(1, 16, 16, 1024, 64),
    shape(1, 8, 8, 2048, 64),
    shape(4, 9, 3, 256, 64),
    shape(4, 8, 8, 256, 32),
    shape(2, 8, 8, 256, 96),
    shape(2, 8, 8, 256, 128),
];

const fn shape(batch: usize, heads: usize, kv_heads: usize, seq: usize, head_dim: usize) -> Shape {
    Shape { batch, heads, kv_heads, seq, head_dim }
}

fn main() {
    if !attention::is_fast() {
        return println!("no AVX512-BF16 on this machine");
    }
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    println!(
        "{:<32} {:>8} {:>10} {:>8} {:>10} {:>8}",
        "batch heads kv_heads seq dim", "threads", "forward ms", "GFLOP/s", "backward ms", "GFLOP/s"
    );
    for shape in SHAPES {
        for count in [1, cores] {
            measure(shape, Threads::new(count).expect("a machine has a core"));
        }
    }
}

fn measure(shape: Shape, threads: Threads) {
    let Shape { batch, heads, kv_heads, seq, head_dim } = shape;
    let random = |name, heads| numbers(name, batch * heads * seq * head_dim);
    let (q, dout, mut out, mut dq) =
        (random("q", heads), random("dout", heads), random("out", heads), random("dq", heads));
    let (k, v, mut dk, mut dv) =
        (random("k", kv_heads), random("v", kv_heads), random("dk", kv_heads), random("dv", kv_heads));
    let mut lse = vec![0.0; batch * heads * seq];
    // As projections leave them.
    let (queries, keys) =
        (Strides::positions_first(&shape, heads), Strides::positions_first(&shape, kv_heads));
    let (q, k, v) = (Operand::new(&q, queries), Operand::new(&k, keys), Operand::new(&v, keys));
    let scale = 1.0 / (head_dim as f32).sqrt();

    let (mut forward, mut backward) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..ROUNDS {
        let start = Instant::now();
        attention::forward(threads, shape, scale, q, k, v, OperandMut::new(&mut out, queries), &mut lse);
        forward = forward.min(start.elapsed().as_secs_f64());
        let (out, dout) = (Operand::new(&out, queries), Operand::new(&dout, queries));
        let dq = OperandMut::new(&mut dq, queries);
        let (dk, dv) = (OperandMut::new(&mut dk, keys), OperandMut::new(&mut dv, keys));
        let start = Instant::now();
        attention::backward(threads, shape, scale, q, k, v, out, &lse, dout, dq, dk, dv);
        backward = backward.min(start.elapsed().as_secs_f64());
    }
    let flops = (batch * heads * seq * seq * head_dim) as f64;
    println!(
        "{:<32} {:>8} {:>10.2} {:>8.0} {:>10.2} {:>8.0}",
        format!("{batch} {heads} {kv_heads} {seq} {head_dim}"),
        threads.get(),
        forward * 1e3,
        2.0 * flops / forward / 1e9,
        backward * 1e3,
        5.0 * flops / backward / 1e9
    );
}

fn numbers(name: &str, numel: usize) -> Vec<bf16> {
    let mut numbers = vec![0.0; numel];
    philox::fill_normal_on(Threads::ONE, 1, name, 0, 0.0, 1.0, &mut numbers);
    numbers.into_iter().map(bf16::from_f32).collect()
}
