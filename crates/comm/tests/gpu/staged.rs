//! Collectives through pinned memory, against the plain reference, bit for bit; and what goes wrong on the way.

use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use shardwise_comm::staged::Staged;
use shardwise_comm::{CommError, Group, Operation, Options, Part, thread};
use shardwise_device::cuda::{Gpu, Stream};
use shardwise_device::{Buffer, DType, Memory, Slice, SliceMut};
use shardwise_fake_gpu::{ALL_WAYS, FakeGpu, on_gpu, pinned, stream, values};

use crate::common::{Ground, Log, Step, reference, run, run_on, step};

/// Small pieces, so that small data goes in many, and a deadline that ends a hanging test.
const PIECE_BYTES: usize = 4096;

fn options() -> Options {
    Options { deadline: Duration::from_secs(20), slot_bytes: 4096 }
}

/// A rank's GPU, its compute stream and its group.
struct Rank {
    group: Group,
    gpu: Gpu,
    compute: Arc<Stream>,
}

impl Rank {
    fn new(fake: &FakeGpu, world: Group) -> Self {
        let gpu = fake.gpu();
        let compute = Arc::new(stream(&gpu));
        let group = Staged::with_pieces(world, &gpu, Arc::clone(&compute), PIECE_BYTES).unwrap();
        Rank { group, gpu, compute }
    }

    fn ground(&self, log: Log) -> Ground<'_> {
        Ground::Gpu { gpu: &self.gpu, compute: &self.compute, log }
    }
}

fn check(n: usize, program: &[Step], results: &[Vec<Vec<u8>>], seed: u64) -> Result<(), TestCaseError> {
    for (rank, result) in results.iter().enumerate() {
        for (i, (got, expected)) in result.iter().zip(reference(n, rank, program, seed)).enumerate() {
            prop_assert!(*got == expected, "rank {rank} of {n}, step {i}: {:?}", program[i]);
        }
    }
    Ok(())
}

fn log() -> impl Strategy<Value = Log> {
    prop_oneof![Just(Log::Kept), Just(Log::None)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn ranks_of_one_gpu_give_the_reference(
        n in 1usize..=5,
        program in prop::collection::vec(step(), 1..6),
        way in prop::sample::select(ALL_WAYS.to_vec()),
        log in log(),
        seed in any::<u32>(),
    ) {
        let (fake, seed) = (FakeGpu::new(way), u64::from(seed));
        let results = thread::run_with(n, options(), |world| {
            let rank = Rank::new(&fake, world);
            run_on(&rank.group, rank.ground(log), &program, seed)
        });
        check(n, &program, &results, seed)?;
        prop_assert_eq!(fake.report(), "");
    }

    /// Groups side by side, and host memory between: the same handles take both.
    #[test]
    fn subgroups_are_staged_too(
        programs in prop::collection::vec(prop::collection::vec(step(), 0..4), 3),
        way in prop::sample::select(ALL_WAYS.to_vec()),
        seed in any::<u32>(),
    ) {
        let (fake, seed) = (FakeGpu::new(way), u64::from(seed));
        let groups: [&[usize]; 3] = [&[0, 1, 2], &[2, 0], &[1, 2]];
        let results = thread::run_with(3, options(), |world| {
            let rank = Rank::new(&fake, world);
            let subgroup = |ranks: &[usize]| rank.group.subgroup(&format!("{ranks:?}"), ranks).unwrap();
            let handles = [Some(rank.group.clone()), subgroup(groups[1]), subgroup(groups[2])];
            let run_both = |(handle, program): (&Option<Group>, &Vec<Step>)| {
                let group = handle.as_ref()?;
                let on_host = run(group, program, seed);
                Some((run_on(group, rank.ground(Log::None), program, seed), on_host))
            };
            handles.iter().zip(&programs).map(run_both).collect::<Vec<_>>()
        });
        for (i, (ranks, program)) in groups.iter().zip(&programs).enumerate() {
            let of_group = |rank: &usize| results[*rank][i].clone().unwrap();
            let (on_gpu, on_host): (Vec<_>, Vec<_>) = ranks.iter().map(of_group).unzip();
            check(ranks.len(), program, &on_gpu, seed)?;
            check(ranks.len(), program, &on_host, seed)?;
        }
        prop_assert_eq!(fake.report(), "");
    }
}

#[test]
fn gpus_without_links_exchange_through_the_host() {
    let fake = FakeGpu::new(ALL_WAYS[3]);
    fake.set_devices(3);
    fake.set_peers(false);
    let program = [
        Step::AllReduce { dtype: DType::Bf16, numel: 5001 },
        Step::AllGather { dtype: DType::F32, numel: 700, in_place: true },
    ];
    let results = thread::run_with(3, options(), |world| {
        let gpu = fake.open(world.group_rank() as u32);
        let compute = Arc::new(stream(&gpu));
        let group = Staged::with_pieces(world, &gpu, Arc::clone(&compute), PIECE_BYTES).unwrap();
        run_on(&group, Ground::Gpu { gpu: &gpu, compute: &compute, log: Log::Kept }, &program, 5)
    });
    check(3, &program, &results, 5).unwrap();
    fake.assert_clean();
}

/// A call returns while its copies are under way, and what uses the memory next waits for them.
#[test]
fn a_call_returns_before_its_copies_are_over() {
    let fake = FakeGpu::lazy();
    thread::run_with(2, options(), |world| {
        let rank = Rank::new(&fake, world);
        let mut own = on_gpu(&rank.gpu, 10);
        rank.compute.copy(pinned(&rank.gpu, &[1.5; 10]).view(), own.view_mut()).unwrap();
        rank.group.all_reduce(own.view_mut()).unwrap();
        rank.group.barrier().unwrap();
        // Written over on another stream at once; the second sum must not see it early, nor the copy of it late.
        let mut kept = on_gpu(&rank.gpu, 10);
        stream(&rank.gpu).copy(own.view(), kept.view_mut()).unwrap();
        rank.compute.fill(own.view_mut(), 0).unwrap();
        rank.group.all_reduce(own.view_mut()).unwrap();
        assert_eq!(values(&rank.gpu, &kept), [3.0; 10]);
        assert_eq!(values(&rank.gpu, &own), [0.0; 10]);
    });
    fake.assert_clean();
}

#[test]
fn pinned_memory_is_bounded_and_used_again() {
    let fake = FakeGpu::lazy();
    thread::run_with(1, options(), |world| {
        let rank = Rank::new(&fake, world);
        let mut full = on_gpu(&rank.gpu, 100_000);
        let before = fake.num_allocations();
        for _ in 0..3 {
            rank.group.all_gather_in_place(full.view_mut()).unwrap();
            rank.group.all_reduce(full.view_mut()).unwrap();
        }
        assert_eq!(fake.num_allocations() - before, 4, "two pieces under way with two buffers each");
    });
    fake.assert_clean();
}

#[test]
fn the_ledger_counts_calls_not_pieces() {
    let fake = FakeGpu::new(ALL_WAYS[2]);
    let ledgers = thread::run_with(2, options(), |world| {
        let rank = Rank::new(&fake, world);
        let mut buffer = on_gpu(&rank.gpu, 8000);
        rank.group.all_reduce(buffer.view_mut()).unwrap();
        match rank.group.group_rank() {
            0 => rank.group.send(buffer.view(), 1).unwrap(),
            _ => rank.group.recv(buffer.view_mut(), 0).unwrap(),
        }
        rank.group.all_reduce(SliceMut::of(&mut [1f32; 8])).unwrap();
        rank.group.barrier().unwrap();
        rank.group.ledger()
    });
    for (rank, ledger) in ledgers.iter().enumerate() {
        let entry = |operation| (ledger.of(operation).num_calls, ledger.of(operation).sent_bytes);
        assert_eq!(entry(Operation::AllReduce), (2, 32_000 + 32));
        assert_eq!(entry(Operation::Send), if rank == 0 { (1, 32_000) } else { (0, 0) });
        assert_eq!((entry(Operation::AllGather), entry(Operation::Barrier)), ((0, 0), (1, 0)));
    }
}

#[test]
fn all_may_send_before_they_receive_if_it_fits() {
    let fake = FakeGpu::new(ALL_WAYS[4]);
    thread::run_with(3, options(), |world| {
        let gpu = fake.gpu();
        let group = Staged::new(world, &gpu, Arc::new(stream(&gpu))).unwrap();
        let (n, me) = (3, group.group_rank());
        let sent = pinned(&gpu, &vec![me as f32; 128 << 10]);
        let mut own = on_gpu(&gpu, 128 << 10);
        stream(&gpu).copy(sent.view(), own.view_mut()).unwrap();
        group.send(own.view(), (me + 1) % n).unwrap();
        let mut got = on_gpu(&gpu, 128 << 10);
        group.recv(got.view_mut(), (me + 2) % n).unwrap();
        assert!(values(&gpu, &got).iter().all(|&x| x as usize == (me + 2) % n));
    });
    fake.assert_clean();
}

/// The text of the one error that all ranks got, and get again from their next call.
fn the_error(size: usize, f: impl Fn(&Rank) -> Result<(), CommError> + Sync) -> String {
    let fake = FakeGpu::new(ALL_WAYS[2]);
    let errors = thread::run_with(size, options(), |world| {
        let rank = Rank::new(&fake, world);
        let error = f(&rank).unwrap_err().to_string();
        assert_eq!(rank.group.barrier().unwrap_err().to_string(), error);
        error
    });
    assert!(errors.windows(2).all(|pair| pair[0] == pair[1]), "{errors:#?}");
    fake.assert_clean();
    errors.into_iter().next().unwrap()
}

#[test]
fn different_calls_are_told_in_whole_calls() {
    // In pieces these would agree at first, and one rank would be through before the other missed it.
    let text = the_error(2, |rank| {
        let numel = 4096 + 2048 * rank.group.group_rank();
        rank.group.all_reduce(on_gpu(&rank.gpu, numel).view_mut())
    });
    assert_eq!(
        text,
        "ranks `0` and `1` disagree in group `world`: rank `0` calls `all_reduce` number `0` of `4096` x `f32`, \
         rank `1` calls `all_reduce` number `0` of `6144` x `f32`"
    );
    let text = the_error(2, |rank| {
        let mut buffer = on_gpu(&rank.gpu, 5000);
        match rank.group.group_rank() {
            0 => rank.group.send(buffer.view().range(0..4096), 1).and_then(|()| rank.group.barrier()),
            _ => rank.group.recv(buffer.view_mut(), 0),
        }
    });
    assert!(text.contains("`recv` number `0` from `0` of `5000` x `f32`"), "{text}");
    assert!(text.contains("`send` number `0` to `1` of `4096` x `f32`"), "{text}");
    let text = the_error(3, |rank| {
        let mut buffer = on_gpu(&rank.gpu, 60);
        match rank.group.group_rank() {
            2 => rank.group.all_gather_in_place(buffer.view_mut()),
            _ => rank.group.all_reduce(buffer.view_mut()),
        }
    });
    assert!(text.contains("rank `2` calls `all_gather` number `0` of `20` x `f32`"), "{text}");
}

#[test]
fn arguments_that_cannot_be_right_are_the_callers_error() {
    let fake = FakeGpu::lazy();
    let errors = thread::run_with(2, options(), |world| {
        let rank = Rank::new(&fake, world);
        let (mut shard, input) = (on_gpu(&rank.gpu, 2), on_gpu(&rank.gpu, 5));
        let result = match rank.group.group_rank() {
            1 => rank.group.reduce_scatter(&[Part::Data(input.view())], shard.view_mut()),
            _ => rank.group.barrier(),
        };
        result.unwrap_err().to_string()
    });
    assert_eq!(
        errors[1],
        "`reduce_scatter` in group `world` of `2` ranks: the input has `5` elements, expected `4`"
    );
    assert_eq!(errors[0], format!("rank `1` gave up: {}", errors[1]));
}

#[test]
fn memory_of_another_gpu_is_refused() {
    let fake = FakeGpu::lazy();
    fake.set_devices(2);
    let errors = thread::run_with(2, options(), |world| {
        let rank = Rank::new(&fake, world);
        let elsewhere = fake.open(rank.group.group_rank() as u32);
        rank.group.all_reduce(on_gpu(&elsewhere, 9).view_mut()).unwrap_err()
    });
    assert!(matches!(&errors[1], CommError::Device { operation: Operation::AllReduce, .. }), "{}", errors[1]);
    assert!(
        errors[1].to_string().contains("a stream of GPU `0` was given memory on `cuda:1`"),
        "{}",
        errors[1]
    );
    assert!(matches!(&errors[0], CommError::GaveUp { rank: 1, .. }), "{}", errors[0]);
}

#[test]
fn a_compute_stream_of_another_gpu_is_refused() {
    let fake = FakeGpu::lazy();
    fake.set_devices(2);
    let (gpu, other) = (fake.open(0), fake.open(1));
    let error = Staged::new(shardwise_comm::solo(), &gpu, Arc::new(stream(&other))).err().unwrap();
    assert!(error.to_string().contains("a `compute stream` of GPU `1` was used on GPU `0`"), "{error}");
}

#[test]
fn a_rank_that_gives_up_is_heard_in_a_call_on_gpu_memory() {
    let text = the_error(3, |rank| {
        if rank.group.group_rank() == 1 {
            rank.group.poison("out of data");
        }
        rank.group.all_reduce(on_gpu(&rank.gpu, 3000).view_mut())
    });
    assert_eq!(text, "rank `1` gave up: out of data");
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    let fake = FakeGpu::lazy();
    let options = Options { deadline: Duration::from_millis(300), ..options() };
    let errors = thread::run_with(2, options, |world| {
        let rank = Rank::new(&fake, world);
        if rank.group.group_rank() == 1 {
            std::thread::sleep(Duration::from_millis(900));
        }
        rank.group.all_reduce(on_gpu(&rank.gpu, 3000).view_mut()).unwrap_err()
    });
    for error in errors {
        assert!(matches!(error, CommError::Stalled { rank: 1, waiting_rank: 0, .. }), "{error}");
    }
    fake.assert_clean();
}

/// Whatever call of the driver fails, on whichever rank: an error or the right result, nobody hangs, nothing leaks.
#[test]
fn any_call_of_the_driver_may_fail() {
    const OUT_OF_MEMORY: i32 = 2;
    let program = |rank: &Rank| -> Result<Vec<f32>, CommError> {
        let mut own = Buffer::allocate(DType::F32, 1500, &Memory::Gpu(rank.gpu.clone())).unwrap();
        rank.group.all_reduce(own.view_mut())?;
        let parts = [Part::Data(own.view().range(0..600)), Part::Zeros(900)];
        let mut shard = on_gpu(&rank.gpu, 750);
        rank.group.reduce_scatter(&parts, shard.view_mut())?;
        let mut out = vec![1f32; 750];
        stream(&rank.gpu).copy_and_wait(shard.view(), SliceMut::of(&mut out)).unwrap();
        Ok(out)
    };
    let (mut failed, mut fine) = (0, 0);
    for k in (1..400).step_by(3) {
        let fake = FakeGpu::new(ALL_WAYS[2 + k as usize % 4]);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            thread::run_with(2, options(), |world| {
                let rank = Rank::new(&fake, world);
                rank.group.barrier().unwrap();
                if rank.group.group_rank() == 0 {
                    fake.fail_at(k, OUT_OF_MEMORY);
                }
                program(&rank)
            })
        }));
        let report = fake.report();
        assert!(!report.contains("freed") && !report.contains("past the end"), "{k}: {report}");
        match outcome {
            // The test's own calls may be the ones that fail; they panic.
            Err(_) => continue,
            Ok(results) => {
                for result in results {
                    match result {
                        Ok(out) => assert_eq!((out, { fine += 1 }).0, [0.0; 750]),
                        Err(CommError::Device { .. } | CommError::GaveUp { .. }) => failed += 1,
                        Err(error) => panic!("{k}: {error}"),
                    }
                }
            }
        }
        assert_eq!(report, "", "{k}");
    }
    assert!(failed > 20 && fine > 0, "{failed} and {fine}");
}

#[test]
fn a_group_of_one_copies_and_converts() {
    let fake = FakeGpu::new(ALL_WAYS[5]);
    thread::run_with(1, options(), |world| {
        let rank = Rank::new(&fake, world);
        let ones = pinned(&rank.gpu, &[1.5, -2.0]);
        let mut input = on_gpu(&rank.gpu, 2);
        rank.compute.copy(ones.view(), input.view_mut()).unwrap();
        let mut shard = on_gpu(&rank.gpu, 4);
        let parts = [Part::Zeros(1), Part::Data(input.view()), Part::Zeros(1)];
        rank.group.reduce_scatter(&parts, shard.view_mut()).unwrap();
        let mut full = on_gpu(&rank.gpu, 4);
        rank.group.all_gather(shard.view(), full.view_mut()).unwrap();
        assert_eq!(values(&rank.gpu, &full), [0.0, 1.5, -2.0, 0.0]);
        // Part on the host, part on the GPU.
        let mut told = [0f32; 4];
        rank.group.all_gather(shard.view(), SliceMut::of(&mut told)).unwrap();
        assert_eq!(told, [0.0, 1.5, -2.0, 0.0]);
        rank.group.all_to_all(Slice::of(&[4f32, 3.0, 2.0, 1.0]), full.view_mut()).unwrap();
        assert_eq!(values(&rank.gpu, &full), [4.0, 3.0, 2.0, 1.0]);
    });
    fake.assert_clean();
}
