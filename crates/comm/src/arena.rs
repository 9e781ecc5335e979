//! The memory that ranks share: on the heap for threads, in a file without a name for processes.
//!
//! An [`Arena`] is an endless range of places; a piece of it is created by one rank and opened by others. New
//! memory is zero, and all structures kept there are made so that zero is their initial state. The file comes
//! from `memfd_create`: no name leads to it, so nothing is left when the last process is gone, however it
//! went.

use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::FallocateFlags;
use rustix::mm::{MapFlags, ProtFlags};
use shardwise_device::{Buffer, DType, Place};

use crate::CommError;

/// Places are multiples of this.
pub(crate) const PAGE: usize = 4096;

/// Memory that several ranks can open.
pub(crate) enum Arena {
    /// For threads of one process.
    Heap(Mutex<HashMap<u64, Arc<Buffer>>>),
    /// For processes that hold this file.
    File(OwnedFd),
}

/// One opened piece. It stays where it is until dropped.
pub(crate) struct Mapping {
    ptr: NonNull<u8>,
    num_bytes: usize,
    heap: Option<Arc<Buffer>>,
}

// SAFETY: a mapping is plain memory; what lies in it is synchronised by its users.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Arena {
    /// Makes `num_bytes` zero bytes at `place`, which nobody has used before, and opens them. `sparse` is a
    /// range of whole pages that may never be used and takes no memory before.
    pub(crate) fn create(
        &self,
        place: u64,
        num_bytes: usize,
        sparse: Range<usize>,
    ) -> Result<Mapping, CommError> {
        let action = "allocate the ranks' shared memory";
        match self {
            Arena::Heap(pieces) => {
                let buffer = Buffer::zeroed(DType::U8, num_bytes, Place::Cpu)
                    .map_err(|error| CommError::system(action, std::io::Error::other(error)))?;
                let buffer = Arc::new(buffer);
                pieces.lock().unwrap_or_else(PoisonError::into_inner).insert(place, Arc::clone(&buffer));
                Ok(Mapping { ptr: buffer.as_ptr(), num_bytes, heap: Some(buffer) })
            }
            Arena::File(file) => {
                // Allocated now: a machine without memory says so here, not by a fault in the middle of a
                // copy.
                for range in [0..sparse.start, sparse.end..num_bytes] {
                    let (start, len) = (place + range.start as u64, range.len() as u64);
                    if len > 0 {
                        rustix::fs::fallocate(file, FallocateFlags::empty(), start, len)
                            .map_err(|errno| CommError::system(action, errno))?;
                    }
                }
                self.open(place, num_bytes)
            }
        }
    }

    /// Opens a piece that another rank has created.
    pub(crate) fn open(&self, place: u64, num_bytes: usize) -> Result<Mapping, CommError> {
        let action = "map the ranks' shared memory";
        match self {
            Arena::Heap(pieces) => {
                let pieces = pieces.lock().unwrap_or_else(PoisonError::into_inner);
                let missing =
                    || CommError::system(action, std::io::Error::from(std::io::ErrorKind::NotFound));
                let buffer = pieces.get(&place).filter(|buffer| buffer.num_bytes() == num_bytes);
                let buffer = Arc::clone(buffer.ok_or_else(missing)?);
                Ok(Mapping { ptr: buffer.as_ptr(), num_bytes, heap: Some(buffer) })
            }
            Arena::File(file) => {
                let protection = ProtFlags::READ | ProtFlags::WRITE;
                // SAFETY: a new mapping at an address of the system's choice touches no existing memory. The
                // file is sealed against shrinking, so its pages stay.
                let ptr = unsafe {
                    rustix::mm::mmap(
                        std::ptr::null_mut(),
                        num_bytes,
                        protection,
                        MapFlags::SHARED,
                        file,
                        place,
                    )
                };
                let ptr = ptr.map_err(|errno| CommError::system(action, errno))?;
                let ptr = NonNull::new(ptr.cast()).expect("a mapping is never at address 0");
                Ok(Mapping { ptr, num_bytes, heap: None })
            }
        }
    }

    /// Gives the memory of a piece back once all have dropped it; its place is not used again.
    pub(crate) fn release(&self, place: u64, num_bytes: usize) {
        match self {
            Arena::Heap(pieces) => {
                pieces.lock().unwrap_or_else(PoisonError::into_inner).remove(&place);
            }
            Arena::File(file) => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                // A system that cannot do it keeps the memory until the last rank ends.
                let _ = rustix::fs::fallocate(file, flags, place, num_bytes as u64);
            }
        }
    }
}

impl Mapping {
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.heap.is_none() {
            // SAFETY: our mapping with its full length; pointers into it do not outlive it.
            let _ = unsafe { rustix::mm::munmap(self.ptr.as_ptr().cast(), self.num_bytes) };
        }
    }
}

/// `bytes` rounded up to whole pages.
pub(crate) fn whole_pages(bytes: usize) -> usize {
    bytes.next_multiple_of(PAGE)
}
