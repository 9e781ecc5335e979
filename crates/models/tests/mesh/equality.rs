//! The numbers do not depend on the mesh, but for the order of sums.

use shardwise_device::DType;
use shardwise_plan::ZeroStage;
use shardwise_plan::pipeline::ScheduleKind;
use shardwise_plan::zoo::SequenceParallel;

use crate::runs::{Run, SCHEDULES, Trace, Weights, gpt2, llama};

/// How far another mesh may lead, relative to the run of one rank.
#[derive(Debug, Clone, Copy)]
pub struct Tolerance {
    pub losses: f64,
    /// Of the first gradient norm, when the weights are still the same.
    pub first_norm: f64,
    pub norms: f64,
    /// Of each weight, beside the largest of its parameter.
    pub weights: f64,
    /// Of all weights together, in the mean of squares.
    pub all_weights: f64,
    /// Of each score that the trained model gives, absolute.
    pub logits: f64,
}

/// Sums over features, rows and ranks in another order differ in the last places of f32 (6e-8 each); ten steps of AdamW, which is
/// sensitive where gradients nearly cancel, make that more, in single weights most.
pub const F32: Tolerance =
    Tolerance { losses: 5e-7, first_norm: 5e-7, norms: 2e-5, weights: 2e-3, all_weights: 1e-5, logits: 2e-5 };

pub fn check(found: &Trace, expected: &Trace, tolerance: Tolerance, what: &str) {
    let worst = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| ((a - b) / b).abs()).fold(0.0, f64::max);
    let losses = worst(&found.losses, &expected.losses);
    let first_norm = worst(&found.norms[..1], &expected.norms[..1]);
    let norms = worst(&found.norms, &expected.norms);
    let asked = worst(&[found.asked], &[expected.asked]);
    let weight_gap = |((name, a), (other, b)): (&Weights, &Weights)| {
        assert_eq!((name, a.len()), (other, b.len()), "{what}");
        let largest = b.iter().fold(1e-3f32, |most, x| most.max(x.abs()));
        f64::from(a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest)
    };
    assert_eq!(found.weights.len(), expected.weights.len(), "{what}");
    let sorted = |trace: &Trace| {
        let mut weights = trace.weights.clone();
        weights.sort_by(|a, b| a.0.cmp(&b.0));
        weights
    };
    let (ours, theirs) = (sorted(found), sorted(expected));
    let weights = ours.iter().zip(&theirs).map(weight_gap).fold(0.0, f64::max);
    let values = |all: &[Weights]| -> Vec<f64> {
        all.iter().flat_map(|(_, values)| values).map(|&value| f64::from(value)).collect()
    };
    let (ours, theirs) = (values(&ours), values(&theirs));
    let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
    let gap = squares(&mut ours.iter().zip(&theirs).map(|(a, b)| a - b));
    let all_weights = (gap / squares(&mut theirs.iter().copied())).sqrt();
    assert_eq!(found.logits.len(), expected.logits.len(), "{what}");
    let logits = found.logits.iter().zip(&expected.logits).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let told = format!(
        "losses {losses:.1e}, asked {asked:.1e}, first norm {first_norm:.1e}, norms {norms:.1e}, weights {weights:.1e}, \
         all {all_weights:.1e}, logits {logits:.1e}"
    );
    println!("{what}: {told}");
    assert!(losses <= tolerance.losses && asked <= tolerance.losses, "{told}: {what}");
    assert!(first_norm <= tolerance.first_norm && norms <= tolerance.norms, "{told}: {what}");
    assert!(weights <= tolerance.weights && all_weights <= tolerance.all_weights, "{told}: {what}");
    assert!(f64::from(logits) <= tolerance.logits, "{told}: {what}");
}

/// Pipeline, data, tensor.
const MESHES: [[usize; 3]; 13] = [
    [2, 1, 1],
    [1, 1, 2],
    [4, 1, 1],
    [1, 1, 4],
    [2, 2, 1],
    [1, 2, 2],
    [2, 1, 2],
    [2, 2, 2],
    [4, 1, 2],
    [2, 1, 4],
    [1, 1, 8],
    [8, 1, 1],
    [1, 4, 2],
];

#[test]
fn every_mesh_trains_as_one_rank_does() {
    let models = [llama(), gpt2()];
    let alone =
        models.each_ref().map(|model| Run::new(model, [1, 1, 1], ZeroStage::Zero, DType::F32).trace());
    for (i, mesh) in MESHES.into_iter().enumerate() {
        // The stages take turns with the models: `bits` holds those of one mesh against each other.
        for (j, stage) in ZeroStage::ALL.into_iter().enumerate() {
            let turn = (i + j) % 2;
            let run = Run::new(&models[turn], mesh, stage, DType::F32);
            let what = format!("{} {mesh:?} stage {stage}", models[turn]["model_type"]);
            check(&run.trace(), &alone[turn], F32, &what);
        }
    }
}

#[test]
fn sequence_parallel_ranks_train_as_one_rank_does() {
    for model in [llama(), gpt2()] {
        let alone = Run::new(&model, [1, 1, 1], ZeroStage::Zero, DType::F32).trace();
        for mesh in [[1, 1, 2], [2, 1, 2], [1, 2, 2], [1, 1, 4], [1, 1, 8]] {
            let run = Run::new(&model, mesh, ZeroStage::Two, DType::F32);
            let run = Run { sequence: SequenceParallel::On, ..run };
            check(&run.trace(), &alone, F32, &format!("{} {mesh:?} sequence", model["model_type"]));
        }
    }
}

#[test]
fn every_schedule_trains_as_one_rank_does() {
    for (i, model) in [llama(), gpt2()].into_iter().enumerate() {
        let alone = Run::new(&model, [1, 1, 1], ZeroStage::Zero, DType::F32).steps(4).trace();
        for (mesh, num_chunks) in
            [([2, 1, 1], 2), ([4, 1, 1], 2), ([2, 2, 1], 4), ([1, 1, 1], 3), ([2, 1, 2], 3)]
        {
            for (j, schedule) in SCHEDULES.into_iter().enumerate() {
                let schedule = match schedule {
                    ScheduleKind::Interleaved { .. } => ScheduleKind::Interleaved { num_chunks },
                    other => other,
                };
                let stage = [ZeroStage::One, ZeroStage::Three][(i + j + mesh[1]) % 2];
                let run = Run { schedule, ..Run::new(&model, mesh, stage, DType::F32).steps(4) };
                let what = format!("{} {mesh:?} {schedule} stage {stage}", model["model_type"]);
                check(&run.trace(), &alone, F32, &what);
            }
        }
    }
}
