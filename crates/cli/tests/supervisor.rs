//! The command as people and scripts meet it, with a stand-in for the worker: how runs end, and who is blamed.

// Helpers of tests may unwrap as tests may.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// The command must end within this of any rank's death; a loaded machine has plenty of room below it.
const LIMIT: Duration = Duration::from_secs(10);

/// A folder with a run file, the stand-in's marks and the output.
struct Bench {
    folder: TempDir,
}

impl Bench {
    fn new() -> Self {
        let bench = Bench { folder: tempfile::tempdir().unwrap() };
        std::fs::write(bench.path("tokens.bin"), vec![0_u8; 4096]).unwrap();
        std::fs::write(bench.path("run.json"), RUN_FILE).unwrap();
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn read(&self, name: &str) -> String {
        String::from_utf8_lossy(&std::fs::read(self.path(name)).unwrap_or_default()).into_owned()
    }

    /// The command with its output in files, so that no test waits for a pipe.
    fn command(&self, args: &[&str], body: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_shardwise"));
        command
            .args(args)
            .current_dir(self.folder.path())
            .env("SHARDWISE_WORKER", concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake_worker.sh"))
            .env("FAKE_DIR", self.folder.path())
            .env("FAKE_BODY", body)
            .stdout(File::create(self.path("stdout")).unwrap())
            .stderr(File::create(self.path("stderr")).unwrap());
        command
    }

    fn train(&self, ranks: u32, body: &str) -> Running<'_> {
        let ranks = ranks.to_string();
        self.start(self.command(&["train", "run.json", "-n", &ranks, "--out", "out"], body))
    }

    fn start(&self, mut command: Command) -> Running<'_> {
        Running { bench: self, child: command.spawn().unwrap(), started: Instant::now() }
    }

    fn wait_until(&self, what: &str, mut reached: impl FnMut() -> bool) {
        let started = Instant::now();
        while !reached() {
            assert!(started.elapsed() < 3 * LIMIT, "{what} did not happen; stderr:\n{}", self.read("stderr"));
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn wait_for_ranks(&self, mark: &str, ranks: u32) {
        self.wait_until(mark, || (0..ranks).all(|rank| self.path(&format!("{mark}-{rank}")).exists()));
    }

    /// Every rank that ever started is gone, or a corpse that its new parent has yet to bury.
    fn assert_no_rank_alive(&self) {
        for entry in std::fs::read_dir(self.folder.path()).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if name.starts_with("pid-") && !name.ends_with(".part") {
                let pid = self.read(&name).trim().to_owned();
                self.wait_until(&format!("the death of {name}"), || !is_running(&pid));
            }
        }
    }
}

fn is_running(pid: &str) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    // The state follows the command's name, which stands in parentheses.
    !stat.rsplit(')').next().unwrap().trim_start().starts_with(['Z', 'X'])
}

struct Running<'a> {
    bench: &'a Bench,
    child: Child,
    started: Instant,
}

impl Running<'_> {
    fn send(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// The exit code (or what else), standard output and standard error.
    fn end(mut self) -> Ended {
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if self.started.elapsed() > 3 * LIMIT {
                self.child.kill().unwrap();
                panic!("the command hangs; stderr:\n{}", self.bench.read("stderr"));
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        let ended = Ended {
            status,
            took: self.started.elapsed(),
            stdout: self.bench.read("stdout"),
            stderr: self.bench.read("stderr"),
        };
        self.bench.assert_no_rank_alive();
        ended
    }
}

#[derive(Debug)]
struct Ended {
    status: ExitStatus,
    took: Duration,
    stdout: String,
    stderr: String,
}

impl Ended {
    #[track_caller]
    fn expect(self, code: i32, stderr: &[&str]) -> Self {
        assert_eq!(self.status.code(), Some(code), "{self:#?}");
        for part in stderr {
            assert!(self.stderr.contains(part), "`{part}` is not in {self:#?}");
        }
        assert!(self.took < LIMIT, "{self:#?}");
        self
    }
}

const RUN_FILE: &str = r#"{
  "model": {"config": {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 64}, "init_seed": 1},
  "data": {"tokens": "tokens.bin", "dtype": "u16", "seq_len": 8},
  "steps": 3,
  "deepspeed": {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {"lr": 0.001}}}
}"#;

const TRAIN_THREE: &str = r#"
    phase "loading model"
    for i in 1 2 3; do begin $i; [ $rank = 0 ] && step $i $((6 - i)).5; done
    [ $rank = 0 ] && echo '{"event":"sample","text":"Once upon a time"}'
    finish"#;

#[test]
fn a_clean_run() {
    let bench = Bench::new();
    let ended = bench
        .train(3, TRAIN_THREE)
        .end()
        .expect(0, &["3 ranks", "loading model\n", "step 1/3  loss 5.5000", "step 3/3  loss 3.5000"]);
    assert!(ended.stdout.contains("loss 5.5000 -> 3.5000, 640 tokens/s"), "{ended:#?}");
    assert!(ended.stdout.ends_with("sample:\nOnce upon a time\n"), "{ended:#?}");
    let effective: serde_json::Value =
        serde_json::from_str(&bench.read("out/effective-config.json")).unwrap();
    assert_eq!(effective["steps"], serde_json::json!({"value": 3, "source": "run.json:5"}));
    // Each phase once, not once a rank, and no control characters where there is no terminal.
    assert_eq!(ended.stderr.matches("loading model").count(), 1);
    assert!(!ended.stderr.contains('\x1b') && !ended.stderr.contains('\r'), "{ended:#?}");
}

#[test]
fn ranks_start_with_what_they_need() {
    use std::os::unix::fs::PermissionsExt;
    let body = r#"
        { printf '%s\n' "$@"; echo "$WORLD_SIZE $LOCAL_RANK $MASTER_ADDR $SHARDWISE_EVENTS"
          echo "$SHARDWISE_THREADS=$OMP_NUM_THREADS"; wc -c; } >"$FAKE_DIR/seen-$rank"
        echo "$SHARDWISE_RUN_ID $MASTER_PORT" >>"$FAKE_DIR/ids"
        echo complaint >&2
        finish"#;
    let bench = Bench::new();
    let args =
        ["train", "run.json", "-n", "2", "--out", "out", "--set", "threads_per_rank=3", "--set", "steps=9"];
    bench.start(bench.command(&args, body)).end().expect(0, &["2 ranks with 3 threads each, 9 steps"]);
    for rank in 0..2 {
        assert_eq!(
            bench.read(&format!("seen-{rank}")),
            format!(
                "run.json\n--out\nout\n--set\nthreads_per_rank=3\n--set\nsteps=9\n2 {rank} 127.0.0.1 1\n3=3\n0\n"
            )
        );
        let log = format!("out/ranks/rank-{rank}.log");
        assert_eq!(bench.read(&log), "complaint\n");
        assert_eq!(std::fs::metadata(bench.path(&log)).unwrap().permissions().mode() & 0o777, 0o600);
    }
    bench.train(2, body).end().expect(0, &[]);
    let ids = bench.read("ids");
    let ids: Vec<_> = ids.lines().collect();
    assert_eq!((ids[0], ids[2]), (ids[1], ids[3]), "ranks of one run agree");
    assert_ne!(ids[0].split(' ').next(), ids[2].split(' ').next(), "two runs never meet");
}

#[test]
fn a_killed_rank_is_named_and_the_rest_is_ended() {
    let body = r#"
        phase "loading model"; begin 1; begin 2
        echo "about to step" >&2
        [ $rank = 1 ] && kill -9 $$
        hang"#;
    let ended = Bench::new().train(3, body).end().expect(
        1,
        &[
            "error: rank 1 was killed by signal 9 (SIGKILL) in step 2\n",
            "hint: the kernel's out-of-memory killer does this",
            "end of `out/ranks/rank-1.log`:\n  | about to step\n",
            "the other ranks have been ended too\n",
        ],
    );
    assert_eq!(ended.stdout, "");
}

#[test]
fn a_rank_killed_from_outside_before_its_first_step() {
    let bench = Bench::new();
    let running = bench.train(2, r#"phase "loading model"; hang"#);
    bench.wait_for_ranks("hanging", 2);
    let victim = bench.read("pid-0").trim().parse().unwrap();
    kill_process(Pid::from_raw(victim).unwrap(), Signal::SEGV).unwrap();
    running.end().expect(1, &["rank 0 was killed by signal 11 (SIGSEGV) while loading model", "native code"]);
}

#[test]
fn a_rank_that_says_why_is_quoted() {
    let body = r#"
        begin 5
        [ $rank = 1 ] && { echo '{"event":"error","message":"disk full","hint":"free some"}'; exit 1; }
        hang"#;
    Bench::new()
        .train(2, body)
        .end()
        .expect(1, &["error: rank 1 failed in step 5: disk full\nhint: free some\n"]);
}

#[test]
fn a_rank_that_panics_is_placed() {
    let body = "begin 2; [ $rank = 0 ] && { echo 'panicked at x.rs:1' >&2; exit 101; }; hang";
    Bench::new()
        .train(2, body)
        .end()
        .expect(1, &["rank 0 exited with code 101 in step 2", "| panicked at x.rs:1"]);
}

#[test]
fn peers_of_a_failed_rank_are_not_blamed() {
    // Rank 0 and 2 speak first, and rank 2 even crashes of it.
    let body = r#"
        begin 4
        if [ $rank = 1 ]; then
            while [ ! -e "$FAKE_DIR/spoke-0" ] || [ ! -e "$FAKE_DIR/spoke-2" ]; do sleep 0.02; done
            kill -9 $$
        fi
        echo '{"event":"error","message":"rank 1 is gone","secondary":true}'
        mark spoke
        [ $rank = 2 ] && kill -ABRT $$
        exit 1"#;
    Bench::new()
        .train(3, body)
        .end()
        .expect(1, &["error: rank 1 was killed by signal 9 (SIGKILL) in step 4"]);
}

#[test]
fn a_stalled_rank_leaves_the_word_to_who_noticed() {
    let body = r#"begin 4; [ $rank = 0 ] && fail_after_peer "rank 1 did not answer within 5s"; hang"#;
    Bench::new()
        .train(2, body)
        .end()
        .expect(1, &["error: rank 0 failed in step 4: rank 1 did not answer within 5s\n"]);
}

#[test]
fn the_rank_at_fault_is_told_with_its_place_on_the_mesh() {
    let bench = Bench::new();
    let run = RUN_FILE.replacen('{', "{\"parallel\": {\"pipeline\": 2, \"tensor\": 2},", 1);
    std::fs::write(bench.path("run.json"), run).unwrap();
    let body = "begin 2; [ $rank = 3 ] && kill -9 $$; hang";
    bench.train(4, body).end().expect(
        1,
        &[
            "4 ranks (pipeline 2 x data 1 x tensor 2)",
            "error: rank 3 (pipeline stage 1, data 0, tensor 1) was killed by signal 9 (SIGKILL) in step 2\n",
        ],
    );
}

#[test]
fn a_configuration_that_a_rank_refuses_is_code_2() {
    let body = r#"[ $rank = 1 ] && sleep 0.2; fail "no such model" 2"#;
    let ended = Bench::new().train(2, body).end().expect(2, &["error: no such model\n"]);
    assert!(!ended.stderr.contains("end of"), "{ended:#?}");
}

#[test]
fn a_rank_that_ends_too_early_is_a_failure() {
    let body = "begin 1; [ $rank = 1 ] && exit 0; hang";
    Bench::new().train(2, body).end().expect(1, &["rank 1 ended before its work was done in step 1"]);
}

#[test]
fn a_rank_that_ignores_sigterm_is_killed() {
    let bench = Bench::new();
    let body = r#"
        begin 1
        trap '' TERM
        [ $rank = 0 ] && hang
        while [ ! -e "$FAKE_DIR/hanging-0" ]; do sleep 0.02; done
        fail "out of luck""#;
    bench.train(2, body).end().expect(1, &["error: rank 1 failed in step 1: out of luck"]);
}

#[test]
fn what_a_rank_leaves_behind_ends_with_it() {
    let bench = Bench::new();
    // The helper also holds the rank's standard output open.
    let body = r#"sleep 1000 & echo $! >"$FAKE_DIR/pid-helper-$rank"; finish"#;
    bench.train(2, body).end().expect(0, &[]);
    assert!(bench.path("pid-helper-1").exists());
}

#[test]
fn a_killed_supervisor_leaves_no_rank() {
    let bench = Bench::new();
    let running = bench.train(3, "begin 1; trap '' TERM INT HUP; hang");
    bench.wait_for_ranks("hanging", 3);
    running.send(Signal::KILL);
    // `end` looks for ranks.
    assert_eq!(running.end().status.code(), None);
}

const STOPS_CLEANLY: &str = r#"
    stop=; trap 'stop=1' TERM
    begin 1; [ $rank = 0 ] && step 1 4.5
    begin 2; mark ready
    while [ -z "$stop" ]; do sleep 0.02; done
    [ $rank = 0 ] && step 2 3.5
    finish"#;

#[test]
fn ctrl_c_stops_after_the_step() {
    let bench = Bench::new();
    let running = bench.train(2, STOPS_CLEANLY);
    bench.wait_for_ranks("ready", 2);
    running.send(Signal::INT);
    let ended = running.end().expect(
        130,
        &["stopping after this step, press Ctrl-C again to stop at once\n", "stopped after step 2 of 3\n"],
    );
    assert!(ended.stdout.contains("loss 4.5000 -> 3.5000"), "{ended:#?}");
    assert!(!ended.stderr.contains("error:"), "{ended:#?}");
}

#[test]
fn sigterm_stops_after_the_step_too() {
    let bench = Bench::new();
    let running = bench.train(2, STOPS_CLEANLY);
    bench.wait_for_ranks("ready", 2);
    running.send(Signal::TERM);
    running.end().expect(143, &["stopped after step 2 of 3\n"]);
}

#[test]
fn ctrl_c_before_ranks_can_listen_still_ends_them() {
    let bench = Bench::new();
    let running = bench.train(2, r#"phase "loading model"; hang"#);
    bench.wait_for_ranks("hanging", 2);
    running.send(Signal::INT);
    let ended = running.end().expect(130, &["stopped after step 0 of 3"]);
    assert!(!ended.stderr.contains("error:"), "{ended:#?}");
}

#[test]
fn ctrl_c_when_only_some_ranks_can_listen_ends_all() {
    let bench = Bench::new();
    // Rank 1 dies of the signal. Rank 0 misses it; rank 2 waits for it and would do so for long.
    let body = r#"
        phase "joining"
        [ $rank = 1 ] && hang
        trap '' TERM
        [ $rank = 2 ] && hang
        mark hanging
        while [ ! -e "$FAKE_DIR/pid-1" ] || kill -0 "$(cat "$FAKE_DIR/pid-1")"; do sleep 0.02; done
        fail_after_peer "rank 1 died""#;
    let running = bench.train(3, body);
    bench.wait_for_ranks("hanging", 3);
    running.send(Signal::INT);
    let ended = running.end().expect(130, &["stopped after step 0 of 3"]);
    assert!(!ended.stderr.contains("error:"), "{ended:#?}");
}

#[test]
fn ctrl_c_twice_stops_at_once() {
    let bench = Bench::new();
    let running = bench.train(2, "begin 1; trap '' TERM; hang");
    bench.wait_for_ranks("hanging", 2);
    running.send(Signal::INT);
    bench.wait_until("the first stop", || bench.read("stderr").contains("stopping after this step"));
    running.send(Signal::INT);
    running.end().expect(130, &["stopped after step 0 of 3"]);
}

#[test]
fn a_failure_while_stopping_is_told() {
    let bench = Bench::new();
    let body = r#"
        stop=; trap 'stop=1' TERM
        begin 1; mark ready
        while [ -z "$stop" ]; do sleep 0.02; done
        [ $rank = 1 ] && fail "could not write the model"
        hang"#;
    let running = bench.train(2, body);
    bench.wait_for_ranks("ready", 2);
    running.send(Signal::INT);
    running.end().expect(130, &["error: rank 1 failed in step 1: could not write the model"]);
}

#[test]
fn noise_on_standard_output_goes_to_the_log() {
    let bench = Bench::new();
    let body = r#"
        echo 'Intel MKL says hello'; echo '{"event":"dance"}'; printf '\377\376\000\n'
        head -c 3000000 /dev/zero | tr '\0' x; echo
        begin 1; [ $rank = 0 ] && step 1 2.5
        echo '{"event":"done"}'
        printf 'no newline at the end'"#;
    bench.train(2, body).end().expect(0, &["step 1/3  loss 2.5000"]);
    let log = std::fs::read(bench.path("out/ranks/rank-1.log")).unwrap();
    assert!(log.starts_with(b"Intel MKL says hello\n{\"event\":\"dance\"}\n\xff\xfe\x00\nxxx"));
    assert!(log.ends_with(b"xxx\nno newline at the end"));
    assert!(log.len() > 3_000_000);
}

#[test]
fn refusals_come_before_any_rank_starts() {
    let bench = Bench::new();
    let expect = |args: &[&str], stderr: &str| {
        bench.start(bench.command(args, "finish")).end().expect(2, &["error: ", stderr]);
        assert!(!bench.path("pid-0").exists());
    };
    expect(&["train", "run.json", "--out", "run.json/x"], "could not make the output folder `run.json/x`");
    expect(&["train", "run.json", "--resume", "auto", "--overwrite"], "ask for opposite things");
    expect(&["train", "absent.json"], "absent.json");
    expect(&["train", "run.json", "-n", "0"], "0 is not in 1..=4096");
    expect(&["train", "run.json", "--set", "stepps=4"], "stepps");
    std::fs::create_dir(bench.path("out")).unwrap();
    std::fs::write(bench.path("out/metrics.jsonl"), "{}\n").unwrap();
    expect(&["train", "run.json", "--out", "out"], "`out` already holds a run\nhint: choose another folder");
    assert_eq!(bench.read("out/metrics.jsonl"), "{}\n");
}

#[test]
fn overwrite_replaces_the_earlier_run() {
    let bench = Bench::new();
    std::fs::create_dir(bench.path("out")).unwrap();
    std::fs::write(bench.path("out/metrics.jsonl"), "{}\n").unwrap();
    let args = ["train", "run.json", "--out", "out", "--overwrite"];
    bench.start(bench.command(&args, TRAIN_THREE)).end().expect(0, &[]);
    assert!(!bench.path("out/metrics.jsonl").exists(), "the stand-in writes none");
}

#[test]
fn overwrite_keeps_what_the_run_reads() {
    let bench = Bench::new();
    std::fs::create_dir_all(bench.path("out/model")).unwrap();
    std::fs::write(bench.path("out/model/config.json"), "{}").unwrap();
    let sets = ["--set", r#"model={"path": "out/model"}"#];
    let args = [&["train", "run.json", "--out", "out", "--overwrite"][..], &sets].concat();
    bench
        .start(bench.command(&args, "finish"))
        .end()
        .expect(2, &["out/model/config.json`, which this run reads"]);
    assert!(bench.path("out/model/config.json").exists());
}

#[test]
fn the_default_output_folder_is_named_after_the_run_file() {
    let bench = Bench::new();
    bench
        .start(bench.command(&["train", "run.json"], "finish"))
        .end()
        .expect(0, &["training into `out/run`"]);
    assert!(bench.path("out/run/ranks/rank-0.log").exists());
}

#[test]
fn a_missing_worker_is_named() {
    let bench = Bench::new();
    let mut command = bench.command(&["train", "run.json"], "");
    command.env("SHARDWISE_WORKER", "/nowhere/worker");
    bench.start(command).end().expect(2, &["`SHARDWISE_WORKER=/nowhere/worker` is no file\nhint: "]);
    // Where it was built, a worker may lie beside it. Another process makes the copy, lest a fork of this one still hold it
    // open for writing when it is to run.
    let alone = bench.path("shardwise");
    assert!(Command::new("cp").arg(env!("CARGO_BIN_EXE_shardwise")).arg(&alone).status().unwrap().success());
    let mut command = Command::new(&alone);
    command.args(["generate", "d", "--prompt", "x"]).env_remove("SHARDWISE_WORKER");
    command
        .stdout(File::create(bench.path("stdout")).unwrap())
        .stderr(File::create(bench.path("stderr")).unwrap());
    bench.start(command).end().expect(2, &["/shardwise-worker` was not found\nhint: "]);
}

#[test]
fn generate_becomes_the_worker() {
    let bench = Bench::new();
    let body = r#"printf '%s\n' "$@"; exit 7"#;
    let args = [
        "generate",
        "model dir",
        "--prompt",
        "--Once\nupon",
        "--temperature",
        "0",
        "--top-k",
        "5",
        "--seed",
        "9",
    ];
    let ended = bench.start(bench.command(&args, body)).end().expect(7, &[]);
    assert_eq!(
        ended.stdout,
        "generate\nmodel dir\n--prompt=--Once\nupon\n--max-tokens\n128\n--temperature\n0\n--top-k\n5\n--seed\n9\n"
    );
}

#[test]
fn check_prints_every_value_with_its_source() {
    let bench = Bench::new();
    let args = ["check", "run.json", "-n", "2", "--set", "steps=9"];
    let ended = bench.start(bench.command(&args, "")).end().expect(0, &[]);
    let row =
        |key: &str| ended.stdout.lines().find(|line| line.starts_with(key)).unwrap_or_default().to_owned();
    assert!(row("steps ").contains(" 9 ") && row("steps ").ends_with("--set steps=9"), "{ended:#?}");
    assert!(row("parallel.world_size ").contains(" 2 "), "{ended:#?}");
    assert!(row("seed ").ends_with("default"), "{ended:#?}");
    assert!(row("data.seq_len ").ends_with("run.json:4"), "{ended:#?}");
}

#[test]
fn check_tells_every_problem_at_once() {
    let bench = Bench::new();
    let args = ["check", "run.json", "--set", "stepps=9", "--set", "data.seq_len=-1"];
    bench
        .start(bench.command(&args, ""))
        .end()
        .expect(2, &["`stepps`", "did you mean `steps`?", "`data.seq_len`"]);
    std::fs::remove_file(bench.path("tokens.bin")).unwrap();
    let ended = bench
        .start(bench.command(&["check", "run.json"], ""))
        .end()
        .expect(2, &["tokens.bin`, which does not exist"]);
    assert!(ended.stdout.contains("steps"), "the values are there all the same");
}

#[test]
fn help_and_version() {
    let bench = Bench::new();
    let ended = bench.start(bench.command(&["--version"], "")).end().expect(0, &[]);
    assert_eq!(ended.stdout, concat!("shardwise ", env!("CARGO_PKG_VERSION"), "\n"));
    for (args, words) in [
        (&["--help"][..], &["train", "check", "generate", "Examples:", "Exit codes:"][..]),
        (&["train", "--help"], &["--out <DIR>", "--overwrite", "Ctrl-C stops after the current step"]),
        (&["generate", "--help"], &["--temperature <F>", "[default: 0.8]"]),
    ] {
        let ended = bench.start(bench.command(args, "")).end().expect(0, &[]);
        words.iter().for_each(|word| assert!(ended.stdout.contains(word), "`{word}`: {ended:#?}"));
    }
    bench.start(bench.command(&["trian"], "")).end().expect(2, &["train"]);
}
