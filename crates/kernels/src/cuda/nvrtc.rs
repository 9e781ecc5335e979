//! NVRTC, NVIDIA's compiler as a library: CUDA C++ in, machine code for one architecture out.
//!
//! Loaded when first needed and never linked, so a program without GPUs does not know it. It needs neither GPU nor
//! driver.

use std::error::Error;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fmt;
use std::mem::ManuallyDrop;
use std::path::Path;
use std::ptr;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use super::search::{self, Candidate};
use super::{Attempt, CudaKernelError, Program, Search};

/// A GPU's architecture by its compute capability, `sm_75` for 7.5.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Arch {
    major: u32,
    minor: u32,
}

impl Arch {
    /// Of a GPU with the compute capability `major.minor`; `minor` is a digit.
    pub const fn new(major: u32, minor: u32) -> Self {
        Arch { major, minor }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sm_{}{}", self.major, self.minor)
    }
}

/// NVRTC's version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// As in CUDA 13.
    pub major: u32,
    /// As in CUDA 13.0.
    pub minor: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// What compiling gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compiled {
    /// Machine code for one architecture, an ELF file.
    pub cubin: Vec<u8>,
    /// Warnings; empty for our own sources.
    pub log: String,
}

/// How everything is compiled. No operation is fused that the source does not fuse, and division, square root and
/// subnormal numbers are IEEE's: so results are those of the CPU kernels.
pub(super) const OPTIONS: &[&str] = &[
    "--std=c++17",
    "--device-as-default-execution-space",
    "--fmad=false",
    "--ftz=false",
    "--prec-div=true",
    "--prec-sqrt=true",
    "--generate-line-info",
    "--ptxas-options=--warn-on-spills",
];

type Handle = *mut c_void;
type Status = c_int;

const SUCCESS: Status = 0;
const COMPILATION: Status = 6;

/// The functions used, as in `nvrtc.h`.
#[derive(Clone, Copy)]
struct Functions {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status,
    num_supported_archs: unsafe extern "C" fn(*mut c_int) -> Status,
    supported_archs: unsafe extern "C" fn(*mut c_int) -> Status,
    error_string: unsafe extern "C" fn(Status) -> *const c_char,
    create_program: unsafe extern "C" fn(
        *mut Handle,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Status,
    destroy_program: unsafe extern "C" fn(*mut Handle) -> Status,
    compile_program: unsafe extern "C" fn(Handle, c_int, *const *const c_char) -> Status,
    log_size: unsafe extern "C" fn(Handle, *mut usize) -> Status,
    log: unsafe extern "C" fn(Handle, *mut c_char) -> Status,
    cubin_size: unsafe extern "C" fn(Handle, *mut usize) -> Status,
    cubin: unsafe extern "C" fn(Handle, *mut c_char) -> Status,
}

/// A loaded NVRTC. Threads may compile side by side.
pub struct Nvrtc {
    functions: Functions,
    version: Version,
    place: String,
    supported: Vec<Arch>,
    /// Stays loaded for good: NVRTC has threads and exit handlers of its own, and libtorch may share it.
    _libraries: ManuallyDrop<Vec<Library>>,
}

impl fmt::Debug for Nvrtc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nvrtc")
            .field("version", &self.version)
            .field("place", &self.place)
            .finish_non_exhaustive()
    }
}

impl Nvrtc {
    /// Loads the first NVRTC that is found and usable.
    ///
    /// # Errors
    /// [`CudaKernelError::NotFound`], with all places and their problems.
    pub fn load(search: &Search) -> Result<Self, CudaKernelError> {
        let mut tried = Vec::new();
        for place in search.places() {
            match search::candidate(&place).and_then(|candidate| Nvrtc::open(&candidate)) {
                Ok(nvrtc) => return Ok(nvrtc),
                Err(problem) => tried.push(Attempt { place: place.display().to_string(), problem }),
            }
        }
        if let Some(name) = search.by_name() {
            match Nvrtc::open(&Candidate { library: name.into(), builtins: None }) {
                Ok(nvrtc) => return Ok(nvrtc),
                Err(problem) => tried.push(Attempt { place: name.into(), problem }),
            }
        }
        Err(CudaKernelError::NotFound { tried })
    }

    fn open(candidate: &Candidate) -> Result<Self, String> {
        let open = |path: &Path| {
            // SAFETY: NVIDIA's libraries, whose initialisers ask for nothing; a user who names another file means it.
            unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.map_err(|error| {
                let cause = error.source().map_or_else(|| error.to_string(), ToString::to_string);
                format!("is not loaded: {cause}")
            })
        };
        let mut libraries = Vec::new();
        if let Some(builtins) = &candidate.builtins {
            libraries.push(open(builtins)?);
        }
        let library = open(&candidate.library)?;
        // SAFETY: the functions' types are those of `nvrtc.h`, the same in all versions since 11.
        let functions = unsafe { Functions::find(&library) }?;
        libraries.push(library);
        let (version, supported) = functions.identity()?;
        Ok(Nvrtc {
            functions,
            version,
            place: candidate.library.display().to_string(),
            supported,
            _libraries: ManuallyDrop::new(libraries),
        })
    }

    /// The version of the library.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Where it was found.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// The architectures that it compiles for, in order.
    pub fn supported(&self) -> &[Arch] {
        &self.supported
    }

    /// Checks that it compiles for GPUs of `arch`.
    pub(super) fn require(&self, arch: Arch) -> Result<(), CudaKernelError> {
        if !self.supported.contains(&arch) {
            let supported = self.supported.clone();
            return Err(CudaKernelError::UnsupportedArch { arch, supported, version: self.version });
        }
        Ok(())
    }

    /// Compiles `program` for GPUs of `arch`.
    ///
    /// # Errors
    /// [`CudaKernelError::UnsupportedArch`]; [`CudaKernelError::Compile`] with the compiler's messages;
    /// [`CudaKernelError::MissingEntry`] if one of the program's kernels is not in the result.
    pub fn compile(&self, program: &Program<'_>, arch: Arch) -> Result<Compiled, CudaKernelError> {
        self.require(arch)?;
        let job = Job::new(self.functions, program)?;
        let arch_option = format!("--gpu-architecture={arch}");
        let options: Vec<&str> = [arch_option.as_str()].into_iter().chain(OPTIONS.iter().copied()).collect();
        let compiled = job.compile(&options)?;
        let log = job.log()?;
        if !compiled {
            return Err(CudaKernelError::Compile { program: program.name.into(), arch, log });
        }
        let cubin = job.cubin()?;
        program.check(&cubin)?;
        Ok(Compiled { cubin, log })
    }
}

impl Functions {
    /// # Safety
    /// `library` is NVRTC.
    unsafe fn find(library: &Library) -> Result<Self, String> {
        /// # Safety
        /// The function called `name` is of type `T`.
        unsafe fn get<T: Copy>(library: &Library, name: &CStr) -> Result<T, String> {
            // SAFETY: the caller's promise.
            unsafe { library.get::<T>(name.to_bytes_with_nul()) }
                .map(|symbol| *symbol)
                .map_err(|_| format!("has no function `{}`", name.to_string_lossy()))
        }
        // SAFETY: the caller's promise; the types are those of `nvrtc.h`.
        unsafe {
            Ok(Functions {
                version: get(library, c"nvrtcVersion")?,
                num_supported_archs: get(library, c"nvrtcGetNumSupportedArchs")?,
                supported_archs: get(library, c"nvrtcGetSupportedArchs")?,
                error_string: get(library, c"nvrtcGetErrorString")?,
                create_program: get(library, c"nvrtcCreateProgram")?,
                destroy_program: get(library, c"nvrtcDestroyProgram")?,
                compile_program: get(library, c"nvrtcCompileProgram")?,
                log_size: get(library, c"nvrtcGetProgramLogSize")?,
                log: get(library, c"nvrtcGetProgramLog")?,
                cubin_size: get(library, c"nvrtcGetCUBINSize")?,
                cubin: get(library, c"nvrtcGetCUBIN")?,
            })
        }
    }

    fn message(&self, status: Status) -> String {
        // SAFETY: takes any number and returns a text that lives as long as the library.
        unsafe { CStr::from_ptr((self.error_string)(status)) }.to_string_lossy().into_owned()
    }

    fn identity(&self) -> Result<(Version, Vec<Arch>), String> {
        let check = |status| if status == SUCCESS { Ok(()) } else { Err(self.message(status)) };
        let (mut major, mut minor, mut count) = (0, 0, 0);
        // SAFETY: places for one number each.
        check(unsafe { (self.version)(&mut major, &mut minor) })?;
        // SAFETY: as above.
        check(unsafe { (self.num_supported_archs)(&mut count) })?;
        let mut archs = vec![0; usize::try_from(count).map_err(|_| "counts its architectures below zero")?];
        // SAFETY: room for as many numbers as it has just said.
        check(unsafe { (self.supported_archs)(archs.as_mut_ptr()) })?;
        let mut archs: Vec<Arch> = archs
            .into_iter()
            .map(|arch| Arch::new(arch.unsigned_abs() / 10, arch.unsigned_abs() % 10))
            .collect();
        archs.sort();
        Ok((Version { major: major.unsigned_abs(), minor: minor.unsigned_abs() }, archs))
    }
}

/// A program of NVRTC's, destroyed when dropped.
struct Job {
    functions: Functions,
    handle: Handle,
}

impl Job {
    fn new(functions: Functions, program: &Program<'_>) -> Result<Self, CudaKernelError> {
        let text = |what: &str, text: &str| {
            CString::new(text).map_err(|_| CudaKernelError::ZeroByte { what: what.into() })
        };
        let (source, name) = (text(program.name, program.text)?, text(program.name, program.name)?);
        let mut headers = Vec::new();
        let mut names = Vec::new();
        for header in program.headers {
            headers.push(text(header.name, header.text)?);
            names.push(text(header.name, header.name)?);
        }
        let pointers = |texts: &[CString]| texts.iter().map(|text| text.as_ptr()).collect::<Vec<_>>();
        let (headers, names) = (pointers(&headers), pointers(&names));
        let mut handle = ptr::null_mut();
        // SAFETY: texts end with zero and live until the call returns, which copies them; the two lists are of the
        // length that is told.
        let status = unsafe {
            (functions.create_program)(
                &mut handle,
                source.as_ptr(),
                name.as_ptr(),
                headers.len() as c_int,
                headers.as_ptr(),
                names.as_ptr(),
            )
        };
        let job = Job { functions, handle };
        job.check("nvrtcCreateProgram", status).map(|()| job)
    }

    fn check(&self, call: &'static str, status: Status) -> Result<(), CudaKernelError> {
        match status {
            SUCCESS => Ok(()),
            _ => Err(CudaKernelError::Nvrtc { call, message: self.functions.message(status) }),
        }
    }

    /// Whether the source is right; if not, the log says why.
    fn compile(&self, options: &[&str]) -> Result<bool, CudaKernelError> {
        let options: Vec<CString> = options
            .iter()
            .map(|option| CString::new(*option).expect("options are our own and hold no zero"))
            .collect();
        let pointers: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: a program that was created, and as many texts as told, alive during the call.
        let status = unsafe {
            (self.functions.compile_program)(self.handle, pointers.len() as c_int, pointers.as_ptr())
        };
        if status == COMPILATION {
            return Ok(false);
        }
        self.check("nvrtcCompileProgram", status).map(|()| true)
    }

    fn log(&self) -> Result<String, CudaKernelError> {
        let bytes = self.bytes("nvrtcGetProgramLog", self.functions.log_size, self.functions.log)?;
        let text = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
        Ok(String::from_utf8_lossy(text).trim().to_owned())
    }

    fn cubin(&self) -> Result<Vec<u8>, CudaKernelError> {
        self.bytes("nvrtcGetCUBIN", self.functions.cubin_size, self.functions.cubin)
    }

    fn bytes(
        &self,
        call: &'static str,
        size: unsafe extern "C" fn(Handle, *mut usize) -> Status,
        get: unsafe extern "C" fn(Handle, *mut c_char) -> Status,
    ) -> Result<Vec<u8>, CudaKernelError> {
        let mut num_bytes = 0;
        // SAFETY: a program that was created, and a place for a number.
        self.check(call, unsafe { size(self.handle, &mut num_bytes) })?;
        let mut bytes = vec![0u8; num_bytes];
        // SAFETY: room for as many bytes as NVRTC has just said.
        self.check(call, unsafe { get(self.handle, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if !self.handle.is_null() {
            // SAFETY: created, and not destroyed before. What it returns helps nobody here.
            unsafe { (self.functions.destroy_program)(&mut self.handle) };
        }
    }
}
