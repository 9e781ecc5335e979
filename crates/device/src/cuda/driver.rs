//! The loaded driver and what it knows about its GPUs without using one.

use std::ffi::{CStr, c_char, c_int};
use std::fmt;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use libloading::Library;

use super::api::{self, Api, Code};
use super::{Capability, CudaError, DriverVersion, Gpu, GpuInfo, PeerLink};

/// Where the driver is found if nobody says otherwise.
const LIBRARY: &str = "libcuda.so.1";

/// A loaded and initialised driver.
pub struct Driver {
    pub(super) api: Api,
    path: PathBuf,
    version: DriverVersion,
    num_gpus: usize,
    /// Never unloaded: the driver has threads and exit handlers of its own.
    _library: ManuallyDrop<Library>,
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Driver({}, CUDA {}, {} GPUs)", self.path.display(), self.version, self.num_gpus)
    }
}

impl Driver {
    /// Loads the driver from `path`, or as `libcuda.so.1` from where the dynamic linker looks.
    ///
    /// # Errors
    /// [`CudaError::NoDriver`], [`CudaError::DriverTooOld`], [`CudaError::MissingSymbol`], [`CudaError::NoGpus`],
    /// or what the driver says when it cannot start.
    pub fn load(path: Option<&Path>) -> Result<Arc<Driver>, CudaError> {
        let path = path.unwrap_or(Path::new(LIBRARY)).to_owned();
        // SAFETY: loading runs the library's initialisers. The caller names the driver, or the system has it
        // under the driver's own name.
        let library = unsafe { Library::new(&path) }
            .map_err(|error| CudaError::NoDriver { path: path.clone(), reason: error.to_string() })?;
        let library = ManuallyDrop::new(library);
        // The version comes first, so that an old driver is called old and not incomplete.
        let version = version_of(&library)
            .ok_or_else(|| missing(&path, "cuDriverGetVersion", None))
            .map(DriverVersion::from_number)?;
        require(version, DriverVersion::OLDEST, "Shardwise")?;
        let api = Api::of(&library).map_err(|symbol| missing(&path, symbol, Some(version)))?;
        let mut driver = Driver { api, path, version, num_gpus: 0, _library: library };
        // SAFETY: takes no pointer.
        let code = unsafe { (driver.api.init)(0) };
        if code == api::NO_DEVICE {
            return Err(CudaError::NoGpus { version });
        }
        driver.check("cuInit", code, || format!("start the driver (CUDA {version})"))?;
        let mut count = 0;
        // SAFETY: writes one integer to `count`.
        let code = unsafe { (driver.api.device_count)(&mut count) };
        driver.check("cuDeviceGetCount", code, || "count GPUs".to_owned())?;
        driver.num_gpus = usize::try_from(count).unwrap_or(0);
        if driver.num_gpus == 0 {
            return Err(CudaError::NoGpus { version });
        }
        Ok(Arc::new(driver))
    }

    /// The newest CUDA it supports.
    pub fn version(&self) -> DriverVersion {
        self.version
    }

    /// Where it was loaded from, as asked for.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// GPUs it sees; `CUDA_VISIBLE_DEVICES` is the driver's own business.
    pub fn num_gpus(&self) -> usize {
        self.num_gpus
    }

    /// Checks that it is new enough for `needed_by`, such as a libtorch.
    ///
    /// # Errors
    /// [`CudaError::DriverTooOld`].
    pub fn require(&self, needed: DriverVersion, needed_by: &str) -> Result<(), CudaError> {
        require(self.version, needed, needed_by)
    }

    /// What it knows about a GPU. Uses none of its memory.
    ///
    /// # Errors
    /// [`CudaError::NoSuchGpu`], or what the driver says.
    pub fn gpu_info(&self, ordinal: u32) -> Result<GpuInfo, CudaError> {
        let device = self.device(ordinal)?;
        let asked = || format!("describe GPU `{ordinal}`");
        let mut text = [0 as c_char; 256];
        // SAFETY: writes at most 256 bytes to `text`, zero-terminated.
        let code = unsafe { (self.api.device_name)(text.as_mut_ptr(), text.len() as c_int, device) };
        self.check("cuDeviceGetName", code, asked)?;
        let name = text_of(&text);
        // SAFETY: as above.
        let code = unsafe { (self.api.device_pci)(text.as_mut_ptr(), text.len() as c_int, device) };
        self.check("cuDeviceGetPCIBusId", code, asked)?;
        let pci_bus_id = text_of(&text);
        let mut total_bytes = 0;
        // SAFETY: writes one `size_t` to `total_bytes`.
        let code = unsafe { (self.api.device_memory)(&mut total_bytes, device) };
        self.check("cuDeviceTotalMem", code, asked)?;
        let attribute = |which| {
            let mut value = 0;
            // SAFETY: writes one integer to `value`.
            let code = unsafe { (self.api.device_attribute)(&mut value, which, device) };
            self.check("cuDeviceGetAttribute", code, asked)?;
            Ok::<_, CudaError>(value.unsigned_abs())
        };
        let capability = Capability {
            major: attribute(api::ATTRIBUTE_CAPABILITY_MAJOR)?,
            minor: attribute(api::ATTRIBUTE_CAPABILITY_MINOR)?,
        };
        let num_multiprocessors = attribute(api::ATTRIBUTE_MULTIPROCESSORS)?;
        Ok(GpuInfo { ordinal, name, capability, total_bytes, pci_bus_id, num_multiprocessors })
    }

    /// How GPU `from` reaches the memory of GPU `to`.
    ///
    /// # Errors
    /// [`CudaError::NoSuchGpu`], or what the driver says.
    pub fn peer_link(&self, from: u32, to: u32) -> Result<PeerLink, CudaError> {
        let (a, b) = (self.device(from)?, self.device(to)?);
        if from == to {
            return Ok(PeerLink::Same);
        }
        let asked = || format!("links from GPU `{from}` to GPU `{to}`");
        let mut value = 0;
        // SAFETY: writes one integer to `value`.
        let code = unsafe { (self.api.can_access_peer)(&mut value, a, b) };
        self.check("cuDeviceCanAccessPeer", code, asked)?;
        if value == 0 {
            return Ok(PeerLink::ThroughHost);
        }
        let attribute = |which| {
            let mut value = 0;
            // SAFETY: writes one integer to `value`.
            let code = unsafe { (self.api.p2p_attribute)(&mut value, which, a, b) };
            self.check("cuDeviceGetP2PAttribute", code, asked)?;
            Ok::<_, CudaError>(value)
        };
        let performance_rank = attribute(api::P2P_PERFORMANCE_RANK)?;
        Ok(PeerLink::Direct { performance_rank, native_atomics: attribute(api::P2P_NATIVE_ATOMICS)? != 0 })
    }

    /// Opens a GPU: retains its primary context, the one that libtorch uses too.
    ///
    /// # Errors
    /// [`CudaError::NoSuchGpu`], [`CudaError::UnsupportedGpu`], or what the driver says.
    pub fn open(self: &Arc<Self>, ordinal: u32) -> Result<Gpu, CudaError> {
        let info = self.gpu_info(ordinal)?;
        info.require_supported()?;
        Gpu::open(Arc::clone(self), info, self.device(ordinal)?)
    }

    /// The driver's number of a GPU.
    fn device(&self, ordinal: u32) -> Result<c_int, CudaError> {
        if ordinal as usize >= self.num_gpus {
            return Err(CudaError::NoSuchGpu { ordinal, num_gpus: self.num_gpus });
        }
        let mut device = 0;
        // SAFETY: writes one integer to `device`. The cast: the ordinal is below a count that was a `c_int`.
        let code = unsafe { (self.api.device_get)(&mut device, ordinal as c_int) };
        self.check("cuDeviceGet", code, || format!("find GPU `{ordinal}`"))?;
        Ok(device)
    }

    /// A driver's number as a result.
    pub(super) fn check(
        &self,
        call: &'static str,
        code: Code,
        asked: impl FnOnce() -> String,
    ) -> Result<(), CudaError> {
        if code == api::SUCCESS {
            return Ok(());
        }
        let said = |ask: unsafe extern "C" fn(Code, *mut *const c_char) -> Code| {
            let mut text = std::ptr::null();
            // SAFETY: writes one pointer to `text`: null, or a zero-terminated string that lives as long as the
            // driver.
            let known = unsafe { ask(code, &mut text) } == api::SUCCESS && !text.is_null();
            // SAFETY: as above.
            known.then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
        };
        let name = said(self.api.error_name).unwrap_or_else(|| format!("error {code}"));
        let text =
            said(self.api.error_text).unwrap_or_else(|| "the driver does not say what it means".to_owned());
        Err(CudaError::Call { call, code, name, text, asked: asked() })
    }
}

fn missing(path: &Path, symbol: &'static str, version: Option<DriverVersion>) -> CudaError {
    CudaError::MissingSymbol { path: path.to_owned(), symbol, version }
}

fn require(got: DriverVersion, needed: DriverVersion, needed_by: &str) -> Result<(), CudaError> {
    if got < needed {
        return Err(CudaError::DriverTooOld { got, needed, needed_by: needed_by.to_owned() });
    }
    Ok(())
}

/// The version as the driver writes it: 13000 for 13.0. Works before anything else does.
fn version_of(library: &Library) -> Option<c_int> {
    let ask: unsafe extern "C" fn(*mut c_int) -> Code = api::symbol(library, "cuDriverGetVersion")?;
    let mut version = 0;
    // SAFETY: writes one integer to `version`.
    (unsafe { ask(&mut version) } == api::SUCCESS).then_some(version)
}

fn text_of(text: &[c_char; 256]) -> String {
    let bytes: Vec<u8> = text.iter().take_while(|&&c| c != 0).map(|&c| c as u8).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
