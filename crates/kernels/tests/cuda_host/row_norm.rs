//! RMS norm and LayerNorm: the CPU's numbers but for the order of sums, alone and with a residual's addition.

use half::{bf16, f16};
use shardwise_kernels::cuda::{
    AddNormBackward, AddNormForward, ColumnSums, DevicePtr, NormBackward, NormForward, RowNorm,
};
use shardwise_kernels::{Threads, layer_norm, rms_norm};

use super::reductions::{SUM_ORDER, assert_close};
use super::{Device, Float, Order, Random, SameBits, host, in_both_orders};

const EPS: f32 = 1e-5;

/// Rows that vectors do not divide, that are longer than a block, whose sums do not fit shared memory; more rows than blocks take at a
/// time, a last round in which some threads have no row. The last number is where arrays begin.
const SHAPES: [(usize, usize, usize); 10] = [
    (0, 8, 0),
    (1, 1, 0),
    (3, 7, 0),
    (5, 64, 1),
    (4, 768, 0),
    (7, 800, 0),
    (3, 4104, 0),
    (2, 5128, 0),
    (2, 10_248, 0),
    (2054, 264, 0),
];

/// A sum and its norm; factors and means.
type Forward<T> = ((Vec<T>, Vec<T>), (Vec<f32>, Vec<f32>));

/// A norm's inputs, and the gradients it is given.
struct Case<T> {
    norm: RowNorm,
    x: Vec<T>,
    weight: Vec<T>,
    bias: Vec<T>,
    dy: Vec<T>,
    /// Where arrays begin.
    offset: usize,
}

/// What is kept for the backward pass.
#[derive(Debug, Clone)]
struct Kept {
    factors: Vec<f32>,
    means: Vec<f32>,
}

/// Gradients of elements, and of columns.
type Grads<T> = (Vec<T>, Vec<T>);

impl<T: Float> Case<T> {
    fn new(norm: RowNorm, random: &mut Random, (rows, width, offset): (usize, usize, usize)) -> Self {
        let [mut x, dy]: [Vec<T>; 2] = std::array::from_fn(|_| random.numbers(rows * width, 3.0));
        // A mean that is not small beside the rest.
        if norm == RowNorm::Layer {
            x.iter_mut().for_each(|x| *x = T::round(x.wide() + 2.0));
        }
        let [weight, bias] = std::array::from_fn(|_| random.numbers(width, 2.0));
        Case { norm, x, weight, bias, dy, offset }
    }

    fn width(&self) -> usize {
        self.weight.len()
    }

    fn rows(&self) -> usize {
        self.x.len() / self.width()
    }

    fn what(&self) -> String {
        format!("{:?} of {} rows of {}", self.norm, self.rows(), self.width())
    }

    /// The CPU's.
    fn forward(&self) -> (Vec<T>, Kept) {
        let (mut out, mut kept) = (self.x.clone(), self.nothing_kept());
        let Kept { factors, means } = &mut kept;
        match self.norm {
            RowNorm::Rms => rms_norm::forward(Threads::ONE, &self.x, &self.weight, EPS, &mut out, factors),
            RowNorm::Layer => {
                layer_norm::forward(&self.x, &self.weight, &self.bias, EPS, &mut out, means, factors);
            }
        }
        (out, kept)
    }

    /// The CPU's; those of columns in `f32`, one after the other.
    fn backward(&self, kept: &Kept) -> (Vec<T>, Vec<f32>) {
        let width = self.width();
        let (mut dx, mut sums) = (self.x.clone(), vec![0f32; self.norm.num_sums() as usize * width]);
        let (x, weight, dy) = (&self.x, &self.weight, &self.dy);
        match self.norm {
            RowNorm::Rms => {
                rms_norm::backward(Threads::ONE, x, weight, &kept.factors, dy, &mut dx, &mut sums);
            }
            RowNorm::Layer => {
                let (dweight, dbias) = sums.split_at_mut(width);
                let Kept { factors, means } = kept;
                layer_norm::backward(x, weight, means, factors, dy, &mut dx, dweight, dbias);
            }
        }
        (dx, sums)
    }

    fn nothing_kept(&self) -> Kept {
        Kept { factors: vec![0.0; self.rows()], means: vec![0.0; self.rows()] }
    }

    /// The kernel's. `addends` are added to make `x`; then the sum comes too.
    fn forward_on_device(&self, addends: Option<[&[T]; 2]>) -> Forward<T> {
        let Kept { factors, means } = self.nothing_kept();
        in_both_orders(|order| {
            let on_device = |x: &[T]| Device::new(x, self.offset);
            let mut x = on_device(addends.map_or(&self.x, |[x, _]| x));
            // The sum in the residual's place.
            let mut sum = on_device(addends.map_or(&[], |[_, residual]| residual));
            let (mut weight, mut bias) = (Device::new(&self.weight, 0), Device::new(&self.bias, 0));
            let mut out = on_device(&vec![T::round(f32::NAN); self.x.len()]);
            let (mut factors, mut means) = (Device::new(&factors, 0), Device::new(&means, 0));
            let norm = NormForward {
                x: x.ptr(),
                weight: weight.ptr(),
                bias: self.of_layer_norm(bias.ptr()),
                out: out.ptr(),
                factors: factors.ptr(),
                means: self.of_layer_norm(means.ptr()),
                rows: self.rows() as u64,
                width: self.width() as u64,
                eps: EPS,
            };
            match addends {
                None => host().launch(&norm.launch(self.norm, T::TYPE), order),
                Some(_) => {
                    let add = AddNormForward { norm, residual: sum.ptr(), sum: sum.ptr() };
                    host().launch(&add.launch(self.norm, T::TYPE), order);
                }
            }
            ((sum.get(), out.get()), (factors.get(), means.get()))
        })
    }

    fn of_layer_norm(&self, array: DevicePtr) -> DevicePtr {
        if self.norm == RowNorm::Layer { array } else { DevicePtr::NULL }
    }

    /// The kernel's, with what the sum's gradient is from elsewhere.
    fn backward_on_device(&self, kept: &Kept, dsum: Option<&[T]>) -> Grads<T> {
        in_both_orders(|order| {
            let on_device = |x: &[T]| Device::new(x, self.offset);
            let (mut x, mut dy, mut weight) =
                (on_device(&self.x), on_device(&self.dy), Device::new(&self.weight, 0));
            let (mut factors, mut means) = (Device::new(&kept.factors, 0), Device::new(&kept.means, 0));
            // The gradient over what it is added to.
            let mut dx = on_device(dsum.unwrap_or(&vec![T::round(f32::NAN); self.x.len()]));
            let (rows, width) = (self.rows() as u64, self.width() as u64);
            let num_partials = self.norm.num_partials(T::TYPE, rows, width);
            let sums_width = self.norm.num_sums() * width;
            let mut partials = Device::new(&vec![f32::NAN; (num_partials * sums_width) as usize], 0);
            let norm = NormBackward {
                x: x.ptr(),
                weight: weight.ptr(),
                factors: factors.ptr(),
                means: self.of_layer_norm(means.ptr()),
                dy: dy.ptr(),
                dx: dx.ptr(),
                partials: partials.ptr(),
                rows,
                width,
            };
            match dsum {
                None => host().launch(&norm.launch(self.norm, T::TYPE), order),
                Some(_) => {
                    let add = AddNormBackward { norm, dsum: dx.ptr() };
                    host().launch(&add.launch(self.norm, T::TYPE), order);
                }
            }
            (dx.get(), column_sums(&partials.get(), sums_width as usize, order))
        })
    }
}

/// Sums of columns of `[.., width]`.
pub fn column_sums<T: Float>(partials: &[f32], width: usize, order: Order) -> Vec<T> {
    let num_partials = (partials.len() / width) as u64;
    let mut partials = Device::new(partials, 0);
    let mut sums = Device::new(&vec![T::round(f32::NAN); width], 0);
    let add = ColumnSums { partials: partials.ptr(), sums: sums.ptr(), num_partials, width: width as u64 };
    host().launch(&add.launch(T::TYPE), order);
    sums.get()
}

fn rounded<T: Float>(x: &[f32]) -> Vec<T> {
    x.iter().map(|&x| T::round(x)).collect()
}

fn check<T: Float>(norm: RowNorm) {
    let mut random = Random(9);
    for shape in SHAPES {
        let case = Case::<T>::new(norm, &mut random, shape);
        let what = case.what();
        let (out, kept) = case.forward();
        let ((_, got_out), (factors, means)) = case.forward_on_device(None);
        assert_close(&got_out, &out, &what);
        assert_close(&factors, &kept.factors, &what);
        assert_close(&means, &kept.means, &what);
        let (dx, sums) = case.backward(&kept);
        let (got_dx, got_sums) = case.backward_on_device(&kept, None);
        assert_close(&got_dx, &dx, &what);
        assert_close(&got_sums, &rounded::<T>(&sums), &what);
    }
}

#[test]
fn norms_are_the_cpus_but_for_the_order_of_sums() {
    for norm in [RowNorm::Rms, RowNorm::Layer] {
        check::<f32>(norm);
        check::<bf16>(norm);
        check::<f16>(norm);
    }
}

fn check_sums<T: Float>(norm: RowNorm) {
    let mut random = Random(16);
    for shape in SHAPES {
        let mut case = Case::<T>::new(norm, &mut random, shape);
        let what = case.what();
        let [x, residual, dsum]: [Vec<T>; 3] = std::array::from_fn(|_| random.numbers(case.x.len(), 3.0));
        let add = |a: &[T], b: &[T]| -> Vec<T> {
            a.iter().zip(b).map(|(a, b)| T::round(a.wide() + b.wide())).collect()
        };
        case.x = add(&x, &residual);
        let (out, kept) = case.forward();
        let ((sum, got_out), (factors, means)) = case.forward_on_device(Some([&x, &residual]));
        sum.assert_same(&case.x, &what);
        assert_close(&got_out, &out, &what);
        assert_close(&factors, &kept.factors, &what);
        assert_close(&means, &kept.means, &what);

        let (of_norm, sums) = case.backward(&kept);
        let dx = add(&dsum, &of_norm);
        let (got_dx, got_sums) = case.backward_on_device(&kept, Some(&dsum));
        // Rounded twice: two units in the last place, of the larger of sum and addend.
        let largest = dsum.iter().chain(&dx).map(|x| x.wide().abs()).fold(0.0, f32::max);
        for (got, expected) in got_dx.iter().zip(&dx) {
            let tolerance = (SUM_ORDER + 2.0 * T::ULP) * largest;
            assert!((got.wide() - expected.wide()).abs() <= tolerance, "{what}: {got:?} for {expected:?}");
        }
        assert_close(&got_sums, &rounded::<T>(&sums), &what);
    }
}

#[test]
fn a_sum_and_its_norm_are_the_cpus_but_for_the_order_of_sums() {
    for norm in [RowNorm::Rms, RowNorm::Layer] {
        check_sums::<f32>(norm);
        check_sums::<bf16>(norm);
        check_sums::<f16>(norm);
    }
}

/// What is far from zero beside its spread keeps its variance: nothing is subtracted from a sum of squares.
#[test]
fn a_large_mean_does_not_spoil_the_variance() {
    let mut case = Case::<f32>::new(RowNorm::Layer, &mut Random(17), (3, 1000, 0));
    case.x.iter_mut().for_each(|x| *x += 4096.0);
    let (_, kept) = case.forward();
    let (_, (factors, means)) = case.forward_on_device(None);
    assert_close(&means, &kept.means, "means");
    // Means of parts are rounded by 2e-4; a sum of squares of such numbers would be off by as much as the variance.
    for (got, expected) in factors.iter().zip(&kept.factors) {
        assert!((got / expected - 1.0).abs() <= 1e-4, "{got} for {expected}");
    }
}

#[test]
fn a_row_with_nan_or_infinity_spares_the_others() {
    for bad in [f32::NAN, f32::INFINITY] {
        for norm in [RowNorm::Rms, RowNorm::Layer] {
            let mut case = Case::<bf16>::new(norm, &mut Random(18), (3, 520, 0));
            let expected = case.forward().0;
            case.x[520 + 77] = bf16::round(bad);
            let ((_, out), _) = case.forward_on_device(None);
            assert!(out[520 + 77].is_nan(), "{norm:?}, {bad}");
            assert_close(&out[..520], &expected[..520], "the row before");
            assert_close(&out[1040..], &expected[1040..], "the row after");
        }
    }
}
