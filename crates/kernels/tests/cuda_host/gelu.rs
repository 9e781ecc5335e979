//! GELU with a bias before it: the CPU's bits on the host, but for the order of sums over rows.

use half::{bf16, f16};
use shardwise_kernels::cuda::{GeluBackward, GeluForward};
use shardwise_kernels::gelu;

use super::reductions::assert_close;
use super::row_norm::column_sums;
use super::{Device, Float, Random, SameBits, host, in_both_orders};

fn check<T: Float>() {
    let mut random = Random(21);
    // Columns that vectors do not divide, several cuts of them, a last one that is not whole; rows fewer than warps, and more than one
    // turn has. The last number is where arrays begin.
    for (rows, width, offset) in
        [(0, 8, 0), (1, 1, 0), (3, 7, 0), (9, 64, 1), (5, 768, 0), (70, 520, 0), (17, 301, 0), (4100, 40, 0)]
    {
        let what = format!("{rows} rows of {width}");
        let [x, dy]: [Vec<T>; 2] = std::array::from_fn(|_| random.numbers(rows * width, 5.0));
        let bias: Vec<T> = random.numbers(width, 2.0);
        let (rows_, width_) = (rows as u64, width as u64);
        let mut expected = x.clone();
        gelu::forward(&x, &bias, &mut expected);
        let out = in_both_orders(|order| {
            let (mut x, mut bias) = (Device::new(&x, offset), Device::new(&bias, 0));
            let mut out = Device::new(&vec![T::round(f32::NAN); rows * width], offset);
            let call =
                GeluForward { x: x.ptr(), bias: bias.ptr(), out: out.ptr(), rows: rows_, width: width_ };
            host().launch(&call.launch(T::TYPE), order);
            out.get()
        });
        out.assert_same(&expected, &what);

        let (mut expected_dx, mut expected_dbias) = (x.clone(), vec![0f32; width]);
        gelu::backward(&x, &bias, &dy, &mut expected_dx, &mut expected_dbias);
        let (dx, dbias) = in_both_orders(|order| {
            let (mut x, mut bias) = (Device::new(&x, offset), Device::new(&bias, 0));
            // The gradient over what it is made of.
            let mut dx = Device::new(&dy, offset);
            let num_partials = GeluBackward::num_partials(T::TYPE, rows_, width_) as usize;
            let mut partials = Device::new(&vec![f32::NAN; num_partials * width], 0);
            let call = GeluBackward {
                x: x.ptr(),
                bias: bias.ptr(),
                dy: dx.ptr(),
                dx: dx.ptr(),
                partial_dbias: partials.ptr(),
                rows: rows_,
                width: width_,
            };
            host().launch(&call.launch(T::TYPE), order);
            (dx.get(), column_sums::<T>(&partials.get(), width, order))
        });
        dx.assert_same(&expected_dx, &what);
        let rounded: Vec<T> = expected_dbias.iter().map(|&sum| T::round(sum)).collect();
        assert_close(&dbias, &rounded, &what);
    }
}

#[test]
fn gelu_is_the_cpus() {
    check::<f32>();
    check::<bf16>();
    check::<f16>();
}

#[test]
fn any_numbers_give_the_cpus() {
    const WIDTH: usize = 264;
    let (x, bias): (Vec<f32>, Vec<f32>) = (Random(22).any(40 * WIDTH), Random(23).any(WIDTH));
    let mut expected = x.clone();
    gelu::forward(&x, &bias, &mut expected);
    let out = in_both_orders(|order| {
        let (mut x, mut bias) = (Device::new(&x, 0), Device::new(&bias, 0));
        let at = x.ptr();
        let call = GeluForward { x: at, bias: bias.ptr(), out: at, rows: 40, width: WIDTH as u64 };
        host().launch(&call.launch(f32::TYPE), order);
        x.get()
    });
    out.assert_same(&expected, "any numbers");
}
