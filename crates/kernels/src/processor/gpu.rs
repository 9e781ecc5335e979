//! A GPU's stream.

use std::collections::{HashMap, hash_map};
use std::fmt;
use std::sync::{Mutex, PoisonError};

use shardwise_device::cuda::{Access, Args, Gpu, Grid, Kernel, Module, Stream};
use shardwise_device::{Buffer, DType, Memory, Place, Slice, SliceMut};

use super::step::pointer_of;
use super::{Piece, ProcessorError, StepSlices};
use crate::cuda::{
    CudaKernelError, Entry, FloatType, Launch, Pack, Params, Segment, Source, StepBuffers, SumInOrder,
    SumOfSquares,
};

/// Where a GPU's machine code comes from.
pub trait MachineCode: Send + Sync {
    /// The kernels of `source` for the GPU, as its driver loads them.
    ///
    /// # Errors
    /// What a compiler says.
    fn of(&self, source: Source) -> Result<Vec<u8>, CudaKernelError>;
}

/// A stream of a GPU with the kernels that run there.
pub struct GpuProcessor {
    stream: Stream,
    code: Box<dyn MachineCode>,
    loaded: Mutex<Loaded>,
    sums: Mutex<Option<Sums>>,
}

#[derive(Default)]
struct Loaded {
    modules: HashMap<Source, Module>,
    kernels: HashMap<Entry, Kernel>,
}

/// Where sums of squares are made: in the GPU's memory, and on their way to the host.
struct Sums {
    /// One for each block of elements, then one for each part; as bytes.
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
    pub unsafe fn new(stream: Stream, code: impl MachineCode + 'static) -> Self {
        GpuProcessor { stream, code: Box::new(code), loaded: Mutex::default(), sums: Mutex::default() }
    }

    /// The GPU.
    pub fn gpu(&self) -> &Gpu {
        self.stream.gpu()
    }

    /// The stream on which everything runs.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Queues a call of a kernel. It waits for conflicting uses of `uses` on other streams, and those wait for it.
    ///
    /// # Errors
    /// Kernels that do not compile or load; what the driver says.
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

    fn kernel(&self, entry: Entry) -> Result<Kernel, ProcessorError> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = loaded.kernels.get(&entry) {
            return Ok(kernel.clone());
        }
        let kernel = match loaded.modules.entry(entry.source) {
            hash_map::Entry::Occupied(module) => module.get().kernel(entry.name)?,
            hash_map::Entry::Vacant(place) => {
                let code = self.code.of(entry.source)?;
                // SAFETY: what a compiler made, as `new` was promised.
                let module = unsafe { self.gpu().load_module(entry.source.program().name, &code)? };
                place.insert(module).kernel(entry.name)?
            }
        };
        loaded.kernels.insert(entry, kernel.clone());
        Ok(kernel)
    }

    /// Views without a log are used in this stream's order; others must be on this GPU.
    fn require_here(&self, view: Slice<'_>) -> Result<(), ProcessorError> {
        let ordinal = self.gpu().ordinal();
        match view.place() {
            Place::Cuda { ordinal: there } if there == ordinal => Ok(()),
            place => {
                Err(shardwise_device::cuda::CudaError::WrongPlaces { ordinal, from: place, to: place }.into())
            }
        }
    }

    pub(super) fn zero(&self, into: SliceMut<'_>) -> Result<(), ProcessorError> {
        Ok(self.stream.fill(into, 0)?)
    }

    pub(super) fn copy(&self, from: Slice<'_>, into: SliceMut<'_>) -> Result<(), ProcessorError> {
        Ok(self.stream.copy_and_wait(from, into)?)
    }

    pub(super) fn pack(
        &self,
        pieces: &[Piece<'_>],
        factor: f32,
        to: SliceMut<'_>,
    ) -> Result<(), ProcessorError> {
        self.require_here(to.as_slice())?;
        let (to_type, mut rest) = (float_type(to.dtype()), to);
        let mut segments = Segments::default();
        for piece in pieces {
            let (here, after) = rest.split_at(piece.numel());
            rest = after;
            match piece {
                Piece::Data(data) => {
                    self.require_here(*data)?;
                    segments.push(*data, here);
                }
                Piece::Zeros(_) => self.zero(here)?,
            }
        }
        assert_eq!(rest.numel(), 0, "elements that no piece fills");
        segments.run(self, |from, segments| Pack::scale(from, to_type, factor, segments).collect())
    }

    pub(super) fn accumulate(&self, pieces: &[Piece<'_>], sum: SliceMut<'_>) -> Result<(), ProcessorError> {
        self.require_here(sum.as_slice())?;
        let (to_type, mut rest) = (float_type(sum.dtype()), sum);
        let mut segments = Segments::default();
        for piece in pieces {
            let (here, after) = rest.split_at(piece.numel());
            rest = after;
            if let Piece::Data(data) = piece {
                self.require_here(*data)?;
                segments.push(*data, here);
            }
        }
        assert_eq!(rest.numel(), 0, "elements that no piece covers");
        segments.run(self, |from, segments| Pack::accumulate(from, to_type, segments).collect())
    }

    pub(super) fn sums_of_squares(&self, parts: &[Slice<'_>]) -> Result<Vec<f64>, ProcessorError> {
        const F64: usize = size_of::<f64>();
        let num_sums = |part: &Slice<'_>| SumOfSquares::num_sums(part.numel() as u64) as usize;
        let num_blocks: usize = parts.iter().map(num_sums).sum();
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |sums: &Sums| {
            sums.made.numel() >= (num_blocks + parts.len()) * F64 && sums.told.numel() >= parts.len() * F64
        };
        if !sums.as_ref().is_some_and(fits) {
            let bytes = |memory, numel| Buffer::allocate(DType::U8, numel * F64, &memory);
            *sums = Some(Sums {
                made: bytes(Memory::Gpu(self.gpu().clone()), num_blocks + parts.len())?,
                told: bytes(Memory::Pinned(self.gpu().clone()), parts.len())?,
            });
        }
        let Sums { made, told } = sums.as_mut().expect("made above");
        let (totals, mut blocks) = made.view_mut().split_at(parts.len() * F64);
        let mut rest_of_totals = totals;
        for part in parts {
            self.require_here(*part)?;
            let (of_blocks, after) = blocks.split_at(num_sums(part) * F64);
            blocks = after;
            let (total, after) = rest_of_totals.split_at(F64);
            rest_of_totals = after;
            let (of_blocks, total) = (of_blocks.as_slice(), total.as_slice());
            let numel = part.numel() as u64;
            let squares = SumOfSquares { x: pointer_of(*part), sums: pointer_of(of_blocks), numel };
            let in_order = SumInOrder {
                terms: pointer_of(of_blocks),
                total: pointer_of(total),
                numel: SumOfSquares::num_sums(numel),
            };
            // SAFETY: the part is read, and as many sums written as `num_sums` says; then they are read, and one f64 is
            // written.
            unsafe {
                if numel > 0 {
                    let uses = [(*part, Access::Read), (of_blocks, Access::Write)];
                    self.run(&squares.launch(float_type(part.dtype())), uses)?;
                }
                self.run(&in_order.launch(), [(of_blocks, Access::Read), (total, Access::Write)])?;
            }
        }
        let of_parts = 0..parts.len() * F64;
        self.stream
            .copy(made.view().range(of_parts.clone()), told.view_mut().into_range(of_parts.clone()))?;
        // Waits for the copy.
        let told = told.view().range(of_parts).host_bytes()?;
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
        if slices.grad.numel() == 0 {
            return Ok(());
        }
        let launch = launch(slices.buffers());
        // SAFETY: the kernel reads and writes these slices, whose lengths and types `buffers` has checked.
        unsafe { self.run(&launch, slices.uses()) }
    }
}

/// Arrays and the places they go to, by type of element.
#[derive(Default)]
struct Segments<'a> {
    of_type: HashMap<DType, Vec<(Slice<'a>, SliceMut<'a>)>>,
}

impl<'a> Segments<'a> {
    fn push(&mut self, from: Slice<'a>, to: SliceMut<'a>) {
        self.of_type.entry(from.dtype()).or_default().push((from, to));
    }

    fn run(
        self,
        processor: &GpuProcessor,
        launches: impl Fn(FloatType, &[Segment]) -> Vec<Launch<Pack>>,
    ) -> Result<(), ProcessorError> {
        for (dtype, pairs) in self.of_type {
            for pairs in pairs.chunks(Pack::MAX_SEGMENTS) {
                let segment = |(from, to): &(Slice<'_>, SliceMut<'_>)| Segment {
                    from: pointer_of(*from),
                    to: pointer_of(to.as_slice()),
                    numel: from.numel() as u64,
                };
                let segments: Vec<_> = pairs.iter().map(segment).collect();
                for launch in launches(float_type(dtype), &segments) {
                    let uses = pairs
                        .iter()
                        .flat_map(|(from, to)| [(*from, Access::Read), (to.as_slice(), Access::Write)]);
                    // SAFETY: the kernel reads the first and writes the second of each pair, as many elements.
                    unsafe { processor.run(&launch, uses)? };
                }
            }
        }
        Ok(())
    }
}

/// # Panics
/// For elements that are no numbers.
fn float_type(dtype: DType) -> FloatType {
    FloatType::of(dtype).unwrap_or_else(|| panic!("no kernel computes on elements of type `{dtype}`"))
}
