//! One rank fails: every other rank hears of it at once, and why, even if the failed rank keeps its engine.

use std::ops::Range;
use std::sync::Barrier;
use std::time::Duration;

use shardwise_comm::{CommError, Options, thread};
use shardwise_device::DType;
use shardwise_engine::{
    BoxError, Context, Engine, EngineError, Layer, ParamSource, Params, Phase, RandomInit,
};
use shardwise_plan::{LayerSpec, ParamSpec, ZeroStage};
use shardwise_torch::function::{Saved, link};
use shardwise_torch::{Tensor, TorchError, no_grad};
use shardwise_zero::{Overlap, ZeroError};

use crate::layers::{Gradients, model};
use crate::runs::{LR, Run, chain, engine, given};

/// Ranks that wait as long as this were not told: the tests then fail with `Stalled`.
fn impatient() -> Options {
    Options { deadline: Duration::from_secs(20), ..Options::default() }
}

/// Where the failing rank fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Where {
    Forward,
    Backward,
    Batch,
}

/// Passes its input on, until told to fail.
struct Fuse(Option<Where>);

impl Layer for Fuse {
    fn spec(&self) -> LayerSpec {
        LayerSpec { name: "fuse".into(), params: vec![] }
    }

    fn forward(&self, _: &Context<'_>, params: &Params<'_>, x: &Tensor) -> Result<Tensor, EngineError> {
        let y = no_grad(|| x.f_mul_scalar(1.0))?;
        match self.0 {
            Some(Where::Forward) => return params.get("spark").map(Tensor::shallow_clone),
            Some(Where::Backward) => {
                let operation = "burn";
                link(&[x], &[&y], &[Saved::Input(x)], move |_| {
                    Err(TorchError::Shim { operation, message: "all burnt".into() })
                })?;
            }
            _ => link(&[x], &[&y], &[], |mut args| Ok(vec![args.grads.remove(0)]))?,
        }
        Ok(y)
    }
}

/// The error that other ranks hand out.
fn verdict(error: &EngineError) -> &CommError {
    match error {
        EngineError::Zero(ZeroError::Comm(error)) => error,
        other => panic!("expected an error of the group, got: {}", chain(other)),
    }
}

#[test]
fn the_others_do_not_wait_for_a_rank_that_failed() {
    for stage in ZeroStage::ALL {
        for (at, overlap) in [
            (Where::Forward, Overlap::Inline),
            (Where::Backward, Overlap::Inline),
            (Where::Batch, Overlap::Inline),
            (Where::Forward, Overlap::SideThread),
            (Where::Backward, Overlap::SideThread),
        ] {
            let run = Run { overlap, ..Run::new(3, stage, DType::F32) };
            let reason = match at {
                Where::Forward => "layer `fuse`, forward: no parameter `spark`, the layer declares []",
                Where::Backward => "layer `fuse`, backward: libtorch: grad: libtorch: burn: all burnt",
                Where::Batch => "could not read the batch of micro-batch `0`: no more data",
            };
            // The engines live until all ranks have their errors: nobody learns of the failure from a handle that is dropped.
            let built = Barrier::new(run.world);
            let ends = thread::run_with(run.world, impatient(), |group| {
                let rank = group.group_rank();
                let mut layers = model(Gradients::Sometimes);
                layers.insert(3, Box::new(Fuse((rank == 1).then_some(at))));
                let mut engine = engine(layers, run.options(), group).unwrap();
                built.wait(); // the failure shall not meet a rank that still builds
                let mut step = || {
                    engine.train_step(LR, |microbatch| match (rank, at) {
                        (1, Where::Batch) => Err("no more data".into()),
                        _ => given(run.batch(rank, 0, microbatch)),
                    })
                };
                let first = step().unwrap_err();
                // Later calls fail as well, with an error.
                let again = step().unwrap_err();
                (engine, first, again)
            });
            for (rank, (_, first, again)) in ends.iter().enumerate() {
                let what = format!("rank {rank}, {at:?}, stage {stage}, {overlap:?}");
                if rank == 1 {
                    assert!(chain(first).starts_with(reason), "{}: {what}", chain(first));
                } else {
                    let CommError::GaveUp { rank: 1, reason: told } = verdict(first) else {
                        panic!("{}: {what}", chain(first));
                    };
                    assert!(told.starts_with(reason), "{told}: {what}");
                    assert!(!chain(again).is_empty());
                }
            }
        }
    }
}

/// Fails for one parameter.
struct Broken;

impl ParamSource for Broken {
    fn fill(&mut self, param: &ParamSpec, range: Range<usize>, out: &mut [f32]) -> Result<(), BoxError> {
        if param.name == "mid.weight" {
            return Err("unreadable sector".into());
        }
        RandomInit { seed: 3 }.fill(param, range, out)
    }
}

#[test]
fn the_others_do_not_wait_for_a_rank_that_cannot_load() {
    for stage in ZeroStage::ALL {
        let run = Run::new(3, stage, DType::F32);
        let ends = thread::run_with(run.world, impatient(), |group| {
            // In stages 1 to 3 each rank fills its own part: let the one with the middle of the weight fail, and keep its group.
            let kept = group.clone();
            let is_broken = group.group_rank() == 1;
            let mut source: Box<dyn ParamSource> =
                if is_broken { Box::new(Broken) } else { Box::new(RandomInit { seed: 3 }) };
            let built = Engine::new(model(Gradients::Always), run.options(), group, &mut *source);
            let error = built
                .and_then(|mut engine| engine.train_step(LR, |microbatch| Ok(run.batch(0, 0, microbatch))));
            (kept, error.unwrap_err())
        });
        for (rank, (_, error)) in ends.iter().enumerate() {
            let text = chain(error);
            let expected = "could not fill `mid.weight`: unreadable sector";
            if rank == 1 {
                assert_eq!(text, expected);
            } else {
                assert_eq!(text, format!("rank `1` gave up: {expected}"), "stage {stage}");
            }
        }
    }
}

/// Below stage 3 a rank may ask the model by itself, and an answer that fails is its own affair.
#[test]
fn a_prediction_that_fails_ends_the_run_only_where_all_take_part() {
    for stage in ZeroStage::ALL {
        let run = Run::new(2, stage, DType::F32);
        let ends = thread::run_with(2, impatient(), |group| {
            let rank = group.group_rank();
            let mut engine = run.engine(group);
            let asked = if rank == 0 {
                run.batch(0, 0, 0).input.to_kind(shardwise_torch::Kind::Float)
            } else {
                run.batch(0, 0, 0).input
            };
            let asks = rank == 0 || stage.shards_parameters();
            let asked = if asks { engine.predict(&asked).map(drop) } else { Ok(()) };
            let trained = engine.train_step(LR, |microbatch| Ok(run.batch(rank, 0, microbatch))).map(drop);
            (engine, asked, trained)
        });
        assert!(chain(ends[0].1.as_ref().unwrap_err()).starts_with("layer `embedding`, forward"));
        for (_, _, trained) in &ends {
            assert_eq!(trained.is_err(), stage.shards_parameters(), "stage {stage}");
        }
    }
}

/// A rank that panics (here: an observer that fails on purpose) is one that failed.
#[test]
fn the_others_do_not_wait_for_a_rank_that_panics() {
    for phase in [Phase::Gather, Phase::Forward, Phase::Backward, Phase::Reduce, Phase::Step] {
        let run = Run { overlap: Overlap::SideThread, ..Run::new(2, ZeroStage::Three, DType::F32) };
        let outcome = std::panic::catch_unwind(|| {
            thread::run_with(2, impatient(), |group| {
                let rank = group.group_rank();
                let mut engine = run.engine(group);
                engine.observe(move |now| assert!(rank == 0 || now != phase, "no further than {phase:?}"));
                let error =
                    engine.train_step(LR, |microbatch| Ok(run.batch(rank, 0, microbatch))).unwrap_err();
                assert!(matches!(verdict(&error), CommError::GaveUp { rank: 1, .. }), "{}", chain(&error));
            })
        });
        let panic = outcome.unwrap_err();
        let text = panic.downcast_ref::<String>().unwrap();
        assert!(text.starts_with("no further than"), "the first panic is the cause: {text}");
    }
}
