//! A sum and its norm together: what stands between two blocks of a transformer, with one read of memory less each way.
//!
//! ```text
//! forward    sum = x + residual       out = norm(sum)
//! backward   dx = dresidual = dsum + the norm's gradient
//! ```
//!
//! The sum is rounded before it is normalized, and the norm's gradient before it is added: the bits are those of the
//! two operations one after the other.

use super::{Backward, Forward};
use crate::isa::{Isa, Kernel};
use crate::parallel::Split;
use crate::rows::{Rows, RowsMut, for_each_rows, rows_per_piece};
use crate::simd::Simd;
use crate::simd::lanes::{Each, for_each, load, store};
use crate::{Float, Threads};

/// `sum = x + residual` and [`forward`](super::forward) of it.
///
/// # Shapes
/// As [`super::forward`]; `residual` and `sum` like `x`.
/// # Panics
/// If lengths do not match.
#[allow(clippy::too_many_arguments, reason = "each is an array of its own")]
pub fn forward<T: Float>(
    threads: Threads,
    x: &[T],
    residual: &[T],
    weight: &[T],
    eps: f32,
    sum: &mut [T],
    out: &mut [T],
    inv_rms: &mut [f32],
) {
    let width = weight.len();
    assert_eq!(x.len(), inv_rms.len() * width, "elements against rows and weights");
    assert_eq!([residual.len(), sum.len(), out.len()], [x.len(); 3], "addends and room against elements");
    if width == 0 {
        return inv_rms.fill(f32::NAN);
    }
    let isa = Isa::best();
    let addends = (Rows { data: x, width }, Rows { data: residual, width });
    let results = ((RowsMut { data: sum, width }, RowsMut { data: out, width }), inv_rms);
    for_each_rows(threads, width, (addends, results), |((x, residual), ((sum, out), inv_rms))| {
        let (x, residual, sum, out) = (x.data, residual.data, sum.data, out.data);
        isa.run(AddForward { x, residual, sum, weight, eps, out, inv_rms });
    });
}

/// The gradients of [`forward`]: `dx` is that of both addends. `dweight` is overwritten with the sum over all rows.
///
/// # Shapes
/// As [`super::backward`], of `sum`; `dsum`, the sum's gradient from where else it is used, like `sum`
/// # Panics
/// If lengths do not match.
#[allow(clippy::too_many_arguments, reason = "each is an array of its own")]
pub fn backward<T: Float>(
    threads: Threads,
    sum: &[T],
    weight: &[T],
    inv_rms: &[f32],
    dy: &[T],
    dsum: &[T],
    dx: &mut [T],
    dweight: &mut [f32],
) {
    let width = weight.len();
    assert_eq!(sum.len(), inv_rms.len() * width, "elements against rows and weights");
    assert_eq!([dy.len(), dsum.len(), dx.len()], [sum.len(); 3], "gradients against elements");
    assert_eq!(width, dweight.len(), "weights against room for their gradients");
    dweight.fill(0.0);
    if sum.is_empty() {
        return;
    }
    let isa = Isa::best();
    let mut sums = vec![0.0; inv_rms.len().div_ceil(rows_per_piece(width)) * width];
    let of_norm = super::Blocks {
        x: Rows { data: sum, width },
        inv_rms,
        dy: Rows { data: dy, width },
        dx: RowsMut { data: dx, width },
        sums: &mut sums,
    };
    for_each_rows(threads, width, Blocks { of_norm, dsum: Rows { data: dsum, width } }, |blocks| {
        let super::Blocks { x, inv_rms, dy, dx, sums } = blocks.of_norm;
        let norm = Backward { x: x.data, weight, inv_rms, dy: dy.data, dx: dx.data, sums };
        isa.run(AddBackward { norm, dsum: blocks.dsum.data });
    });
    for block in sums.chunks_exact(width) {
        dweight.iter_mut().zip(block).for_each(|(total, sum)| *total += sum);
    }
}

struct AddForward<'a, T> {
    x: &'a [T],
    residual: &'a [T],
    sum: &'a mut [T],
    weight: &'a [T],
    eps: f32,
    out: &'a mut [T],
    inv_rms: &'a mut [f32],
}

impl<T: Float> Kernel for AddForward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (weight, eps, width) = (self.weight, self.eps, self.weight.len());
        let addends = self.x.chunks_exact(width).zip(self.residual.chunks_exact(width));
        let results = self.sum.chunks_exact_mut(width).zip(self.out.chunks_exact_mut(width));
        let inv_rms = self.inv_rms.chunks_exact_mut(1);
        for (((x, residual), (sum, out)), inv_rms) in addends.zip(results).zip(inv_rms) {
            // SAFETY: a row has `width` elements.
            unsafe { for_each(simd, width, &mut Add { x, residual, sum }) }
            Forward { x: sum, weight, eps, out, inv_rms }.run(simd);
        }
    }
}

struct Add<'a, T> {
    x: &'a [T],
    residual: &'a [T],
    sum: &'a mut [T],
}

impl<T: Float> Each for Add<'_, T> {
    #[inline(always)]
    unsafe fn each<S: Simd, const N: usize>(&mut self, simd: S, at: usize) {
        // SAFETY: in range by the caller's promise.
        unsafe {
            let mut x: [_; N] = load(simd, self.x.as_ptr().add(at));
            let residual: [_; N] = load(simd, self.residual.as_ptr().add(at));
            for k in 0..N {
                x[k] = simd.add(x[k], residual[k]);
            }
            store(simd, self.sum.as_mut_ptr().add(at), x);
        }
    }
}

/// The norm's work, and the other gradient of its rows.
struct Blocks<'a, T> {
    of_norm: super::Blocks<'a, T>,
    dsum: Rows<'a, T>,
}

impl<T: Float> Split for Blocks<'_, T> {
    fn numel(&self) -> usize {
        self.of_norm.numel()
    }
    fn split_at(self, at: usize) -> (Self, Self) {
        let (of_norm, dsum) = (self.of_norm.split_at(at), self.dsum.split_at(at));
        (Blocks { of_norm: of_norm.0, dsum: dsum.0 }, Blocks { of_norm: of_norm.1, dsum: dsum.1 })
    }
}

struct AddBackward<'a, T> {
    norm: Backward<'a, T>,
    dsum: &'a [T],
}

impl<T: Float> Kernel for AddBackward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Backward { x, weight, inv_rms, dy, dx, sums } = self.norm;
        let width = weight.len();
        let block_rows = rows_per_piece(width);
        let rows = x.chunks_exact(width).zip(dy.chunks_exact(width)).zip(self.dsum.chunks_exact(width));
        let rows = rows.zip(dx.chunks_exact_mut(width)).zip(inv_rms.chunks_exact(1)).enumerate();
        for (row, ((((x, dy), dsum), dx), inv_rms)) in rows {
            let sums = &mut sums[row / block_rows * width..][..width];
            Backward { x, weight, inv_rms, dy, dx: &mut *dx, sums }.run(simd);
            // SAFETY: a row has `width` elements.
            unsafe { for_each(simd, width, &mut AddTo { dsum, dx }) }
        }
    }
}

/// `dx = dsum + dx`, which is in the cache.
struct AddTo<'a, T> {
    dsum: &'a [T],
    dx: &'a mut [T],
}

impl<T: Float> Each for AddTo<'_, T> {
    #[inline(always)]
    unsafe fn each<S: Simd, const N: usize>(&mut self, simd: S, at: usize) {
        // SAFETY: in range by the caller's promise.
        unsafe {
            let to = self.dx.as_mut_ptr().add(at);
            let mut sum: [_; N] = load(simd, self.dsum.as_ptr().add(at));
            let dx: [_; N] = load(simd, to.cast_const());
            for k in 0..N {
                sum[k] = simd.add(sum[k], dx[k]);
            }
            store(simd, to, sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::parallel::PIECE_NUMEL;
    use crate::rms_norm;
    use crate::testing::{Number, bits, normal};

    const EPS: f32 = 1e-5;

    fn check<T: Number>(rows: usize, width: usize) {
        let [x, residual, dy, dsum] =
            ["x", "residual", "dy", "dsum"].map(|name| normal::<T>(name, rows * width, 1.5));
        let weight = normal::<T>("weight", width, 1.0);
        let zeros = vec![T::of(0.5); x.len()];
        let plain = |a: &[T], b: &[T]| -> Vec<T> {
            a.iter().zip(b).map(|(a, b)| T::of(a.wide() as f32 + b.wide() as f32)).collect()
        };
        let expected_sum = plain(&x, &residual);
        let (mut expected_out, mut expected_inv_rms) = (zeros.clone(), vec![0.5; rows]);
        rms_norm::forward(
            Threads::ONE,
            &expected_sum,
            &weight,
            EPS,
            &mut expected_out,
            &mut expected_inv_rms,
        );
        let (mut of_norm, mut expected_dweight) = (zeros.clone(), vec![0.5; width]);
        let inv_rms = &expected_inv_rms;
        rms_norm::backward(
            Threads::ONE,
            &expected_sum,
            &weight,
            inv_rms,
            &dy,
            &mut of_norm,
            &mut expected_dweight,
        );
        let expected_dx = plain(&dsum, &of_norm);
        for threads in [1, 3].map(|count| Threads::new(count).unwrap()) {
            let (mut sum, mut out, mut inv_rms) = (zeros.clone(), zeros.clone(), vec![0.5; rows]);
            forward(threads, &x, &residual, &weight, EPS, &mut sum, &mut out, &mut inv_rms);
            assert!(bits(&sum) == bits(&expected_sum) && bits(&out) == bits(&expected_out));
            assert_eq!(inv_rms, expected_inv_rms);
            let (mut dx, mut dweight) = (zeros.clone(), vec![0.5; width]);
            backward(threads, &sum, &weight, &inv_rms, &dy, &dsum, &mut dx, &mut dweight);
            assert!(bits(&dx) == bits(&expected_dx));
            assert_eq!(dweight, expected_dweight);
        }
    }

    #[test]
    fn the_bits_are_those_of_the_two_operations_apart() {
        for (rows, width) in [(0, 5), (3, 3), (5, 33), (4, 64), (2, 131), (2 * PIECE_NUMEL / 333 + 7, 333)] {
            check::<f32>(rows, width);
            check::<bf16>(rows, width);
            check::<f16>(rows, width);
        }
    }

    #[test]
    fn rows_of_nothing_are_fine() {
        let mut inv_rms = [1.0; 2];
        forward::<bf16>(Threads::ONE, &[], &[], &[], EPS, &mut [], &mut [], &mut inv_rms);
        backward::<bf16>(Threads::ONE, &[], &[], &inv_rms, &[], &[], &mut [], &mut []);
    }
}
