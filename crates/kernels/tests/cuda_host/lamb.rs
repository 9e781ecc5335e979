//! LAMB: the CPU's bits in both passes, and in the norms between them.

use half::{bf16, f16};
use shardwise_kernels::Threads;
use shardwise_kernels::cuda::{DeviceCopy, LambApplyBuffers, LambMomentBuffers, LambNorms, LambRowSums};
use shardwise_kernels::norm::BLOCK_NUMEL;
use shardwise_kernels::optimizer::{BiasCorrection, ComputeCopy, Lamb, SquaredNorms};

use super::{Device, Random, SameBits, host, in_both_orders};

const GRAD_SCALE: f32 = 0.37;
const LAMB: Lamb = Lamb {
    lr: 1e-2,
    beta1: 0.9,
    beta2: 0.95,
    eps: 1e-6,
    weight_decay: 0.1,
    max_coeff: 10.0,
    min_coeff: 0.01,
    bias_correction: BiasCorrection::On,
    step: 3,
};

fn pair(norms: SquaredNorms) -> Vec<f64> {
    vec![norms.param, norms.update]
}

/// Gradients, parameters and moments.
fn arrays(random: &mut Random, numel: usize) -> [Vec<f32>; 4] {
    let [grad, param, m]: [Vec<f32>; 3] = [2.0, 3.0, 0.1].map(|size| random.numbers(numel, size));
    let v: Vec<f32> = random.numbers(numel, 0.1);
    [grad, param, m, v.into_iter().map(f32::abs).collect()]
}

#[test]
fn moments_and_norms_are_the_cpus() {
    let mut random = Random(30);
    let sizes = [0, 1, 31, 32, 33, 127, 128, 129, 4000, BLOCK_NUMEL - 1, BLOCK_NUMEL, 9 * BLOCK_NUMEL + 77];
    for (case, numel) in sizes.into_iter().enumerate() {
        let [mut grad, param, m, v] = arrays(&mut random, numel);
        if case % 3 == 2 {
            grad = random.any(numel);
        }
        let (mut expected_m, mut expected_v) = (m.clone(), v.clone());
        let expected =
            LAMB.moments_on(Threads::ONE, GRAD_SCALE, &grad, &param, &mut expected_m, &mut expected_v);
        let offset = case % 2;
        let got = in_both_orders(|order| {
            let (mut g, mut p) = (Device::new(&grad, offset), Device::new(&param, offset));
            let (mut m, mut v) = (Device::new(&m, offset), Device::new(&v, offset));
            let num_blocks = LambNorms::num_blocks(numel as u64);
            let mut blocks = Device::new(&vec![f64::NAN; 2 * num_blocks as usize], 0);
            let mut total = Device::new(&[f64::NAN; 2], 0);
            let buffers = LambMomentBuffers {
                grad: g.ptr(),
                master: p.ptr(),
                states: [m.ptr(), v.ptr()],
                blocks: blocks.ptr(),
                numel: numel as u64,
            };
            host().launch(&LAMB.cuda_moments(GRAD_SCALE, buffers), order);
            let add = LambNorms { blocks: blocks.ptr(), total: total.ptr(), num_blocks };
            host().launch(&add.launch(), order);
            blocks.get();
            g.get().assert_same(&grad, "gradients are read only");
            p.get().assert_same(&param, "the first pass moves no parameter");
            (m.get(), v.get(), total.get())
        });
        got.assert_same(&(expected_m, expected_v, pair(expected)), &format!("{numel} elements"));
    }
}

#[test]
fn many_blocks_norms_are_added_in_order() {
    let mut random = Random(31);
    for num_blocks in [0, 1, 127, 128, 129, 1000] {
        let terms: Vec<f64> = (0..2 * num_blocks).map(|_| f64::from(random.unit().abs()) * 1e10).collect();
        let mut expected = vec![0.0; 2];
        terms.chunks_exact(2).for_each(|block| (0..2).for_each(|i| expected[i] += block[i]));
        let total = in_both_orders(|order| {
            let (mut blocks, mut total) = (Device::new(&terms, 0), Device::new(&[f64::NAN; 2], 0));
            let add = LambNorms { blocks: blocks.ptr(), total: total.ptr(), num_blocks: num_blocks as u64 };
            host().launch(&add.launch(), order);
            total.get()
        });
        total.assert_same(&expected, &format!("{num_blocks} blocks"));
    }
}

/// A table of norms of three tensors, one of which is in the middle, and that tensor's sum.
fn table(random: &mut Random, num_rows: usize, [param, update]: [f64; 2]) -> (Vec<f64>, SquaredNorms) {
    let mut sum = SquaredNorms::default();
    let mut rows = Vec::new();
    for _ in 0..num_rows {
        let share = f64::from(random.unit().abs()) / num_rows as f64;
        sum += SquaredNorms { param: param * share, update: update * share };
        rows.extend([1e9, f64::NAN, param * share, update * share, -7.0, f64::INFINITY]);
    }
    (rows, sum)
}

#[test]
fn parameters_move_as_on_the_cpu() {
    let mut random = Random(32);
    // Sizes of norms: usual, none, none of an update, one that overflows, one that is not a number, ratios beyond both limits.
    let sizes = [
        [300.0, 2.0],
        [0.0, 2.0],
        [300.0, 0.0],
        [f64::MAX, 1e-300],
        [1.0, f64::NAN],
        [f64::INFINITY, f64::INFINITY],
        [1e9, 1.0],
        [1e-9, 1.0],
    ];
    for (case, (numel, num_rows)) in
        [(1, 1), (3, 2), (64, 1), (65, 31), (1024, 32), (5001, 33), (0, 1), (257, 70)].into_iter().enumerate()
    {
        let [_, param, m, v] = arrays(&mut random, numel);
        let (rows, sum) = table(&mut random, num_rows, sizes[case]);
        let offset = case % 3;
        for copy in 0..3 {
            let mut expected = (param.clone(), vec![bf16::ZERO; numel], vec![f16::ZERO; numel]);
            let compute = match copy {
                0 => ComputeCopy::None,
                1 => ComputeCopy::Bf16(&mut expected.1),
                _ => ComputeCopy::F16(&mut expected.2),
            };
            LAMB.apply_on(Threads::ONE, sum, &mut expected.0, &m, &v, compute);
            let got = in_both_orders(|order| {
                let (mut p, mut table) = (Device::new(&param, offset), Device::new(&rows, 0));
                let (mut m_, mut v_) = (Device::new(&m, offset), Device::new(&v, offset));
                let mut to_bf16 = Device::new(&vec![bf16::ZERO; numel], offset);
                let mut to_f16 = Device::new(&vec![f16::ZERO; numel], offset);
                let norms = shardwise_kernels::cuda::DevicePtr::new(table.ptr().address() + 16);
                let buffers = LambApplyBuffers {
                    master: p.ptr(),
                    states: [m_.ptr(), v_.ptr()],
                    compute: match copy {
                        0 => DeviceCopy::None,
                        1 => DeviceCopy::Bf16(to_bf16.ptr()),
                        _ => DeviceCopy::F16(to_f16.ptr()),
                    },
                    numel: numel as u64,
                    norms,
                    num_rows: num_rows as u64,
                    row_numel: 3,
                };
                host().launch(&LAMB.cuda_apply(buffers), order);
                m_.get().assert_same(&m, "the second pass moves no moment");
                v_.get().assert_same(&v, "the second pass moves no moment");
                (p.get(), to_bf16.get(), to_f16.get())
            });
            got.assert_same(&expected, &format!("{numel} elements, {num_rows} rows, {:?}", sizes[case]));
        }
    }
}

#[test]
fn rows_are_added_in_order() {
    let mut random = Random(33);
    for (num_rows, width) in [(1, 2), (3, 14), (8, 600)] {
        let rows: Vec<f64> = (0..num_rows * width).map(|_| f64::from(random.unit()) * 1e10).collect();
        let expected: Vec<f64> =
            (0..width).map(|at| (0..num_rows).fold(0.0, |sum, row| sum + rows[row * width + at])).collect();
        let sums = in_both_orders(|order| {
            let (mut rows, mut sums) = (Device::new(&rows, 0), Device::new(&vec![0f64; width], 0));
            let (num_rows, width) = (num_rows as u64, width as u64);
            let add = LambRowSums { rows: rows.ptr(), sums: sums.ptr(), num_rows, width };
            host().launch(&add.launch(), order);
            sums.get()
        });
        sums.assert_same(&expected, &format!("{num_rows} rows of {width}"));
    }
}
