//! Copies between host and GPUs, and between GPUs.

use super::{Access, CudaError, Stream};
use crate::{Place, Slice, SliceMut};

/// How the bytes go.
enum Route {
    ToDevice,
    ToHost,
    OnDevice,
    /// Between GPUs: directly where they have access to each other, through host memory otherwise.
    ToPeer,
}

impl Stream {
    /// Copies `from` into `into`, when the stream gets there. One of the two is on the stream's GPU; the other is
    /// there too, in a buffer on another GPU, or in pinned host memory.
    ///
    /// The memory is in use until the stream is past the copy. Buffers see to that themselves: other streams, the
    /// host and the end of the buffer wait.
    ///
    /// # Errors
    /// [`CudaError::CopyMismatch`], [`CudaError::NotPinned`], [`CudaError::WrongPlaces`], or what the driver says.
    pub fn copy(&self, from: Slice<'_>, into: SliceMut<'_>) -> Result<(), CudaError> {
        let into = Slice::from(into);
        if [from, into].iter().any(|view| view.place() == Place::Cpu && view.uses().is_none()) {
            return Err(CudaError::NotPinned);
        }
        self.queue_copy(from, into)
    }

    /// Copies `from` into `into` behind what is queued, and waits for that. Host memory need not be pinned.
    ///
    /// # Errors
    /// As [`Stream::copy`], but for [`CudaError::NotPinned`].
    pub fn copy_and_wait(&self, from: Slice<'_>, into: SliceMut<'_>) -> Result<(), CudaError> {
        let queued = self.queue_copy(from, Slice::from(into));
        // Also after an error, and in another way if this one fails: the views may end when this returns.
        let waited = self.synchronize().or_else(|error| self.gpu().synchronize().and(Err(error)));
        queued.and(waited)
    }

    fn queue_copy(&self, from: Slice<'_>, into: Slice<'_>) -> Result<(), CudaError> {
        if (from.numel(), from.dtype()) != (into.numel(), into.dtype()) {
            return Err(CudaError::CopyMismatch {
                from_numel: from.numel(),
                from: from.dtype(),
                to_numel: into.numel(),
                to: into.dtype(),
            });
        }
        let route = self.route(from, into)?;
        let num_bytes = from.num_bytes();
        if num_bytes == 0 {
            return Ok(());
        }
        let (source, target) = (from.address(), into.address());
        let touches: Vec<_> =
            [from.touch(Access::Read), into.touch(Access::Write)].into_iter().flatten().collect();
        let asked = || format!("copy `{num_bytes}` bytes from `{}` to `{}`", from.place(), into.place());
        let (queue, gpu) = (self.queue(), self.gpu());
        // What the four unsafe calls rely on. Both views are valid for `num_bytes` bytes where `route` found them. A
        // buffer's stays so, and unchanged, until the use logged here is over; an unlogged one of a GPU as its maker
        // promised (`from_raw`); unpinned host memory until `copy_and_wait` returns, which waits. Source and target
        // do not overlap, as one is borrowed to write. The stream orders the copy behind what it has been told.
        match route {
            Route::ToDevice => {
                let host = from.as_ptr().cast();
                queue.submit(gpu, &touches, "cuMemcpyHtoDAsync", asked, |api, stream| {
                    // SAFETY: as said above.
                    unsafe { (api.copy_to_device)(target, host, num_bytes, stream) }
                })
            }
            Route::ToHost => {
                let host = into.as_ptr().cast_mut().cast();
                queue.submit(gpu, &touches, "cuMemcpyDtoHAsync", asked, |api, stream| {
                    // SAFETY: as said above.
                    unsafe { (api.copy_to_host)(host, source, num_bytes, stream) }
                })
            }
            Route::OnDevice => queue.submit(gpu, &touches, "cuMemcpyDtoDAsync", asked, |api, stream| {
                // SAFETY: as said above.
                unsafe { (api.copy_on_device)(target, source, num_bytes, stream) }
            }),
            Route::ToPeer => {
                let context =
                    |view: Slice<'_>| view.uses().map_or(gpu.context(), |uses| uses.gpu().context());
                let (from, into) = (context(from), context(into));
                queue.submit(gpu, &touches, "cuMemcpyPeerAsync", asked, |api, stream| {
                    // SAFETY: as said above; each context is that of the memory, held by the buffer or by `gpu`.
                    unsafe { (api.copy_to_peer)(target, into, source, from, num_bytes, stream) }
                })
            }
        }
    }

    fn route(&self, from: Slice<'_>, into: Slice<'_>) -> Result<Route, CudaError> {
        let ordinal = self.gpu().ordinal();
        let here = Place::Cuda { ordinal };
        // Of memory on another GPU only a buffer says which context it belongs to.
        let elsewhere = |view: Slice<'_>| view.place() != Place::Cpu && view.uses().is_some();
        match (from.place(), into.place()) {
            (Place::Cpu, to) if to == here => Ok(Route::ToDevice),
            (from, Place::Cpu) if from == here => Ok(Route::ToHost),
            (from, to) if from == here && to == here => Ok(Route::OnDevice),
            (source, _) if source == here && elsewhere(into) => Ok(Route::ToPeer),
            (_, target) if target == here && elsewhere(from) => Ok(Route::ToPeer),
            (from, to) => Err(CudaError::WrongPlaces { ordinal, from, to }),
        }
    }
}
