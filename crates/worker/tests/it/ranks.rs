//! Starts one worker process for each rank, the way a launcher does, and waits for all.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;
use shardwise_checkpoint::HfReader;
use shardwise_monitor::{Outcome, StepMetrics};
use tempfile::TempDir;

use crate::case::Curve;

/// A rank that has not ended by then hangs. Runs take seconds; a loaded machine has plenty of room.
const LIMIT: Duration = Duration::from_secs(150);

/// Ranks about to start.
pub struct Ranks {
    dir: TempDir,
    /// One for each rank, which launchers would never do.
    run_files: Vec<PathBuf>,
    world_size: usize,
    /// Variables of single ranks that differ from what a launcher sets; `None` takes one away.
    env: HashMap<usize, Vec<(&'static str, Option<&'static str>)>>,
    args: Vec<String>,
}

/// Ranks that have ended.
pub struct Ended {
    dir: TempDir,
    pub codes: Vec<Option<i32>>,
    pub stderr: Vec<String>,
}

impl Ranks {
    pub fn new(run: &Value, world_size: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let run_file = dir.path().join("run.json");
        fs::write(&run_file, run.to_string()).unwrap();
        Ranks {
            dir,
            run_files: vec![run_file; world_size],
            world_size,
            env: HashMap::new(),
            args: Vec::new(),
        }
    }

    /// Changes one variable of one rank.
    pub fn env(mut self, rank: usize, name: &'static str, value: Option<&'static str>) -> Self {
        self.env.entry(rank).or_default().push((name, value));
        self
    }

    /// Gives one rank another run file.
    pub fn run_file_of(mut self, rank: usize, run: &Value) -> Self {
        self.run_files[rank] = self.dir.path().join(format!("run-{rank}.json"));
        fs::write(&self.run_files[rank], run.to_string()).unwrap();
        self
    }

    pub fn arg(mut self, arg: &str) -> Self {
        self.args.push(arg.to_owned());
        self
    }

    /// Puts a file into the output folder before the ranks start.
    pub fn write(&self, name: &str, text: &str) {
        let out = self.dir.path().join("out");
        fs::create_dir_all(&out).unwrap();
        fs::write(out.join(name), text).unwrap();
    }

    pub fn run(self) -> Ended {
        // Unlike a port, this cannot collide with another test's.
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let run_id = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let log = |rank| self.dir.path().join(format!("stderr-{rank}"));
        let start = |rank: usize| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_shardwise-worker"));
            for name in ["LOCAL_WORLD_SIZE", "SHARDWISE_EVENTS", "SHARDWISE_FAULT", "TORCHELASTIC_RUN_ID"] {
                command.env_remove(name);
            }
            command
                .arg(&self.run_files[rank])
                .arg("--out")
                .arg(self.dir.path().join("out"))
                .args(&self.args)
                .env("RANK", rank.to_string())
                .env("LOCAL_RANK", rank.to_string())
                .env("WORLD_SIZE", self.world_size.to_string())
                .env("MASTER_ADDR", "127.0.0.1")
                .env("MASTER_PORT", "29500")
                .env("SHARDWISE_RUN_ID", &run_id)
                .env("SHARDWISE_THREADS", "1")
                .stdout(Stdio::null())
                .stderr(File::create(log(rank)).unwrap());
            for (name, value) in self.env.get(&rank).into_iter().flatten() {
                match value {
                    Some(value) => command.env(name, value),
                    None => command.env_remove(name),
                };
            }
            command.spawn().unwrap()
        };
        let children: Vec<_> = (0..self.world_size).map(start).collect();
        let codes = wait(children);
        let stderr: Vec<_> =
            (0..self.world_size).map(|rank| fs::read_to_string(log(rank)).unwrap()).collect();
        let ended = Ended { dir: self.dir, codes, stderr };
        assert!(ended.codes.iter().all(Option::is_some), "a rank hung or was killed: {}", ended.report());
        ended
    }
}

/// The exit code of every rank; `None` if it was killed, by us at the limit or by a signal.
fn wait(mut children: Vec<Child>) -> Vec<Option<i32>> {
    let start = Instant::now();
    while start.elapsed() < LIMIT && children.iter_mut().any(|child| child.try_wait().unwrap().is_none()) {
        std::thread::sleep(Duration::from_millis(5));
    }
    for child in &mut children {
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
        }
    }
    children.into_iter().map(|mut child| child.wait().unwrap().code()).collect()
}

impl Ended {
    /// What `metrics.jsonl` says of every step, if all went well.
    pub fn metrics(&self) -> Vec<StepMetrics> {
        assert!(self.codes.iter().all(|code| *code == Some(0)), "{}", self.report());
        let lines = fs::read_to_string(self.path("metrics.jsonl")).unwrap();
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// What the ranks trained, if all went well.
    pub fn curve(&self) -> Curve {
        let metrics = self.metrics();
        for (index, step) in metrics.iter().enumerate() {
            assert_eq!((step.step, step.outcome), (index as u64 + 1, Outcome::Applied));
        }
        Curve {
            losses: metrics.iter().map(|step| step.loss).collect(),
            grad_norms: metrics.iter().map(|step| step.grad_norm).collect(),
        }
    }

    /// Starts the same run once more in the same folder, with these arguments.
    pub fn again(self, args: &[&str]) -> Ended {
        let run_file = self.dir.path().join("run.json");
        let world_size = self.codes.len();
        let args = args.iter().map(|&arg| arg.to_owned()).collect();
        let run_files = vec![run_file; world_size];
        Ranks { dir: self.dir, run_files, world_size, env: HashMap::new(), args }.run()
    }

    /// Something in the output folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("out").join(name)
    }

    /// The bytes of the trained model.
    pub fn model(&self) -> Vec<u8> {
        fs::read(self.dir.path().join("out/model/model.safetensors")).unwrap()
    }

    /// The trained model's parameters in fp32, by name.
    pub fn weights(&self) -> BTreeMap<String, Vec<f32>> {
        let reader = HfReader::open(self.path("model")).unwrap();
        let read = |name: &String| (name.clone(), reader.read_f32(name).unwrap());
        reader.tensors().iter().map(|tensor| read(&tensor.name)).collect()
    }

    pub fn report(&self) -> String {
        let ranks = self.codes.iter().zip(&self.stderr).enumerate();
        ranks.map(|(rank, (code, stderr))| format!("\nrank {rank}, exit code {code:?}:\n{stderr}")).collect()
    }
}
