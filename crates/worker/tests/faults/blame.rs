//! Ranks that hang, panic, or cannot go on: who is named, and with which words.

use std::fs;
use std::time::Duration;

use crate::bench::{Bench, LIMIT, SEQ_LEN};

#[test]
fn a_stopped_rank_is_named_as_stalled() {
    const DEADLINE: Duration = Duration::from_secs(2);
    let bench = Bench::new();
    let ended = bench.train(3, &["parallel.deadline_s=2"], "stop:rank=1,step=3,phase=backward,after=2").end();
    ended.expect(1, &["rank `1` stalled: rank `", " waited `2` s in "]);
    let took = ended.since(&bench.path("out/ranks/rank-1.log"));
    assert!(took < DEADLINE + Duration::from_secs(5), "after {took:?}: {ended:#?}");
    bench.assert_nothing_left();
    println!("a stopped rank: the command ended {took:?} after it stopped, with a deadline of {DEADLINE:?}");
}

#[test]
fn a_panicking_rank_is_blamed_with_its_message() {
    for victim in [0, 2] {
        let bench = Bench::new();
        let fault = format!("panic:rank={victim},step=2,phase=forward,after=3");
        let ended = bench.train(3, &[], &fault).end();
        ended.expect(
            1,
            &[
                &format!("error: rank {victim} failed in step 2: panicked at crates/worker/src/fault.rs:"),
                ": failing on purpose, as `SHARDWISE_FAULT` says\nhint: a panic is a bug of ours",
            ],
        );
        assert!(ended.since(&bench.path(&format!("out/ranks/rank-{victim}.log"))) < LIMIT, "{ended:#?}");
        for rank in (0..3).filter(|&rank| rank != victim) {
            let log = bench.log(rank);
            assert!(
                log.contains(&format!("rank `{victim}` gave up: its thread panicked")),
                "rank {rank}: {log}"
            );
        }
        bench.assert_nothing_left();
    }
}

#[test]
fn without_a_supervisor_a_panic_is_code_1() {
    let bench = Bench::new();
    let ranks: Vec<_> = (0..2).map(|rank| bench.rank(rank, 2, "panic:rank=1,step=2,phase=reduce")).collect();
    let ended: Vec<_> = ranks.into_iter().map(|rank| rank.end()).collect();
    ended[1].expect(1, &["error: panicked at ", ": failing on purpose"]);
    ended[0].expect(1, &["rank `1` gave up: its thread panicked"]);
}

/// Overwrites the tokens of the sample that `rank` of `num_ranks` reads in `step`, micro-batch 1, with numbers that are no tokens.
fn spoil_sample(bench: &Bench, step: usize, rank: usize, num_ranks: usize) {
    let sample = ((step - 1) * 2 + 1) * num_ranks + rank;
    let mut tokens = fs::read(bench.path("tokens.bin")).unwrap();
    // The first and the last token belong to its neighbours as well.
    tokens[2 * (sample * SEQ_LEN + 1)..2 * (sample + 1) * SEQ_LEN].fill(0xff);
    fs::write(bench.path("tokens.bin"), tokens).unwrap();
}

#[test]
fn a_rank_with_bad_tokens_is_blamed_and_not_those_who_waited_for_it() {
    let bench = Bench::new();
    spoil_sample(&bench, 4, 2, 3);
    let ended = bench.train(3, &["deepspeed.zero_optimization.stage=3"], "").end();
    ended.expect(
        1,
        &[
            "error: rank 2 failed in step 4: could not read the batch of micro-batch `1`: token file `",
            "tokens.bin` has token `65535` at byte `",
        ],
    );
    assert_eq!(bench.num_steps(), 3);
    for rank in [0, 1] {
        let log = bench.log(rank);
        assert!(log.contains("rank `2` gave up: could not read the batch"), "rank {rank}: {log}");
    }
    bench.assert_nothing_left();
}

#[test]
fn a_token_file_cut_short_during_the_run_ends_it() {
    let bench = Bench::new();
    let running = bench.train(2, &[], "");
    bench.wait_until("the third step", || bench.num_steps() >= 3);
    fs::File::options().write(true).open(bench.path("tokens.bin")).unwrap().set_len(0).unwrap();
    running.end().expect(1, &["was killed by signal 7 (SIGBUS) in step ", "cut short"]);
    bench.assert_nothing_left();
}

#[test]
fn a_model_that_cannot_be_written_is_told() {
    let bench = Bench::new();
    fs::create_dir(bench.path("out")).unwrap();
    fs::write(bench.path("out/model"), "in the way").unwrap();
    let ended = bench.train(2, &["steps=3"], "").end();
    ended.expect(1, &["error: rank 0 failed after it began step 3, while saving the model: ", "out/model"]);
    assert_eq!(bench.num_steps(), 3);
    bench.assert_nothing_left();
}

#[test]
fn a_full_disk_is_told() {
    let bench = Bench::new();
    let Some(running) = bench.train_on_a_small_disk() else {
        println!("skipped: this system allows no private mounts");
        return;
    };
    running.end().expect(1, &["error: rank 0 failed in step ", "No space left on device"]);
    bench.assert_nothing_left();
}

#[test]
fn a_fault_that_means_nothing_is_refused() {
    for (fault, says) in
        [("kill", "expected `action:rank"), ("kill:rank=2,step=1,phase=step", "there are `2` ranks")]
    {
        let bench = Bench::new();
        bench.train(2, &[], fault).end().expect(2, &["error: environment variable `SHARDWISE_FAULT`", says]);
        bench.assert_nothing_left();
    }
}
