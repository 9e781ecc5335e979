//! The GPU of the machine, for tests that are ignored unless asked for: what holds on the fake is held against it.

use std::env;
use std::path::PathBuf;
use std::sync::Arc;

use shardwise_device::cuda::{Driver, Priority};
use shardwise_kernels::cuda::{CompiledCode, KernelCache, Nvrtc, Search};
use shardwise_kernels::processor::GpuProcessor;

/// GPU 0 on a stream of its own, with kernels compiled by NVRTC as `SHARDWISE_NVRTC` or the system has it. They are kept where runs keep
/// theirs.
///
/// # Panics
/// If there is no driver, GPU or compiler.
pub fn real_processor() -> Arc<GpuProcessor> {
    let path = |name| env::var_os(name).map(PathBuf::from);
    let gpu = Driver::load(None).unwrap().open(0).unwrap();
    let search = Search { given: path("SHARDWISE_NVRTC"), libtorch: path("LIBTORCH") };
    let nvrtc = Arc::new(Nvrtc::load(&search).unwrap());
    let user = || path("XDG_CACHE_HOME").or_else(|| Some(path("HOME")?.join(".cache")));
    let cache = path("SHARDWISE_CACHE").or_else(|| Some(user()?.join("shardwise")));
    let cache = KernelCache::open(&cache.unwrap().join("kernels")).unwrap();
    let code = Arc::new(CompiledCode::for_gpu(nvrtc, cache, &gpu).unwrap());
    Arc::new(GpuProcessor::compiled(gpu.stream(Priority::Normal).unwrap(), code))
}
