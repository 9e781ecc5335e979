//! Kill -9 of one rank, at every phase of a step and in the middle of phases.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use crate::bench::{Bench, LIMIT};

/// How often a rank is killed in each phase.
const NUM_KILLS: usize = 20;
/// How often each rank enters a phase of a step: four layers (units, in `reduce`), two micro-batches.
const NUM_ENTRIES: usize = 8;
/// The supervisor leaves this time to the peers of a dead rank before it ends them.
const GRACE: Duration = Duration::from_secs(2);

#[test]
fn killed_in_forward() {
    kill_in("forward", NUM_ENTRIES);
}

#[test]
fn killed_in_backward() {
    kill_in("backward", NUM_ENTRIES);
}

#[test]
fn killed_in_reduce() {
    kill_in("reduce", NUM_ENTRIES);
}

#[test]
fn killed_in_the_step() {
    kill_in("step", 1);
}

/// Draws, the same in every run: worlds of 2 and 3 ranks, ZeRO 1 to 3, collectives inline and on a side thread, the victim and when it
/// dies. Every second kill comes a little after the phase was entered.
fn kill_in(phase: &str, num_entries: usize) {
    let (mut worst, mut sum) = (Duration::ZERO, Duration::ZERO);
    for kill in 0..NUM_KILLS {
        let draw = |what: &str, below: usize| {
            let mut hasher = DefaultHasher::new();
            (phase, kill, what).hash(&mut hasher);
            hasher.finish() as usize % below
        };
        let num_ranks = 2 + draw("ranks", 2);
        let victim = draw("victim", num_ranks);
        let step = 1 + draw("step", 5);
        let after = 1 + draw("after", num_entries);
        let delay_us = kill % 2 * draw("delay", 1500);
        let stage = format!("deepspeed.zero_optimization.stage={}", 1 + draw("stage", 3));
        let overlap = format!("deepspeed.zero_optimization.overlap_comm={}", draw("overlap", 2) == 0);
        let fault = format!("kill:rank={victim},step={step},phase={phase},after={after},delay_us={delay_us}");

        let bench = Bench::new();
        let ended = bench.train(num_ranks, &[&stage, &overlap], &fault).end();
        let took = ended.since(&bench.path(&format!("out/ranks/rank-{victim}.log")));
        let context =
            format!("kill {kill}, {num_ranks} ranks, {stage}, {overlap}, {fault}, took {took:?}: {ended:#?}");

        let died = format!("error: rank {victim} was killed by signal 9 (SIGKILL) in step ");
        ended.expect(1, &[&died, "the other ranks have been ended too\n"]);
        let (_, rest) = ended.stderr.split_once(&died).unwrap();
        let named: usize = rest.lines().next().unwrap().parse().unwrap();
        // A kill that is delayed may come in one of the next steps.
        assert!(if delay_us == 0 { named == step } else { named >= step }, "{context}");
        assert!(took < LIMIT, "{context}");
        bench.assert_nothing_left();
        // All others saw it for themselves, if they had the time.
        let blind = |&rank: &usize| !bench.log(rank).contains(&format!("rank `{victim}` died"));
        let blind: Vec<_> = (0..num_ranks).filter(|&rank| rank != victim).filter(blind).collect();
        assert!(took >= GRACE || blind.is_empty(), "ranks {blind:?} did not see it: {context}");
        worst = worst.max(took);
        sum += took;
    }
    let mean = sum / NUM_KILLS as u32;
    println!("{NUM_KILLS} kills in {phase}: the command ended {mean:?} after the death, {worst:?} at worst");
}

#[test]
fn without_a_supervisor_the_survivors_name_the_dead() {
    for victim in [0, 1] {
        let bench = Bench::new();
        let fault = format!("kill:rank={victim},step=3,phase=backward,after=4");
        let ranks: Vec<_> = (0..3).map(|rank| bench.rank(rank, 3, &fault)).collect();
        let ended: Vec<_> = ranks.into_iter().map(|rank| rank.end()).collect();
        let log = bench.path(&format!("rank-{victim}.stderr"));
        for (rank, ended) in ended.iter().enumerate().filter(|(rank, _)| *rank != victim) {
            ended.expect(1, &[&format!("rank `{victim}` died")]);
            assert!(ended.since(&log) < LIMIT, "rank {rank}: {ended:#?}");
        }
        assert_eq!(ended[victim].status.code(), None, "killed by a signal");
        bench.assert_nothing_left();
    }
}
