//! One rank as a process.
//!
//! A rank leads a process group of its own, so Ctrl-C on the terminal reaches the supervisor only, and a signal to
//! the group reaches helpers the rank may have started. Its death is noticed without reaping it: until this side
//! reaps, its number cannot go to a stranger, so a signal can never hit the wrong process.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::Sender;

use anyhow::Context;
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, getpid, getppid, kill_process_group, set_parent_process_death_signal,
    waitid,
};
use shardwise_monitor::{Event, RunDir};
use shardwise_plan::Mesh;

use super::Message;
use super::verdict::{Asked, Ending};

/// A line longer than this is no event.
const MAX_LINE_BYTES: u64 = 1 << 20;

/// What all ranks of a run start with.
#[derive(Debug)]
pub struct Launch {
    pub worker: PathBuf,
    /// Arguments of the worker, the same for each rank.
    pub args: Vec<OsString>,
    pub mesh: Mesh,
    pub threads_per_rank: usize,
    /// Tells this run's shared memory from that of any other run.
    pub run_id: String,
    pub master_port: u16,
    pub run: RunDir,
}

impl Launch {
    pub fn num_ranks(&self) -> usize {
        self.mesh.world_size()
    }

    fn command(&self, rank: usize) -> Command {
        let mut command = Command::new(&self.worker);
        let threads = self.threads_per_rank.to_string();
        command
            .args(&self.args)
            .env("RANK", rank.to_string())
            .env("LOCAL_RANK", rank.to_string())
            .env("WORLD_SIZE", self.num_ranks().to_string())
            .env("LOCAL_WORLD_SIZE", self.num_ranks().to_string())
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", self.master_port.to_string())
            .env("SHARDWISE_RUN_ID", &self.run_id)
            .env("SHARDWISE_EVENTS", "1")
            .env("SHARDWISE_THREADS", &threads)
            .env("OMP_NUM_THREADS", &threads)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        command
    }
}

/// A rank that this process started.
#[derive(Debug)]
pub struct RankProcess {
    child: Child,
    group: Pid,
    alive: bool,
    sent_terminate: bool,
    sent_kill: bool,
}

impl RankProcess {
    /// Starts a rank and the two threads that watch it.
    pub fn start(launch: &Launch, rank: usize, inbox: &Sender<Message>) -> anyhow::Result<Self> {
        let log_path = launch.run.rank_log(rank);
        let log = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&log_path)
            .with_context(|| format!("could not open `{}`", log_path.display()))?;
        let mut command = launch.command(rank);
        command.stderr(log.try_clone().context("could not share the log with the rank")?);
        command.process_group(0);
        let supervisor = getpid();
        // SAFETY: runs in the child between fork and exec, and makes two system calls that allocate nothing and
        // take no locks.
        unsafe { command.pre_exec(move || die_with(supervisor)) };
        let child =
            command.spawn().with_context(|| format!("could not run `{}`", launch.worker.display()))?;
        let group = Pid::from_child(&child);
        let mut process = RankProcess { child, group, alive: true, sent_terminate: false, sent_kill: false };

        let stdout = process.child.stdout.take().expect("the command pipes standard output");
        let sender = inbox.clone();
        spawn_thread(format!("rank {rank} output"), move || forward_lines(rank, stdout, log, &sender))?;
        let sender = inbox.clone();
        spawn_thread(format!("rank {rank} end"), move || {
            await_death(group);
            // The loop that reads this may be over.
            let _ = sender.send(Message::Ended { rank });
        })?;
        Ok(process)
    }

    pub fn is_alive(&self) -> bool {
        self.alive
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal to the rank and whatever it started, unless the rank is gone.
    pub fn signal(&mut self, signal: Signal) {
        if !self.alive {
            return;
        }
        self.sent_terminate |= signal == Signal::TERM;
        self.sent_kill |= signal == Signal::KILL;
        // It fails only if the group is already gone, which is what the signal is for.
        let _ = kill_process_group(self.group, signal);
    }

    /// Takes the exit status of a rank that is dead, and kills what it left behind.
    pub fn reap(&mut self) -> io::Result<(Ending, Asked)> {
        let _ = kill_process_group(self.group, Signal::KILL);
        let ending = Ending::from(self.child.wait()?);
        self.alive = false;
        let asked = match ending {
            Ending::Killed(number) => {
                (self.sent_terminate && number == Signal::TERM.as_raw())
                    || (self.sent_kill && number == Signal::KILL.as_raw())
            }
            Ending::Exited(_) => self.sent_terminate || self.sent_kill,
        };
        Ok((ending, if asked { Asked::Yes } else { Asked::No }))
    }
}

impl Drop for RankProcess {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

/// In the child: the kernel kills it when the thread that started it ends.
fn die_with(supervisor: Pid) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // It may have ended before the line above.
    if getppid() == Some(supervisor) { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
}

fn spawn_thread(name: String, body: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
    std::thread::Builder::new()
        .name(name)
        .spawn(body)
        .context("could not start a thread that watches a rank")?;
    Ok(())
}

/// Returns once the process is dead, and leaves it to be reaped.
fn await_death(pid: Pid) {
    while let Err(rustix::io::Errno::INTR) =
        waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)
    {}
}

/// Sends on events; what is none goes to the rank's log.
fn forward_lines(rank: usize, stdout: ChildStdout, mut log: File, inbox: &Sender<Message>) {
    let mut reader = BufReader::new(stdout);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut reader).take(MAX_LINE_BYTES).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
        match Event::parse(&line) {
            Some(event) => {
                if inbox.send(Message::Said { rank, event }).is_err() {
                    break;
                }
            }
            // A full disk costs this line and nothing else.
            None => drop(log.write_all(&line)),
        }
    }
    let _ = inbox.send(Message::OutputClosed { rank });
}
