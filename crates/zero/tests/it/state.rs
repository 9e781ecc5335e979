//! State by name: what is saved on one layout goes on on any other.

use std::collections::BTreeMap;
use std::sync::Mutex;

use shardwise_device::DType;
use shardwise_plan::ZeroStage;
use shardwise_zero::{PARAM, StatePrecision, Zero, ZeroError, ZeroOptions};

use crate::harness::{Model, common, options, reduce, trace, train_step, unchanged};
use crate::optimizers;

/// Bytes of each state of each parameter, whole.
type Saved = BTreeMap<Key, (DType, Vec<u8>)>;
/// Which elements were told.
type Seen = BTreeMap<Key, Vec<bool>>;
/// Of a parameter and of a state.
type Key = (String, &'static str);

fn model() -> Model {
    Model { frozen: vec![1], ..Model::new(&[&[8 * 13, 11, 8 * 40], &[40], &[8 * 9, 3], &[70]]) }
}

/// Adds this rank's part, and checks that nobody told it before.
fn save(zero: &mut Zero, saved: &Mutex<(Saved, Seen)>) {
    let mut guard = saved.lock().unwrap();
    let (saved, seen) = &mut *guard;
    zero.for_each_state::<ZeroError>(|part| {
        let (key, width) = ((part.param.name.clone(), part.name), part.dtype.size_bytes());
        let numel = part.param.numel();
        assert_eq!(part.bytes.len(), part.param_range.len() * width);
        let seen = seen.entry(key.clone()).or_insert_with(|| vec![false; numel]);
        for i in part.param_range.clone() {
            assert!(!std::mem::replace(&mut seen[i], true), "{key:?}[{i}] is told twice");
        }
        let (dtype, bytes) = saved.entry(key).or_insert_with(|| (part.dtype, vec![0; numel * width]));
        assert_eq!(*dtype, part.dtype);
        bytes[part.param_range.start * width..part.param_range.end * width].copy_from_slice(part.bytes);
        Ok(())
    })
    .unwrap();
}

fn saved_by(world: usize, options: &ZeroOptions, act: impl Fn(&mut Zero) + Sync) -> Saved {
    let saved = Mutex::default();
    model().run(world, options, |zero| {
        act(zero);
        save(zero, &saved);
    });
    let (saved, seen) = saved.into_inner().unwrap();
    assert!(seen.values().flatten().all(|&seen| seen), "every element is told");
    saved
}

fn load(zero: &mut Zero, saved: &Saved, num_steps: u64) {
    zero.load_states::<ZeroError>(num_steps, |part| {
        let (dtype, bytes) = &saved[&(part.param.name.clone(), part.name)];
        assert_eq!(*dtype, part.dtype);
        let width = dtype.size_bytes();
        let range = part.param_range.start * width..part.param_range.end * width;
        part.bytes.copy_from_slice(&bytes[range]);
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_run_goes_on_bit_for_bit_on_another_stage() {
    for (optimizer, _) in optimizers::all() {
        for (compute, states) in [
            (DType::F32, StatePrecision::F32),
            (DType::Bf16, StatePrecision::F32),
            (DType::F16, StatePrecision::Bf16 { seed: 3 }),
        ] {
            let options = |stage| ZeroOptions {
                optimizer: optimizer.clone(),
                states: if is_element_wise(&optimizer) { states } else { StatePrecision::F32 },
                ..options(stage, compute)
            };
            let whole = common(model().run(2, &options(ZeroStage::One), |zero| {
                (0..2).for_each(|step| drop(train_step(zero, step, 1, &unchanged)));
                trace(zero, &[2, 3], 1, &unchanged)
            }));
            for (from, to) in [
                (ZeroStage::Zero, ZeroStage::Three),
                (ZeroStage::Three, ZeroStage::One),
                (ZeroStage::Two, ZeroStage::Zero),
            ] {
                let saved = saved_by(2, &options(from), |zero| {
                    (0..2).for_each(|step| drop(train_step(zero, step, 1, &unchanged)));
                });
                let resumed = common(model().run(2, &options(to), |zero| {
                    // What was there before does not show.
                    train_step(zero, 7, 1, &unchanged);
                    reduce(zero, 0, 8, 0, &unchanged);
                    zero.gather(0).unwrap();
                    load(zero, &saved, 2);
                    assert_eq!(zero.num_steps(), 2);
                    trace(zero, &[2, 3], 1, &unchanged)
                }));
                assert!(resumed == whole, "{optimizer:?}, {compute}, stage {from} to {to}");
            }
        }
    }
}

fn is_element_wise(optimizer: &shardwise_zero::Optimizer) -> bool {
    use shardwise_zero::Optimizer;
    !matches!(optimizer, Optimizer::Lamb(_) | Optimizer::Muon(_))
}

#[test]
fn state_survives_any_number_of_ranks() {
    for (optimizer, _) in optimizers::all() {
        let options = |stage| ZeroOptions { optimizer: optimizer.clone(), ..options(stage, DType::Bf16) };
        let first = saved_by(3, &options(ZeroStage::Two), |zero| {
            train_step(zero, 0, 1, &unchanged);
        });
        for (name, param) in [("unit0.0.weight", true), ("unit1.0.weight", false)] {
            let names: Vec<_> = first.keys().filter(|(param, _)| param == name).map(|key| key.1).collect();
            assert!(names.contains(&PARAM) && (param || names.len() == 1));
            let dtype = first[&(name.to_owned(), PARAM)].0;
            assert_eq!(dtype, if param { DType::F32 } else { DType::Bf16 });
        }
        for (world, stage) in
            [(1, ZeroStage::Zero), (4, ZeroStage::Three), (2, ZeroStage::Zero), (5, ZeroStage::One)]
        {
            let again = saved_by(world, &options(stage), |zero| load(zero, &first, 1));
            assert!(again == first, "{optimizer:?}, {world} ranks, stage {stage}");
        }
    }
}

/// A file that cannot be read on one rank: the others end their load, and all can talk on.
#[test]
fn a_reader_that_fails_on_one_rank_leaves_the_ranks_together() {
    for stage in ZeroStage::ALL {
        model().run(2, &options(stage, DType::Bf16), |zero| {
            let is_first = zero.group().group_rank() == 0;
            let outcome = zero.load_states(1, |_| match is_first {
                true => Err(ZeroError::Lost { unit: "mine".to_owned() }),
                false => Ok(()),
            });
            assert_eq!(outcome.is_err(), is_first);
            zero.exchange(&[1.0]).unwrap();
        });
    }
}
