//! Memory of a GPU, and host memory that GPUs reach.
//!
//! Who frees: the owner, when dropped, after the host has waited for every logged use. A use that cannot be waited
//! for, because the GPU failed, keeps the memory to the end of the process.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr::NonNull;

use super::api::{self, Address};
use super::uses::{Access, Touch, Uses};
use super::{CudaError, Gpu};

/// Which memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The GPU's own.
    Device,
    /// The host's, pinned: it does not move, and GPUs copy from and to it at full speed.
    Pinned,
}

/// Owned memory with its log of uses.
#[derive(Debug)]
pub(crate) struct CudaMemory {
    kind: Kind,
    ptr: NonNull<u8>,
    num_bytes: usize,
    uses: Uses,
}

// SAFETY: it owns its memory; the pointer is freed once, by the owner.
unsafe impl Send for CudaMemory {}
// SAFETY: methods through `&CudaMemory` do not touch the memory; the log has a lock.
unsafe impl Sync for CudaMemory {}

/// Zeroes host memory, much of it on several threads: gigabytes take one thread seconds.
fn zero(bytes: &mut [MaybeUninit<u8>]) {
    const PART_BYTES: usize = 256 << 20;
    const MAX_THREADS: usize = 8;
    let zeroed = |part: &mut [MaybeUninit<u8>]| part.fill(MaybeUninit::new(0));
    if bytes.len() <= PART_BYTES {
        return zeroed(bytes);
    }
    let part = bytes.len().div_ceil(MAX_THREADS).max(PART_BYTES);
    std::thread::scope(|scope| bytes.chunks_mut(part).for_each(|part| drop(scope.spawn(|| zeroed(part)))));
}

impl CudaMemory {
    /// Memory of `num_bytes` zeros, at least one byte.
    ///
    /// Of a GPU's memory the zeros are written on its housekeeping stream and logged like any use.
    pub(crate) fn zeroed(gpu: &Gpu, kind: Kind, num_bytes: usize) -> Result<Self, CudaError> {
        let memory = match kind {
            Kind::Device => Self::on_device(gpu, num_bytes)?,
            Kind::Pinned => Self::pinned(gpu, num_bytes)?,
        };
        match kind {
            Kind::Device => {
                let start = memory.ptr.as_ptr().addr();
                let range = start..start + num_bytes;
                let touch = Touch { uses: &memory.uses, range, access: Access::Write };
                let asked = || format!("zero `{num_bytes}` new bytes");
                gpu.housekeeping().submit(gpu, &[touch], "cuMemsetD8Async", asked, |api, stream| {
                    // SAFETY: new memory of this GPU of this size; freed only after the logged mark.
                    unsafe { (api.fill)(start as Address, 0, num_bytes, stream) }
                })?;
            }
            Kind::Pinned => {
                // SAFETY: new host memory of this size, which nobody else knows.
                let bytes = unsafe { std::slice::from_raw_parts_mut(memory.ptr.as_ptr().cast(), num_bytes) };
                zero(bytes);
            }
        }
        Ok(memory)
    }

    fn on_device(gpu: &Gpu, num_bytes: usize) -> Result<Self, CudaError> {
        let mut address: Address = 0;
        let asked = || format!("allocate `{num_bytes}` bytes");
        let mut allocate = || {
            gpu.call("cuMemAlloc", asked, |api| {
                // SAFETY: writes one address to `address`; the context is current.
                unsafe { (api.memory_alloc)(&mut address, num_bytes) }
            })
        };
        let result = match allocate() {
            Err(CudaError::Call { code: api::OUT_OF_MEMORY, .. }) if gpu.call_on_reserve() => allocate(),
            result => result,
        };
        match result {
            Err(CudaError::Call { code: api::OUT_OF_MEMORY, .. }) => {
                let info = gpu.memory_info()?;
                return Err(CudaError::OutOfMemory {
                    ordinal: gpu.ordinal(),
                    bytes: num_bytes,
                    free_bytes: info.free_bytes,
                    total_bytes: info.total_bytes,
                });
            }
            result => result?,
        }
        let ptr = std::ptr::with_exposed_provenance_mut(address as usize);
        Ok(CudaMemory::owned(gpu, Kind::Device, ptr, num_bytes))
    }

    fn pinned(gpu: &Gpu, num_bytes: usize) -> Result<Self, CudaError> {
        let mut ptr: *mut c_void = std::ptr::null_mut();
        let asked = || format!("pin `{num_bytes}` bytes of host memory");
        let result = gpu.call("cuMemHostAlloc", asked, |api| {
            // SAFETY: writes one pointer to `ptr`; the context is current. Portable: all GPUs take it for pinned.
            unsafe { (api.host_alloc)(&mut ptr, num_bytes, api::HOST_ALLOC_PORTABLE) }
        });
        match result {
            Err(CudaError::Call { code: api::OUT_OF_MEMORY, .. }) => {
                Err(CudaError::OutOfPinnedMemory { bytes: num_bytes })
            }
            result => result.map(|()| CudaMemory::owned(gpu, Kind::Pinned, ptr.cast(), num_bytes)),
        }
    }

    fn owned(gpu: &Gpu, kind: Kind, ptr: *mut u8, num_bytes: usize) -> Self {
        let ptr = NonNull::new(ptr).expect("the driver gives memory an address when it reports success");
        gpu.count_taken(kind, num_bytes);
        CudaMemory { kind, ptr, num_bytes, uses: Uses::new(gpu) }
    }

    pub(crate) fn ptr(&self) -> NonNull<u8> {
        self.ptr
    }

    pub(crate) fn uses(&self) -> &Uses {
        &self.uses
    }
}

impl Drop for CudaMemory {
    fn drop(&mut self) {
        let gpu = self.uses.gpu();
        if !self.uses.wait_for_all() {
            return;
        }
        let (ptr, num_bytes) = (self.ptr.as_ptr(), self.num_bytes);
        gpu.count_given_back(self.kind, num_bytes);
        let asked = || format!("free `{num_bytes}` bytes");
        match self.kind {
            Kind::Device => gpu.free("cuMemFree", asked, |api| {
                // SAFETY: allocated by `cuMemAlloc`, freed once; every use is over (waited for above).
                unsafe { (api.memory_free)(ptr.addr() as Address) }
            }),
            Kind::Pinned => gpu.free("cuMemFreeHost", asked, |api| {
                // SAFETY: allocated by `cuMemHostAlloc`, freed once; every use is over, and no view outlives `self`.
                unsafe { (api.host_free)(ptr.cast()) }
            }),
        }
    }
}
