//! Adding gradients into `f32` sums.

use half::{bf16, f16};

use crate::Threads;
use crate::isa::{Isa, Kernel};
use crate::parallel::for_each_piece;
use crate::simd::{Element, Scalar, Simd};

/// `acc += x`.
///
/// # Panics
/// If the lengths differ.
pub fn add_assign(acc: &mut [f32], x: &[f32]) {
    add_with(Isa::best(), Threads::ONE, acc, x);
}

/// `acc += x`, each element of `x` widened first.
///
/// # Panics
/// If the lengths differ.
pub fn add_assign_bf16(acc: &mut [f32], x: &[bf16]) {
    add_with(Isa::best(), Threads::ONE, acc, x);
}

/// `acc += x`, each element of `x` widened first.
///
/// # Panics
/// If the lengths differ.
pub fn add_assign_f16(acc: &mut [f32], x: &[f16]) {
    add_with(Isa::best(), Threads::ONE, acc, x);
}

/// [`add_assign`] on several threads.
///
/// # Panics
/// If the lengths differ.
pub fn add_assign_on(threads: Threads, acc: &mut [f32], x: &[f32]) {
    add_with(Isa::best(), threads, acc, x);
}

/// [`add_assign_bf16`] on several threads.
///
/// # Panics
/// If the lengths differ.
pub fn add_assign_bf16_on(threads: Threads, acc: &mut [f32], x: &[bf16]) {
    add_with(Isa::best(), threads, acc, x);
}

/// [`add_assign_f16`] on several threads.
///
/// # Panics
/// If the lengths differ.
pub fn add_assign_f16_on(threads: Threads, acc: &mut [f32], x: &[f16]) {
    add_with(Isa::best(), threads, acc, x);
}

fn add_with<T: Element>(isa: Isa, threads: Threads, acc: &mut [f32], x: &[T]) {
    assert_eq!(acc.len(), x.len(), "sums against addends");
    for_each_piece(threads, (acc, x), |(acc, x)| isa.run(AddAssign { acc, x }));
}

struct AddAssign<'a, T> {
    acc: &'a mut [f32],
    x: &'a [T],
}

impl<T: Element> AddAssign<'_, T> {
    /// # Safety
    /// `at..at + S::LANES` lies inside both slices.
    #[inline(always)]
    unsafe fn add<S: Simd>(&mut self, simd: S, at: usize) {
        // SAFETY: in range by the caller's promise.
        unsafe {
            let acc = self.acc.as_mut_ptr().add(at);
            let x = T::load(simd, self.x.as_ptr().add(at));
            simd.store(acc, simd.add(simd.load(acc), x));
        }
    }
}

impl<T: Element> Kernel for AddAssign<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let numel = self.acc.len().min(self.x.len());
        let whole = numel - numel % S::LANES;
        for at in (0..whole).step_by(S::LANES) {
            // SAFETY: `at + LANES <= whole <= numel`.
            unsafe { self.add(simd, at) }
        }
        for at in whole..numel {
            // SAFETY: `at < numel`, and a scalar is one lane.
            unsafe { self.add(Scalar, at) }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::parallel::PIECE_NUMEL;

    /// Equal bits, any NaN for a NaN.
    fn same(a: f32, b: f32) -> bool {
        a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
    }

    proptest! {
        #[test]
        fn every_instruction_set_adds_like_plain_rust(
            values in prop::collection::vec((any::<f32>(), any::<u32>()), 0..200),
            skip in 0usize..9,
        ) {
            let skip = skip.min(values.len());
            let start: Vec<f32> = values.iter().map(|v| v.0).collect();
            let x: Vec<f32> = values.iter().map(|v| f32::from_bits(v.1)).collect();
            let x_bf16: Vec<bf16> = values.iter().map(|v| bf16::from_bits(v.1 as u16)).collect();
            let x_f16: Vec<f16> = values.iter().map(|v| f16::from_bits(v.1 as u16)).collect();
            for isa in Isa::all() {
                let mut sums = [start.clone(), start.clone(), start.clone()];
                add_with(isa, Threads::ONE, &mut sums[0][skip..], &x[skip..]);
                add_with(isa, Threads::ONE, &mut sums[1][skip..], &x_bf16[skip..]);
                add_with(isa, Threads::ONE, &mut sums[2][skip..], &x_f16[skip..]);
                for i in 0..values.len() {
                    let addends = [x[i], x_bf16[i].to_f32(), x_f16[i].to_f32()];
                    for (sum, addend) in sums.iter().zip(addends) {
                        let expected = if i < skip { start[i] } else { start[i] + addend };
                        prop_assert!(same(sum[i], expected), "{isa:?}, element {i}: {} for {expected}", sum[i]);
                    }
                }
            }
        }
    }

    #[test]
    fn threads_do_not_change_the_sums() {
        let numel = 2 * PIECE_NUMEL + 321;
        let x: Vec<f32> = (0..numel).map(|i| i as f32 * 0.37).collect();
        let mut one = vec![0.1; numel];
        add_assign(&mut one, &x);
        let mut three = vec![0.1; numel];
        add_assign_on(Threads::new(3).unwrap(), &mut three, &x);
        assert_eq!(one, three);
    }

    #[test]
    #[should_panic(expected = "sums against addends")]
    fn lengths_that_differ_panic() {
        add_assign(&mut [0.0; 3], &[0.0; 2]);
    }
}
