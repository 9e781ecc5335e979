//! Ranks of a mesh that die, stop or panic, in every role: the first, a middle and the last pipeline stage, a tensor-parallel peer. The
//! command names their places on the mesh.

use std::time::Duration;

use shardwise_checkpoint::state::Checkpoint;
use shardwise_plan::{Coordinates, Mesh};

use crate::bench::{Bench, Ended, LIMIT};

/// The supervisor leaves this time to the peers of a dead rank before it ends them.
const GRACE: Duration = Duration::from_secs(2);
const STEP: usize = 3;

/// `rank 1 (pipeline stage 1, data 0, tensor 0)`, with the rank in quotes that the ranks themselves use.
fn name(mesh: &Mesh, rank: usize, quote: &str) -> String {
    let Coordinates { pipeline, data, tensor } = mesh.coordinates(rank);
    format!("rank {quote}{rank}{quote} (pipeline stage {pipeline}, data {data}, tensor {tensor})")
}

/// Trains on a mesh, with more settings.
fn train(bench: &Bench, [pipeline, data, tensor]: [usize; 3], sets: &[&str], fault: &str) -> (Mesh, Ended) {
    let num_ranks = pipeline * data * tensor;
    let [pipeline_set, tensor_set] = [("pipeline", pipeline), ("tensor", tensor)]
        .map(|(axis, degree)| format!("parallel.{axis}={degree}"));
    let sets = [&[&*pipeline_set, &*tensor_set], sets].concat();
    (Mesh::new(num_ranks, pipeline, tensor).unwrap(), bench.train(num_ranks, &sets, fault).end())
}

/// Kills rank `victim` at `at`; returns what was said.
fn kill(mesh: [usize; 3], victim: usize, sets: &[&str], at: &str) -> String {
    let bench = Bench::new();
    let fault = format!("kill:rank={victim},step={STEP},{at}");
    let (mesh, ended) = train(&bench, mesh, sets, &fault);
    let took = ended.since(&bench.path(&format!("out/ranks/rank-{victim}.log")));
    let died = format!("error: {} was killed by signal 9 (SIGKILL) ", name(&mesh, victim, ""));
    let log = bench.log(victim);
    assert!(ended.stderr.contains(&died), "after {took:?}, {log}\nof {ended:#?}");
    ended.expect(1, &["the other ranks have been ended too\n"]);
    assert!(took < LIMIT, "took {took:?}: {ended:#?}");
    bench.assert_nothing_left();
    // All others saw it for themselves, if they had the time.
    let blind = |&rank: &usize| rank != victim && !bench.log(rank).contains(&format!("rank `{victim}` died"));
    let blind: Vec<_> = (0..mesh.world_size()).filter(blind).collect();
    assert!(took >= GRACE || blind.is_empty(), "ranks {blind:?} did not see it: {ended:#?}");
    // What was being saved is complete or not there.
    if let Some(found) = Checkpoint::newest(bench.path("out")).unwrap() {
        assert!(found.damaged.is_empty() && found.checkpoint.verify(|_| {}).findings.is_empty());
    }
    println!("{mesh:?}, {fault}: the command ended {took:?} after the death");
    ended.stderr.lines().find(|line| line.starts_with("error:")).unwrap().to_owned()
}

/// In the phases of a step, and a little after some.
const PHASES: [&str; 4] =
    ["phase=forward,after=2", "phase=backward", "phase=step", "phase=backward,after=2,delay_us=300"];

#[test]
fn killed_pipeline_stages_are_named() {
    for victim in 0..3 {
        for (at, schedule) in PHASES.into_iter().zip(["1f1b", "zero-bubble", "gpipe", "1f1b"]) {
            let said = kill([3, 1, 1], victim, &[&format!("parallel.schedule={schedule}")], at);
            assert!(said.contains(" in step "), "{said}");
        }
    }
}

#[test]
fn killed_tensor_peers_are_named() {
    for (mesh, victim, at) in [
        ([1, 1, 2], 1, PHASES[0]),
        ([1, 1, 2], 0, PHASES[1]),
        ([2, 1, 2], 1, PHASES[1]),
        ([2, 1, 2], 3, PHASES[0]),
        ([2, 1, 2], 2, PHASES[2]),
        ([1, 2, 2], 3, PHASES[3]),
    ] {
        let sequence = format!("parallel.sequence={}", victim == 3);
        let said = kill(mesh, victim, &[&sequence], at);
        assert!(said.contains(" in step "), "{said}");
    }
}

#[test]
fn a_rank_killed_while_saving_leaves_complete_checkpoints_only() {
    // Large enough for a save to take several milliseconds.
    let sets = ["checkpoint.every=1", "checkpoint.keep=2", "model.config.hidden_size=128"];
    let mut num_saving = 0;
    for (mesh, victim, delay_us) in [
        ([3, 1, 1], 0, 2000),
        ([3, 1, 1], 1, 4000),
        ([3, 1, 1], 2, 8000),
        ([2, 1, 2], 1, 4000),
        ([2, 1, 2], 2, 6000),
    ] {
        let background = format!("checkpoint.async={}", delay_us == 8000);
        let sets = [&sets[..], &[&*background]].concat();
        let said = kill(mesh, victim, &sets, &format!("phase=idle,delay_us={delay_us}"));
        println!("{said}");
        num_saving += usize::from(said.contains("while saving step"));
    }
    println!("{num_saving} of 5 died while they saved");
}

#[test]
fn stopped_ranks_are_named() {
    for (mesh, victim, at) in [
        ([3, 1, 1], 0, "forward"),
        ([3, 1, 1], 1, "backward"),
        ([3, 1, 1], 2, "step"),
        ([2, 1, 2], 1, "forward"),
    ] {
        let bench = Bench::new();
        let fault = format!("stop:rank={victim},step={STEP},phase={at}");
        let (mesh, ended) = train(&bench, mesh, &["parallel.deadline_s=1"], &fault);
        ended.expect(1, &[&format!("{} stalled: rank `", name(&mesh, victim, "`")), " waited `1` s in "]);
        let took = ended.since(&bench.path(&format!("out/ranks/rank-{victim}.log")));
        assert!(took < LIMIT, "took {took:?}: {ended:#?}");
        bench.assert_nothing_left();
        println!("{mesh:?}, {fault}: the command ended {took:?} after the stop");
    }
}

#[test]
fn panicking_ranks_are_blamed() {
    for (mesh, victim, at) in
        [([3, 1, 1], 1, "backward"), ([1, 1, 2], 1, "backward"), ([2, 1, 2], 2, "forward")]
    {
        let bench = Bench::new();
        let fault = format!("panic:rank={victim},step={STEP},phase={at}");
        let (mesh, ended) = train(&bench, mesh, &[], &fault);
        let blamed = format!("error: {} failed in step {STEP}: panicked at ", name(&mesh, victim, ""));
        ended.expect(1, &[&blamed, "failing on purpose"]);
        for rank in (0..mesh.world_size()).filter(|&rank| rank != victim) {
            let log = bench.log(rank);
            assert!(
                log.contains(&format!("rank `{victim}` gave up: its thread panicked")),
                "rank {rank}: {log}"
            );
        }
        bench.assert_nothing_left();
    }
}
