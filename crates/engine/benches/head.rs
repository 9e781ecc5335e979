//! A head's forward and backward in chunks of rows: time and peak memory.
//!
//!     cargo bench -p shardwise-engine --bench head [-- ROWS WIDTH CLASSES THREADS [CHUNK]...]

use std::time::Instant;

use shardwise_engine::ops::LinearCrossEntropy;
use shardwise_plan::memory::HeadShape;
use shardwise_torch::{Device, Kind, Tensor, autograd, memory, set_num_threads};

const NUM_RUNS: usize = 3;

fn leaf(shape: [i64; 2]) -> Tensor {
    (Tensor::randn(shape, (Kind::Float, Device::Cpu)) * 0.5).to_kind(Kind::BFloat16).set_requires_grad(true)
}

/// Milliseconds of forward and backward, and MiB of libtorch's memory at the peak.
fn run(chunk_rows: usize, x: &Tensor, weight: &Tensor, target: &Tensor) -> (f64, f64) {
    let options = LinearCrossEntropy { chunk_rows: Some(chunk_rows), ..LinearCrossEntropy::default() };
    let before = memory::stats().live_bytes;
    memory::reset_peak();
    let start = Instant::now();
    let loss =
        options.forward(&shardwise_engine::Context::inference(None), x, weight, target).expect("shapes fit");
    let dloss = loss.ones_like();
    let grads = autograd::grad(&[&loss], &[Some(&dloss)], &[x, weight]).expect("the head has a backward");
    let ms = start.elapsed().as_secs_f64() * 1e3;
    drop(grads);
    (ms, (memory::stats().peak_live_bytes - before) as f64 / (1u64 << 20) as f64)
}

fn main() {
    let numbers: Vec<usize> = std::env::args().skip(1).filter_map(|arg| arg.parse().ok()).collect();
    let (&[num_rows, width, num_classes, threads], chunks) =
        numbers.split_first_chunk().unwrap_or((&[2048, 1024, 16384, 1], &[256, 512, 1024]));
    memory::install();
    set_num_threads(threads);
    let shape = HeadShape { num_rows, width, num_classes, element_bytes: 2 };
    let x = leaf([num_rows as i64, width as i64]);
    let weight = leaf([num_classes as i64, width as i64]);
    let target = Tensor::randint(num_classes as i64, [num_rows as i64], (Kind::Int64, Device::Cpu));
    let mut sizes: Vec<_> = chunks.iter().copied().filter(|&rows| rows < num_rows).collect();
    sizes.extend([shape.chunk_rows(), num_rows]);
    sizes.dedup();
    // Taken in turn, so that all see the same machine.
    let mut runs = vec![Vec::new(); sizes.len()];
    for _ in 0..NUM_RUNS {
        for (rows, runs) in sizes.iter().zip(&mut runs) {
            runs.push(run(*rows, &x, &weight, &target));
        }
    }
    println!("{num_rows} rows of {width}, {num_classes} classes, bf16, {threads} threads");
    for (rows, mut runs) in sizes.into_iter().zip(runs) {
        runs.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (ms, mib) = runs[NUM_RUNS / 2];
        let planned = shape.needed(rows).mib();
        let name = if rows == shape.chunk_rows() { "  (chosen)" } else { "" };
        println!(
            "{rows:6} at a time {ms:9.1} ms   peak {mib:7.1} MiB, scores and sums planned {planned:7.1}{name}"
        );
    }
}
