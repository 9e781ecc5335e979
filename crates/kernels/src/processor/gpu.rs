//! A GPU's stream.

use std::collections::{HashMap, hash_map};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use shardwise_device::cuda::{Access, Args, CudaError, Gpu, Grid, Kernel, Module, Stream};
use shardwise_device::{Buffer, DType, Memory, Place, Slice, SliceMut};

use super::step::pointer_of;
use super::{Piece, ProcessorError, StepSlices, num_terms};
use crate::cuda::{
    CompiledCode, CudaKernelError, DevicePtr, Entry, FloatType, Launch, Pack, Params, Segment, Source,
    StepBuffers, SumRanks, SumType, SumsOfSquares,
};

/// Where a GPU's machine code comes from.
pub trait MachineCode: Send + Sync {
    /// The kernels of `source` for the GPU, as its driver loads them.
    ///
    /// # Errors
    /// What a compiler says.
    fn of(&self, source: Source) -> Result<Vec<u8>, CudaKernelError>;
}

impl<T: MachineCode + ?Sized> MachineCode for Arc<T> {
    fn of(&self, source: Source) -> Result<Vec<u8>, CudaKernelError> {
        (**self).of(source)
    }
}

/// A stream of a GPU with the kernels that run there.
pub struct GpuProcessor {
    stream: Arc<Stream>,
    kernels: Arc<Kernels>,
    /// Locked from the first launch until the sums are on the host, so that no two calls share it.
    sums: Mutex<Option<Sums>>,
    /// Norms of blocks of elements, as bytes, between two calls of one pass of LAMB.
    pub(super) norm_blocks: Mutex<Option<Buffer>>,
}

/// What processors on several streams of a GPU share.
struct Kernels {
    code: Box<dyn MachineCode>,
    loaded: Mutex<Loaded>,
}

#[derive(Default)]
struct Loaded {
    modules: HashMap<Source, Module>,
    kernels: HashMap<Entry, Arc<Kernel>>,
}

/// Where sums of squares are made, as bytes: in the GPU's memory, and on their way to the host.
struct Sums {
    /// One for each part, then one for each block of elements.
    made: Buffer,
    told: Buffer,
}

impl fmt::Debug for GpuProcessor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GpuProcessor({:?})", self.stream)
    }
}

impl GpuProcessor {
    /// Work goes to `stream`, in the order of the calls.
    ///
    /// # Safety
    /// `code` gives what a compiler made of the sources, unchanged.
    pub unsafe fn new(stream: impl Into<Arc<Stream>>, code: impl MachineCode + 'static) -> Self {
        let kernels = Kernels { code: Box::new(code), loaded: Mutex::default() };
        GpuProcessor {
            stream: stream.into(),
            kernels: Arc::new(kernels),
            sums: Mutex::default(),
            norm_blocks: Mutex::default(),
        }
    }

    /// Work goes to `stream`, in the order of the calls. Kernels come from NVRTC and its cache.
    pub fn compiled(stream: impl Into<Arc<Stream>>, code: Arc<CompiledCode>) -> Self {
        // SAFETY: it compiles the sources, or reads what the user's own cache has of them, by a checksum.
        unsafe { GpuProcessor::new(stream, code) }
    }

    /// The same kernels on another stream of the GPU.
    ///
    /// # Errors
    /// [`CudaError::WrongGpu`] if the stream is another GPU's.
    pub fn on_stream(&self, stream: impl Into<Arc<Stream>>) -> Result<Self, CudaError> {
        let stream = stream.into();
        let (expected, got) = (self.gpu().ordinal(), stream.gpu().ordinal());
        if expected != got {
            return Err(CudaError::WrongGpu { what: "stream", expected, got });
        }
        Ok(GpuProcessor {
            stream,
            kernels: Arc::clone(&self.kernels),
            sums: Mutex::default(),
            norm_blocks: Mutex::default(),
        })
    }

    /// The GPU.
    pub fn gpu(&self) -> &Gpu {
        self.stream.gpu()
    }

    /// The stream on which everything runs.
    pub fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }

    /// Compiles and loads the kernels of `sources` now, and not when they are first called: what fails does so here.
    ///
    /// # Errors
    /// Kernels that do not compile or load.
    pub fn load(&self, sources: impl IntoIterator<Item = Source>) -> Result<(), ProcessorError> {
        for source in sources {
            for name in source.entries() {
                self.kernel(Entry { source, name })?;
            }
        }
        Ok(())
    }

    /// Queues a call of a kernel. It waits for conflicting uses of `uses` on other streams, and those wait for it.
    ///
    /// # Errors
    /// Kernels that do not compile or load; memory out of the GPU's reach; what the driver says.
    ///
    /// # Safety
    /// The addresses in `launch` lie within `uses`, or in memory of this GPU that stays until the stream is past the call and is used
    /// in its order; the kernel writes only to what `uses` says it writes.
    pub unsafe fn run<'a, P: Params>(
        &self,
        launch: &Launch<P>,
        uses: impl IntoIterator<Item = (Slice<'a>, Access)>,
    ) -> Result<(), ProcessorError> {
        let kernel = self.kernel(launch.entry())?;
        let plan = launch.plan();
        let grid = Grid { shared_bytes: plan.shared_bytes, ..Grid::linear(plan.grid, plan.block) };
        // SAFETY: `params` is a `P`, alive during this call.
        let args = unsafe { Args::new().structure(launch.params(), size_of::<P>()) };
        let args = uses.into_iter().fold(args, |args, (view, access)| args.uses(view, access));
        // SAFETY: every kernel has one parameter, of this type (`Launch`); its pointers are the caller's promise.
        unsafe { self.stream.launch(&kernel, grid, args)? };
        Ok(())
    }

    fn kernel(&self, entry: Entry) -> Result<Arc<Kernel>, ProcessorError> {
        let mut loaded = self.kernels.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = loaded.kernels.get(&entry) {
            return Ok(Arc::clone(kernel));
        }
        let kernel = match loaded.modules.entry(entry.source) {
            hash_map::Entry::Occupied(module) => module.get().kernel(entry.name)?,
            hash_map::Entry::Vacant(place) => {
                let code = self.kernels.code.of(entry.source)?;
                // SAFETY: what a compiler made, as `new` was promised.
                let module = unsafe { self.gpu().load_module(entry.source.program().name, &code)? };
                place.insert(module).kernel(entry.name)?
            }
        };
        let kernel = Arc::new(kernel);
        loaded.kernels.insert(entry, Arc::clone(&kernel));
        Ok(kernel)
    }

    /// A view has to be in this GPU's memory, with a log or without: then it is used in the stream's order.
    pub(super) fn require_here(&self, view: Slice<'_>) -> Result<(), ProcessorError> {
        let expected = Place::Cuda { ordinal: self.gpu().ordinal() };
        match view.place() {
            place if place == expected => Ok(()),
            got => Err(ProcessorError::Elsewhere { expected, got }),
        }
    }

    pub(super) fn zero(&self, into: SliceMut<'_>) -> Result<(), ProcessorError> {
        self.require_here(into.as_slice())?;
        Ok(self.stream.fill(into, 0)?)
    }

    pub(super) fn copy(&self, from: Slice<'_>, into: SliceMut<'_>) -> Result<(), ProcessorError> {
        assert_eq!((from.numel(), from.dtype()), (into.numel(), into.dtype()), "a copy");
        Ok(self.stream.copy_and_wait(from, into)?)
    }

    pub(super) fn pack(
        &self,
        pieces: &[Piece<'_>],
        factor: f32,
        mut to: SliceMut<'_>,
    ) -> Result<(), ProcessorError> {
        self.require_pieces(pieces, to.as_slice())?;
        let mut start = 0;
        for piece in pieces {
            let range = start..start + piece.numel();
            start = range.end;
            if let Piece::Zeros(_) = piece {
                self.zero(to.range_mut(range))?;
            }
        }
        let to_type = float_type(to.dtype());
        self.for_each_piece(pieces, to, |from, segments| Pack::scale(from, to_type, factor, segments).next())
    }

    pub(super) fn accumulate(&self, pieces: &[Piece<'_>], sum: SliceMut<'_>) -> Result<(), ProcessorError> {
        self.require_pieces(pieces, sum.as_slice())?;
        let to_type = float_type(sum.dtype());
        self.for_each_piece(pieces, sum, |from, segments| Pack::accumulate(from, to_type, segments).next())
    }

    /// Checks everything before anything is queued.
    fn require_pieces(&self, pieces: &[Piece<'_>], whole: Slice<'_>) -> Result<(), ProcessorError> {
        let numel: usize = pieces.iter().map(Piece::numel).sum();
        assert_eq!(numel, whole.numel(), "elements of pieces against room for them");
        float_type(whole.dtype());
        self.require_here(whole)?;
        for piece in pieces {
            if let Piece::Data(data) = piece {
                float_type(data.dtype());
                self.require_here(*data)?;
            }
        }
        Ok(())
    }

    /// Queues `launch` for the pieces that are data, up to 64 of one type together, each with its place in `whole`.
    fn for_each_piece(
        &self,
        pieces: &[Piece<'_>],
        whole: SliceMut<'_>,
        launch: impl Fn(FloatType, &[Segment]) -> Option<Launch<Pack>>,
    ) -> Result<(), ProcessorError> {
        let whole = whole.as_slice();
        for from in FloatType::ALL {
            let mut start = 0;
            let placed = pieces.iter().filter_map(|piece| {
                let to = whole.range(start..start + piece.numel());
                start += piece.numel();
                match piece {
                    Piece::Data(data) if float_type(data.dtype()) == from => Some((*data, to)),
                    _ => None,
                }
            });
            let placed: Vec<_> = placed.filter(|(data, _)| data.numel() > 0).collect();
            for placed in placed.chunks(Pack::MAX_SEGMENTS) {
                let segment = |&(data, to): &(Slice<'_>, Slice<'_>)| Segment {
                    from: pointer_of(data),
                    to: pointer_of(to),
                    numel: data.numel() as u64,
                };
                let segments: Vec<_> = placed.iter().map(segment).collect();
                if let Some(launch) = launch(from, &segments) {
                    // One write for all: a log with an entry for each piece would be searched for each.
                    let reads = placed.iter().map(|(data, _)| (*data, Access::Read));
                    let uses = reads.chain([(whole, Access::Write)]);
                    // SAFETY: the kernel reads the first and writes the second of each pair, as many elements; the second
                    // lies in `whole`, which is borrowed to be written. Types are those of the views.
                    unsafe { self.run(&launch, uses)? };
                }
            }
        }
        Ok(())
    }

    /// Checks lengths and types as the host's sums do, then queues one launch.
    pub(super) fn sum_ranks(
        &self,
        terms: Slice<'_>,
        stride: usize,
        sum: SliceMut<'_>,
    ) -> Result<(), ProcessorError> {
        let (num_terms, numel) = (num_terms(terms, stride, sum.as_slice()), sum.numel());
        let from = float_type(terms.dtype());
        let to = match sum.dtype() {
            dtype if dtype == terms.dtype() => SumType::Same,
            DType::F32 => SumType::F32,
            to => panic!("a sum of `{}` into `{to}` is not defined", terms.dtype()),
        };
        for view in [terms, sum.as_slice()] {
            self.require_here(view)?;
        }
        if numel == 0 {
            return Ok(());
        }
        let launch = SumRanks {
            terms: pointer_of(terms),
            sum: pointer_of(sum.as_slice()),
            stride: stride as u64,
            numel: numel as u64,
            num_terms: u32::try_from(num_terms).expect("fewer ranks than a `u32` counts"),
        };
        // SAFETY: the last term ends within `terms` (`num_terms`), and `sum` has as many elements as a term; types are those of
        // the views. `sum` is borrowed to be written.
        unsafe {
            self.run(&launch.launch(from, to), [(terms, Access::Read), (sum.as_slice(), Access::Write)])
        }
    }

    pub(super) fn sums_of_squares(&self, parts: &[Slice<'_>]) -> Result<Vec<f64>, ProcessorError> {
        const F64: usize = size_of::<f64>();
        for part in parts {
            float_type(part.dtype());
            self.require_here(*part)?;
        }
        if parts.is_empty() {
            return Ok(Vec::new());
        }
        let num_blocks = |part: &Slice<'_>| SumsOfSquares::num_blocks(part.numel() as u64) as usize;
        let num_sums = parts.len() + parts.iter().map(num_blocks).sum::<usize>();
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let sums = match &mut *sums {
            Some(sums) if sums.made.numel() >= num_sums * F64 && sums.told.numel() >= parts.len() * F64 => {
                sums
            }
            sums => {
                let bytes = |memory, numel| Buffer::allocate(DType::U8, numel * F64, &memory);
                sums.insert(Sums {
                    made: bytes(Memory::Gpu(self.gpu().clone()), num_sums)?,
                    told: bytes(Memory::Pinned(self.gpu().clone()), parts.len())?,
                })
            }
        };
        let made = sums.made.view();
        let sum = |index: usize| DevicePtr::new(pointer_of(made).address() + (index * F64) as u64);
        let (mut first_total, mut first_block) = (0, parts.len());
        // Neighbours of one type together, so that totals stand in the order of the parts.
        let same = |a: &Slice<'_>, b: &Slice<'_>| a.dtype() == b.dtype();
        for parts in parts.chunk_by(same).flat_map(|same| same.chunks(SumsOfSquares::MAX_ARRAYS)) {
            let arrays: Vec<_> = parts.iter().map(|part| (pointer_of(*part), part.numel() as u64)).collect();
            let squares = SumsOfSquares::new(&arrays, sum(first_block), sum(first_total));
            for launch in squares.launches(float_type(parts[0].dtype())) {
                let reads = parts.iter().map(|part| (*part, Access::Read));
                // SAFETY: the parts are read, and as many sums written to `made` as `num_blocks` says; then these are read,
                // and one is written for each part. `made` has `num_sums` in all, is aligned, and is this call's alone (the lock).
                unsafe { self.run(&launch, reads.chain([(made, Access::Write)]))? };
            }
            first_total += parts.len();
            first_block += parts.iter().map(num_blocks).sum::<usize>();
        }
        let of_parts = 0..parts.len() * F64;
        self.stream.copy(made.range(of_parts.clone()), sums.told.view_mut().into_range(of_parts.clone()))?;
        // Waits for the copy.
        let told = sums.told.view().range(of_parts).host_bytes()?;
        let number = |bytes: &[u8]| f64::from_ne_bytes(bytes.try_into().expect("chunks of eight bytes"));
        Ok(told.chunks_exact(F64).map(number).collect())
    }

    pub(super) fn step<P: Params, const K: usize>(
        &self,
        slices: StepSlices<'_, K>,
        launch: impl FnOnce(StepBuffers<K>) -> Launch<P>,
    ) -> Result<(), ProcessorError> {
        for (view, _) in slices.uses() {
            self.require_here(view)?;
        }
        let launch = launch(slices.buffers());
        if slices.grad.numel() == 0 {
            return Ok(());
        }
        // SAFETY: the kernel reads and writes these slices, whose lengths and types `buffers` has checked.
        unsafe { self.run(&launch, slices.uses()) }
    }
}

/// # Panics
/// For elements that are no numbers.
fn float_type(dtype: DType) -> FloatType {
    FloatType::of(dtype).unwrap_or_else(|| panic!("no kernel computes on elements of type `{dtype}`"))
}
