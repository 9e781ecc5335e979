//! Both back ends against the plain reference, bit for bit.
#![allow(clippy::unwrap_used, reason = "a test that fails may panic")]

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::{Step, reference, run, step};
use proptest::prelude::*;
use shardwise_comm::shm::{self, ShmOptions};
use shardwise_comm::{Group, Operation, Options, Part, solo, thread};
use shardwise_device::{DType, Slice, SliceMut};

/// Small slots, so that small data goes in many pieces, and a deadline that ends a hanging test.
fn options() -> Options {
    Options { deadline: Duration::from_secs(20), slot_bytes: 4096 }
}

/// As [`thread::run`], with ranks that join as processes do.
fn run_shm<T: Send>(size: usize, f: impl Fn(Group) -> T + Sync) -> Vec<T> {
    static MEETINGS: AtomicUsize = AtomicUsize::new(0);
    let meeting = format!("test-{}-{}", std::process::id(), MEETINGS.fetch_add(1, Ordering::Relaxed));
    std::thread::scope(|scope| {
        let start = |rank| {
            let (f, meeting) = (&f, &meeting);
            scope.spawn(move || {
                let Options { deadline, slot_bytes } = options();
                f(shm::join(ShmOptions { deadline, slot_bytes, ..ShmOptions::new(rank, size, meeting) })
                    .unwrap())
            })
        };
        let threads: Vec<_> = (0..size).map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn check(n: usize, program: &[Step], results: &[Vec<Vec<u8>>], seed: u64) -> Result<(), TestCaseError> {
    for (rank, result) in results.iter().enumerate() {
        for (i, (got, expected)) in result.iter().zip(reference(n, rank, program, seed)).enumerate() {
            prop_assert!(*got == expected, "rank {rank} of {n}, step {i}: {:?}", program[i]);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn threads_give_the_reference(
        n in 1usize..=8,
        program in prop::collection::vec(step(), 1..8),
        seed in any::<u32>(),
    ) {
        let seed = u64::from(seed);
        let results = thread::run_with(n, options(), |group| run(&group, &program, seed));
        check(n, &program, &results, seed)?;
    }

    #[test]
    fn shared_memory_gives_the_reference(
        n in 1usize..=8,
        program in prop::collection::vec(step(), 1..8),
        seed in any::<u32>(),
    ) {
        let seed = u64::from(seed);
        let results = run_shm(n, |group| run(&group, &program, seed));
        check(n, &program, &results, seed)?;
    }

    /// Groups side by side and across each other, each at another point of its own sequence.
    #[test]
    fn subgroups_keep_apart(
        programs in prop::collection::vec(prop::collection::vec(step(), 0..5), 4),
        seed in any::<u32>(),
    ) {
        let seed = u64::from(seed);
        let groups: [&[usize]; 4] = [&[0, 1, 2, 3, 4], &[0, 3], &[4, 2, 1], &[1, 3, 0]];
        let results = thread::run_with(5, options(), |world| {
            let mut handles = vec![Some(world.clone())];
            for ranks in &groups[1..] {
                handles.push(world.subgroup(&format!("{ranks:?}"), ranks).unwrap());
            }
            for (handle, ranks) in handles.iter().zip(groups) {
                let place = ranks.iter().position(|&rank| rank == world.group_rank());
                assert_eq!(handle.as_ref().map(|group| group.group_rank()), place);
                assert!(handle.as_ref().is_none_or(|group| group.ranks() == ranks));
            }
            let run = |handle: &Option<Group>, program: &Vec<Step>| handle.as_ref().map(|group| run(group, program, seed));
            handles.iter().zip(&programs).map(|(handle, program)| run(handle, program)).collect::<Vec<_>>()
        });
        for (i, (ranks, program)) in groups.iter().zip(&programs).enumerate() {
            let of_group: Vec<_> = ranks.iter().map(|&rank| results[rank][i].clone().unwrap()).collect();
            check(ranks.len(), program, &of_group, seed)?;
        }
    }
}

#[test]
fn large_calls_stream_past_the_cache_and_stay_the_same() {
    // Above the size at which stores change, and not a multiple of anything.
    let numel = (5 << 20) / 2 + 77;
    let program = [
        Step::AllReduce { dtype: DType::Bf16, numel },
        Step::AllReduce { dtype: DType::F32, numel },
        Step::ReduceScatter { dtype: DType::Bf16, shard_dtype: DType::F32, numel, cuts: 5 },
        Step::AllGather { dtype: DType::Bf16, numel, in_place: true },
        Step::AllGather { dtype: DType::Bf16, numel, in_place: false },
        Step::AllToAll { dtype: DType::U8, numel },
        Step::Broadcast { dtype: DType::F32, numel, root: 1 },
    ];
    for n in [2, 3] {
        let options = Options { slot_bytes: Options::default().slot_bytes, ..options() };
        let results = thread::run_with(n, options, |group| run(&group, &program, 9));
        check(n, &program, &results, 9).unwrap();
    }
}

#[test]
fn subgroups_over_shared_memory() {
    let program =
        [Step::AllReduce { dtype: DType::F32, numel: 3000 }, Step::AllToAll { dtype: DType::U8, numel: 9 }];
    let results = run_shm(4, |world| {
        let rows = [[0, 1], [2, 3]].map(|ranks| world.subgroup("row", &ranks).unwrap());
        let columns = [[0, 2], [1, 3]].map(|ranks| world.subgroup("column", &ranks).unwrap());
        let row = rows.into_iter().flatten().next().unwrap();
        let column = columns.into_iter().flatten().next().unwrap();
        drop(world);
        // A group of a group, after the world's handle is gone.
        let alone = row.subgroup("alone", &[row.ranks()[1]]).unwrap();
        assert_eq!(alone.is_some(), row.group_rank() == 1);
        // Both at once, from two threads of the rank.
        std::thread::scope(|scope| {
            let beside = scope.spawn(|| (0..20).map(|i| run(&row, &program, i)).collect::<Vec<_>>());
            let here: Vec<_> = (0..20).map(|i| run(&column, &program, i)).collect();
            (beside.join().unwrap(), here)
        })
    });
    for seed in 0..20 {
        for ranks in [[0, 1], [2, 3]] {
            check(2, &program, &ranks.map(|rank| results[rank].0[seed].clone()), seed as u64).unwrap();
        }
        for ranks in [[0, 2], [1, 3]] {
            check(2, &program, &ranks.map(|rank| results[rank].1[seed].clone()), seed as u64).unwrap();
        }
    }
}

/// What a loss scale relies on: nothing that was too large for f16 is finite again after a sum, on any rank.
#[test]
fn infinities_outlive_sums_of_f16() {
    use half::f16;
    const NUMEL: usize = 3 * 1100;
    // In pieces of 4 KiB, and on three ranks in more than one way: large calls divide the work.
    let results = thread::run_with(3, options(), |group| {
        let rank = group.group_rank();
        let mut own = vec![f16::from_f32(2.0); NUMEL];
        for (i, x) in own.iter_mut().enumerate().filter(|(i, _)| i % 100 < 4) {
            *x = match (i % 100, rank) {
                (0, 1) => f16::INFINITY,
                (1, 0) => f16::INFINITY,
                (1, 2) => f16::NEG_INFINITY,
                (2, 2) => f16::NAN,
                // Finite on each rank, too large together for f16 and not for f32.
                (3, _) => f16::from_f32(-40_000.0),
                _ => *x,
            };
        }
        let mut narrow = own.clone();
        group.all_reduce(SliceMut::of(&mut narrow)).unwrap();
        let mut wide = vec![0f32; NUMEL / 3];
        group.reduce_scatter(&[Part::Data(Slice::of(&own))], SliceMut::of(&mut wide)).unwrap();
        let narrow: Vec<f32> = narrow.into_iter().map(f16::to_f32).collect();
        (narrow, wide)
    });
    let whole: Vec<f32> = results.iter().flat_map(|(_, wide)| wide.clone()).collect();
    for (narrow, _) in &results {
        for (i, (narrow, wide)) in narrow.iter().zip(&whole).enumerate() {
            match i % 100 {
                0 => assert_eq!((*narrow, *wide), (f32::INFINITY, f32::INFINITY)),
                1 | 2 => assert!(narrow.is_nan() && wide.is_nan()),
                3 => assert_eq!((*narrow, *wide), (f32::NEG_INFINITY, -120_000.0)),
                _ => assert_eq!((*narrow, *wide), (6.0, 6.0)),
            }
        }
    }
}

#[test]
fn a_group_of_one_copies_and_converts() {
    let group = solo();
    let input = [half::bf16::from_f32(1.5), half::bf16::from_f32(-2.0)];
    let mut shard = [9f32; 5];
    let parts = [Part::Zeros(1), Part::Data(Slice::of(&input)), Part::Zeros(2)];
    group.reduce_scatter(&parts, SliceMut::of(&mut shard)).unwrap();
    assert_eq!(shard, [0.0, 1.5, -2.0, 0.0, 0.0]);
    let mut full = [0f32; 5];
    group.all_gather(Slice::of(&shard), SliceMut::of(&mut full)).unwrap();
    assert_eq!(full, shard);
    group.all_gather_in_place(SliceMut::of(&mut full)).unwrap();
    group.all_reduce(SliceMut::of(&mut full)).unwrap();
    group.broadcast(SliceMut::of(&mut full), 0).unwrap();
    group.barrier().unwrap();
    assert_eq!(full, shard);
    assert!(group.subgroup("same", &[0]).unwrap().is_some());
    assert_eq!(group.ledger().total().sent_bytes, 0);
    assert_eq!(
        group.send(Slice::of(&full), 0).unwrap_err().to_string(),
        "`send` in group `world` of `1` ranks: no other rank `0`"
    );
}

#[test]
fn the_ledger_counts_what_operations_demand() {
    let ledgers = thread::run(4, |group| {
        let mut wide = [1f32; 80];
        let mut narrow = [half::bf16::ONE; 80];
        let shard = [half::bf16::ONE; 20];
        group.all_reduce(SliceMut::of(&mut wide)).unwrap();
        let mut piece = [0f32; 20];
        group.reduce_scatter(&[Part::Data(Slice::of(&narrow))], SliceMut::of(&mut piece)).unwrap();
        group.all_gather(Slice::of(&shard), SliceMut::of(&mut narrow)).unwrap();
        group.broadcast(SliceMut::of(&mut wide), 2).unwrap();
        let mut out = [half::bf16::ONE; 80];
        group.all_to_all(Slice::of(&narrow), SliceMut::of(&mut out)).unwrap();
        if group.group_rank() == 0 {
            group.send(Slice::of(&shard), 3).unwrap();
        } else if group.group_rank() == 3 {
            group.recv(SliceMut::of(&mut narrow[..20]), 0).unwrap();
        }
        group.ledger()
    });
    for (rank, ledger) in ledgers.iter().enumerate() {
        let sent = |operation| (ledger.of(operation).sent_numel, ledger.of(operation).sent_bytes);
        assert_eq!(sent(Operation::AllReduce), (120, 480));
        assert_eq!(sent(Operation::ReduceScatter), (60, 120));
        assert_eq!(sent(Operation::AllGather), (60, 120));
        assert_eq!(sent(Operation::Broadcast), if rank == 2 { (240, 960) } else { (0, 0) });
        assert_eq!(sent(Operation::AllToAll), (60, 120));
        assert_eq!(sent(Operation::Send), if rank == 0 { (20, 40) } else { (0, 0) });
        assert_eq!(ledger.of(Operation::Recv).num_calls, u64::from(rank == 3));
        assert!(ledger.of(Operation::AllReduce).time > Duration::ZERO);
    }
}

#[test]
fn all_may_send_before_they_receive_if_it_fits() {
    thread::run_with(3, options(), |group| {
        let (n, me) = (3, group.group_rank());
        let sent = vec![me as u8; 512 << 10];
        group.send(Slice::of(&sent), (me + 1) % n).unwrap();
        let mut got = vec![9u8; 512 << 10];
        group.recv(SliceMut::of(&mut got), (me + 2) % n).unwrap();
        assert!(got.iter().all(|&x| usize::from(x) == (me + 2) % n));
    });
}
