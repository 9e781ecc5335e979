//! The vocabulary that kernels are written in: a few lanes of `f32` at a time.
//!
//! A [`Simd`] token stands for an instruction set; holding one proves that the machine has it. Every operation
//! is one IEEE operation per lane (a fused multiply-add is one rounding), so all tokens give the same bits (which
//! NaN a NaN is may differ), and [`Scalar`], one lane of plain Rust, is the reference for the others.
//! Where a machine has no fused multiply-add, the reference computes it in software: slow, and still equal.

use half::{bf16, f16};

pub(crate) mod exp;
pub(crate) mod lanes;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86;

/// Lanes of the `f64` sums of squares, whatever the width of the registers.
pub(crate) const SUM_LANES: usize = 32;

/// Lanes of the `f32` sums and maxima of a row, whatever the width of the registers.
pub(crate) const ROW_LANES: usize = 32;

/// Public in a private module, so that [`Float`] can be: nobody outside can name it.
pub trait Simd: Copy {
    /// `LANES` numbers.
    type Vector: Copy;
    /// `LANES` numbers of 16 bits.
    type Bits16: Copy;
    /// `SUM_LANES` sums in `f64`.
    type Sums: Copy;
    /// `ROW_LANES` numbers, in order.
    type Row: Copy + AsRef<[Self::Vector]> + AsMut<[Self::Vector]>;
    const LANES: usize;

    fn splat(self, x: f32) -> Self::Vector;
    fn splat_row(self, x: f32) -> Self::Row;
    fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    fn sub(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    fn div(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    fn sqrt(self, a: Self::Vector) -> Self::Vector;
    /// `a * b + c`, rounded once.
    fn mul_add(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// `a` where `a > b`, else `b`: so `b` where one of them is NaN.
    fn max(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a` where `a < b`, else `b`: so `b` where one of them is NaN.
    fn min(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `x * 2^n`, rounded once, for `x` in 0.5..2 and whole numbers `n` in -160..=160; NaN if `x` is.
    fn scale(self, x: Self::Vector, n: Self::Vector) -> Self::Vector;

    /// # Safety
    /// Valid for reads of `LANES` elements; no alignment beyond the element's is asked, here and below.
    unsafe fn load(self, from: *const f32) -> Self::Vector;
    /// # Safety
    /// Valid for reads of `LANES` elements.
    unsafe fn load_bf16(self, from: *const bf16) -> Self::Vector;
    /// # Safety
    /// Valid for reads of `LANES` elements.
    unsafe fn load_f16(self, from: *const f16) -> Self::Vector;
    /// # Safety
    /// Valid for writes of `LANES` elements.
    unsafe fn store(self, to: *mut f32, x: Self::Vector);
    /// Rounds to nearest, ties to even; NaN stays NaN (quiet, payload cut).
    fn to_bf16(self, x: Self::Vector) -> Self::Bits16;
    /// Rounds to nearest, ties to even; NaN stays NaN (quiet, payload cut).
    fn to_f16(self, x: Self::Vector) -> Self::Bits16;
    /// # Safety
    /// Valid for writes of `LANES` elements.
    unsafe fn store16(self, to: *mut u16, bits: Self::Bits16);
    /// Stores past the cache. Nobody may read the memory before a [`fence`](Simd::fence) by this thread.
    /// # Safety
    /// Valid for writes of `LANES` elements, and aligned to all of them together.
    unsafe fn stream16(self, to: *mut u16, bits: Self::Bits16);
    /// Orders streamed stores before everything that follows.
    fn fence(self);

    fn zero_sums(self) -> Self::Sums;
    /// Adds the square of element `j` to sum `j`. The square of an `f32` is exact in `f64`, so it makes no
    /// difference whether multiplication and addition are fused.
    /// # Safety
    /// Valid for reads of `SUM_LANES` elements.
    unsafe fn add_squares(self, sums: Self::Sums, from: *const f32) -> Self::Sums;
    fn sums(self, sums: Self::Sums) -> [f64; SUM_LANES];
}

/// The numbers that kernels of model layers work on: `f32`, `bf16`, `f16`. Arithmetic is `f32` for all of them.
pub trait Float: Element {}

impl Float for f32 {}
impl Float for bf16 {}
impl Float for f16 {}

/// A type that lanes are read from and written to.
pub trait Element: Copy + Send + Sync {
    /// # Safety
    /// Valid for reads of `S::LANES` elements.
    unsafe fn load<S: Simd>(simd: S, from: *const Self) -> S::Vector;
    /// Rounds to nearest, ties to even; NaN stays NaN.
    /// # Safety
    /// Valid for writes of `S::LANES` elements.
    unsafe fn store<S: Simd>(simd: S, to: *mut Self, x: S::Vector);
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const f32) -> S::Vector {
        // SAFETY: the caller's promise, here and below.
        unsafe { simd.load(from) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(simd: S, to: *mut f32, x: S::Vector) {
        // SAFETY: as above.
        unsafe { simd.store(to, x) }
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const bf16) -> S::Vector {
        // SAFETY: as above.
        unsafe { simd.load_bf16(from) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(simd: S, to: *mut bf16, x: S::Vector) {
        // SAFETY: as above.
        unsafe { simd.store16(to.cast(), simd.to_bf16(x)) }
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const f16) -> S::Vector {
        // SAFETY: as above.
        unsafe { simd.load_f16(from) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(simd: S, to: *mut f16, x: S::Vector) {
        // SAFETY: as above.
        unsafe { simd.store16(to.cast(), simd.to_f16(x)) }
    }
}

/// A 16-bit float type.
pub(crate) trait Float16: Element {
    fn round<S: Simd>(simd: S, x: S::Vector) -> S::Bits16;
}

impl Float16 for bf16 {
    #[inline(always)]
    fn round<S: Simd>(simd: S, x: S::Vector) -> S::Bits16 {
        simd.to_bf16(x)
    }
}

impl Float16 for f16 {
    #[inline(always)]
    fn round<S: Simd>(simd: S, x: S::Vector) -> S::Bits16 {
        simd.to_f16(x)
    }
}

/// One lane of plain Rust.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scalar;

impl Simd for Scalar {
    type Vector = f32;
    type Bits16 = u16;
    type Sums = [f64; SUM_LANES];
    type Row = [f32; ROW_LANES];
    const LANES: usize = 1;

    #[inline(always)]
    fn splat(self, x: f32) -> f32 {
        x
    }
    #[inline(always)]
    fn splat_row(self, x: f32) -> Self::Row {
        [x; ROW_LANES]
    }
    #[inline(always)]
    fn add(self, a: f32, b: f32) -> f32 {
        a + b
    }
    #[inline(always)]
    fn sub(self, a: f32, b: f32) -> f32 {
        a - b
    }
    #[inline(always)]
    fn mul(self, a: f32, b: f32) -> f32 {
        a * b
    }
    #[inline(always)]
    fn div(self, a: f32, b: f32) -> f32 {
        a / b
    }
    #[inline(always)]
    fn sqrt(self, a: f32) -> f32 {
        a.sqrt()
    }
    #[inline(always)]
    fn mul_add(self, a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
    #[inline(always)]
    fn max(self, a: f32, b: f32) -> f32 {
        if a > b { a } else { b }
    }
    #[inline(always)]
    fn min(self, a: f32, b: f32) -> f32 {
        if a < b { a } else { b }
    }
    #[inline(always)]
    fn scale(self, x: f32, n: f32) -> f32 {
        // By halves: each is a normal number, the first product is exact.
        let n = n as i32;
        let power = |n: i32| f32::from_bits(((n + 127) << 23) as u32);
        x * power(n >> 1) * power(n - (n >> 1))
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> f32 {
        // SAFETY: the caller's promise, here and below.
        unsafe { *from }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> f32 {
        // SAFETY: as above.
        f32::from_bits(u32::from(unsafe { *from }.to_bits()) << 16)
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> f32 {
        // SAFETY: as above.
        unsafe { *from }.to_f32()
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, x: f32) {
        // SAFETY: as above.
        unsafe { *to = x }
    }
    #[inline(always)]
    fn to_bf16(self, x: f32) -> u16 {
        bf16::from_f32(x).to_bits()
    }
    #[inline(always)]
    fn to_f16(self, x: f32) -> u16 {
        f16::from_f32(x).to_bits()
    }
    #[inline(always)]
    unsafe fn store16(self, to: *mut u16, bits: u16) {
        // SAFETY: as above.
        unsafe { *to = bits }
    }
    #[inline(always)]
    unsafe fn stream16(self, to: *mut u16, bits: u16) {
        // SAFETY: as above.
        unsafe { *to = bits }
    }
    #[inline(always)]
    fn fence(self) {}

    #[inline(always)]
    fn zero_sums(self) -> Self::Sums {
        [0.0; SUM_LANES]
    }
    #[inline(always)]
    unsafe fn add_squares(self, mut sums: Self::Sums, from: *const f32) -> Self::Sums {
        for (j, sum) in sums.iter_mut().enumerate() {
            // SAFETY: `j < SUM_LANES` elements are readable, the caller's promise.
            let x = f64::from(unsafe { *from.add(j) });
            *sum += x * x;
        }
        sums
    }
    #[inline(always)]
    fn sums(self, sums: Self::Sums) -> [f64; SUM_LANES] {
        sums
    }
}
