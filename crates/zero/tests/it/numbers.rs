//! Every stage against the plain reference, and bit for bit against each other.

use half::{bf16, f16};
use proptest::prelude::*;
use shardwise_device::DType;
use shardwise_kernels::Threads;
use shardwise_plan::ZeroStage;
use shardwise_zero::{GradientOp, LossScaling, Overlap, Predivide, ReductionOptions, StepOutcome};

use crate::harness::{Model, Trace, biases_without_decay, common, options, rounded, trace, unchanged};
use crate::reference::Reference;

/// The same f64 numbers added in another order.
const NORM_TOLERANCE: f64 = 1e-12;
/// Of a weight, for each step: the update is computed in f32 here and in f64 there. Updates are at most some ten times the
/// rate (0.01), so a few units in the last place of f32 (6e-8 of that), and of weights below 4.
const WEIGHT_TOLERANCE: f32 = 5e-7;

const NUM_STEPS: usize = 3;

#[derive(Debug, Clone)]
struct Case {
    model: Model,
    world: usize,
    compute: DType,
    accum: usize,
    clip: Option<f64>,
    reduction: ReductionOptions,
}

/// As it is by default, half of the time.
fn reduction() -> impl Strategy<Value = ReductionOptions> {
    let float = || prop::sample::select(vec![DType::F32, DType::Bf16, DType::F16]);
    let predivide = vec![Predivide::By(1.0), Predivide::By(3.0), Predivide::By(4.0), Predivide::ByNumRanks];
    let op = prop::sample::select(vec![GradientOp::Mean, GradientOp::Sum]);
    let any = (float(), prop::option::of(float()), prop::sample::select(predivide), op).prop_map(
        |(accumulation_dtype, communication_dtype, predivide, op)| ReductionOptions {
            accumulation_dtype,
            communication_dtype,
            predivide,
            op,
        },
    );
    prop_oneof![Just(ReductionOptions::default()), any]
}

fn case() -> impl Strategy<Value = Case> {
    let units = prop::collection::vec(prop::collection::vec(0usize..150, 0..4), 1..5);
    let frozen = prop::collection::vec(0usize..12, 0..2);
    let world = prop::sample::select(vec![1usize, 2, 3, 4, 5, 7]);
    let compute = prop::sample::select(vec![DType::F32, DType::Bf16, DType::F16]);
    // Norms here are around one: the lower limit bites, the upper does not.
    let clip = prop::sample::select(vec![None, Some(0.05), Some(1e3)]);
    (units, frozen, world, compute, 1usize..4, clip, reduction()).prop_map(
        |(units, frozen, world, compute, accum, clip, reduction)| Case {
            model: Model { units, frozen },
            world,
            compute,
            accum,
            clip,
            reduction,
        },
    )
}

impl Case {
    fn options(&self, stage: ZeroStage) -> shardwise_zero::ZeroOptions {
        shardwise_zero::ZeroOptions {
            grad_accum_steps: self.accum,
            clip_grad_norm: self.clip,
            groups: biases_without_decay(),
            loss_scaling: (self.compute == DType::F16).then_some(LossScaling::Static(256.0)),
            reduction: self.reduction,
            ..options(stage, self.compute)
        }
    }

    fn trace(&self, stage: ZeroStage, overlap: Overlap) -> Trace {
        let options = shardwise_zero::ZeroOptions { overlap, ..self.options(stage) };
        let steps: Vec<_> = (0..NUM_STEPS).collect();
        common(self.model.run(self.world, &options, |zero| trace(zero, &steps, self.accum, &unchanged)))
    }

    /// Holds the end of a run against the reference for its stage.
    fn check(&self, stage: ZeroStage, found: &Trace) {
        let layouts = self.model.layouts(self.world);
        let mut reference = Reference::new(&layouts, self.world, &self.options(stage));
        for (step, norm) in found.norms.iter().enumerate() {
            let (norm, expected) = (f64::from_bits(*norm), reference.step(step));
            assert!(
                (norm - expected).abs() <= NORM_TOLERANCE * expected,
                "step {step}: {norm}, expected {expected}"
            );
        }
        assert!(found.outcomes.iter().all(|outcome| *outcome == StepOutcome::Applied));
        let mut num_seen = 0;
        for ((name, values), (expected_name, expected)) in found.weights.iter().zip(reference.weights()) {
            assert_eq!((name.as_str(), values.len()), (expected_name, expected.len()));
            num_seen += 1;
            let trainable = layouts.iter().any(|layout| layout.trainable && name.starts_with(&layout.name));
            let tolerance = if trainable { WEIGHT_TOLERANCE * NUM_STEPS as f32 } else { 0.0 };
            for (i, (value, expected)) in values.iter().zip(expected).enumerate() {
                // Frozen parameters are kept in the compute type only.
                let expected = if trainable { *expected } else { rounded(*expected, self.compute) };
                assert!((value - expected).abs() <= tolerance, "{name}[{i}] is {value}, expected {expected}");
            }
        }
        assert_eq!(num_seen, reference.weights().count(), "every parameter is visited");
        self.check_copies(found);
    }

    /// The compute copy is the rounded master copy, and zero in gaps and padding.
    fn check_copies(&self, found: &Trace) {
        let mut weights = found.weights.iter();
        for (layout, copy) in self.model.layouts(self.world).iter().zip(&found.copies) {
            let mut expected = vec![0f32; layout.padded_numel];
            for slot in &layout.slots {
                let (name, values) = weights.next().expect("one for each slot");
                assert_eq!(*name, slot.param.name);
                expected[slot.range()].copy_from_slice(values);
            }
            let bytes: Vec<u8> = match self.compute {
                DType::Bf16 => expected.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
                DType::F16 => expected.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
                _ => expected.iter().flat_map(|x| x.to_le_bytes()).collect(),
            };
            assert_eq!(*copy, bytes, "compute copy of `{}`", layout.name);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 90, ..ProptestConfig::default() })]

    #[test]
    fn every_stage_is_the_reference_and_its_peers_bit_for_bit(case in case()) {
        let zero = case.trace(ZeroStage::Zero, Overlap::Inline);
        let two = case.trace(ZeroStage::Two, Overlap::Inline);
        case.check(ZeroStage::Zero, &zero);
        case.check(ZeroStage::Two, &two);
        for (stage, overlap, expected) in [
            (ZeroStage::Zero, Overlap::SideThread, &zero),
            (ZeroStage::One, Overlap::Inline, &zero),
            (ZeroStage::One, Overlap::SideThread, &zero),
            (ZeroStage::Two, Overlap::SideThread, &two),
            (ZeroStage::Three, Overlap::Inline, &two),
            (ZeroStage::Three, Overlap::SideThread, &two),
        ] {
            prop_assert_eq!(&case.trace(stage, overlap), expected, "stage {}, {:?}", stage, overlap);
        }
        if case.accum == 1 {
            prop_assert_eq!(zero, two);
        }
    }
}

/// Units large enough to be cut into pieces for several threads.
#[test]
fn the_number_of_threads_does_not_show() {
    let model = Model::new(&[&[700_001, 33]]);
    for (stage, compute, accum) in
        [(ZeroStage::Zero, DType::Bf16, 2), (ZeroStage::Two, DType::Bf16, 2), (ZeroStage::One, DType::F32, 1)]
    {
        let with = |threads: usize| {
            let threads = Threads::new(threads).unwrap();
            let options =
                shardwise_zero::ZeroOptions { threads, grad_accum_steps: accum, ..options(stage, compute) };
            common(model.run(2, &options, |zero| trace(zero, &[0, 1], accum, &unchanged)))
        };
        assert!(with(1) == with(3), "stage {stage}, {compute}");
    }
}
