//! Sums of several ranks' numbers, and copies that keep out of the cache.
//!
//! A collective adds the same elements of several ranks. [`sum_in_order`] does it in one pass: widen each
//! term to f32, add term 0 + term 1 + ... , and round once if the result is 16 bits wide. The order of the
//! terms is the order of the additions and each element is added alone, so the result does not depend on how
//! a caller cuts the data into pieces, nor on the instruction set: the vector paths give the bits of the
//! plain one.
//!
//! [`Store::Streaming`] writes past the cache. It saves the read of a line that is about to be overwritten
//! whole, which for results larger than the cache is a third of the memory traffic of a copy.

use half::{bf16, f16};
use shardwise_device::{DType, Element, Slice, SliceMut};

/// One term of a sum.
#[derive(Debug, Clone, Copy)]
pub enum Term<'a> {
    /// These numbers.
    Of(Slice<'a>),
    /// What the destination holds before the sum is written there.
    Out,
}

/// How results are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Store {
    /// Into the cache: the result is read again soon, or is small.
    Cached,
    /// Past the cache, for results that are larger than it.
    Streaming,
}

/// Writes `terms[0] + terms[1] + ...`, added in that order in f32, to `out`.
///
/// # Shapes
/// - `terms`: at least one; all of one element type (f32, bf16 or f16) and of `out`'s length
/// - `out`: of the terms' type, or f32; of the terms' type if one of them is [`Term::Out`]
/// # Panics
/// If shapes or types are not as above, or a GPU has the memory.
pub fn sum_in_order(terms: &[Term<'_>], mut out: SliceMut<'_>, store: Store) {
    let numel = out.numel();
    let target = out.reborrow().bytes().as_mut_ptr();
    let mut dtype = None;
    let mut many = Vec::new();
    let mut few = [std::ptr::null(); 8];
    let pointers: &mut [*const u8] = if terms.len() <= few.len() {
        &mut few[..terms.len()]
    } else {
        many.resize(terms.len(), std::ptr::null());
        &mut many
    };
    for (pointer, term) in pointers.iter_mut().zip(terms) {
        let term_dtype = match term {
            Term::Of(slice) => {
                assert_eq!(slice.numel(), numel, "a term is as long as the result");
                *pointer = slice.bytes().as_ptr();
                slice.dtype()
            }
            Term::Out => {
                *pointer = target;
                out.dtype()
            }
        };
        assert_eq!(*dtype.get_or_insert(term_dtype), term_dtype, "terms are of one type");
    }
    let pointers = &*pointers;
    let dtype = dtype.expect("a sum has at least one term");
    // SAFETY: each pointer is valid for reads of `numel` elements of `dtype` and `target` for writes of
    // `numel` of its own type. A term lies apart from `out` (the views' contract), or is `out` itself with
    // the same type: then each element is read before it is written, as all paths load all terms of a
    // position first.
    unsafe {
        match (dtype, out.dtype()) {
            (DType::F32, DType::F32) => sum::<f32, f32>(pointers, target.cast(), numel, store),
            (DType::Bf16, DType::F32) => sum::<bf16, f32>(pointers, target.cast(), numel, store),
            (DType::Bf16, DType::Bf16) => sum::<bf16, bf16>(pointers, target.cast(), numel, store),
            (DType::F16, DType::F32) => sum::<f16, f32>(pointers, target.cast(), numel, store),
            (DType::F16, DType::F16) => sum::<f16, f16>(pointers, target.cast(), numel, store),
            (from, to) => panic!("a sum of `{from}` into `{to}` is not defined"),
        }
    }
}

/// Copies `from` to `out`.
///
/// # Panics
/// If lengths or element types differ.
pub fn copy(from: Slice<'_>, out: SliceMut<'_>, store: Store) {
    assert_eq!((from.numel(), from.dtype()), (out.numel(), out.dtype()), "a copy has one shape");
    let (from, out) = (from.bytes(), out.bytes());
    // SAFETY: two views of equal length in bytes that do not overlap, as one is exclusive.
    unsafe { copy_bytes(from.as_ptr(), out.as_mut_ptr(), out.len(), store) }
}

/// Copies `num_bytes` bytes between memory that Rust does not see as slices (shared with another process).
///
/// # Safety
/// `from` is valid for reads and `out` for writes of `num_bytes`, and they do not overlap.
pub unsafe fn copy_bytes(from: *const u8, out: *mut u8, num_bytes: usize, store: Store) {
    #[cfg(target_arch = "x86_64")]
    if store == Store::Streaming && is_x86_feature_detected!("avx512f") {
        // SAFETY: the caller's contract, and the feature is there.
        return unsafe { x86::stream_512(from, out, num_bytes) };
    }
    #[cfg(target_arch = "x86_64")]
    if store == Store::Streaming && is_x86_feature_detected!("avx") {
        // SAFETY: the caller's contract, and the feature is there.
        return unsafe { x86::stream_256(from, out, num_bytes) };
    }
    #[cfg(target_arch = "x86_64")]
    if num_bytes >= 4096 && is_x86_feature_detected!("avx512f") {
        // SAFETY: the caller's contract, and the feature is there.
        return unsafe { x86::copy_512(from, out, num_bytes) };
    }
    let _ = store;
    // SAFETY: the caller's contract.
    unsafe { std::ptr::copy_nonoverlapping(from, out, num_bytes) }
}

/// A number that sums are made of.
trait Number: Element {
    fn widen(self) -> f32;
    fn round(value: f32) -> Self;
}

impl Number for f32 {
    fn widen(self) -> f32 {
        self
    }
    fn round(value: f32) -> Self {
        value
    }
}
impl Number for bf16 {
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn round(value: f32) -> Self {
        bf16::from_f32(value)
    }
}
impl Number for f16 {
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn round(value: f32) -> Self {
        f16::from_f32(value)
    }
}

/// The reference: one element after the other.
///
/// # Safety
/// Each of `terms` points to `numel` readable `I`, `out` to `numel` writable `O`, apart or equal with `I =
/// O`.
unsafe fn sum_plain<I: Number, O: Number>(terms: &[*const u8], out: *mut O, range: std::ops::Range<usize>) {
    for i in range {
        // SAFETY: `i` is inside the range the caller vouches for.
        unsafe {
            let mut total = terms[0].cast::<I>().add(i).read().widen();
            for term in &terms[1..] {
                total += term.cast::<I>().add(i).read().widen();
            }
            out.add(i).write(O::round(total));
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
unsafe fn sum<I: Number, O: Number>(terms: &[*const u8], out: *mut O, numel: usize, _store: Store) {
    // SAFETY: the caller's contract.
    unsafe { sum_plain::<I, O>(terms, out, 0..numel) }
}

/// # Safety
/// As [`sum_plain`].
#[cfg(target_arch = "x86_64")]
unsafe fn sum<I: x86::Lanes, O: x86::Lanes>(terms: &[*const u8], out: *mut O, numel: usize, store: Store) {
    // SAFETY: the caller's contract; each path runs only where its instructions exist.
    unsafe {
        if is_x86_feature_detected!("avx512f") {
            x86::sum_512::<I, O>(terms, out, numel, store);
        } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") {
            x86::sum_256::<I, O>(terms, out, numel, store);
        } else {
            sum_plain::<I, O>(terms, out, 0..numel);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use shardwise_device::SliceMut;

    use super::*;

    /// Any finite or infinite number, subnormals and both zeros among them, and quiet NaN.
    fn number() -> impl Strategy<Value = f32> {
        any::<f32>().prop_map(|x| if x.is_nan() { f32::NAN } else { x })
    }

    /// The plain path's bits and the bits of whatever path this machine takes.
    fn both<I: Number, O: Number>(
        rows: &[Vec<I>],
        skip: usize,
        numel: usize,
        store: Store,
    ) -> (Vec<O>, Vec<O>) {
        let mut plain = vec![O::round(7.0); numel];
        let mut fast = vec![O::round(7.0); numel + 64];
        let views: Vec<_> = rows.iter().map(|row| Slice::of(&row[skip..skip + numel])).collect();
        let pointers: Vec<_> = views.iter().map(Slice::as_ptr).collect();
        // SAFETY: every row holds `numel` elements after `skip`, `plain` holds as many.
        unsafe { sum_plain::<I, O>(&pointers, plain.as_mut_ptr(), 0..numel) };
        let terms: Vec<_> = views.into_iter().map(Term::Of).collect();
        sum_in_order(&terms, SliceMut::of(&mut fast).into_range(skip..skip + numel), store);
        assert!(fast[..skip].iter().chain(&fast[skip + numel..]).all(|x| x.widen() == 7.0), "wrote outside");
        (plain, fast[skip..skip + numel].to_vec())
    }

    fn bits<T: Element>(values: &[T]) -> &[u8] {
        Slice::of(values).bytes()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn vector_paths_give_the_bits_of_the_plain_one(
            rows in (1usize..10).prop_flat_map(|n| prop::collection::vec(prop::collection::vec(number(), 300), n)),
            skip in 0usize..40,
            numel in 0usize..260,
            streaming in any::<bool>(),
        ) {
            let store = if streaming { Store::Streaming } else { Store::Cached };
            let (plain, fast) = both::<f32, f32>(&rows, skip, numel, store);
            prop_assert_eq!(bits(&plain), bits(&fast));
            let rows16: Vec<Vec<_>> = rows.iter().map(|row| row.iter().map(|&x| bf16::from_f32(x)).collect()).collect();
            let (plain, fast) = both::<bf16, f32>(&rows16, skip, numel, store);
            prop_assert_eq!(bits(&plain), bits(&fast));
            let (plain, fast) = both::<bf16, bf16>(&rows16, skip, numel, store);
            prop_assert_eq!(bits(&plain), bits(&fast));
            let rows16: Vec<Vec<_>> =
                rows.iter().map(|row| row.iter().map(|&x| f16::from_f32(x % 1e5)).collect()).collect();
            let (plain, fast) = both::<f16, f32>(&rows16, skip, numel, store);
            prop_assert_eq!(bits(&plain), bits(&fast));
            let (plain, fast) = both::<f16, f16>(&rows16, skip, numel, store);
            prop_assert_eq!(bits(&plain), bits(&fast));
        }

        #[test]
        fn a_streamed_copy_is_a_copy(bytes in prop::collection::vec(any::<u8>(), 0..2000), skip in 0usize..70) {
            let skip = skip.min(bytes.len());
            let mut out = vec![0u8; bytes.len()];
            copy(Slice::of(&bytes[skip..]), SliceMut::of(&mut out[skip..]), Store::Streaming);
            prop_assert_eq!(&out[skip..], &bytes[skip..]);
            prop_assert!(out[..skip].iter().all(|&x| x == 0));
        }
    }

    /// Every path that this machine can run, not only the one it would choose.
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn narrow_vectors_agree_too() {
        if !(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c")) {
            return;
        }
        let every_bf16: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
        let every_f16: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
        fn check<I: x86::Lanes>(values: &[I]) {
            let small: Vec<I> = values.iter().map(|_| I::round(3e-3)).collect();
            let terms = [bits(values).as_ptr(), bits(&small).as_ptr()];
            let (mut plain, mut fast) = (values.to_vec(), values.to_vec());
            // SAFETY: all four hold `values.len()` elements, and the features are there.
            unsafe {
                sum_plain::<I, I>(&terms, plain.as_mut_ptr(), 0..values.len());
                x86::sum_256::<I, I>(&terms, fast.as_mut_ptr(), values.len(), Store::Cached);
            }
            assert!(bits(&plain) == bits(&fast));
        }
        check(&every_bf16);
        check(&every_f16);
    }

    #[test]
    fn a_sum_in_place_takes_its_term_in_order() {
        // 1e8 + 1 is 1e8 in f32: the order shows.
        let (a, b) = ([1e8f32; 100], [-1e8f32; 100]);
        let mut middle = [1f32; 100];
        sum_in_order(
            &[Term::Of(Slice::of(&a)), Term::Out, Term::Of(Slice::of(&b))],
            SliceMut::of(&mut middle),
            Store::Cached,
        );
        assert_eq!(middle, [0.0; 100]);
    }

    #[test]
    #[should_panic(expected = "a sum of `u8` into `u8` is not defined")]
    fn bytes_are_not_summed() {
        sum_in_order(&[Term::Out], SliceMut::of(&mut [1u8]), Store::Cached);
    }
}
