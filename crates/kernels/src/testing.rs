//! What the tests of generic kernels share.

use half::{bf16, f16};

use crate::isa::Isa;
use crate::{Float, Threads, philox};

/// Element types as tests see them.
pub(crate) trait Number: Float + std::fmt::Debug {
    /// The largest relative error of rounding to this type.
    const ROUNDING: f64;
    fn of(x: f32) -> Self;
    fn wide(self) -> f64;
}

impl Number for f32 {
    const ROUNDING: f64 = 1.0 / (1u64 << 24) as f64;
    fn of(x: f32) -> Self {
        x
    }
    fn wide(self) -> f64 {
        self.into()
    }
}

impl Number for bf16 {
    const ROUNDING: f64 = 1.0 / (1u64 << 8) as f64;
    fn of(x: f32) -> Self {
        bf16::from_f32(x)
    }
    fn wide(self) -> f64 {
        self.into()
    }
}

impl Number for f16 {
    const ROUNDING: f64 = 1.0 / (1u64 << 11) as f64;
    fn of(x: f32) -> Self {
        f16::from_f32(x)
    }
    fn wide(self) -> f64 {
        self.into()
    }
}

/// Normally distributed numbers.
pub(crate) fn normal<T: Number>(name: &str, numel: usize, std: f32) -> Vec<T> {
    let mut x = vec![0.0; numel];
    philox::fill_normal(1, name, 0, 0.0, std, &mut x);
    x.into_iter().map(T::of).collect()
}

pub(crate) fn wide<T: Number>(x: &[T]) -> Vec<f64> {
    x.iter().map(|&x| x.wide()).collect()
}

/// Bits, with one NaN for all.
pub(crate) fn bits<T: Number>(x: &[T]) -> Vec<u64> {
    x.iter().map(|&x| if x.wide().is_nan() { f64::NAN.to_bits() } else { x.wide().to_bits() }).collect()
}

/// Every instruction set on one thread, and the best one on several.
pub(crate) fn ways() -> Vec<(Isa, Threads)> {
    let several = [2, 3, 7].into_iter().filter_map(Threads::new);
    Isa::all()
        .into_iter()
        .map(|isa| (isa, Threads::ONE))
        .chain(several.map(|threads| (Isa::best(), threads)))
        .collect()
}

/// Asserts that each element lies within `tolerance` of what is expected, relative to the latter's size or to `floor`.
#[track_caller]
pub(crate) fn assert_close<T: Number>(what: &str, got: &[T], expected: &[f64], tolerance: f64, floor: f64) {
    assert_eq!(got.len(), expected.len());
    for (i, (got, &expected)) in got.iter().zip(expected).enumerate() {
        let error = (got.wide() - expected).abs() / expected.abs().max(floor);
        assert!(error <= tolerance, "{what}, element {i}: {got:?} for {expected}, error {error:e}");
    }
}

/// The derivative of `f` at `x`, by central differences of fourth order.
pub(crate) fn slope(f: impl Fn(f64) -> f64, x: f64) -> f64 {
    const STEP: f64 = 1e-3;
    (8.0 * (f(x + STEP) - f(x - STEP)) - (f(x + 2.0 * STEP) - f(x - 2.0 * STEP))) / (12.0 * STEP)
}
