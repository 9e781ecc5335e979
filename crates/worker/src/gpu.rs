//! A rank's GPU: found, checked, and prepared before anything else asks libtorch what there is.
//!
//! ```text
//! driver ─► GPU of LOCAL_RANK ─► libtorch's CUDA, on our stream ─► kernels, compiled once a machine ─► collectives
//! ```
//!
//! What cannot work is said here, before a model is built: no driver, too few GPUs, one too old, bf16 on a GPU that has none.

use std::path::PathBuf;
use std::sync::Arc;

use shardwise_comm::nccl::{self, Library, Nccl};
use shardwise_comm::staged::Staged;
use shardwise_comm::{Group, ProcessGroup};
use shardwise_config::{Determinism, Device, GpuSharing, RunConfig};
use shardwise_device::cuda::{Driver, DriverVersion, Gpu, Priority, Sharing, gpu_for_rank};
use shardwise_device::{Buffer, DType, Memory, Slice, SliceMut};
use shardwise_engine::Ranks;
use shardwise_kernels::cuda::{CompiledCode, KernelCache, Nvrtc, Search, Source};
use shardwise_kernels::processor::GpuProcessor;
use shardwise_plan::Collectives;
use shardwise_torch::{Kind, Tensor, TorchError, autograd, cuda, library_folder};

use crate::failure::Failure;
use crate::launch::Libraries;
use crate::options::dtype;
use crate::telemetry::Telemetry;

/// The driver that CUDA 13, for which libtorch is built, can run on.
const NEEDED_BY_LIBTORCH: DriverVersion = DriverVersion { major: 13, minor: 0 };

/// A rank's GPU, with the stream that libtorch uses too.
pub struct RankGpu {
    processor: Arc<GpuProcessor>,
    /// Memory that a limit keeps from the run: held to the end.
    withheld: Vec<Buffer>,
}

/// The most that a run has had of a GPU's memory.
#[derive(Debug, Clone, Copy, Default)]
pub struct PeakMemory {
    /// Taken from the driver.
    pub reserved_bytes: usize,
    /// In use by tensors and buffers.
    pub allocated_bytes: usize,
}

impl RankGpu {
    /// The GPU of a run on GPUs.
    pub fn open(
        config: &RunConfig,
        local_rank: usize,
        libraries: &Libraries,
        telemetry: &Telemetry,
    ) -> Result<Option<Self>, Failure> {
        if config.device == Device::Cpu {
            return Ok(None);
        }
        if config.cuda.memory_limit.is_some() && config.cuda.sharing == GpuSharing::Shared {
            return Err(Failure::usage(
                "`cuda.memory_limit` is set, and `cuda.share` lets ranks share a GPU: each would take the rest from the others",
                "leave one of the two out",
            ));
        }
        telemetry.phase("opening the GPU");
        let driver = Driver::load(None).map_err(Failure::configuration)?;
        driver.require(NEEDED_BY_LIBTORCH, "libtorch 2.11.0").map_err(Failure::configuration)?;
        let sharing = match config.cuda.sharing {
            GpuSharing::Exclusive => Sharing::Exclusive,
            GpuSharing::Shared => Sharing::Shared,
        };
        let ordinal = gpu_for_rank(local_rank, driver.num_gpus(), sharing).map_err(Failure::configuration)?;
        let gpu = driver.open(ordinal).map_err(Failure::configuration)?;
        gpu.require_dtype(dtype(config.precision.float_type())).map_err(Failure::configuration)?;
        let stream = gpu.stream(Priority::Normal)?.named("compute").measuring_stalls();
        cuda::load(ordinal).map_err(torch_failure)?;
        cuda::set_determinism(match config.cuda.determinism {
            Determinism::Off => cuda::Determinism::Off,
            Determinism::On => cuda::Determinism::On,
        })?;
        // SAFETY: our own stream of this GPU's primary context. The processor holds it, and the engine and this value hold that, to
        // the end of the run.
        unsafe { cuda::use_stream(ordinal, stream.as_raw()) }.map_err(torch_failure)?;
        share_memory_with_libtorch(&gpu);
        warm_up(ordinal)?;
        telemetry.phase("preparing kernels");
        let search = Search { given: libraries.nvrtc.clone(), libtorch: libtorch() };
        let nvrtc = Arc::new(Nvrtc::load(&search).map_err(Failure::configuration)?);
        let cache = KernelCache::open(&libraries.cache.join("kernels"))?;
        let code = Arc::new(CompiledCode::for_gpu(nvrtc, cache, &gpu).map_err(Failure::configuration)?);
        let processor = Arc::new(GpuProcessor::compiled(stream, Arc::clone(&code)));
        processor.load(Source::ALL)?;
        if let Some(error) = code.take_not_kept() {
            telemetry.note(&format!("compiled kernels could not be kept for the next run: {error}"));
        }
        let withheld = match config.cuda.memory_limit {
            Some(limit) => withhold(&gpu, limit)?,
            None => Vec::new(),
        };
        Ok(Some(RankGpu { processor, withheld }))
    }

    /// What runs kernels there.
    pub fn processor(&self) -> &Arc<GpuProcessor> {
        &self.processor
    }

    /// What libtorch calls it.
    pub fn device(&self) -> shardwise_torch::Device {
        shardwise_torch::Device::Cuda(self.processor.gpu().ordinal() as usize)
    }

    /// The ranks of `world` for memory of their GPUs, laid out as the run's mesh.
    ///
    /// # Collective
    /// Every rank of `world`.
    pub fn ranks(
        &self,
        world: Group,
        config: &RunConfig,
        libraries: &Libraries,
        telemetry: &Telemetry,
    ) -> Result<Ranks, Failure> {
        let mesh = config.parallel.mesh();
        if world.group_size() == 1 {
            return Ok(Ranks::new(world, mesh)?);
        }
        let staged = || Staged::new(world.clone(), self.processor.gpu(), self.processor.stream().clone());
        match self.nccl(&world, config, libraries, telemetry)? {
            // Messages between stages come from threads of their own, beside collectives: NCCL would have to be given all
            // of them in one order.
            Some(nccl) if config.parallel.pipeline > 1 => Ok(Ranks::with_messages(nccl, &staged()?, mesh)?),
            Some(nccl) => Ok(Ranks::new(nccl, mesh)?),
            None => Ok(Ranks::new(staged()?, mesh)?),
        }
    }

    /// NCCL over the ranks of `world`, if they are to use it and all can.
    ///
    /// # Collective
    /// Every rank of `world`.
    fn nccl(
        &self,
        world: &Group,
        config: &RunConfig,
        libraries: &Libraries,
        telemetry: &Telemetry,
    ) -> Result<Option<Group>, Failure> {
        let wanted = config.cuda.collectives();
        if wanted == Collectives::Host {
            return Ok(None);
        }
        let search = nccl::Search { given: libraries.nccl.clone(), libtorch: libtorch() };
        let library = Library::load(&search);
        // One rank without it would wait for the others for ever: they agree first.
        let have_it = all_agree(&**world, library.is_ok())?;
        match (library, have_it) {
            (Ok(library), true) => {
                let processor = Arc::clone(&self.processor);
                Ok(Some(Nccl::new(world.clone(), library, processor, self.processor.stream().clone())?))
            }
            (Err(error), _) if wanted == Collectives::Nccl => Err(Failure::configuration(error)),
            (Ok(_), false) if wanted == Collectives::Nccl => Err(Failure::usage(
                "another rank has no NCCL",
                "see `shardwise doctor` there, or set `cuda.collectives` to `host`",
            )),
            (library, _) => {
                let why =
                    library.err().map_or_else(|| "another rank has no NCCL".to_owned(), |e| e.to_string());
                telemetry.note(&format!("collectives go through host memory: {why}"));
                Ok(None)
            }
        }
    }

    /// The most of the GPU's memory so far: libtorch's, and the state's buffers. The two peaks need not be of one moment.
    pub fn peak_memory(&self) -> Result<PeakMemory, Failure> {
        let gpu = self.processor.gpu();
        let withheld: usize = self.withheld.iter().map(Buffer::num_bytes).sum();
        let torch = cuda::memory(gpu.ordinal())?;
        let ours = gpu.held_memory().peak_device_bytes - withheld;
        Ok(PeakMemory {
            reserved_bytes: torch.peak_reserved_bytes + ours,
            allocated_bytes: torch.peak_allocated_bytes + ours,
        })
    }
}

/// Memory that libtorch keeps for later is given back before a buffer of ours is refused.
fn share_memory_with_libtorch(gpu: &Gpu) {
    gpu.when_out_of_memory(|| {
        // If it cannot, the buffer is refused as it would have been.
        let _ = cuda::release_cached();
    });
}

/// Multiplies, forward and backward: libraries take their memory now, and not when a model has filled the GPU.
fn warm_up(ordinal: u32) -> Result<(), Failure> {
    let small = Tensor::f_ones([8, 8], (Kind::Float, shardwise_torch::Device::Cuda(ordinal as usize)));
    let small = small.map_err(TorchError::from)?.set_requires_grad(true);
    let product = small.f_matmul(&small).and_then(|product| product.f_sum(Kind::Float));
    autograd::grad(&[&product.map_err(TorchError::from)?], &[None], &[&small])?;
    Ok(())
}

/// The folder that libtorch's `include/` and `lib/` are in.
pub fn libtorch() -> Option<PathBuf> {
    Some(library_folder()?.parent()?.to_owned())
}

fn torch_failure(error: TorchError) -> Failure {
    match error.hint() {
        Some(hint) => Failure::usage(error.to_string(), hint),
        None => error.into(),
    }
}

/// Takes what a limit leaves over: then nothing of this process can go beyond it, whoever asks for memory.
fn withhold(gpu: &Gpu, limit: u64) -> Result<Vec<Buffer>, Failure> {
    /// Pieces, as no driver has to find all of it in a row.
    const PIECE_BYTES: usize = 1 << 30;
    let info = gpu.memory_info()?;
    let used = info.total_bytes - info.free_bytes;
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    if limit <= used {
        let message = format!("`cuda.memory_limit` is `{limit}` bytes, and `{used}` are in use already");
        return Err(Failure::usage(message, "give more: a context and libtorch need about 1 GiB"));
    }
    let mut left = info.total_bytes.saturating_sub(limit);
    let mut withheld = Vec::new();
    while left > 0 {
        let bytes = left.min(PIECE_BYTES);
        withheld.push(Buffer::allocate(DType::U8, bytes, &Memory::Gpu(gpu.clone()))?);
        left -= bytes;
    }
    Ok(withheld)
}

fn all_agree(world: &dyn ProcessGroup, mine: bool) -> Result<bool, Failure> {
    let mut all = vec![0u8; world.group_size()];
    world.all_gather(Slice::of(&[u8::from(mine)]), SliceMut::of(&mut all))?;
    Ok(all.iter().all(|&has| has == 1))
}
