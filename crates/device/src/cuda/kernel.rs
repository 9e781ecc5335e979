//! Kernels: loaded from CUBINs, launched with arguments that are checked as far as a driver can check them.

use std::ffi::{CString, c_void};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::sync::Arc;

use super::api::{self, Handle};
use super::uses::Touch;
use super::{Access, CudaError, Gpu, Stream, cubin};
use crate::{Place, Slice, SliceMut};

/// A driver's answer to a parameter number past the last.
const INVALID_VALUE: i32 = 1;

/// Kernels that were loaded together. Clones are the same module; it is unloaded with the last of them and of its
/// kernels, once the GPU is idle.
#[derive(Debug, Clone)]
pub struct Module(Arc<Loaded>);

#[derive(Debug)]
struct Loaded {
    gpu: Gpu,
    name: String,
    handle: Handle,
}

/// A kernel of a module.
#[derive(Debug, Clone)]
pub struct Kernel {
    module: Arc<Loaded>,
    name: String,
    handle: Handle,
    /// Bytes of each parameter; unknown before CUDA 12.4.
    parameters: Option<Vec<usize>>,
}

impl Gpu {
    /// Loads a module from a CUBIN; `name` is for messages.
    ///
    /// # Errors
    /// [`CudaError::InvalidCubin`] if it is none or was cut short, or what the driver says: for one if it was
    /// compiled for another architecture.
    ///
    /// # Safety
    /// `image` is what a compiler made, unchanged: a driver trusts what it loads.
    pub unsafe fn load_module(&self, name: &str, image: &[u8]) -> Result<Module, CudaError> {
        cubin::require_whole(image)
            .map_err(|reason| CudaError::InvalidCubin { module: name.to_owned(), reason })?;
        // The driver is told no length, and may expect the alignment of the ELF header.
        let mut aligned = vec![0u64; image.len().div_ceil(8)];
        bytemuck::cast_slice_mut(&mut aligned)[..image.len()].copy_from_slice(image);
        let mut handle = Handle::NULL;
        let asked = || format!("load module `{name}` of `{}` bytes", image.len());
        self.call("cuModuleLoadData", asked, |api| {
            // SAFETY: writes one handle to `handle`. The image is whole (checked above as far as its headers say)
            // and what a compiler made (the caller); the driver copies what it keeps.
            unsafe { (api.module_load)(&mut handle, aligned.as_ptr().cast()) }
        })?;
        Ok(Module(Arc::new(Loaded { gpu: self.clone(), name: name.to_owned(), handle })))
    }
}

impl Module {
    /// The kernel called `name`, as the module's symbols spell it: with C linkage, or mangled.
    ///
    /// # Errors
    /// [`CudaError::NoSuchKernel`], or what the driver says.
    pub fn kernel(&self, name: &str) -> Result<Kernel, CudaError> {
        let loaded = &self.0;
        let no_such = || CudaError::NoSuchKernel { module: loaded.name.clone(), kernel: name.to_owned() };
        let symbol = CString::new(name).map_err(|_| no_such())?;
        let mut handle = Handle::NULL;
        let asked = || format!("find kernel `{name}` in module `{}`", loaded.name);
        let found = loaded.gpu.call("cuModuleGetFunction", asked, |api| {
            // SAFETY: writes one handle to `handle`; the name is zero-terminated; the module is loaded.
            unsafe { (api.module_function)(&mut handle, loaded.handle, symbol.as_ptr()) }
        });
        match found {
            Err(CudaError::Call { code: api::NOT_FOUND, .. }) => return Err(no_such()),
            found => found?,
        }
        let parameters = parameters(&loaded.gpu, handle, asked)?;
        Ok(Kernel { module: Arc::clone(loaded), name: name.to_owned(), handle, parameters })
    }
}

/// Bytes of each parameter, if the driver can say.
fn parameters(
    gpu: &Gpu,
    kernel: Handle,
    asked: impl Fn() -> String,
) -> Result<Option<Vec<usize>>, CudaError> {
    let Some(ask) = gpu.driver().api.function_parameter else { return Ok(None) };
    let mut sizes = Vec::new();
    loop {
        let (mut offset, mut size) = (0, 0);
        let told = gpu.call("cuFuncGetParamInfo", &asked, |_| {
            // SAFETY: writes two `size_t`; the kernel's module is loaded.
            unsafe { ask(kernel, sizes.len(), &mut offset, &mut size) }
        });
        match told {
            Ok(()) => sizes.push(size),
            Err(CudaError::Call { code: INVALID_VALUE, .. }) => return Ok(Some(sizes)),
            Err(error) => return Err(error),
        }
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        // Kernels of the module may still run. If it cannot be known that none does, the module stays.
        let idle = self.gpu.synchronize().or_else(|_| self.gpu.synchronize());
        match idle {
            Ok(()) => self.gpu.free(
                "cuModuleUnload",
                || format!("unload module `{}`", self.name),
                |api| {
                    // SAFETY: loaded by us, unloaded once, no kernel of it is running or will be launched.
                    unsafe { (api.module_unload)(self.handle) }
                },
            ),
            Err(error) => self.gpu.keep_lost(error),
        }
    }
}

impl Kernel {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Allows launches with up to `bytes` of dynamic shared memory; without it 48 KiB.
    ///
    /// # Errors
    /// What the driver says, for one if the GPU has less.
    pub fn allow_shared_bytes(&self, bytes: u32) -> Result<(), CudaError> {
        let asked = || format!("give kernel `{}` `{bytes}` bytes of shared memory", self.name);
        let value = i32::try_from(bytes).unwrap_or(i32::MAX);
        self.module.gpu.call("cuFuncSetAttribute", asked, |api| {
            // SAFETY: takes no pointer; the kernel's module is loaded.
            unsafe {
                (api.function_set_attribute)(self.handle, api::FUNCTION_MAX_DYNAMIC_SHARED_BYTES, value)
            }
        })
    }
}

/// The shape of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Blocks along x, y, z.
    pub blocks: [u32; 3],
    /// Threads of a block along x, y, z.
    pub threads: [u32; 3],
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
}

impl Grid {
    /// `blocks` of `threads`, along x.
    pub fn linear(blocks: u32, threads: u32) -> Self {
        Grid { blocks: [blocks, 1, 1], threads: [threads, 1, 1], shared_bytes: 0 }
    }
}

/// A number that a kernel takes by value.
pub trait Scalar: bytemuck::Pod {}
impl Scalar for u8 {}
impl Scalar for u16 {}
impl Scalar for i32 {}
impl Scalar for u32 {}
impl Scalar for f32 {}
impl Scalar for i64 {}
impl Scalar for u64 {}
impl Scalar for f64 {}

/// One argument: its bytes, in words that are aligned for every type.
struct Value {
    words: Vec<MaybeUninit<u64>>,
    num_bytes: usize,
}

/// The arguments of a launch, in the order of the kernel's parameters.
///
/// Views are borrowed until the launch; what they show is then in use until the kernel is over. A second pointer into
/// memory that another argument shows already is a [`Args::value`]: the address, as a `u64`.
#[derive(Default)]
#[must_use]
pub struct Args<'a> {
    values: Vec<Value>,
    touches: Vec<Touch<'a>>,
    /// Where the memory of an argument is, and whether it has a log.
    views: Vec<(usize, Slice<'a>)>,
    memory: PhantomData<&'a mut [u8]>,
}

impl<'a> Args<'a> {
    /// No arguments.
    pub fn new() -> Self {
        Args::default()
    }

    /// A pointer to memory that the kernel reads. Empty views are null.
    pub fn read(self, view: Slice<'a>) -> Self {
        self.view(view, Access::Read)
    }

    /// A pointer to memory that the kernel writes. Empty views are null.
    pub fn write(self, view: SliceMut<'a>) -> Self {
        self.view(Slice::from(view), Access::Write)
    }

    /// A null pointer, for a parameter that may be absent.
    pub fn null(self) -> Self {
        self.value(0u64)
    }

    /// A number.
    pub fn value<T: Scalar>(mut self, value: T) -> Self {
        // SAFETY: a number is alive and as large as its type.
        unsafe { self.push((&raw const value).cast(), size_of::<T>()) };
        self
    }

    /// A structure, by value. What its pointers show is told apart from it, with [`Args::uses`].
    ///
    /// # Safety
    /// `structure` is aligned and valid for reads of `num_bytes` bytes; padding may be anything.
    pub unsafe fn structure(mut self, structure: *const c_void, num_bytes: usize) -> Self {
        // SAFETY: as this function's.
        unsafe { self.push(structure, num_bytes) };
        self
    }

    /// # Safety
    /// As [`Args::structure`].
    unsafe fn push(&mut self, value: *const c_void, num_bytes: usize) {
        let mut words = vec![MaybeUninit::uninit(); num_bytes.div_ceil(size_of::<u64>())];
        // SAFETY: the caller's value is so long, and the words are at least so; they are new, and never read as numbers.
        unsafe { value.cast::<u8>().copy_to_nonoverlapping(words.as_mut_ptr().cast(), num_bytes) };
        self.values.push(Value { words, num_bytes });
    }

    /// Memory that the kernel reaches through a pointer in a structure.
    pub fn uses(mut self, view: Slice<'a>, access: Access) -> Self {
        self.views.push((self.values.len().saturating_sub(1), view));
        self.touches.extend(view.touch(access));
        self
    }

    fn view(mut self, view: Slice<'a>, access: Access) -> Self {
        self.views.push((self.values.len(), view));
        self.touches.extend(view.touch(access));
        let address = if view.num_bytes() == 0 { 0 } else { view.address() };
        self.value(address)
    }

    fn check(&self, kernel: &Kernel, ordinal: u32) -> Result<(), CudaError> {
        for &(index, view) in &self.views {
            let pinned = view.place() == Place::Cpu && view.uses().is_some();
            if view.num_bytes() > 0 && view.place() != (Place::Cuda { ordinal }) && !pinned {
                let (kernel, place) = (kernel.name.clone(), view.place());
                return Err(CudaError::UnreachableArgument { kernel, index, place, ordinal });
            }
        }
        let got = || self.values.iter().map(|value| value.num_bytes);
        match &kernel.parameters {
            Some(expected) if !expected.iter().copied().eq(got()) => Err(CudaError::WrongArguments {
                kernel: kernel.name.clone(),
                expected: expected.clone(),
                got: got().collect(),
            }),
            _ => Ok(()),
        }
    }
}

impl Stream {
    /// Launches `kernel`, when the stream gets there. It waits for conflicting uses of the views among `args` on
    /// other streams, and those wait for it.
    ///
    /// # Errors
    /// [`CudaError::WrongArguments`], [`CudaError::UnreachableArgument`], [`CudaError::WrongGpu`], or what the
    /// driver says. A kernel that fails is reported by a later call.
    ///
    /// # Safety
    /// The kernel takes these arguments, stays inside of the views, and writes to none that was given to be read.
    pub unsafe fn launch(&self, kernel: &Kernel, grid: Grid, args: Args<'_>) -> Result<(), CudaError> {
        self.require_gpu("kernel", &kernel.module.gpu)?;
        args.check(kernel, self.gpu().ordinal())?;
        let Args { mut values, touches, .. } = args;
        let mut pointers: Vec<*mut c_void> =
            values.iter_mut().map(|value| value.words.as_mut_ptr().cast()).collect();
        let asked = || format!("launch kernel `{}` with {grid:?}", kernel.name);
        let ([bx, by, bz], [tx, ty, tz]) = (grid.blocks, grid.threads);
        self.queue().submit(self.gpu(), &touches, "cuLaunchKernel", asked, |api, stream| {
            // SAFETY: one pointer for each parameter, to at least as many bytes as it has (checked where the driver
            // tells, and promised by the caller); the driver copies them before it returns. Memory of buffers stays
            // until the uses logged here are over. The kernel's module is loaded and waits for it.
            unsafe {
                let (parameters, extra) = (pointers.as_mut_ptr(), std::ptr::null_mut());
                (api.launch)(
                    kernel.handle,
                    bx,
                    by,
                    bz,
                    tx,
                    ty,
                    tz,
                    grid.shared_bytes,
                    stream,
                    parameters,
                    extra,
                )
            }
        })
    }
}
