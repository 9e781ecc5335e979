//! Parameters as they come and go.

use proptest::prelude::*;
use shardwise_comm::Operation;
use shardwise_device::{DType, Place, Slice};
use shardwise_plan::ZeroStage;
use shardwise_zero::{Overlap, Zero, ZeroOptions};

use crate::harness::{Model, options, reduce, unchanged, weights};

/// One call that an engine may make at any time.
#[derive(Debug, Clone, Copy)]
enum Call {
    Gather(usize),
    Prefetch(usize),
    Release(usize),
    /// Reduces all units and steps.
    Step,
}

const NUM_UNITS: usize = 4;

fn model() -> Model {
    Model { frozen: vec![2], ..Model::new(&[&[70, 5], &[33], &[9, 40], &[]]) }
}

fn call() -> impl Strategy<Value = Call> {
    prop_oneof![
        4 => (0..NUM_UNITS).prop_map(Call::Gather),
        3 => (0..NUM_UNITS).prop_map(Call::Prefetch),
        3 => (0..NUM_UNITS).prop_map(Call::Release),
        1 => Just(Call::Step),
    ]
}

/// Gathers a unit and copies what is there.
fn gathered(zero: &mut Zero, unit: usize) -> Vec<u8> {
    let (numel, dtype) = (zero.layout(unit).padded_numel, zero.compute_dtype());
    let ptr = zero.gather(unit).unwrap();
    // SAFETY: `gather` names the unit's `padded_numel` elements, which stay until `release` or `step`.
    unsafe { Slice::from_raw(ptr, numel, dtype, Place::Cpu) }.bytes().to_vec()
}

/// Makes the calls and returns what every gather found.
fn play(zero: &mut Zero, calls: &[Call]) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    let mut num_steps = 0;
    for call in calls {
        match *call {
            Call::Gather(unit) => found.push(gathered(zero, unit)),
            Call::Prefetch(unit) => zero.prefetch(unit).unwrap(),
            Call::Release(unit) => zero.release(unit),
            Call::Step => {
                (0..NUM_UNITS).for_each(|unit| reduce(zero, unit, num_steps, 0, &unchanged));
                zero.step(0.01, &[]).unwrap();
                num_steps += 1;
            }
        }
    }
    found
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn any_order_of_calls_finds_the_parameters_of_stage_0(
        calls in prop::collection::vec(call(), 1..40),
        world in 1usize..4,
        compute in prop::sample::select(vec![DType::F32, DType::Bf16, DType::F16]),
    ) {
        let run = |stage, overlap| {
            let options = ZeroOptions { overlap, ..options(stage, compute) };
            model().run(world, &options, |zero| play(zero, &calls))
        };
        let expected = run(ZeroStage::Zero, Overlap::Inline);
        for stage in ZeroStage::ALL {
            for overlap in [Overlap::Inline, Overlap::SideThread] {
                prop_assert_eq!(&run(stage, overlap), &expected, "stage {}, {:?}", stage, overlap);
            }
        }
    }
}

/// How many all-gathers `f` costs.
fn gathers(zero: &mut Zero, f: impl FnOnce(&mut Zero)) -> u64 {
    let count = |zero: &Zero| zero.group().ledger().of(Operation::AllGather).num_calls;
    let before = count(zero);
    f(zero);
    count(zero) - before
}

#[test]
fn stage_3_gathers_once_for_each_use() {
    for (overlap, num_prefetched) in [(Overlap::Inline, 0), (Overlap::SideThread, 1)] {
        let options = ZeroOptions { overlap, ..options(ZeroStage::Three, DType::F32) };
        model().run(2, &options, |zero| {
            let mut ptr = None;
            assert_eq!(gathers(zero, |zero| ptr = Some(zero.gather(0).unwrap())), 1);
            assert_eq!(gathers(zero, |zero| assert_eq!(zero.gather(0).unwrap(), ptr.unwrap())), 0);
            assert_eq!(gathers(zero, |zero| zero.prefetch(0).unwrap()), 0, "it is here already");
            let used = zero.pool_stats().live_bytes;
            assert_eq!(gathers(zero, |zero| zero.release(0)), 0);
            zero.release(0); // again: nothing to let go
            assert!(used > 0 && zero.pool_stats().live_bytes == 0, "the buffer went back");
            // A prefetch takes the place of the gather's own collective.
            let both = |zero: &mut Zero| {
                zero.prefetch(1).unwrap();
                zero.prefetch(1).unwrap();
                zero.gather(1).unwrap();
            };
            assert_eq!(gathers(zero, both), 1);
            zero.release(1);
            // A prefetch alone: nothing inline, one collective beside.
            zero.prefetch(1).unwrap();
            let waited = gathers(zero, |zero| zero.exchange(&[]).map(drop).unwrap());
            assert!(waited <= num_prefetched + 1);
        });
    }
}

#[test]
fn below_stage_3_a_gather_is_free_and_stays_in_place() {
    for stage in [ZeroStage::Zero, ZeroStage::One, ZeroStage::Two] {
        for overlap in [Overlap::Inline, Overlap::SideThread] {
            let options = ZeroOptions { overlap, ..options(stage, DType::Bf16) };
            model().run(3, &options, |zero| {
                let at: Vec<_> = (0..NUM_UNITS).map(|unit| zero.gather(unit).unwrap()).collect();
                play(zero, &[Call::Release(0), Call::Step, Call::Prefetch(1)]);
                let again: Vec<_> = (0..NUM_UNITS).map(|unit| zero.gather(unit).unwrap()).collect();
                assert_eq!(at, again, "stage {stage}");
                let used = gathers(zero, |zero| {
                    (0..NUM_UNITS).for_each(|unit| assert_eq!(zero.gather(unit).unwrap(), at[unit]))
                });
                assert_eq!(used, 0);
            });
        }
    }
}

/// A copy gathered before a step must not be taken for the new parameters.
#[test]
fn a_step_ages_what_was_gathered_before() {
    for overlap in [Overlap::Inline, Overlap::SideThread] {
        let options = ZeroOptions { overlap, ..options(ZeroStage::Three, DType::F32) };
        model().run(2, &options, |zero| {
            let before = gathered(zero, 0);
            zero.prefetch(1).unwrap();
            play(zero, &[Call::Step]);
            let after = gathered(zero, 0);
            assert_ne!(before, after);
            let expected = &weights(zero)[0].1;
            let bytes: Vec<u8> = expected.iter().flat_map(|x| x.to_le_bytes()).collect();
            assert_eq!(after[..bytes.len()], bytes);
        });
    }
}
