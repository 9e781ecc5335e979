//! A folder with a tiny run in it, its commands, and what is left of them afterwards.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant, SystemTime};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// The command must end within this of any rank's death.
pub const LIMIT: Duration = Duration::from_secs(10);
/// A run that takes so long hangs: a loaded machine may need several seconds to start three ranks.
const HANGS: Duration = Duration::from_secs(60);
/// All processes of a run inherit this variable, and its value is the run's folder.
const MARK: &str = "SHARDWISE_FAULT_TEST";

pub const WORKER: &str = env!("CARGO_BIN_EXE_shardwise-worker");
pub const SEQ_LEN: usize = 16;
const NUM_TOKENS: usize = 16 * 1024;

/// One run.
pub struct Bench {
    folder: TempDir,
    shared_memory: BTreeSet<String>,
}

impl Bench {
    /// A model of four layers that all ZeRO stages split, two micro-batches a step, far more steps than any test waits for.
    pub fn new() -> Self {
        let bench = Bench { folder: tempfile::tempdir().unwrap(), shared_memory: shared_memory() };
        let tokens: Vec<u8> = (0..NUM_TOKENS).flat_map(|i| ((i * i % 61) as u16).to_le_bytes()).collect();
        fs::write(bench.path("tokens.bin"), tokens).unwrap();
        fs::write(bench.path("run.json"), RUN_FILE).unwrap();
        bench
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn read(&self, name: &str) -> String {
        String::from_utf8_lossy(&fs::read(self.path(name)).unwrap_or_default()).into_owned()
    }

    pub fn log(&self, rank: usize) -> String {
        self.read(&format!("out/ranks/rank-{rank}.log"))
    }

    /// A command whose output goes to the files `{name}.stdout` and `{name}.stderr`.
    fn command(&self, program: &Path, name: &str) -> Command {
        let mut command = Command::new(program);
        command
            .current_dir(self.folder.path())
            .env(MARK, self.folder.path())
            .env_remove("SHARDWISE_FAULT")
            .stdout(File::create(self.path(&format!("{name}.stdout"))).unwrap())
            .stderr(File::create(self.path(&format!("{name}.stderr"))).unwrap());
        command
    }

    /// `shardwise train` with `ranks` ranks, `sets` of the run file and a fault, if it is not empty.
    pub fn train(&self, ranks: usize, sets: &[&str], fault: &str) -> Running<'_> {
        let mut command = self.command(&shardwise(), "train");
        command.args(["train", "run.json", "--out", "out", "-n", &ranks.to_string()]);
        command.args(sets.iter().flat_map(|set| ["--set", set]));
        Running::start(self, command, fault, "train".to_owned())
    }

    /// `shardwise train` with two ranks, writing to a disk of 64 KiB. `None` where the system allows no private mounts.
    pub fn train_on_a_small_disk(&self) -> Option<Running<'_>> {
        const PRIVATELY: [&str; 4] = ["--map-root-user", "--mount", "sh", "-c"];
        fs::create_dir(self.path("out")).unwrap();
        let mount = "mount -t tmpfs -o size=64k tmpfs out";
        let mut probe = self.command(Path::new("unshare"), "train");
        if !probe.args(PRIVATELY).arg(mount).status().is_ok_and(|status| status.success()) {
            return None;
        }
        let mut command = self.command(Path::new("unshare"), "train");
        command.args(PRIVATELY).args([&format!("{mount} && exec \"$@\""), "sh"]).arg(shardwise());
        command.args(["train", "run.json", "--out", "out", "-n", "2"]);
        Some(Running::start(self, command, "", "train".to_owned()))
    }

    /// One rank as torchrun would start it.
    pub fn rank(&self, rank: usize, world_size: usize, fault: &str) -> Running<'_> {
        let name = format!("rank-{rank}");
        let mut command = self.command(Path::new(WORKER), &name);
        let number = rank.to_string();
        command
            .args(["run.json", "--out", "out"])
            .envs([("RANK", &*number), ("LOCAL_RANK", &*number), ("MASTER_ADDR", "127.0.0.1")])
            .env("MASTER_PORT", "29500")
            .env("WORLD_SIZE", world_size.to_string())
            .env("TORCHELASTIC_RUN_ID", self.folder.path().file_name().unwrap());
        Running::start(self, command, fault, name)
    }

    /// The steps in `metrics.jsonl`; its last line may still be on its way.
    pub fn num_steps(&self) -> usize {
        self.read("out/metrics.jsonl").matches('\n').count()
    }

    pub fn wait_until(&self, what: &str, mut reached: impl FnMut() -> bool) {
        let started = Instant::now();
        while !reached() {
            assert!(
                started.elapsed() < HANGS,
                "{what} did not happen; stderr:\n{}",
                self.read("train.stderr")
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The process of a rank.
    pub fn rank_process(&self, rank: usize) -> Pid {
        let mark = format!("\0RANK={rank}\0");
        let is_rank = |pid: &String| {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment.windows(mark.len()).any(|window| window == mark.as_bytes())
        };
        let pid = self.processes().into_iter().find(is_rank).unwrap();
        Pid::from_raw(pid.parse().unwrap()).unwrap()
    }

    /// The processes of this run that are alive.
    pub fn processes(&self) -> Vec<String> {
        let mark = format!("{MARK}={}\0", self.folder.path().display());
        let is_ours = |pid: &String| {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment.windows(mark.len()).any(|window| window == mark.as_bytes())
        };
        let names =
            fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.parse::<u32>().is_ok()).filter(is_ours).collect()
    }

    pub fn assert_nothing_left(&self) {
        assert_eq!(self.processes(), [""; 0], "these processes are left");
        let new: Vec<_> = shared_memory().difference(&self.shared_memory).cloned().collect();
        // Other programs of this machine may share memory, too: theirs is in somebody's use.
        let leaked: Vec<_> = new.iter().filter(|name| !is_mapped(name)).collect();
        assert!(leaked.is_empty(), "these are left in /dev/shm: {leaked:?}");
    }
}

/// The command-line tool, which another package builds.
fn shardwise() -> PathBuf {
    let path = Path::new(WORKER).with_file_name("shardwise");
    assert!(
        path.is_file(),
        "`{}` is missing: these tests run the whole program, so build it first with `make build`, or with \
         `cargo build -p shardwise-cli` and the profile of this test",
        path.display()
    );
    path
}

fn shared_memory() -> BTreeSet<String> {
    let entries = fs::read_dir("/dev/shm").into_iter().flatten();
    entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
}

fn is_mapped(name: &str) -> bool {
    let path = format!("/dev/shm/{name}");
    let maps = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path().join("maps"));
    maps.filter_map(|maps| fs::read_to_string(maps).ok())
        .any(|maps| maps.lines().any(|line| line.ends_with(&path)))
}

/// A process under test; killed when dropped, so that a failed test leaves nothing either.
pub struct Running<'a> {
    bench: &'a Bench,
    name: String,
    child: Child,
    started: Instant,
}

impl<'a> Running<'a> {
    fn start(bench: &'a Bench, mut command: Command, fault: &str, name: String) -> Self {
        if !fault.is_empty() {
            command.env("SHARDWISE_FAULT", fault);
        }
        Running { bench, name, child: command.spawn().unwrap(), started: Instant::now() }
    }

    pub fn send(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    pub fn end(mut self) -> Ended {
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            let stderr = || self.bench.read(&format!("{}.stderr", self.name));
            assert!(self.started.elapsed() < HANGS, "`{}` hangs; stderr:\n{}", self.name, stderr());
            std::thread::sleep(Duration::from_millis(2));
        };
        Ended {
            status,
            at: SystemTime::now(),
            stdout: self.bench.read(&format!("{}.stdout", self.name)),
            stderr: self.bench.read(&format!("{}.stderr", self.name)),
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    at: SystemTime,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    #[track_caller]
    pub fn expect(&self, code: i32, stderr: &[&str]) {
        assert_eq!(self.status.code(), Some(code), "{self:#?}");
        for part in stderr {
            assert!(self.stderr.contains(part), "`{part}` is not in {self:#?}");
        }
    }

    /// How long after the last line in `log` this process ended: the last thing that a rank under a fault does is to write there.
    pub fn since(&self, log: &Path) -> Duration {
        self.at.duration_since(fs::metadata(log).unwrap().modified().unwrap()).unwrap_or_default()
    }
}

const RUN_FILE: &str = r#"{
  "model": {"config": {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "vocab_size": 61}, "init_seed": 1},
  "data": {"tokens": "tokens.bin", "dtype": "u16", "seq_len": 16, "order": "sequential"},
  "steps": 1000000,
  "threads_per_rank": 1,
  "deepspeed": {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2,
                "zero_optimization": {"stage": 2},
                "optimizer": {"type": "AdamW", "params": {"lr": 0.001}}}
}"#;
