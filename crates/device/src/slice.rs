//! Borrowed views of device memory.
//!
//! A view is a pointer with an element count, an element type and a place; its lifetime is that of the memory.
//! Views are made safely from Rust slices and [`crate::Buffer`]s, and unsafely from a raw pointer (a tensor's).

use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;

use crate::{DType, DeviceError, Element, Place};

/// A read-only view of `numel` elements.
#[derive(Debug, Clone, Copy)]
pub struct Slice<'a> {
    ptr: NonNull<u8>,
    numel: usize,
    dtype: DType,
    place: Place,
    memory: PhantomData<&'a [u8]>,
}

/// A writable view of `numel` elements.
#[derive(Debug)]
pub struct SliceMut<'a> {
    ptr: NonNull<u8>,
    numel: usize,
    dtype: DType,
    place: Place,
    memory: PhantomData<&'a mut [u8]>,
}

// SAFETY: a `Slice` is a shared borrow of plain numbers; sending it is sending a `&[u8]`.
unsafe impl Send for Slice<'_> {}
// SAFETY: as above; all methods through `&Slice` only read.
unsafe impl Sync for Slice<'_> {}
// SAFETY: a `SliceMut` is an exclusive borrow of plain numbers; sending it is sending a `&mut [u8]`.
unsafe impl Send for SliceMut<'_> {}
// SAFETY: methods through `&SliceMut` only read.
unsafe impl Sync for SliceMut<'_> {}

impl<'a> Slice<'a> {
    /// A view of a Rust slice in host memory.
    pub fn of<T: Element>(values: &'a [T]) -> Self {
        let ptr = NonNull::from(values).cast();
        Slice { ptr, numel: values.len(), dtype: T::DTYPE, place: Place::Cpu, memory: PhantomData }
    }

    /// A view of `numel` elements at `ptr`.
    ///
    /// # Safety
    /// `ptr` must be aligned for `dtype` and valid for reads of `numel` elements at `place` for `'a`, and nobody
    /// may write there during `'a`.
    pub unsafe fn from_raw(ptr: NonNull<u8>, numel: usize, dtype: DType, place: Place) -> Self {
        Slice { ptr, numel, dtype, place, memory: PhantomData }
    }

    /// Elements in view.
    pub fn numel(&self) -> usize {
        self.numel
    }

    /// Bytes in view.
    pub fn num_bytes(&self) -> usize {
        self.numel * self.dtype.size_bytes()
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the memory is.
    pub fn place(&self) -> Place {
        self.place
    }

    /// Address of the first element.
    pub fn as_ptr(&self) -> *const u8 {
        self.ptr.as_ptr()
    }

    /// The elements `range` of this view.
    ///
    /// # Panics
    /// If `range` is not inside the view, like slice indexing.
    pub fn range(&self, range: Range<usize>) -> Slice<'a> {
        assert!(range.start <= range.end && range.end <= self.numel, "range {range:?} of {}", self.numel);
        // SAFETY: the range lies inside the view (asserted), so the pointer stays inside its memory.
        let ptr = unsafe { self.ptr.add(range.start * self.dtype.size_bytes()) };
        Slice { ptr, numel: range.end - range.start, ..*self }
    }

    /// The view as a Rust slice of its own element type.
    ///
    /// # Errors
    /// [`DeviceError::WrongDType`] if `T` is another type.
    pub fn typed<T: Element>(&self) -> Result<&'a [T], DeviceError> {
        if T::DTYPE != self.dtype {
            return Err(DeviceError::WrongDType { expected: T::DTYPE, got: self.dtype });
        }
        let Place::Cpu = self.place;
        // SAFETY: host memory, aligned and valid for `numel` elements of this type for `'a` (the constructors'
        // contract), and not written meanwhile.
        Ok(unsafe { std::slice::from_raw_parts(self.ptr.as_ptr().cast(), self.numel) })
    }

    /// The view's bytes (host memory).
    pub fn bytes(&self) -> &'a [u8] {
        let Place::Cpu = self.place;
        // SAFETY: as in `typed`; any byte is a valid `u8`.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.num_bytes()) }
    }
}

impl<'a> SliceMut<'a> {
    /// A writable view of a Rust slice in host memory.
    pub fn of<T: Element>(values: &'a mut [T]) -> Self {
        let numel = values.len();
        let ptr = NonNull::from(values).cast();
        SliceMut { ptr, numel, dtype: T::DTYPE, place: Place::Cpu, memory: PhantomData }
    }

    /// A writable view of `numel` elements at `ptr`.
    ///
    /// # Safety
    /// `ptr` must be aligned for `dtype` and valid for reads and writes of `numel` initialised elements at `place`
    /// for `'a`, and nobody else may read or write there during `'a`.
    pub unsafe fn from_raw(ptr: NonNull<u8>, numel: usize, dtype: DType, place: Place) -> Self {
        SliceMut { ptr, numel, dtype, place, memory: PhantomData }
    }

    /// Elements in view.
    pub fn numel(&self) -> usize {
        self.numel
    }

    /// Bytes in view.
    pub fn num_bytes(&self) -> usize {
        self.numel * self.dtype.size_bytes()
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the memory is.
    pub fn place(&self) -> Place {
        self.place
    }

    /// Address of the first element.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// A read-only view of the same elements, for a shorter time.
    pub fn as_slice(&self) -> Slice<'_> {
        Slice { ptr: self.ptr, numel: self.numel, dtype: self.dtype, place: self.place, memory: PhantomData }
    }

    /// A writable view of the same elements, for a shorter time.
    pub fn reborrow(&mut self) -> SliceMut<'_> {
        SliceMut {
            ptr: self.ptr,
            numel: self.numel,
            dtype: self.dtype,
            place: self.place,
            memory: PhantomData,
        }
    }

    /// The elements `range` of this view, for a shorter time.
    ///
    /// # Panics
    /// If `range` is not inside the view, like slice indexing.
    pub fn range_mut(&mut self, range: Range<usize>) -> SliceMut<'_> {
        self.reborrow().into_range(range)
    }

    /// The elements `range` of this view, giving the rest up.
    ///
    /// # Panics
    /// If `range` is not inside the view, like slice indexing.
    pub fn into_range(self, range: Range<usize>) -> SliceMut<'a> {
        assert!(range.start <= range.end && range.end <= self.numel, "range {range:?} of {}", self.numel);
        // SAFETY: the range lies inside the view (asserted), so the pointer stays inside its memory.
        let ptr = unsafe { self.ptr.add(range.start * self.dtype.size_bytes()) };
        SliceMut { ptr, numel: range.end - range.start, ..self }
    }

    /// The two halves `0..at` and `at..numel`.
    ///
    /// # Panics
    /// If `at` is past the end, like slice splitting.
    pub fn split_at(self, at: usize) -> (SliceMut<'a>, SliceMut<'a>) {
        assert!(at <= self.numel, "split at {at} of {}", self.numel);
        // SAFETY: `at` is inside the view (asserted); the two results do not overlap.
        let second = unsafe { self.ptr.add(at * self.dtype.size_bytes()) };
        let (dtype, place, memory) = (self.dtype, self.place, PhantomData);
        (
            SliceMut { ptr: self.ptr, numel: at, dtype, place, memory },
            SliceMut { ptr: second, numel: self.numel - at, dtype, place, memory },
        )
    }

    /// The view as a Rust slice of its own element type.
    ///
    /// # Errors
    /// [`DeviceError::WrongDType`] if `T` is another type.
    pub fn typed<T: Element>(self) -> Result<&'a mut [T], DeviceError> {
        if T::DTYPE != self.dtype {
            return Err(DeviceError::WrongDType { expected: T::DTYPE, got: self.dtype });
        }
        let Place::Cpu = self.place;
        // SAFETY: host memory, aligned, initialised and exclusively ours for `'a` (the constructors' contract).
        Ok(unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr().cast(), self.numel) })
    }

    /// The view's bytes (host memory).
    pub fn bytes(self) -> &'a mut [u8] {
        let Place::Cpu = self.place;
        let num_bytes = self.num_bytes();
        // SAFETY: as in `typed`; any byte is a valid `u8`, and any bytes are valid numbers.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), num_bytes) }
    }
}

impl<'a> From<SliceMut<'a>> for Slice<'a> {
    fn from(view: SliceMut<'a>) -> Self {
        Slice { ptr: view.ptr, numel: view.numel, dtype: view.dtype, place: view.place, memory: PhantomData }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_address_elements_not_bytes() {
        let values = [1f32, 2.0, 3.0, 4.0];
        let view = Slice::of(&values).range(1..3);
        assert_eq!(view.typed::<f32>().unwrap(), [2.0, 3.0]);
        assert_eq!(view.num_bytes(), 8);
    }

    #[test]
    fn halves_do_not_overlap() {
        let mut values = [0u8; 5];
        let (low, high) = SliceMut::of(&mut values).split_at(2);
        low.bytes().fill(1);
        high.bytes().fill(2);
        assert_eq!(values, [1, 1, 2, 2, 2]);
    }

    #[test]
    fn reading_as_another_type_is_refused() {
        let values = [half::bf16::ONE];
        let error = Slice::of(&values).typed::<half::f16>().unwrap_err();
        assert_eq!(error.to_string(), "view holds `bf16`, expected `f16`");
    }

    #[test]
    #[should_panic(expected = "range 1..3 of 2")]
    fn a_range_past_the_end_panics() {
        Slice::of(&[0u8; 2]).range(1..3);
    }
}
