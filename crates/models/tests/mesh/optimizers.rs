//! Optimizers that look at more than an element, and copies of one parameter that must not drift apart.

use std::collections::HashMap;

use shardwise_comm::thread;
use shardwise_device::DType;
use shardwise_plan::pipeline::ScheduleKind;
use shardwise_plan::zoo::SequenceParallel;
use shardwise_plan::{SplitUnits, ZeroStage};
use shardwise_zero::{
    AdamOptions, BiasCorrection, Direction, LambOptions, MuonOptions, Optimizer, Overlap, SgdOptions,
    StatePrecision,
};

use crate::equality::{F32, Tolerance, check};
use crate::runs::{Run, dropping_gpt2, gpt2, llama};

fn lamb() -> Optimizer {
    Optimizer::Lamb(LambOptions {
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-6,
        weight_decay: 0.1,
        max_coeff: 10.0,
        min_coeff: 0.01,
        bias_correction: BiasCorrection::On,
    })
}

fn sgd() -> Optimizer {
    let options =
        SgdOptions { momentum: 0.9, dampening: 0.0, direction: Direction::Nesterov, weight_decay: 0.01 };
    Optimizer::Sgd(options)
}

/// LAMB's trust ratio is of a whole parameter, which ranks of two axes have in parts.
#[test]
fn lamb_and_sgd_train_as_on_one_rank() {
    for (model, optimizer) in [(llama(), lamb()), (gpt2(), lamb()), (gpt2(), sgd()), (llama(), sgd())] {
        let run = |mesh, stage| {
            let run = Run::new(&model, mesh, stage, DType::F32).steps(3);
            Run { optimizer: optimizer.clone(), ..run }
        };
        let alone = run([1, 1, 1], ZeroStage::Zero).trace();
        for (mesh, sequence) in [
            ([1, 1, 2], SequenceParallel::Off),
            ([2, 1, 1], SequenceParallel::Off),
            ([2, 2, 2], SequenceParallel::On),
            ([1, 2, 4], SequenceParallel::Off),
        ] {
            for stage in [ZeroStage::One, ZeroStage::Three] {
                let what = format!("{} {mesh:?} stage {stage} {optimizer:?}", model["model_type"]);
                check(&Run { sequence, ..run(mesh, stage) }.trace(), &alone, F32, &what);
            }
        }
    }
}

/// What several ranks have of one parameter: its name, and which part of it.
type Piece = (String, usize);

/// The bits that each rank computes with, by piece: norms and biases on tensor ranks, shared heads, a tied table on two stages.
fn pieces(run: &Run) -> Vec<HashMap<Piece, Vec<u8>>> {
    thread::run(run.mesh().world_size(), |world| {
        let mut engine = run.engine(world);
        let at = engine.ranks().at();
        for step in 0..run.num_steps {
            engine.train_step(3e-3, |microbatch| Ok(run.batch(at.data, step, microbatch))).unwrap();
        }
        let whole: HashMap<_, _> = engine
            .specs()
            .iter()
            .flat_map(|layer| &layer.params)
            .map(|param| (param.name.clone(), param.split))
            .collect();
        let width = run.compute.size_bytes();
        let mut pieces = HashMap::new();
        let num_units = engine.zero().layouts().len();
        for unit in 0..num_units {
            let bytes = engine.zero_mut().compute_bytes(unit).unwrap();
            for slot in &engine.zero().layout(unit).slots {
                let part = match whole[&slot.param.name] {
                    None => 0,
                    Some(split) => at.tensor / split.num_sharers(run.mesh[2]),
                };
                let range = slot.range().start * width..slot.range().end * width;
                pieces.insert((slot.param.name.clone(), part), bytes[range].to_vec());
            }
        }
        pieces
    })
}

/// Copies move alike to the bit, also where states are rounded at random, and where each tensor rank sees other tokens.
#[test]
fn copies_of_a_parameter_never_drift_apart() {
    let shared = |split: shardwise_plan::TensorSplit| matches!(split.units, SplitUnits::SharedHeads(2));
    assert!(
        shardwise_plan::zoo::ModelConfig::from_json(&llama())
            .unwrap()
            .layers()
            .iter()
            .flat_map(|layer| &layer.params)
            .any(|param| param.split.is_some_and(shared)),
        "there are heads to share"
    );
    for model in [dropping_gpt2(), llama()] {
        for (mesh, sequence) in [
            ([2, 1, 2], SequenceParallel::On),
            ([2, 2, 1], SequenceParallel::Off),
            ([1, 1, 4], SequenceParallel::On),
            ([2, 1, 4], SequenceParallel::Off),
        ] {
            for (stage, compute, states) in [
                (ZeroStage::One, DType::Bf16, StatePrecision::Bf16 { seed: 11 }),
                (ZeroStage::Three, DType::F32, StatePrecision::Bf16 { seed: 11 }),
                (ZeroStage::Two, DType::Bf16, StatePrecision::F32),
            ] {
                let run = Run::new(&model, mesh, stage, compute).steps(2);
                let run = Run { sequence, states, schedule: ScheduleKind::ZeroBubble, ..run };
                let run = Run { overlap: Overlap::SideThread, ..run };
                let mut first: HashMap<Piece, Vec<u8>> = HashMap::new();
                let mut num_compared = 0;
                for (rank, pieces) in pieces(&run).into_iter().enumerate() {
                    for (piece, bytes) in pieces {
                        let what = format!("{piece:?} on rank {rank} of {mesh:?}, stage {stage}, {states:?}");
                        match first.get(&piece) {
                            Some(expected) => {
                                assert!(bytes == *expected, "{what}");
                                num_compared += 1;
                            }
                            None => drop(first.insert(piece, bytes)),
                        }
                    }
                }
                assert!(num_compared > 0, "{mesh:?}");
            }
        }
    }
}

/// States that are rounded at random are the same on every mesh, as far as gradients are.
#[test]
fn states_in_16_bits_train_as_on_one_rank() {
    let run = |mesh, stage| {
        let run = Run::new(&gpt2(), mesh, stage, DType::F32).steps(3);
        Run { states: StatePrecision::Bf16 { seed: 11 }, ..run }
    };
    let alone = run([1, 1, 1], ZeroStage::Zero).trace();
    let f32 = Run { states: StatePrecision::F32, ..run([1, 1, 1], ZeroStage::Zero) }.trace();
    assert!(alone.weights != f32.weights, "states are rounded");
    // A state that is on the edge goes to the one or the other side, 2^-8 of it; weights move by a few steps of 3e-3.
    let tolerance = Tolerance {
        losses: 1e-5,
        first_norm: 5e-7,
        norms: 2e-4,
        weights: 2e-2,
        all_weights: 5e-4,
        logits: 2e-3,
    };
    for mesh in [[2, 1, 1], [1, 1, 2], [2, 2, 2]] {
        for stage in [ZeroStage::One, ZeroStage::Three] {
            check(
                &run(mesh, stage).trace(),
                &alone,
                tolerance,
                &format!("{mesh:?} stage {stage} bf16 states"),
            );
        }
    }
}

#[test]
fn muon_is_refused_on_several_tensor_ranks_and_runs_on_pipelines() {
    let muon = Optimizer::Muon(MuonOptions {
        momentum: 0.95,
        direction: Direction::Nesterov,
        num_newton_schulz_steps: 5,
        weight_decay: 0.01,
        adamw: AdamOptions {
            beta1: 0.9,
            beta2: 0.99,
            eps: 1e-8,
            weight_decay: 0.01,
            bias_correction: BiasCorrection::On,
        },
        adamw_lr_scale: 0.3,
        adamw_for: MuonOptions::not_hidden(),
    });
    let run = |mesh, stage| {
        let run = Run::new(&gpt2(), mesh, stage, DType::F32).steps(3);
        Run { optimizer: muon.clone(), ..run }
    };
    for mesh in [[1, 1, 2], [2, 1, 2]] {
        let run = run(mesh, ZeroStage::One);
        for error in
            thread::run(run.mesh().world_size(), |world| run.try_engine(world).err().unwrap().to_string())
        {
            let expected = "`optimizer` is `muon`, expected `adamw`, `lamb` or another: tensor-parallel ranks have no whole matrices";
            assert!(error == expected || error.ends_with(&format!("gave up: {expected}")), "{error}");
        }
    }
    let alone = run([1, 1, 1], ZeroStage::Zero).trace();
    for mesh in [[2, 1, 1], [2, 2, 1], [4, 1, 1]] {
        for stage in [ZeroStage::Zero, ZeroStage::Three] {
            check(&run(mesh, stage).trace(), &alone, F32, &format!("{mesh:?} stage {stage} muon"));
        }
    }
}
