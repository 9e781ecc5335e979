//! The fused kernels of model layers at the sizes of a small Llama, bf16, on one thread: 1024 rows of 512, of 1408 (feed-forward) and of
//! 8192 (vocabulary). The fastest of many turns counts, since the machine may be busy.

use std::hint::black_box;
use std::time::Instant;

use half::bf16;
use shardwise_kernels::cross_entropy::split;
use shardwise_kernels::dropout::Mask;
use shardwise_kernels::{Threads, cross_entropy, philox, rms_norm, rotary, swiglu};

const ROWS: usize = 1024;
const HIDDEN: usize = 512;
const FEED_FORWARD: usize = 1408;
const VOCABULARY: usize = 8192;
const TURNS: usize = 60;

fn main() {
    println!("{:<34} {:>8}", "one thread, bf16", "ms");
    norm();
    rotation();
    gated();
    loss();
    dropped();
    born();
}

fn norm() {
    let [x, dy] = [1, 2].map(|seed| numbers(seed, ROWS * HIDDEN));
    let weight = numbers(3, HIDDEN);
    let (mut out, mut inv_rms, mut dweight) = (x.clone(), vec![0.0; ROWS], vec![0.0; HIDDEN]);
    measure("rms_norm forward, 1024 x 512", || {
        rms_norm::forward(Threads::ONE, &x, &weight, 1e-5, &mut out, &mut inv_rms);
    });
    measure("rms_norm backward, 1024 x 512", || {
        rms_norm::backward(Threads::ONE, &x, &weight, &inv_rms, &dy, &mut out, &mut dweight);
    });
    black_box((&out, &dweight));
}

fn rotation() {
    let shape = rotary::Shape { batch: 4, seq: 256, heads: 8, head_dim: 64 };
    let x = numbers(1, shape.numel());
    let angles = (0..256 * 32).map(|i| (i / 32) as f32 * 10_000f32.powf((i % 32) as f32 / -32.0));
    let (sin, cos): (Vec<f32>, Vec<f32>) = angles.map(f32::sin_cos).unzip();
    let mut out = x.clone();
    for (name, direction) in [
        ("rotary forward, 4 x 256 x 8 x 64", rotary::Direction::Forward),
        ("rotary inverse, 4 x 256 x 8 x 64", rotary::Direction::Inverse),
    ] {
        measure(name, || rotary::rotate(Threads::ONE, direction, &x, &mut out, &cos, &sin, shape));
    }
    black_box(&out);
}

fn gated() {
    let [gate, up, dy] = [1, 2, 3].map(|seed| numbers(seed, ROWS * FEED_FORWARD));
    let (mut out, mut dup) = (gate.clone(), gate.clone());
    measure("swiglu forward, 1024 x 1408", || swiglu::forward(Threads::ONE, &gate, &up, &mut out));
    measure("swiglu backward, 1024 x 1408", || {
        swiglu::backward(Threads::ONE, &gate, &up, &dy, &mut out, &mut dup);
    });
    black_box((&out, &dup));
}

fn loss() {
    let logits = numbers(1, ROWS * VOCABULARY);
    let targets: Vec<i64> = (0..ROWS as i64).map(|row| row * 7919 % VOCABULARY as i64).collect();
    let mut grad = logits.clone();
    measure("cross_entropy loss, 1024 x 8192", || {
        black_box(cross_entropy::loss_only(Threads::ONE, &logits, &targets)).expect("targets are classes");
    });
    measure("cross_entropy both, 1024 x 8192", || {
        black_box(cross_entropy::forward_backward(Threads::ONE, &logits, &targets, 1e-3, &mut grad))
            .expect("targets are classes");
    });
    // Each turn takes the gradient of the last one for logits: other numbers, the same work.
    grad.copy_from_slice(&logits);
    measure("cross_entropy in place, 1024 x 8192", || {
        black_box(cross_entropy::in_place(Threads::ONE, &mut grad, &targets, 1e3))
            .expect("targets are classes");
    });
    // The first of two ranks, of twice the classes.
    grad.copy_from_slice(&logits);
    let mut part = vec![split::RowStats::EMPTY; ROWS];
    measure("cross_entropy partial, 1024 x 8192", || {
        let own = 0..VOCABULARY;
        split::partial(Threads::ONE, &logits, &targets, own, 2 * VOCABULARY, &mut part)
            .expect("targets are classes");
    });
    let both = [&part[..], &part[..]].concat();
    let (_, rows) = split::combine(&both, ROWS);
    measure("cross_entropy combine, 2 of 1024", || drop(black_box(split::combine(&both, ROWS))));
    measure("cross_entropy gradients, 1024 x 8192", || {
        split::gradients(Threads::ONE, &mut grad, &targets, 0..VOCABULARY, &rows, 1e3);
    });
}

fn dropped() {
    let x = numbers(1, ROWS * VOCABULARY);
    let mut out = x.clone();
    let whole = Mask::new(1, "h.0.attn", 64, 0.1);
    measure("dropout, 1024 x 8192", || whole.apply(Threads::ONE, &x, &mut out));
    // Of rows twice as long, as a rank has them that has half of the heads.
    let half = whole.of_part(2 * VOCABULARY, VOCABULARY..2 * VOCABULARY);
    measure("dropout of a half, 1024 x 8192", || half.apply(Threads::ONE, &x, &mut out));
    let small = whole.of_part(256, 50..150);
    measure("dropout of 100 of 256, 1024 x 8192", || small.apply(Threads::ONE, &x, &mut out));
    black_box(&out);
}

/// A weight that is cut between its columns is filled in runs.
fn born() {
    const NUMEL: usize = 1 << 20;
    let mut out = vec![0.0; NUMEL];
    for run in [NUMEL, 4096, 1024, 256, 64, 16] {
        for shift in [0, 7] {
            measure(&format!("normal, 1M by {run}, from {shift}"), || {
                for (i, out) in out.chunks_mut(run).enumerate() {
                    let first = (2 * i * run + shift) as u64;
                    philox::fill_normal(1, "model.layers.11.mlp.down_proj.weight", first, 0.0, 0.02, out);
                }
            });
        }
    }
    black_box(&out);
}

fn numbers(seed: u64, numel: usize) -> Vec<bf16> {
    let mut numbers = vec![0.0; numel];
    philox::fill_normal(seed, "bench", 0, 0.0, 2.0, &mut numbers);
    numbers.into_iter().map(bf16::from_f32).collect()
}

fn measure(name: &str, mut run: impl FnMut()) {
    let mut best = f64::INFINITY;
    for _ in 0..TURNS {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
    }
    println!("{name:<34} {:>8.3}", best * 1e3);
}
