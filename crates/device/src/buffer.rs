//! Owned device memory.

use std::ptr::NonNull;

use crate::{DType, DeviceError, Element, Place, Slice, SliceMut};

/// Buffers of at least this many bytes ask for huge pages: fewer faults when first touched.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Owned memory for `numel` elements, zero when new, page aligned.
///
/// Untouched pages cost nothing. Dropping the buffer gives its pages back to the system at once.
#[derive(Debug)]
pub struct Buffer {
    ptr: NonNull<u8>,
    numel: usize,
    dtype: DType,
    place: Place,
    mapped_bytes: usize,
}

// SAFETY: the buffer owns its memory exclusively, and the memory holds plain numbers.
unsafe impl Send for Buffer {}
// SAFETY: methods through `&Buffer` only read.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// A buffer of zeros.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] if the system refuses the memory.
    pub fn zeroed(dtype: DType, numel: usize, place: Place) -> Result<Self, DeviceError> {
        let Place::Cpu = place;
        let too_large = || DeviceError::OutOfMemory {
            bytes: usize::MAX,
            source: std::io::Error::from(std::io::ErrorKind::OutOfMemory),
        };
        let bytes = numel.checked_mul(dtype.size_bytes()).ok_or_else(too_large)?;
        if bytes == 0 {
            // Aligned for every element type, never read.
            let ptr = NonNull::<u64>::dangling().cast();
            return Ok(Buffer { ptr, numel, dtype, place, mapped_bytes: 0 });
        }
        // SAFETY: an anonymous private mapping at an address of the system's choice touches no existing memory.
        let mapped = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        let refused = || DeviceError::OutOfMemory { bytes, source: std::io::Error::last_os_error() };
        if mapped == libc::MAP_FAILED {
            return Err(refused());
        }
        let ptr = NonNull::new(mapped.cast()).ok_or_else(refused)?;
        if bytes >= HUGE_PAGE_BYTES {
            // SAFETY: advice about our own mapping; a kernel without huge pages ignores it.
            unsafe { libc::madvise(mapped, bytes, libc::MADV_HUGEPAGE) };
        }
        Ok(Buffer { ptr, numel, dtype, place, mapped_bytes: bytes })
    }

    /// Elements it holds.
    pub fn numel(&self) -> usize {
        self.numel
    }

    /// Bytes it holds.
    pub fn num_bytes(&self) -> usize {
        self.numel * self.dtype.size_bytes()
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where it lives.
    pub fn place(&self) -> Place {
        self.place
    }

    /// Address of the first element; stays the same for the buffer's life.
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.ptr
    }

    /// All of it, to read.
    pub fn view(&self) -> Slice<'_> {
        // SAFETY: the mapping is valid, aligned to a page and zero-initialised; `&self` keeps writers out.
        unsafe { Slice::from_raw(self.ptr, self.numel, self.dtype, self.place) }
    }

    /// All of it, to write.
    pub fn view_mut(&mut self) -> SliceMut<'_> {
        // SAFETY: as in `view`; `&mut self` makes the view exclusive.
        unsafe { SliceMut::from_raw(self.ptr, self.numel, self.dtype, self.place) }
    }

    /// All of it as a Rust slice.
    ///
    /// # Errors
    /// [`DeviceError::WrongDType`] if `T` is not the buffer's type.
    pub fn typed<T: Element>(&self) -> Result<&[T], DeviceError> {
        self.view().typed()
    }

    /// All of it as a writable Rust slice.
    ///
    /// # Errors
    /// [`DeviceError::WrongDType`] if `T` is not the buffer's type.
    pub fn typed_mut<T: Element>(&mut self) -> Result<&mut [T], DeviceError> {
        self.view_mut().typed()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.mapped_bytes > 0 {
            // SAFETY: this is our mapping with its full length, and no view outlives the buffer.
            unsafe { libc::munmap(self.ptr.as_ptr().cast(), self.mapped_bytes) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_buffers_are_zero_and_writable() {
        let mut buffer = Buffer::zeroed(DType::F32, 1000, Place::Cpu).unwrap();
        assert!(buffer.typed::<f32>().unwrap().iter().all(|&x| x == 0.0));
        buffer.typed_mut::<f32>().unwrap()[999] = 2.5;
        assert_eq!(buffer.view().range(999..1000).typed::<f32>().unwrap(), [2.5]);
    }

    #[test]
    fn an_empty_buffer_is_fine() {
        let buffer = Buffer::zeroed(DType::Bf16, 0, Place::Cpu).unwrap();
        assert!(buffer.typed::<half::bf16>().unwrap().is_empty());
    }

    #[test]
    fn an_impossible_size_is_an_error() {
        for numel in [usize::MAX, 1 << 60] {
            let error = Buffer::zeroed(DType::F32, numel, Place::Cpu).unwrap_err();
            assert!(error.to_string().starts_with("could not allocate"), "{error}");
        }
    }
}
