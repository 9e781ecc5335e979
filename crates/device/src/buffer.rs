//! Owned device memory.

use std::ptr::NonNull;

use crate::cuda::{CudaMemory, Gpu, Kind, Uses};
use crate::{DType, DeviceError, Element, Place, Slice, SliceMut};

/// Buffers of at least this many bytes ask for huge pages: fewer faults when first touched.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Where memory is allocated.
#[derive(Debug, Clone)]
pub enum Memory {
    /// The host's.
    Host,
    /// The host's, pinned: it does not move, and GPUs copy from and to it while the host goes on.
    Pinned(Gpu),
    /// A GPU's own.
    Gpu(Gpu),
}

impl Memory {
    /// Where that is.
    pub fn place(&self) -> Place {
        match self {
            Memory::Host | Memory::Pinned(_) => Place::Cpu,
            Memory::Gpu(gpu) => Place::Cuda { ordinal: gpu.ordinal() },
        }
    }
}

/// Owned memory for `numel` elements, zero when new, aligned for every element type.
///
/// Of pageable host memory untouched pages cost nothing, and dropping the buffer gives its pages back to the system
/// at once. A buffer of a GPU, or a pinned one, logs which streams use it: they order themselves by it, and dropping
/// the buffer waits for them.
#[derive(Debug)]
pub struct Buffer {
    ptr: NonNull<u8>,
    numel: usize,
    dtype: DType,
    place: Place,
    owner: Owner,
}

/// Who gives the memory back.
#[derive(Debug)]
enum Owner {
    /// There is none.
    Empty,
    /// The system gave it, this many bytes.
    System(usize),
    /// The driver gave it.
    Cuda(Box<CudaMemory>),
}

// SAFETY: the buffer owns its memory exclusively, and the memory holds plain numbers.
unsafe impl Send for Buffer {}
// SAFETY: methods through `&Buffer` only read.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// A buffer of zeros in host memory.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] if the system refuses the memory; [`DeviceError::NotOpened`] if `place` is a GPU.
    pub fn zeroed(dtype: DType, numel: usize, place: Place) -> Result<Self, DeviceError> {
        match place {
            Place::Cpu => Buffer::allocate(dtype, numel, &Memory::Host),
            Place::Cuda { .. } => Err(DeviceError::NotOpened { place }),
        }
    }

    /// A buffer of zeros in `memory`. On a GPU the zeros are written on a stream of its own, which all uses of the
    /// buffer wait for.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] if the system refuses the memory, [`DeviceError::Cuda`] if the driver does.
    pub fn allocate(dtype: DType, numel: usize, memory: &Memory) -> Result<Self, DeviceError> {
        let place = memory.place();
        let too_large = || DeviceError::OutOfMemory {
            bytes: usize::MAX,
            source: std::io::Error::from(std::io::ErrorKind::OutOfMemory),
        };
        let bytes = numel.checked_mul(dtype.size_bytes()).ok_or_else(too_large)?;
        if bytes == 0 {
            // Aligned for every element type, never read.
            let ptr = NonNull::<u64>::dangling().cast();
            return Ok(Buffer { ptr, numel, dtype, place, owner: Owner::Empty });
        }
        let (gpu, kind) = match memory {
            Memory::Host => return Buffer::mapped(dtype, numel, bytes),
            Memory::Pinned(gpu) => (gpu, Kind::Pinned),
            Memory::Gpu(gpu) => (gpu, Kind::Device),
        };
        let memory = Box::new(CudaMemory::zeroed(gpu, kind, bytes)?);
        Ok(Buffer { ptr: memory.ptr(), numel, dtype, place, owner: Owner::Cuda(memory) })
    }

    /// Pages of the system's, at least one byte of them.
    fn mapped(dtype: DType, numel: usize, bytes: usize) -> Result<Self, DeviceError> {
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
        Ok(Buffer { ptr, numel, dtype, place: Place::Cpu, owner: Owner::System(bytes) })
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
        // SAFETY: the memory is valid, aligned and zero when new; `&self` keeps writers out, and the log streams.
        let view = unsafe { Slice::from_raw(self.ptr, self.numel, self.dtype, self.place) };
        view.logged(self.uses())
    }

    /// All of it, to write.
    pub fn view_mut(&mut self) -> SliceMut<'_> {
        // SAFETY: as in `view`; `&mut self` makes the view exclusive.
        let view = unsafe { SliceMut::from_raw(self.ptr, self.numel, self.dtype, self.place) };
        view.logged(self.uses())
    }

    /// Whether streams copy from and to it while the host goes on: pinned memory or a GPU's.
    pub fn is_logged(&self) -> bool {
        self.uses().is_some()
    }

    fn uses(&self) -> Option<&Uses> {
        match &self.owner {
            Owner::Cuda(memory) => Some(memory.uses()),
            Owner::Empty | Owner::System(_) => None,
        }
    }

    /// All of it as a Rust slice.
    ///
    /// # Errors
    /// [`DeviceError::WrongDType`] if `T` is not the buffer's type; [`DeviceError::NotOnHost`] if a GPU has it.
    pub fn typed<T: Element>(&self) -> Result<&[T], DeviceError> {
        self.view().typed()
    }

    /// All of it as a writable Rust slice.
    ///
    /// # Errors
    /// [`DeviceError::WrongDType`] if `T` is not the buffer's type; [`DeviceError::NotOnHost`] if a GPU has it.
    pub fn typed_mut<T: Element>(&mut self) -> Result<&mut [T], DeviceError> {
        self.view_mut().typed()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // The driver's memory goes with its owner, after the streams that use it.
        if let Owner::System(mapped_bytes) = self.owner {
            // SAFETY: this is our mapping with its full length, and no view outlives the buffer.
            unsafe { libc::munmap(self.ptr.as_ptr().cast(), mapped_bytes) };
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
