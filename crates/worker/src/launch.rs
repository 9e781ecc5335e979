//! What the environment says: which rank this is, how to find the others, who listens.

use std::env;
use std::path::PathBuf;
use std::sync::OnceLock;

use shardwise_monitor::EventWriter;

use crate::failure::Failure;
use crate::fault::Fault;

/// This process's place among the ranks.
#[derive(Debug, Clone)]
pub struct Launch {
    pub rank: usize,
    pub world_size: usize,
    /// What all ranks of this run, and no other run, agree on.
    pub rendezvous: String,
    /// Threads of this rank, if the launcher decided.
    pub threads: Option<usize>,
    /// How this rank is to fail, in tests.
    pub fault: Option<Fault>,
    /// What a run on GPUs loads, and where it keeps what it compiles.
    pub libraries: Libraries,
}

/// Where libraries and the cache of compiled kernels are.
#[derive(Debug, Clone)]
pub struct Libraries {
    /// `SHARDWISE_NVRTC`: a library or its folder, instead of looking for it.
    pub nvrtc: Option<PathBuf>,
    /// `SHARDWISE_NCCL`: likewise.
    pub nccl: Option<PathBuf>,
    /// `SHARDWISE_CACHE`, or `shardwise` in the user's cache.
    pub cache: PathBuf,
}

impl Libraries {
    fn from_env() -> Self {
        let path = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let user_cache = || {
            let cache = path("XDG_CACHE_HOME").or_else(|| Some(path("HOME")?.join(".cache")));
            cache.map_or_else(
                || env::temp_dir().join(format!("shardwise-{}", uid())),
                |cache| cache.join("shardwise"),
            )
        };
        Libraries {
            nvrtc: path("SHARDWISE_NVRTC"),
            nccl: path("SHARDWISE_NCCL"),
            cache: path("SHARDWISE_CACHE").unwrap_or_else(user_cache),
        }
    }
}

fn uid() -> u32 {
    rustix::process::getuid().as_raw()
}

/// The line to the supervisor; silent if there is none.
pub fn events() -> &'static EventWriter {
    static EVENTS: OnceLock<EventWriter> = OnceLock::new();
    EVENTS.get_or_init(|| match env::var_os("SHARDWISE_EVENTS") {
        Some(value) if value == "1" => EventWriter::stdout(),
        _ => EventWriter::disabled(),
    })
}

/// Whether `shardwise train` watches this rank and shows its progress.
pub fn is_supervised() -> bool {
    env::var_os("SHARDWISE_EVENTS").is_some_and(|value| value == "1")
}

/// Sets what the driver reads when a GPU is opened, unless the user has: as many queues as there are, so that streams that share one do not
/// wait for each other.
///
/// # Safety
/// No other thread reads the environment now.
pub unsafe fn prepare_environment() {
    const CONNECTIONS: &str = "CUDA_DEVICE_MAX_CONNECTIONS";
    if env::var_os(CONNECTIONS).is_none() {
        // SAFETY: as the caller promises.
        unsafe { env::set_var(CONNECTIONS, "32") };
    }
}

impl Launch {
    /// Reads `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR` and `MASTER_PORT`; without any of them this is a single
    /// rank.
    pub fn from_env() -> Result<Self, Failure> {
        let rank = number("RANK")?;
        let world_size = number("WORLD_SIZE")?;
        let (rank, world_size) = match (rank, world_size) {
            (None, None) => (0, 1),
            (Some(rank), Some(world_size)) => (rank, world_size),
            (Some(_), None) => return Err(lonely("RANK", "WORLD_SIZE")),
            (None, Some(_)) => return Err(lonely("WORLD_SIZE", "RANK")),
        };
        if rank >= world_size {
            let message = format!("`RANK` is `{rank}` and `WORLD_SIZE` is `{world_size}`");
            return Err(Failure::usage(message, "ranks count from 0 to `WORLD_SIZE` - 1"));
        }
        if let Some(local) = number("LOCAL_RANK")?.filter(|&local| local != rank) {
            let message = format!("`LOCAL_RANK` is `{local}` on rank `{rank}`: ranks on several hosts");
            return Err(Failure::usage(message, "ranks of one host is what this version can connect"));
        }
        let address = env::var("MASTER_ADDR").unwrap_or_else(|_| "127.0.0.1".into());
        let port = number("MASTER_PORT")?.unwrap_or(29500);
        let run_id =
            env::var("SHARDWISE_RUN_ID").or_else(|_| env::var("TORCHELASTIC_RUN_ID")).unwrap_or_default();
        let rendezvous = format!("{address}:{port}:{run_id}");
        let fault = fault(world_size)?.filter(|fault| fault.rank == rank);
        let libraries = Libraries::from_env();
        Ok(Launch { rank, world_size, rendezvous, threads: number("SHARDWISE_THREADS")?, fault, libraries })
    }
}

/// Reads `SHARDWISE_FAULT`: see [`crate::fault`].
fn fault(world_size: usize) -> Result<Option<Fault>, Failure> {
    let Some(text) = env::var_os("SHARDWISE_FAULT") else { return Ok(None) };
    let text = text.to_string_lossy();
    let refuse = |problem: String| {
        let message = format!("environment variable `SHARDWISE_FAULT` is `{text}`: {problem}");
        Failure::usage(
            message,
            "it makes a rank fail on purpose, as in `kill:rank=1,step=3,phase=backward`; unset it to train",
        )
    };
    let fault: Fault = text.parse().map_err(refuse)?;
    if fault.rank >= world_size {
        return Err(refuse(format!("there are `{world_size}` ranks")));
    }
    Ok(Some(fault))
}

fn number(name: &str) -> Result<Option<usize>, Failure> {
    let Some(text) = env::var_os(name) else { return Ok(None) };
    let text = text.to_string_lossy();
    match text.parse() {
        Ok(number) => Ok(Some(number)),
        Err(_) => Err(Failure::usage(
            format!("environment variable `{name}` is `{text}`, expected a whole number"),
            "the launcher sets it; unset it to run a single rank",
        )),
    }
}

fn lonely(given: &str, missing: &str) -> Failure {
    let message = format!("environment variable `{given}` is set, but `{missing}` is not");
    Failure::usage(message, "set both, or neither to run a single rank")
}
