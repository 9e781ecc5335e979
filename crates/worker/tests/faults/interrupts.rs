//! Someone ends the run: politely, impatiently, at a bad moment, or by killing the supervisor.

use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use serde_json::Value;

use crate::bench::{Bench, LIMIT};

/// Every line of `metrics.jsonl` is a step, in order; returns how many there are.
fn check_metrics(bench: &Bench) -> usize {
    let text = bench.read("out/metrics.jsonl");
    assert!(text.is_empty() || text.ends_with('\n'), "the last line is complete");
    for (i, line) in text.lines().enumerate() {
        let step: Value = serde_json::from_str(line).unwrap();
        assert_eq!(step["step"], i + 1);
        assert!(step["loss"].is_number(), "{line}");
    }
    text.lines().count()
}

#[test]
fn ctrl_c_finishes_the_step() {
    let bench = Bench::new();
    let running = bench.train(3, &[], "");
    bench.wait_until("the third step", || bench.num_steps() >= 3);
    running.send(Signal::INT);
    let ended = running.end();
    let num_steps = check_metrics(&bench);
    ended.expect(130, &["stopping after this step", &format!("stopped after step {num_steps} of 1000000\n")]);
    assert!(!ended.stderr.contains("error:"), "{ended:#?}");
    assert!(ended.stdout.contains(&format!("{num_steps} steps in ")), "{ended:#?}");
    assert!(!bench.path("out/model").exists(), "a run that was stopped has no trained model");
    bench.assert_nothing_left();
}

#[test]
fn ctrl_c_twice_ends_at_once() {
    // Stopped, rank 1 cannot finish its step; the others would wait two minutes for it.
    let bench = Bench::new();
    let running = bench.train(2, &[], "stop:rank=1,step=3,phase=forward");
    bench.wait_until("the stop", || bench.log(1).contains("failing on purpose"));
    running.send(Signal::INT);
    bench.wait_until("the first Ctrl-C", || bench.read("train.stderr").contains("press Ctrl-C again"));
    let pressed = Instant::now();
    running.send(Signal::INT);
    let ended = running.end();
    assert!(pressed.elapsed() < Duration::from_secs(3), "{ended:#?}");
    ended.expect(130, &["stopped after step 2 of 1000000\n"]);
    assert_eq!(check_metrics(&bench), 2);
    bench.assert_nothing_left();
}

#[test]
fn ctrl_c_at_any_moment_of_the_start_ends_the_run() {
    for delay_ms in [0, 20, 40, 80, 120, 160, 200, 250, 300, 400, 500] {
        let bench = Bench::new();
        let running = bench.train(2, &[], "");
        // From here on the supervisor listens.
        bench.wait_until("the start", || bench.path("out/ranks/rank-0.log").exists());
        std::thread::sleep(Duration::from_millis(delay_ms));
        let pressed = Instant::now();
        running.send(Signal::INT);
        let ended = running.end();
        assert!(pressed.elapsed() < LIMIT, "after {delay_ms} ms: {ended:#?}");
        ended.expect(130, &["stopping after this step"]);
        assert!(!ended.stderr.contains("error:"), "after {delay_ms} ms: {ended:#?}");
        check_metrics(&bench);
        bench.assert_nothing_left();
    }
}

#[test]
fn a_rank_that_is_told_to_stop_by_a_stranger_stops_all_and_that_is_no_success() {
    let bench = Bench::new();
    let running = bench.train(3, &[], "");
    bench.wait_until("the third step", || bench.num_steps() >= 3);
    kill_process(bench.rank_process(1), Signal::TERM).unwrap();
    let ended = running.end();
    let num_steps = check_metrics(&bench);
    let stopped = format!("exited with code 143 in step {num_steps}\n");
    ended.expect(1, &[&stopped, "hint: someone other than this command sent SIGTERM"]);
    bench.assert_nothing_left();
}

#[test]
fn no_rank_outlives_a_killed_supervisor() {
    for stopped in ["", "stop:rank=1,step=3,phase=reduce"] {
        let bench = Bench::new();
        let running = bench.train(3, &[], stopped);
        bench.wait_until("the second step", || bench.num_steps() >= 2);
        assert_eq!(bench.processes().len(), 4, "the supervisor and three ranks");
        running.send(Signal::KILL);
        let killed = Instant::now();
        assert_eq!(running.end().status.code(), None);
        bench.wait_until("the ranks' death", || bench.processes().is_empty());
        assert!(killed.elapsed() < LIMIT, "after {:?}", killed.elapsed());
        bench.assert_nothing_left();
    }
}
