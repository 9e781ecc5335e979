//! How near the kernels come to the speed of memory.
//!
//! All of them do little arithmetic for each byte, so the measure is the time that memory alone would need. Reads
//! and writes overlap but share no limit, so plain loops measure two speeds on the same machine: of reads alone,
//! and of both together. A kernel that reads `r` bytes and writes `w` needs `max(r / reads, (r + w) / both)`.
//!
//! Bytes are counted as memory sees them: a store to a line that was not read first also reads it, unless it
//! goes past the cache. Arrays are far larger than the caches. Loops and kernels take turns, so that a busy
//! machine slows them alike; the fastest turn of each counts. All is done with one thread and with every core.
//!
//! `step` is all that follows the last gradient: the norm, then unscaling, clipping, update and 16-bit copy in one pass. With the
//! arguments `step THREADS` that alone is done, once for each line of the standard input, and its milliseconds are
//! printed: `scripts/bench_optimizer.py` has PyTorch take turns with it.

use std::hint::black_box;
use std::time::Instant;

use half::bf16;
use shardwise_device::{Buffer, DType, Element, Place};
use shardwise_kernels::optimizer::{
    Adam, BiasCorrection, ComputeCopy, Gradient, Lamb, Lion, Noise, States, Tensors, WeightDecay,
    orthogonalize_on,
};
use shardwise_kernels::{Threads, add, cast, norm, philox};

const NUMEL: usize = 100_000_000;
const ROUNDS: usize = 9;

/// A loop over the arrays, and the bytes that it reads and writes for each element.
struct Case {
    name: &'static str,
    reads: usize,
    writes: usize,
    run: fn(&mut Arrays, Threads),
}

/// Plain loops that set the standard.
const MEMORY: [Case; 4] = [
    Case { name: "memory: read", reads: 4, writes: 0, run: |x, n| parts(x, n, read) },
    Case { name: "memory: copy", reads: 4, writes: 4, run: |x, n| parts(x, n, copy) },
    Case { name: "memory: scale", reads: 4, writes: 4, run: |x, n| parts(x, n, scale) },
    Case { name: "memory: triad", reads: 12, writes: 4, run: |x, n| parts(x, n, triad) },
];

const KERNELS: [Case; 13] = [
    Case { name: "step", reads: 20, writes: 14, run: step },
    Case { name: "adamw", reads: 16, writes: 12, run: |x, n| adamw(x, n, |_| ComputeCopy::None) },
    Case {
        name: "adamw, bf16 copy",
        reads: 16,
        writes: 14,
        run: |x, n| adamw(x, n, |copy| ComputeCopy::Bf16(copy)),
    },
    Case {
        name: "lion",
        reads: 12,
        writes: 8,
        run: |x, n| {
            let states = States::F32([x.exp_avg]);
            let tensors =
                Tensors { grad: Gradient::F32(x.grad), master: x.master, states, compute: ComputeCopy::None };
            LION.step_on(n, 0.5, tensors);
        },
    },
    Case {
        name: "lion, bf16 state",
        reads: 10,
        writes: 6,
        run: |x, n| {
            x.step += 1;
            let states = States::Bf16([x.copy], Noise::new(1, "bench", x.step, 0));
            let tensors =
                Tensors { grad: Gradient::F32(x.grad), master: x.master, states, compute: ComputeCopy::None };
            LION.step_on(n, 0.5, tensors);
        },
    },
    Case { name: "lamb, bf16 copy", reads: 28, writes: 14, run: lamb },
    Case {
        name: "sum_of_squares",
        reads: 4,
        writes: 0,
        run: |x, n| use_it(norm::sum_of_squares_on(n, x.grad)),
    },
    Case { name: "all_finite", reads: 4, writes: 0, run: |x, n| use_it(norm::all_finite_on(n, x.grad)) },
    Case { name: "add_assign", reads: 8, writes: 4, run: |x, n| add::add_assign_on(n, x.sums, x.grad) },
    Case {
        name: "add_assign_bf16",
        reads: 6,
        writes: 4,
        run: |x, n| add::add_assign_bf16_on(n, x.sums, x.copy),
    },
    Case { name: "f32_to_bf16", reads: 6, writes: 2, run: |x, n| cast::f32_to_bf16_on(n, x.grad, x.copy) },
    Case { name: "bf16_to_f32", reads: 6, writes: 4, run: |x, n| cast::bf16_to_f32_on(n, x.copy, x.sums) },
    Case {
        name: "fill_normal",
        reads: 4,
        writes: 4,
        run: |x, n| philox::fill_normal_on(n, 1, "w", 0, 0.0, 0.02, x.sums),
    },
];

struct Arrays<'a> {
    step: u64,
    grad: &'a mut [f32],
    master: &'a mut [f32],
    exp_avg: &'a mut [f32],
    exp_avg_sq: &'a mut [f32],
    sums: &'a mut [f32],
    copy: &'a mut [bf16],
}

fn main() {
    let mut args = std::env::args().skip_while(|arg| arg != "step").skip(1);
    let server =
        args.next().map(|count| count.parse().ok().and_then(Threads::new).expect("a number of threads"));
    let mut buffers: [Buffer; 5] = std::array::from_fn(|_| buffer(DType::F32));
    let [grad, master, exp_avg, exp_avg_sq, sums] = buffers.each_mut().map(numbers);
    let mut copy = buffer(DType::Bf16);
    let mut arrays = Arrays { step: 0, grad, master, exp_avg, exp_avg_sq, sums, copy: numbers(&mut copy) };
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let all = Threads::new(cores).expect("a machine has a core");
    philox::fill_normal_on(all, 1, "grad", 0, 0.0, 1.0, arrays.grad);
    philox::fill_normal_on(all, 1, "master", 0, 0.0, 0.02, arrays.master);

    if let Some(threads) = server {
        for _ in std::io::stdin().lines() {
            let start = Instant::now();
            step(&mut arrays, threads);
            println!("{}", start.elapsed().as_secs_f64() * 1e3);
        }
        return;
    }
    println!("{NUMEL} elements, the best of {ROUNDS} rounds");
    measure(&mut arrays, Threads::ONE);
    measure_orthogonalization(arrays.sums, Threads::ONE);
    if cores > 1 {
        measure(&mut arrays, all);
        measure_orthogonalization(arrays.sums, all);
    }
}

fn measure(arrays: &mut Arrays<'_>, threads: Threads) {
    let cases: Vec<&Case> = MEMORY.iter().chain(&KERNELS).collect();
    let mut seconds = vec![f64::INFINITY; cases.len()];
    for _ in 0..ROUNDS {
        for (case, best) in cases.iter().zip(&mut seconds) {
            let start = Instant::now();
            (case.run)(arrays, threads);
            *best = best.min(start.elapsed().as_secs_f64());
        }
    }
    let speed = |bytes: usize, seconds: f64| (NUMEL * bytes) as f64 / seconds;
    let memory = || MEMORY.iter().zip(&seconds);
    let reads = memory().map(|(case, &s)| speed(case.reads, s)).fold(0.0, f64::max);
    let both = memory().map(|(case, &s)| speed(case.reads + case.writes, s)).fold(0.0, f64::max);

    println!(
        "\n{:<20} {:>7} {:>7} {:>16}",
        format!("{} thread(s)", threads.get()),
        "ms",
        "GB/s",
        "of memory speed"
    );
    for (case, &seconds) in cases.iter().zip(&seconds) {
        let bytes = case.reads + case.writes;
        let floor = ((NUMEL * case.reads) as f64 / reads).max((NUMEL * bytes) as f64 / both);
        let (ms, gb_per_s) = (seconds * 1e3, speed(bytes, seconds) / 1e9);
        println!("{:<20} {ms:>7.1} {gb_per_s:>7.1} {:>15.0}%", case.name, 100.0 * floor / seconds);
    }
}

/// Muon's matrix products, on a matrix of a layer.
fn measure_orthogonalization(matrix: &mut [f32], threads: Threads) {
    const SHAPE: [usize; 2] = [1024, 4096];
    const STEPS: usize = 5;
    let [rows, cols] = SHAPE;
    let flop = STEPS * 2 * rows * rows * (2 * cols + rows);
    let seconds = (0..3).map(|_| {
        let start = Instant::now();
        orthogonalize_on(threads, SHAPE, STEPS, &mut matrix[..rows * cols]);
        start.elapsed().as_secs_f64()
    });
    let best = seconds.fold(f64::INFINITY, f64::min);
    println!("orthogonalize {rows} x {cols}: {:.0} ms, {:.0} GFLOP/s", best * 1e3, flop as f64 / best / 1e9);
}

fn buffer(dtype: DType) -> Buffer {
    Buffer::zeroed(dtype, NUMEL, Place::Cpu).expect("memory for the benchmark")
}

fn numbers<T: Element>(buffer: &mut Buffer) -> &mut [T] {
    buffer.typed_mut().expect("asked for by its own type")
}

fn use_it<T>(value: T) {
    black_box(value);
}

const LION: Lion = Lion { lr: 1e-5, beta1: 0.9, beta2: 0.99, weight_decay: 0.1 };

/// Both passes.
fn lamb(x: &mut Arrays<'_>, threads: Threads) {
    x.step += 1;
    let lamb = Lamb {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-6,
        weight_decay: 0.1,
        max_coeff: 10.0,
        min_coeff: 0.01,
        bias_correction: BiasCorrection::On,
        step: x.step,
    };
    let norms = lamb.moments_on(threads, 0.5, x.grad, x.master, x.exp_avg, x.exp_avg_sq);
    lamb.apply_on(threads, norms, x.master, x.exp_avg, x.exp_avg_sq, ComputeCopy::Bf16(x.copy));
}

/// Norm, decision, and one pass for the rest.
fn step(x: &mut Arrays<'_>, threads: Threads) {
    let norm = norm::sum_of_squares_on(threads, x.grad).sqrt();
    assert!(norm.is_finite());
    update(x, threads, (1.0 / norm).min(1.0) as f32, |copy| ComputeCopy::Bf16(copy));
}

fn adamw(x: &mut Arrays<'_>, threads: Threads, compute: for<'a> fn(&'a mut [bf16]) -> ComputeCopy<'a>) {
    update(x, threads, 0.5, compute);
}

fn update(
    x: &mut Arrays<'_>,
    threads: Threads,
    grad_scale: f32,
    compute: for<'a> fn(&'a mut [bf16]) -> ComputeCopy<'a>,
) {
    x.step += 1;
    let adam = Adam {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        decay: WeightDecay::Decoupled,
        bias_correction: BiasCorrection::On,
        step: x.step,
    };
    let states = States::F32([x.exp_avg, x.exp_avg_sq]);
    let tensors = Tensors { grad: Gradient::F32(x.grad), master: x.master, states, compute: compute(x.copy) };
    adam.step_on(threads, grad_scale, tensors);
}

/// Runs `work` on equal parts of two arrays to read and one to write.
fn parts(x: &mut Arrays<'_>, threads: Threads, work: fn(&[f32], &[f32], &mut [f32])) {
    let part = NUMEL.div_ceil(threads.get());
    std::thread::scope(|scope| {
        for ((a, b), out) in x.grad.chunks(part).zip(x.master.chunks(part)).zip(x.sums.chunks_mut(part)) {
            scope.spawn(move || work(a, b, out));
        }
    });
}

fn read(a: &[f32], _: &[f32], _: &mut [f32]) {
    // Integers, so that the compiler may add in any order.
    use_it(a.iter().fold(0u32, |sum, x| x.to_bits().wrapping_add(sum)));
}

fn copy(a: &[f32], _: &[f32], out: &mut [f32]) {
    out.copy_from_slice(a);
}

fn scale(_: &[f32], _: &[f32], out: &mut [f32]) {
    for out in out {
        *out *= 0.999;
    }
}

fn triad(a: &[f32], b: &[f32], out: &mut [f32]) {
    for ((a, b), out) in a.iter().zip(b).zip(out) {
        *out = a + 0.5 * b;
    }
}
