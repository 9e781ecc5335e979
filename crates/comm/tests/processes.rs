//! Ranks as real processes: joining, dying, stalling, and what is left behind.
//!
//! The test binary starts itself again for each rank: [`rank_process`] is no test of its own but what those
//! processes run.
#![allow(clippy::unwrap_used, reason = "a test that fails may panic")]

mod common;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use shardwise_comm::shm::{self, ShmOptions};
use shardwise_comm::{CommError, Group};
use shardwise_device::{DType, SliceMut};

/// One rank's process; killed when dropped.
struct Rank {
    child: Child,
    output: BufReader<ChildStdout>,
}

/// What a rank is told.
#[derive(Clone, Copy)]
struct Start<'a> {
    rank: usize,
    world_size: usize,
    meeting: &'a str,
    role: &'a str,
    fingerprint: &'a str,
    deadline_ms: u64,
    join_ms: u64,
}

impl<'a> Start<'a> {
    fn new(rank: usize, world_size: usize, meeting: &'a str, role: &'a str) -> Self {
        Start { rank, world_size, meeting, role, fingerprint: "same", deadline_ms: 30_000, join_ms: 20_000 }
    }

    fn spawn(self) -> Rank {
        let text = [
            self.rank.to_string(),
            self.world_size.to_string(),
            self.meeting.to_owned(),
            self.role.to_owned(),
            self.fingerprint.to_owned(),
            self.deadline_ms.to_string(),
            self.join_ms.to_string(),
        ];
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "rank_process", "--nocapture", "--test-threads=1"])
            .env("COMM_TEST_RANK", text.join(" "))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Rank { child, output }
    }
}

impl Rank {
    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// The rest of the next line that begins with `word` (libtest may have written something before it).
    fn line(&mut self, word: &str) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "the rank ended without saying `{word}`");
            if let Some((_, rest)) = line.split_once(word) {
                return rest.trim().to_owned();
            }
        }
    }

    fn ends_well(mut self) {
        let mut rest = String::new();
        self.output.read_to_string(&mut rest).unwrap();
        assert!(self.child.wait().unwrap().success(), "{rest}");
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn_all<'a>(
    world_size: usize,
    meeting: &'a str,
    role: &'a str,
    change: impl Fn(&mut Start<'a>),
) -> Vec<Rank> {
    let spawn = |rank| {
        let mut start = Start::new(rank, world_size, meeting, role);
        change(&mut start);
        start.spawn()
    };
    (0..world_size).map(spawn).collect()
}

/// A meeting place of this test alone.
fn meeting(name: &str) -> String {
    format!("{name}-{}", std::process::id())
}

/// What the processes do. Says `ready` when joined, and `error <text>` where a role ends in one.
#[test]
#[ignore = "what the ranks of the other tests run"]
fn rank_process() {
    let Ok(text) = std::env::var("COMM_TEST_RANK") else { return };
    // A rank that hangs fails its test instead of blocking it.
    std::thread::spawn(|| {
        std::thread::sleep(Duration::from_secs(60));
        std::process::exit(3);
    });
    let words: Vec<&str> = text.split(' ').collect();
    let (rank, world_size): (usize, usize) = (words[0].parse().unwrap(), words[1].parse().unwrap());
    let options = ShmOptions {
        fingerprint: words[4].to_owned(),
        deadline: Duration::from_millis(words[5].parse().unwrap()),
        join_deadline: Duration::from_millis(words[6].parse().unwrap()),
        slot_bytes: 4096,
        ..ShmOptions::new(rank, world_size, words[2])
    };
    let group = match shm::join(options) {
        Ok(group) => group,
        Err(error) => return println!("\nerror {error}"),
    };
    println!("\nready");
    let result = play(&group, words[3]);
    if let Err(error) = result {
        println!("\nerror {error}");
    }
}

fn play(group: &Group, role: &str) -> Result<(), CommError> {
    let mut buffer = vec![1f32; 50_000];
    match role {
        // In collectives all the time.
        "busy" => loop {
            group.all_reduce(SliceMut::of(&mut buffer))?;
        },
        // Rank 1 computes for long, the others wait for it.
        "waiting" if group.group_rank() == 1 => {
            std::thread::sleep(Duration::from_secs(5));
            group.barrier()
        }
        "waiting" => group.barrier(),
        // All compute, and look at the group now and then, in order.
        "computing" => loop {
            std::thread::sleep(Duration::from_millis(700));
            group.barrier()?;
        },
        "subgroups" => {
            let half = group.subgroup("half", &[1, 2])?;
            match half {
                Some(half) => loop {
                    half.all_reduce(SliceMut::of(&mut buffer))?;
                },
                None => group.barrier(),
            }
        }
        "program" => {
            let program = program();
            let got = common::run(group, &program, 3);
            assert!(got == common::reference(group.group_size(), group.group_rank(), &program, 3));
            Ok(())
        }
        role => panic!("no role `{role}`"),
    }
}

fn program() -> Vec<common::Step> {
    use common::Step;
    vec![
        Step::AllReduce { dtype: DType::F32, numel: 5000 },
        Step::ReduceScatter { dtype: DType::Bf16, shard_dtype: DType::F32, numel: 3001, cuts: 7 },
        Step::AllGather { dtype: DType::F16, numel: 2999, in_place: true },
        Step::Broadcast { dtype: DType::U8, numel: 10_000, root: 2 },
        Step::AllToAll { dtype: DType::Bf16, numel: 1234 },
        Step::Ring { dtype: DType::F32, numel: 40_000 },
    ]
}

#[test]
fn processes_give_the_reference() {
    let meeting = meeting("program");
    let mut ranks = spawn_all(3, &meeting, "program", |_| {});
    ranks.iter_mut().for_each(|rank| assert_eq!(rank.line("ready"), ""));
    ranks.into_iter().for_each(Rank::ends_well);
}

/// Files that bear our name where shared memory and sockets might be.
fn named_files() -> BTreeSet<PathBuf> {
    let files = ["/dev/shm", "/tmp"].map(|folder| std::fs::read_dir(folder).into_iter().flatten().flatten());
    let paths = files.into_iter().flatten().map(|file| file.path());
    paths.filter(|path| path.to_string_lossy().contains("shardwise")).collect()
}

/// Kills (or stops) `victim` once all have joined; all others must name it within `limit`.
fn end_one(role: &str, victim: usize, signal: Signal, deadline_ms: u64, limit: Duration) {
    let meeting = meeting(&format!("{role}-{victim}-{}", signal.as_raw()));
    let before = named_files();
    let mut ranks = spawn_all(3, &meeting, role, |start| start.deadline_ms = deadline_ms);
    ranks.iter_mut().for_each(|rank| drop(rank.line("ready")));
    std::thread::sleep(Duration::from_millis(300));
    let pid = ranks[victim].child.id();
    ranks[victim].signal(signal);
    let since = Instant::now();
    for (rank, process) in ranks.iter_mut().enumerate().filter(|(rank, _)| *rank != victim) {
        let text = process.line("error");
        if signal == Signal::STOP {
            assert!(text.starts_with(&format!("rank `{victim}` stalled: ")), "rank {rank}: {text}");
        } else {
            assert_eq!(
                text,
                format!("rank `{victim}` died: its process `{pid}` ended without leaving"),
                "rank {rank}"
            );
        }
        assert!(since.elapsed() < limit, "rank {rank} after {:?}", since.elapsed());
    }
    if signal == Signal::STOP {
        // A stopped rank that wakes up finds that it was given up.
        ranks[victim].signal(Signal::CONT);
        assert!(ranks[victim].line("error").starts_with(&format!("rank `{victim}` stalled: ")));
    }
    let left: Vec<_> = named_files().difference(&before).cloned().collect();
    assert!(left.is_empty(), "ranks leave {left:?}");
    for (i, rank) in ranks.into_iter().enumerate() {
        if i != victim {
            rank.ends_well();
        }
    }
}

const SOON: Duration = Duration::from_secs(5);

#[test]
fn a_killed_rank_is_named_by_those_who_wait_for_it() {
    end_one("waiting", 1, Signal::KILL, 30_000, SOON);
}

#[test]
fn a_killed_rank_is_named_in_the_middle_of_a_collective() {
    for victim in 0..3 {
        end_one("busy", victim, Signal::KILL, 30_000, SOON);
    }
}

#[test]
fn a_killed_rank_is_named_by_those_who_compute() {
    for victim in [0, 2] {
        end_one("computing", victim, Signal::KILL, 30_000, SOON);
    }
}

#[test]
fn a_killed_rank_is_named_in_groups_it_does_not_belong_to() {
    end_one("subgroups", 0, Signal::KILL, 30_000, SOON);
    end_one("subgroups", 2, Signal::KILL, 30_000, SOON);
}

#[test]
fn a_stopped_rank_is_named_after_the_deadline() {
    end_one("busy", 1, Signal::STOP, 1500, SOON + Duration::from_millis(1500));
    end_one("waiting", 1, Signal::STOP, 1500, SOON + Duration::from_millis(1500));
}

fn join_errors(ranks: Vec<Rank>) -> Vec<String> {
    ranks.into_iter().map(|mut rank| rank.line("error")).collect()
}

#[test]
fn a_missing_rank_is_named() {
    let meeting = meeting("missing");
    let start = |rank| Start { join_ms: 1500, ..Start::new(rank, 4, &meeting, "program") }.spawn();
    let errors = join_errors([0, 1, 3].map(start).into());
    for (rank, error) in [0, 1, 3].iter().zip(&errors) {
        let expected =
            format!("rank `{rank}` cannot join at `{meeting}`: ranks [2] of `4` did not come within `1` s");
        assert_eq!(*error, expected);
    }
    let errors = join_errors([1, 2].map(start).into());
    for error in &errors {
        assert!(error.ends_with("ranks [0] of `4` did not come within `1` s"), "{error}");
    }
}

#[test]
fn different_starts_are_errors_on_all() {
    let place = meeting("fingerprint");
    let change = |start: &mut Start<'_>| start.fingerprint = if start.rank == 2 { "other" } else { "same" };
    for error in join_errors(spawn_all(3, &place, "program", change)) {
        let expected = "ranks `0` and `2` were started with different configurations: `same` and `other`";
        assert!(error.ends_with(expected), "{error}");
    }
    let place = meeting("world-size");
    let change = |start: &mut Start<'_>| start.world_size = if start.rank == 1 { 4 } else { 3 };
    for error in join_errors(spawn_all(3, &place, "program", change)) {
        assert!(error.ends_with("rank `0` was started for `3` ranks, rank `1` for `4`"), "{error}");
    }
    let place = meeting("duplicate");
    let start = |rank| Start::new(rank, 3, &place, "program").spawn();
    for error in join_errors([0, 1, 1].map(start).into()) {
        assert!(error.contains("two processes are rank `1`"), "{error}");
    }
}

#[test]
fn a_second_rank_0_disturbs_nobody() {
    let meeting = meeting("second");
    let start = |rank| Start::new(rank, 2, &meeting, "program").spawn();
    let first = start(0);
    std::thread::sleep(Duration::from_millis(300));
    let mut second = start(0);
    assert!(second.line("error").contains("two processes are rank `0`"));
    let other = start(1);
    first.ends_well();
    other.ends_well();
}

#[test]
fn a_rank_that_dies_while_joining_is_named() {
    let meeting = meeting("broken");
    let start = |rank| Start::new(rank, 3, &meeting, "program").spawn();
    let host = start(0);
    let victim = start(2);
    std::thread::sleep(Duration::from_millis(400));
    victim.signal(Signal::KILL);
    let errors = join_errors(vec![host]);
    assert!(errors[0].ends_with("rank `2` broke off while the ranks came together"), "{}", errors[0]);
}

#[test]
fn what_cannot_be_a_rank_is_refused() {
    let error = shm::join(ShmOptions::new(3, 3, "x")).err().unwrap();
    assert_eq!(error.to_string(), "rank `3` cannot join at `x`: rank `3` does not exist among `3` ranks");
    let error = shm::join(ShmOptions::new(0, 2, "x".repeat(200))).err().unwrap();
    assert!(error.to_string().contains("bytes, at most `107` fit"), "{error}");
    assert_eq!(shm::join(ShmOptions::new(0, 1, "x")).unwrap().group_size(), 1);
}
