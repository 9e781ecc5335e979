//! Borrowed views of device memory.
//!
//! A view is a pointer with an element count, an element type and a place; its lifetime is that of the memory.
//! Views are made safely from Rust slices and [`crate::Buffer`]s, and unsafely from a raw pointer (a tensor's).
//!
//! The host reads and writes through views of host memory only; of a GPU's memory they give an address and an error.
//! Views of pinned memory wait for the streams that use it.

use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;

use crate::cuda::{Access, Uses};
use crate::{DType, DeviceError, Element, Place};

/// A read-only view of `numel` elements.
#[derive(Debug, Clone, Copy)]
pub struct Slice<'a> {
    ptr: NonNull<u8>,
    numel: usize,
    dtype: DType,
    place: Place,
    /// Who uses the memory, if streams may.
    uses: Option<&'a Uses>,
    memory: PhantomData<&'a [u8]>,
}

/// A writable view of `numel` elements.
#[derive(Debug)]
pub struct SliceMut<'a> {
    ptr: NonNull<u8>,
    numel: usize,
    dtype: DType,
    place: Place,
    uses: Option<&'a Uses>,
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
        Slice {
            ptr,
            numel: values.len(),
            dtype: T::DTYPE,
            place: Place::Cpu,
            uses: None,
            memory: PhantomData,
        }
    }

    /// A view of `numel` elements at `ptr`.
    ///
    /// # Safety
    /// `ptr` must be aligned for `dtype` and valid for reads of `numel` elements at `place` for `'a`, and nobody
    /// may write there during `'a`. On a GPU all that holds until the streams that are given the view are past it;
    /// their order is the caller's business too.
    pub unsafe fn from_raw(ptr: NonNull<u8>, numel: usize, dtype: DType, place: Place) -> Self {
        Slice { ptr, numel, dtype, place, uses: None, memory: PhantomData }
    }

    /// The same view with the log of its memory.
    pub(crate) fn logged(self, uses: Option<&'a Uses>) -> Self {
        Slice { uses, ..self }
    }

    pub(crate) fn uses(&self) -> Option<&'a Uses> {
        self.uses
    }

    /// Whether the memory keeps a log of the streams that use it: pinned memory and GPUs', if a buffer owns it.
    pub fn is_logged(&self) -> bool {
        self.uses.is_some()
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

    /// The same bytes as elements of another type, with the same log.
    ///
    /// # Panics
    /// If the bytes are no whole number of such elements, or not aligned for them.
    pub fn cast(self, dtype: DType) -> Slice<'a> {
        let numel = cast_numel(self.ptr, self.num_bytes(), dtype);
        Slice { numel, dtype, ..self }
    }

    /// The view as a Rust slice of its own element type.
    ///
    /// # Errors
    /// [`DeviceError::WrongDType`] if `T` is another type; [`DeviceError::NotOnHost`] if a GPU has the memory.
    pub fn typed<T: Element>(&self) -> Result<&'a [T], DeviceError> {
        if T::DTYPE != self.dtype {
            return Err(DeviceError::WrongDType { expected: T::DTYPE, got: self.dtype });
        }
        on_host(self, Access::Read)?;
        // SAFETY: host memory that no stream writes (`on_host`), aligned and valid for `numel` elements of this type for `'a` (the constructors'
        // contract), and not written meanwhile.
        Ok(unsafe { std::slice::from_raw_parts(self.ptr.as_ptr().cast(), self.numel) })
    }

    /// The view's bytes (host memory).
    ///
    /// # Panics
    /// Where [`Slice::host_bytes`] is an error, for code that has host memory only.
    pub fn bytes(&self) -> &'a [u8] {
        self.host_bytes().unwrap_or_else(|error| panic!("{error}"))
    }

    /// The view's bytes.
    ///
    /// # Errors
    /// [`DeviceError::NotOnHost`] if a GPU has the memory.
    pub fn host_bytes(&self) -> Result<&'a [u8], DeviceError> {
        on_host(self, Access::Read)?;
        // SAFETY: as in `typed`; any byte is a valid `u8`.
        Ok(unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.num_bytes()) })
    }
}

impl<'a> SliceMut<'a> {
    /// A writable view of a Rust slice in host memory.
    pub fn of<T: Element>(values: &'a mut [T]) -> Self {
        let numel = values.len();
        let ptr = NonNull::from(values).cast();
        SliceMut { ptr, numel, dtype: T::DTYPE, place: Place::Cpu, uses: None, memory: PhantomData }
    }

    /// A writable view of `numel` elements at `ptr`.
    ///
    /// # Safety
    /// `ptr` must be aligned for `dtype` and valid for reads and writes of `numel` initialised elements at `place`
    /// for `'a`, and nobody else may read or write there during `'a`. On a GPU as for [`Slice::from_raw`].
    pub unsafe fn from_raw(ptr: NonNull<u8>, numel: usize, dtype: DType, place: Place) -> Self {
        SliceMut { ptr, numel, dtype, place, uses: None, memory: PhantomData }
    }

    /// The same view with the log of its memory.
    pub(crate) fn logged(self, uses: Option<&'a Uses>) -> Self {
        SliceMut { uses, ..self }
    }

    /// Whether the memory keeps a log of the streams that use it: pinned memory and GPUs', if a buffer owns it.
    pub fn is_logged(&self) -> bool {
        self.uses.is_some()
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
        Slice {
            ptr: self.ptr,
            numel: self.numel,
            dtype: self.dtype,
            place: self.place,
            uses: self.uses,
            memory: PhantomData,
        }
    }

    /// A writable view of the same elements, for a shorter time.
    pub fn reborrow(&mut self) -> SliceMut<'_> {
        SliceMut {
            ptr: self.ptr,
            numel: self.numel,
            dtype: self.dtype,
            place: self.place,
            uses: self.uses,
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
        let (dtype, place, uses, memory) = (self.dtype, self.place, self.uses, PhantomData);
        (
            SliceMut { ptr: self.ptr, numel: at, dtype, place, uses, memory },
            SliceMut { ptr: second, numel: self.numel - at, dtype, place, uses, memory },
        )
    }

    /// The same bytes as elements of another type, with the same log.
    ///
    /// # Panics
    /// If the bytes are no whole number of such elements, or not aligned for them.
    pub fn cast(self, dtype: DType) -> SliceMut<'a> {
        let numel = cast_numel(self.ptr, self.num_bytes(), dtype);
        SliceMut { numel, dtype, ..self }
    }

    /// The view as a Rust slice of its own element type.
    ///
    /// # Errors
    /// [`DeviceError::WrongDType`] if `T` is another type; [`DeviceError::NotOnHost`] if a GPU has the memory.
    pub fn typed<T: Element>(self) -> Result<&'a mut [T], DeviceError> {
        if T::DTYPE != self.dtype {
            return Err(DeviceError::WrongDType { expected: T::DTYPE, got: self.dtype });
        }
        on_host(&self.as_slice(), Access::Write)?;
        // SAFETY: host memory that no stream uses (`on_host`), aligned, initialised and exclusively ours for `'a` (the constructors' contract).
        Ok(unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr().cast(), self.numel) })
    }

    /// The view's bytes (host memory).
    ///
    /// # Panics
    /// Where [`SliceMut::host_bytes`] is an error, for code that has host memory only.
    pub fn bytes(self) -> &'a mut [u8] {
        self.host_bytes().unwrap_or_else(|error| panic!("{error}"))
    }

    /// The view's bytes.
    ///
    /// # Errors
    /// [`DeviceError::NotOnHost`] if a GPU has the memory.
    pub fn host_bytes(self) -> Result<&'a mut [u8], DeviceError> {
        on_host(&self.as_slice(), Access::Write)?;
        let num_bytes = self.num_bytes();
        // SAFETY: as in `typed`; any byte is a valid `u8`, and any bytes are valid numbers.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), num_bytes) })
    }
}

/// Elements of type `dtype` in `num_bytes` bytes at `ptr`. Any bytes are numbers of any type.
fn cast_numel(ptr: NonNull<u8>, num_bytes: usize, dtype: DType) -> usize {
    let width = dtype.size_bytes();
    let fits = num_bytes.is_multiple_of(width) && ptr.as_ptr().addr().is_multiple_of(width);
    assert!(fits, "`{num_bytes}` bytes at {ptr:?} are no whole, aligned elements of type `{dtype}`");
    num_bytes / width
}

/// Checks that the host may do `access` to a view, waiting for the streams that use it if it is pinned memory.
fn on_host(view: &Slice<'_>, access: Access) -> Result<(), DeviceError> {
    match (view.place, view.uses) {
        (Place::Cpu, None) => Ok(()),
        (Place::Cpu, Some(uses)) => {
            let start = view.ptr.as_ptr().addr();
            Ok(uses.wait(&(start..start + view.num_bytes()), access)?)
        }
        (place @ Place::Cuda { .. }, _) => Err(DeviceError::NotOnHost { place }),
    }
}

impl<'a> From<SliceMut<'a>> for Slice<'a> {
    fn from(view: SliceMut<'a>) -> Self {
        let SliceMut { ptr, numel, dtype, place, uses, .. } = view;
        Slice { ptr, numel, dtype, place, uses, memory: PhantomData }
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
    fn memory_of_a_gpu_is_out_of_the_hosts_reach() {
        let place = Place::Cuda { ordinal: 1 };
        // SAFETY: the view is never given to a stream, and its memory never accessed: that is what is tested.
        let view = unsafe { Slice::from_raw(NonNull::<u64>::dangling().cast(), 8, DType::F32, place) };
        let error = view.typed::<f32>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "the memory is on `cuda:1`, where the host cannot reach it: copy it to pinned memory first"
        );
        assert!(view.host_bytes().is_err());
        assert!(view.range(2..4).host_bytes().is_err());
    }

    #[test]
    #[should_panic(expected = "the memory is on `cuda:0`")]
    fn code_for_host_memory_panics_rather_than_faults() {
        let place = Place::Cuda { ordinal: 0 };
        // SAFETY: as above.
        unsafe { Slice::from_raw(NonNull::<u64>::dangling().cast(), 8, DType::F32, place) }.bytes();
    }

    #[test]
    fn bytes_are_numbers_of_any_type_that_fits() {
        let mut values = [1f32, 2.0, 3.0];
        let bytes = SliceMut::of(&mut values).cast(DType::U8);
        assert_eq!(bytes.numel(), 12);
        let halves = bytes.as_slice().range(4..8).cast(DType::Bf16);
        assert_eq!(halves.typed::<half::bf16>().unwrap(), [half::bf16::ZERO, half::bf16::from_f32(2.0)]);
        assert_eq!(bytes.into_range(8..12).cast(DType::F32).typed::<f32>().unwrap(), [3.0]);
    }

    #[test]
    #[should_panic(expected = "no whole, aligned elements of type `f32`")]
    fn bytes_between_numbers_are_none() {
        let values = [1f32, 2.0];
        Slice::of(&values).cast(DType::U8).range(2..6).cast(DType::F32);
    }

    #[test]
    #[should_panic(expected = "range 1..3 of 2")]
    fn a_range_past_the_end_panics() {
        Slice::of(&[0u8; 2]).range(1..3);
    }
}
