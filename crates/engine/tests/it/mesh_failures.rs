//! One rank of a mesh fails, in each role: every other rank hears of it at once, who it was and why, wherever it waits for it: for an
//! activation, for a sum within a layer, for the norm of all.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};

use shardwise_comm::CommError;
use shardwise_engine::{EngineError, Phase};
use shardwise_plan::ZeroStage;
use shardwise_plan::pipeline::ScheduleKind;
use shardwise_zero::{Overlap, ZeroError};

use crate::runs::{LR, chain};
use crate::stack::{Mishap, StackRun, Told, on_mesh};

/// The error of the group behind an error.
fn verdict(error: &EngineError) -> &CommError {
    match error {
        EngineError::Zero(ZeroError::Comm(error)) | EngineError::Comm(error) => error,
        EngineError::Layer { source, .. } => verdict(source),
        other => panic!("expected an error of a group, got: {}", chain(other)),
    }
}

/// Where the failing rank fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Where {
    Batch,
    Layer(Mishap),
}

/// Pipeline 3, tensor 2 and pipeline 2, data 2, tensor 2; ranks of the first, the middle and the last stage, of either place in
/// their tensor group.
const ROLES: [([usize; 3], usize); 6] =
    [([3, 1, 2], 0), ([3, 1, 2], 3), ([3, 1, 2], 4), ([3, 1, 2], 5), ([2, 2, 2], 1), ([2, 2, 2], 6)];

#[test]
fn a_rank_that_fails_in_any_role_ends_all_others() {
    let ways = [Where::Batch, Where::Layer(Mishap::Forward), Where::Layer(Mishap::Backward)];
    let schedules = [
        ScheduleKind::OneForwardOneBackward,
        ScheduleKind::GPipe,
        ScheduleKind::ZeroBubble,
        ScheduleKind::Interleaved { num_chunks: 2 },
    ];
    for (i, (mesh, victim)) in ROLES.into_iter().enumerate() {
        for (j, at) in ways.into_iter().enumerate() {
            for (stage, overlap) in
                [(ZeroStage::One, Overlap::Inline), (ZeroStage::Three, Overlap::SideThread)]
            {
                let schedule = schedules[(i + j) % schedules.len()];
                let run = StackRun { schedule, overlap, ..StackRun::new(mesh, stage) };
                let what = format!("rank {victim} of {mesh:?}, {at:?}, stage {stage}, {schedule}");
                let done = Barrier::new(mesh.iter().product());
                let ends = on_mesh(mesh, |ranks| {
                    let (rank, data) = (ranks.world().group_rank(), ranks.at().data);
                    let told = Told::default();
                    let mut engine = run.engine(ranks, &told);
                    // A step that all make, so that every channel has been used; the failure shall not meet a rank that is still at it.
                    let before = engine.train_step(LR, |microbatch| Ok(run.batch(data, 0, microbatch)));
                    done.wait();
                    before.unwrap();
                    if let (true, Where::Layer(mishap)) = (rank == victim, at) {
                        *told.lock().unwrap() = Some(("*", mishap));
                    }
                    let mut step = || {
                        engine.train_step(LR, |microbatch| match (rank == victim, at, microbatch) {
                            (true, Where::Batch, 1) => Err("no more data".into()),
                            _ => Ok(run.batch(data, 1, microbatch)),
                        })
                    };
                    let (first, again) = (step().unwrap_err(), step().unwrap_err());
                    // The engine is kept until all have their errors: nobody learns of it from a handle that is dropped.
                    (engine, first, again)
                });
                let own = chain(&ends[victim].1);
                match at {
                    Where::Batch => {
                        assert_eq!(
                            own, "could not read the batch of micro-batch `1`: no more data",
                            "{what}"
                        );
                    }
                    Where::Layer(Mishap::Forward) => {
                        assert!(
                            own.starts_with("layer `pair.")
                                && own.contains(", forward: no parameter `spark`"),
                            "{own}: {what}"
                        );
                    }
                    Where::Layer(_) => {
                        assert!(
                            own.starts_with("layer `pair.") && own.ends_with("burn: all burnt"),
                            "{own}: {what}"
                        );
                    }
                }
                for (rank, (_, first, again)) in ends.iter().enumerate().filter(|(rank, _)| *rank != victim) {
                    let CommError::GaveUp { rank: told_rank, reason } = verdict(first) else {
                        panic!("rank {rank}: {}: {what}", chain(first));
                    };
                    assert_eq!((*told_rank, reason), (victim, &own), "rank {rank}: {what}");
                    assert!(!chain(again).is_empty());
                }
            }
        }
    }
}

/// A thread that dies with receives posted and messages handed over: its queues do not wait for what will never come, and the other
/// ranks hear of it.
#[test]
fn a_rank_that_panics_in_any_role_ends_all_others() {
    let phases = [Phase::Gather, Phase::Forward, Phase::Backward, Phase::Reduce, Phase::Step];
    for (i, (mesh, victim)) in ROLES.into_iter().enumerate() {
        for (j, phase) in phases.into_iter().enumerate() {
            let stage = if (i + j) % 2 == 0 { ZeroStage::Three } else { ZeroStage::Zero };
            let run = StackRun { overlap: Overlap::SideThread, ..StackRun::new(mesh, stage) };
            let what = format!("rank {victim} of {mesh:?}, {phase:?}, stage {stage}");
            let (num_told, built) = (AtomicUsize::new(0), Barrier::new(mesh.iter().product()));
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                on_mesh(mesh, |ranks| {
                    let (rank, data) = (ranks.world().group_rank(), ranks.at().data);
                    let mut engine = run.engine(ranks, &Told::default());
                    built.wait(); // the failure shall not meet a rank that still builds
                    engine.observe(move |now| assert!(rank != victim || now != phase, "no further"));
                    let step = engine.train_step(LR, |microbatch| Ok(run.batch(data, 0, microbatch)));
                    let error = step.unwrap_err();
                    match verdict(&error) {
                        CommError::GaveUp { rank: told, reason } => {
                            assert_eq!(*told, victim, "{reason}");
                            num_told.fetch_add(1, Ordering::Relaxed);
                        }
                        other => panic!("rank {rank}: {other}: {what}"),
                    }
                })
            }));
            let panic = outcome.unwrap_err();
            assert_eq!(
                *panic.downcast_ref::<&str>().unwrap(),
                "no further",
                "the first panic is the cause: {what}"
            );
            assert_eq!(num_told.into_inner(), mesh.iter().product::<usize>() - 1, "{what}");
        }
    }
}
