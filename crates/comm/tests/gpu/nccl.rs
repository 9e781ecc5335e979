//! Collectives by NCCL, on one without GPUs, against the plain reference, bit for bit; and what goes wrong on the way.

use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use shardwise_comm::nccl::{Library, Nccl, Search};
use shardwise_comm::{CommError, Group, Operation, Options, Part, thread};
use shardwise_device::cuda::{Gpu, Stream};
use shardwise_device::{Buffer, DType, Memory, Slice, SliceMut};
use shardwise_fake_gpu::{ALL_WAYS, Eagerness, FakeGpu, on_gpu, pinned, stream, values};

use crate::common::{Ground, Log, Step, reference, run, run_on, step};

/// Little staging memory, so that small data goes in many pieces, and a deadline that ends a hanging test.
const STAGING_BYTES: usize = 4096;

fn options() -> Options {
    Options { deadline: Duration::from_secs(20), slot_bytes: 4096 }
}

fn impatient() -> Options {
    Options { deadline: Duration::from_millis(400), ..options() }
}

fn fake((seed, eagerness): (u64, Eagerness), num_gpus: usize) -> FakeGpu {
    let fake = FakeGpu::new((seed, eagerness));
    fake.set_devices(num_gpus as i32);
    fake
}

/// A rank's GPU, its compute stream and its group.
struct Rank {
    group: Group,
    gpu: Gpu,
    compute: Arc<Stream>,
}

fn library(fake: &FakeGpu) -> Arc<Library> {
    Library::load(&Search { given: Some(fake.path().into()), libtorch: None }).unwrap()
}

impl Rank {
    fn new(fake: &FakeGpu, world: Group) -> Self {
        Rank::on(fake, fake.open(world.group_rank() as u32), world)
    }

    fn on(fake: &FakeGpu, gpu: Gpu, world: Group) -> Self {
        let compute = Arc::new(stream(&gpu));
        let (library, processor) = (library(fake), fake.processor(&gpu));
        let group =
            Nccl::with_staging(world, library, processor, Arc::clone(&compute), STAGING_BYTES).unwrap();
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
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn ranks_give_the_reference(
        n in 1usize..=5,
        program in prop::collection::vec(step(), 1..6),
        way in prop::sample::select(ALL_WAYS.to_vec()),
        log in log(),
        seed in any::<u32>(),
    ) {
        let (fake, seed) = (fake(way, n), u64::from(seed));
        let results = thread::run_with(n, options(), |world| {
            let rank = Rank::new(&fake, world);
            run_on(&rank.group, rank.ground(log), &program, seed)
        });
        check(n, &program, &results, seed)?;
        prop_assert_eq!(fake.report(), "");
    }

    /// Groups side by side, and host memory between: the same handles take both.
    #[test]
    fn subgroups_have_communicators_of_their_own(
        programs in prop::collection::vec(prop::collection::vec(step(), 0..4), 3),
        way in prop::sample::select(ALL_WAYS.to_vec()),
        seed in any::<u32>(),
    ) {
        let (fake, seed) = (fake(way, 3), u64::from(seed));
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
fn the_staging_memory_does_not_change_a_bit() {
    let program = [
        Step::AllReduce { dtype: DType::Bf16, numel: 50_001 },
        Step::ReduceScatter { dtype: DType::F16, shard_dtype: DType::F32, numel: 9001, cuts: 3 },
        Step::AllReduce { dtype: DType::F32, numel: 40_000 },
    ];
    let sizes = [1, 10_000, shardwise_comm::nccl::STAGING_BYTES];
    for (staging_bytes, log) in sizes.into_iter().flat_map(|size| [(size, Log::Kept), (size, Log::None)]) {
        let fake = fake(ALL_WAYS[3], 3);
        let results = thread::run_with(3, options(), |world| {
            let gpu = fake.open(world.group_rank() as u32);
            let compute = Arc::new(stream(&gpu));
            let (library, processor) = (library(&fake), fake.processor(&gpu));
            let group =
                Nccl::with_staging(world, library, processor, Arc::clone(&compute), staging_bytes).unwrap();
            run_on(&group, Ground::Gpu { gpu: &gpu, compute: &compute, log }, &program, 9)
        });
        check(3, &program, &results, 9).unwrap();
        fake.assert_clean();
    }
}

/// Calls return before the others have come, and what uses the memory next waits for the exchange.
#[test]
fn a_call_returns_when_it_is_queued() {
    let fake = fake(ALL_WAYS[0], 2);
    thread::run_with(2, options(), |world| {
        let rank = Rank::new(&fake, world);
        let mut own = on_gpu(&rank.gpu, 1000);
        rank.group.all_reduce(own.view_mut()).unwrap();
        rank.group.barrier().unwrap();
        if rank.group.group_rank() == 1 {
            // The other rank is past its call long before this one.
            std::thread::sleep(Duration::from_millis(200));
        }
        let begun = Instant::now();
        rank.compute.copy(pinned(&rank.gpu, &[1.5; 1000]).view(), own.view_mut()).unwrap();
        rank.group.all_reduce(own.view_mut()).unwrap();
        assert!(begun.elapsed() < Duration::from_millis(150), "the second call makes no communicator");
        let mut kept = on_gpu(&rank.gpu, 1000);
        stream(&rank.gpu).copy(own.view(), kept.view_mut()).unwrap();
        rank.compute.fill(own.view_mut(), 0).unwrap();
        rank.group.all_reduce(own.view_mut()).unwrap();
        assert_eq!(values(&rank.gpu, &kept), [3.0; 1000]);
        assert_eq!(values(&rank.gpu, &own), [0.0; 1000]);
    });
    fake.assert_clean();
}

#[test]
fn a_group_without_gpu_memory_has_no_communicator() {
    let fake = fake(ALL_WAYS[0], 2);
    thread::run_with(2, options(), |world| {
        let rank = Rank::new(&fake, world);
        let pair = rank.group.subgroup("pair", &[1, 0]).unwrap().unwrap();
        pair.all_reduce(SliceMut::of(&mut [1f32; 100])).unwrap();
        pair.all_reduce(on_gpu(&rank.gpu, 0).view_mut()).unwrap();
        assert_eq!(fake.num_nccl_calls(0) + fake.num_nccl_calls(1), 0);
    });
    fake.assert_clean();
}

#[test]
fn staging_memory_is_bounded_and_used_again() {
    let fake = fake(ALL_WAYS[0], 2);
    thread::run_with(2, options(), |world| {
        let rank = Rank::new(&fake, world);
        let (input, mut shard) = (on_gpu(&rank.gpu, 100_000), on_gpu(&rank.gpu, 50_000));
        let parts = [Part::Data(input.view().range(0..70_000)), Part::Zeros(30_000)];
        rank.group.barrier().unwrap();
        let before = fake.num_allocations();
        rank.group.barrier().unwrap();
        for _ in 0..3 {
            rank.group.reduce_scatter(&parts, shard.view_mut()).unwrap();
        }
        rank.group.barrier().unwrap();
        assert_eq!(
            fake.num_allocations() - before,
            4 + 2,
            "two pieces under way: terms, and what rank 0 packs"
        );
    });
    fake.assert_clean();
}

#[test]
fn the_ledger_counts_calls_not_pieces() {
    let fake = fake(ALL_WAYS[2], 2);
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
    let fake = fake(ALL_WAYS[4], 3);
    thread::run_with(3, options(), |world| {
        let Rank { group, gpu, .. } = Rank::new(&fake, world);
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

/// Two ranks send each other large messages at once, each from a thread that runs ahead, and go on computing.
#[test]
fn large_messages_cross() {
    for way in ALL_WAYS {
        let fake = fake(way, 2);
        thread::run_with(2, options(), |world| {
            let rank = Rank::new(&fake, world);
            let (me, numel) = (rank.group.group_rank(), 200_000);
            let there = rank.group.subgroup("there", &[0, 1]).unwrap().unwrap();
            let back = rank.group.subgroup("back", &[0, 1]).unwrap().unwrap();
            let (out, into) = if me == 0 { (there, back) } else { (back, there) };
            std::thread::scope(|scope| {
                let (gpu, compute) = (&rank.gpu, &rank.compute);
                scope.spawn(move || {
                    let mut own = on_gpu(gpu, numel);
                    for i in 0..3 {
                        let filled = pinned(gpu, &vec![(10 * me + i) as f32; numel]);
                        compute.copy(filled.view(), own.view_mut()).unwrap();
                        out.send_ahead(own.view(), 1 - me).unwrap();
                    }
                });
                let mut got = on_gpu(gpu, numel);
                for i in 0..3 {
                    into.recv(got.view_mut(), 1 - me).unwrap();
                    assert_eq!(values(gpu, &got), vec![(10 * (1 - me) + i) as f32; numel]);
                }
            });
        });
        fake.assert_clean();
    }
}

/// The error that all ranks got, or get from a later call: calls return when they are queued.
fn errors(
    fake: &FakeGpu,
    size: usize,
    options: Options,
    f: impl Fn(&Rank) -> Result<(), CommError> + Sync,
) -> Vec<CommError> {
    let begun = Instant::now();
    let limit = options.deadline * 4 + Duration::from_secs(4);
    let errors = thread::run_with(size, options, |world| {
        let rank = Rank::new(fake, world);
        let error = match f(&rank) {
            Err(error) => error,
            // As a rank that goes on without calling anything.
            Ok(()) => loop {
                if let Err(error) = rank.group.check() {
                    break error;
                }
                assert!(begun.elapsed() < limit, "no error came");
                std::thread::sleep(Duration::from_millis(5));
            },
        };
        // Streams are free, and whoever asks again gets an error at once.
        rank.gpu.synchronize().unwrap();
        rank.group.all_reduce(on_gpu(&rank.gpu, 10).view_mut()).unwrap_err();
        error
    });
    fake.assert_clean();
    errors
}

fn the_error(errors: &[CommError]) -> String {
    let texts: Vec<_> = errors.iter().map(ToString::to_string).collect();
    assert!(texts.windows(2).all(|pair| pair[0] == pair[1]), "{texts:#?}");
    texts[0].clone()
}

#[test]
fn different_calls_are_told_in_whole_calls() {
    for way in ALL_WAYS {
        let told = errors(&fake(way, 2), 2, options(), |rank| {
            rank.group.all_reduce(on_gpu(&rank.gpu, 10).view_mut())?;
            let numel = 4096 + 2048 * rank.group.group_rank();
            rank.group.all_reduce(on_gpu(&rank.gpu, numel).view_mut())
        });
        assert_eq!(
            the_error(&told),
            "ranks `0` and `1` disagree in group `world`: rank `0` calls `all_reduce` number `1` of `4096` x `f32`, \
             rank `1` calls `all_reduce` number `1` of `6144` x `f32`"
        );
    }
    let told = errors(&fake(ALL_WAYS[2], 3), 3, options(), |rank| {
        let mut buffer = on_gpu(&rank.gpu, 60);
        match rank.group.group_rank() {
            2 => rank.group.all_gather_in_place(buffer.view_mut()),
            _ => rank.group.all_reduce(buffer.view_mut()),
        }
    });
    let text = the_error(&told);
    assert!(text.contains("rank `2` calls `all_gather` number `0` of `20` x `f32`"), "{text}");
}

#[test]
fn arguments_that_cannot_be_right_are_the_callers_error() {
    let told = errors(&fake(ALL_WAYS[0], 2), 2, options(), |rank| {
        let (mut shard, input) = (on_gpu(&rank.gpu, 2), on_gpu(&rank.gpu, 5));
        match rank.group.group_rank() {
            1 => rank.group.reduce_scatter(&[Part::Data(input.view())], shard.view_mut()),
            _ => rank.group.barrier(),
        }
    });
    assert_eq!(
        told[1].to_string(),
        "`reduce_scatter` in group `world` of `2` ranks: the input has `5` elements, expected `4`"
    );
    assert_eq!(told[0].to_string(), format!("rank `1` gave up: {}", told[1]));
}

#[test]
fn memory_and_streams_of_another_gpu_are_refused() {
    let shared = fake(ALL_WAYS[0], 2);
    let told =
        errors(&shared, 2, options(), |rank| rank.group.all_reduce(on_gpu(&shared.open(0), 9).view_mut()));
    assert!(matches!(&told[1], CommError::Device { operation: Operation::AllReduce, .. }), "{}", told[1]);
    assert!(told[1].to_string().contains("a stream of GPU `1` was given memory on `cuda:0`"), "{}", told[1]);

    let (gpu, other) = (shared.open(0), shared.open(1));
    let (library, processor, compute) = (library(&shared), shared.processor(&gpu), Arc::new(stream(&other)));
    let error = Nccl::new(shardwise_comm::solo(), library, processor, compute).err().unwrap();
    assert!(error.to_string().contains("a `compute stream` of GPU `1` was used on GPU `0`"), "{error}");
}

#[test]
fn ranks_that_share_a_gpu_are_told_by_nccl() {
    let fake = fake(ALL_WAYS[2], 1);
    let told = thread::run_with(2, impatient(), |world| {
        let rank = Rank::on(&fake, fake.gpu(), world);
        rank.group.all_reduce(on_gpu(&rank.gpu, 9).view_mut()).unwrap_err().to_string()
    });
    fake.assert_clean();
    for (rank, text) in told.iter().enumerate() {
        let own = format!(
            "`all_reduce` in group `world`: `ncclCommInitRankConfig` of NCCL failed on rank `{rank}`"
        );
        assert!(
            text.starts_with(&own) || text.starts_with(&format!("rank `{}` gave up", 1 - rank)),
            "{text}"
        );
        assert!(text.contains("invalid usage (Duplicate GPU detected)"), "{text}");
        assert!(text.contains("NCCL_DEBUG=INFO"), "{text}");
    }
}

#[test]
fn a_library_that_will_not_do_is_refused_with_reasons() {
    let nowhere = Search { given: Some("/nowhere/libnccl.so.2".into()), libtorch: None };
    assert_eq!(
        Library::load(&nowhere).unwrap_err().to_string(),
        "no usable NCCL, through which GPUs exchange; `/nowhere/libnccl.so.2`: no such file or folder; install the \
         package `nvidia-nccl-cu13` beside libtorch, or name the folder that holds `libnccl.so.2` in `SHARDWISE_NCCL`"
    );
    let fake = FakeGpu::lazy();
    // Beside libtorch, as wheels lie.
    let packages = tempfile::tempdir().unwrap();
    let folder = packages.path().join("nvidia/nccl/lib");
    std::fs::create_dir_all(&folder).unwrap();
    let search = Search { given: None, libtorch: Some(packages.path().join("torch")) };
    let told = Library::load(&search).map(drop).map_err(|error| error.to_string());
    // The system may have one.
    if let Err(told) = told {
        assert!(told.contains("holds no `libnccl.so.2`; `libnccl.so.2`: is not loaded: "), "{told}");
    }
    std::fs::copy(fake.path(), folder.join("libnccl.so.2")).unwrap();
    let found = Library::load(&search).unwrap();
    assert_eq!(
        (found.version().to_string().as_str(), found.place()),
        ("2.28.9", folder.join("libnccl.so.2").to_str().unwrap())
    );
    let found = Library::load(&Search { given: Some(folder), libtorch: None }).unwrap();
    assert!(found.place().ends_with("/libnccl.so.2"));

    fake.set_nccl_version(21403);
    let old = Search { given: Some(fake.path().into()), libtorch: None };
    let error = Library::load(&old).unwrap_err().to_string();
    assert!(error.contains("is NCCL 2.14.3, older than 2.18.0"), "{error}");
    let other = Search { given: Some("/lib/x86_64-linux-gnu/libc.so.6".into()), libtorch: None };
    let error = Library::load(&other).unwrap_err().to_string();
    assert!(error.contains("has no function `ncclGetVersion`"), "{error}");
}

/// Several kinds of calls, in pieces, and a message.
fn program(rank: &Rank) -> Result<Vec<f32>, CommError> {
    let mut own = Buffer::allocate(DType::F32, 1500, &Memory::Gpu(rank.gpu.clone())).unwrap();
    rank.group.all_reduce(own.view_mut())?;
    let parts = [Part::Data(own.view().range(0..600)), Part::Zeros(900)];
    let mut shard = on_gpu(&rank.gpu, 750);
    rank.group.reduce_scatter(&parts, shard.view_mut())?;
    let mut large = on_gpu(&rank.gpu, 140_000);
    match rank.group.group_rank() {
        0 => rank.group.send(large.view(), 1)?,
        _ => rank.group.recv(large.view_mut(), 0)?,
    }
    rank.group.broadcast(own.view_mut(), 1)?;
    let mut out = vec![1f32; 750];
    stream(&rank.gpu).copy_and_wait(shard.view(), SliceMut::of(&mut out)).unwrap();
    rank.group.barrier()?;
    Ok(out)
}

/// Whatever call of NCCL fails, on whichever rank: an error that names the call and the rank, nobody hangs, nothing leaks.
#[test]
fn any_call_of_nccl_may_fail() {
    const INTERNAL_ERROR: i32 = 3;
    for (device, step) in [(0, 3), (1, 4)] {
        let mut failed = 0;
        for k in (1..).step_by(step) {
            let fake = fake(ALL_WAYS[2 + k as usize % 4], 2);
            fake.fail_nccl_at(device, k, INTERNAL_ERROR);
            let results = thread::run_with(2, options(), |world| program(&Rank::new(&fake, world)));
            assert_eq!(fake.report(), "", "call {k} of GPU {device}");
            let texts: Vec<_> =
                results.iter().filter_map(|result| result.as_ref().err()).map(ToString::to_string).collect();
            for text in &texts {
                assert!(
                    text.contains(&format!("of NCCL failed on rank `{device}`: internal error")),
                    "{k}: {text}"
                );
            }
            failed += texts.len();
            if fake.num_nccl_calls(device) < k {
                assert!(texts.is_empty());
                break;
            }
        }
        assert!(failed > 10, "{failed}");
    }
}

#[test]
fn an_error_from_the_background_ends_the_call_on_every_rank() {
    const REMOTE_ERROR: i32 = 6;
    for way in [ALL_WAYS[0], ALL_WAYS[2]] {
        let fake = fake(way, 3);
        let told = errors(&fake, 3, options(), |rank| {
            let mut buffer = on_gpu(&rank.gpu, 3000);
            rank.group.all_reduce(buffer.view_mut())?;
            rank.gpu.synchronize().unwrap();
            rank.group.barrier()?;
            if rank.group.group_rank() == 2 {
                // What the others wait for, on their streams.
                fake.set_nccl_async_error(1, REMOTE_ERROR);
                return Ok(());
            }
            rank.group.all_reduce(buffer.view_mut())
        });
        for error in told {
            let text = error.to_string();
            assert!(text.contains("`all_reduce` in group `world`: "), "{text}");
            assert!(text.contains("of NCCL failed on rank `1`: remote process exited"), "{text}");
        }
    }
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    for way in ALL_WAYS {
        let fake = fake(way, 3);
        let told = errors(&fake, 3, impatient(), |rank| {
            let mut buffer = on_gpu(&rank.gpu, 3000);
            rank.group.all_reduce(buffer.view_mut())?;
            if rank.group.group_rank() == 1 {
                return Ok(());
            }
            rank.group.all_gather_in_place(buffer.view_mut())
        });
        for error in told {
            let CommError::Stalled { rank: 1, waiting_rank: 0 | 2, call, .. } = &error else {
                panic!("{error}")
            };
            assert_eq!((call.operation, call.sequence), (Operation::AllGather, 1));
        }
    }
}

/// The first call makes the communicator, with all ranks.
#[test]
fn a_rank_that_does_not_come_at_first_is_named() {
    let fake = fake(ALL_WAYS[2], 2);
    let told = errors(&fake, 2, impatient(), |rank| {
        if rank.group.group_rank() == 1 {
            return Ok(());
        }
        rank.group.all_reduce(on_gpu(&rank.gpu, 3000).view_mut())
    });
    for error in told {
        let CommError::Stalled { rank: 1, waiting_rank: 0, call, .. } = &error else { panic!("{error}") };
        assert_eq!((call.operation, call.numel), (Operation::AllReduce, 3000));
    }
}

#[test]
fn a_rank_that_gives_up_is_heard_while_others_are_in_a_call() {
    for way in ALL_WAYS {
        let told = errors(&fake(way, 3), 3, options(), |rank| {
            let mut buffer = on_gpu(&rank.gpu, 3000);
            rank.group.all_reduce(buffer.view_mut())?;
            if rank.group.group_rank() == 1 {
                std::thread::sleep(Duration::from_millis(50));
                rank.group.poison("out of data");
                return Ok(());
            }
            rank.group.all_reduce(buffer.view_mut())
        });
        assert_eq!(the_error(&told), "rank `1` gave up: out of data");
    }
}

/// A rank whose host waits for a stream that waits for a rank that ended is free again.
#[test]
fn a_rank_that_ends_in_the_middle_leaves_nobody_waiting() {
    for way in ALL_WAYS {
        let fake = fake(way, 2);
        let told = thread::run_with(2, options(), |world| {
            let rank = Rank::new(&fake, world);
            let mut buffer = on_gpu(&rank.gpu, 3000);
            rank.group.all_reduce(buffer.view_mut()).unwrap();
            if rank.group.group_rank() == 1 {
                return None;
            }
            let called = rank.group.all_reduce(buffer.view_mut());
            // Hangs, but for the watcher.
            values(&rank.gpu, &buffer);
            Some(called.and_then(|()| rank.group.barrier()).unwrap_err())
        });
        let error = told[0].as_ref().unwrap();
        assert!(matches!(error, CommError::Left { rank: 1, waiting_rank: 0, .. }), "{error}");
        fake.assert_clean();
    }
}

#[test]
fn a_gpu_that_is_stuck_is_told_from_a_rank_that_does_not_come() {
    let fake = fake(ALL_WAYS[3], 2);
    let told = errors(&fake, 2, impatient(), |rank| {
        let mut buffer = on_gpu(&rank.gpu, 3000);
        rank.group.all_reduce(buffer.view_mut())?;
        rank.gpu.synchronize().unwrap();
        rank.group.barrier()?;
        fake.stall_nccl(1);
        rank.group.broadcast(buffer.view_mut(), 0)
    });
    let text = the_error(&told);
    assert!(
        text.starts_with(
            "`broadcast` number `2` from `0` of `3000` x `f32` (group `world`) is not over on rank `"
        ),
        "{text}"
    );
    assert!(text.contains("after `0.4` s, though every rank has queued it: a GPU or a link"), "{text}");
}

#[test]
fn a_receiver_that_does_not_come_is_named_and_one_behind_is_waited_for() {
    let fake = fake(ALL_WAYS[2], 2);
    let told = errors(&fake, 2, impatient(), |rank| {
        let large = on_gpu(&rank.gpu, 200_000);
        match rank.group.group_rank() {
            0 => rank.group.send(large.view(), 1),
            _ => Ok(()),
        }
    });
    for error in told {
        assert!(matches!(error, CommError::Stalled { rank: 1, waiting_rank: 0, .. }), "{error}");
    }
    let fake = self::fake(ALL_WAYS[2], 2);
    thread::run_with(2, impatient(), |world| {
        let rank = Rank::new(&fake, world);
        let mut large = on_gpu(&rank.gpu, 200_000);
        for _ in 0..2 {
            match rank.group.group_rank() {
                0 => rank.group.send_ahead(large.view(), 1).unwrap(),
                _ => {
                    std::thread::sleep(Duration::from_millis(900));
                    rank.group.recv(large.view_mut(), 0).unwrap();
                }
            }
        }
    });
    fake.assert_clean();
}

/// Whatever call of the driver fails, on whichever rank: an error or the right result, nobody hangs, nothing leaks.
#[test]
fn any_call_of_the_driver_may_fail() {
    const OUT_OF_MEMORY: i32 = 2;
    let (mut failed, mut fine) = (0, 0);
    for k in (1..900).step_by(7) {
        let fake = fake(ALL_WAYS[2 + k as usize % 4], 2);
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
    let fake = fake(ALL_WAYS[5], 1);
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
        assert_eq!(fake.num_nccl_calls(0), 0);
    });
    fake.assert_clean();
}
