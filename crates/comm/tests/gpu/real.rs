//! NCCL as it is, between two processes that share a GPU. Ignored unless asked for: `cargo test -p shardwise-comm --test gpu -- --ignored`.
//!
//! NCCL refuses two ranks of one host on one GPU. Told that they are on two (`NCCL_HOSTID`), it takes them and sends through sockets: slow, but
//! every call is NCCL's own.

use std::env;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use shardwise_comm::nccl::{Library, Nccl, Search};
use shardwise_comm::shm::{self, ShmOptions};
use shardwise_comm::{CommError, Group};
use shardwise_device::DType;
use shardwise_fake_gpu::{on_gpu, real_processor};

use crate::common::{Ground, Log, Step, reference, run_on};

/// Rank, place to meet and part of a process.
const ROLE: &str = "COMM_TEST_NCCL";
/// Longer than NCCL takes to connect through sockets.
const DEADLINE: Duration = Duration::from_secs(30);

const PROGRAM: [Step; 4] = [
    Step::AllReduce { dtype: DType::Bf16, numel: 50_001 },
    Step::ReduceScatter { dtype: DType::F16, shard_dtype: DType::F32, numel: 9001, cuts: 3 },
    Step::AllGather { dtype: DType::F32, numel: 70_003, in_place: true },
    Step::AllReduce { dtype: DType::F32, numel: 3_000_000 },
];

/// What the processes of the tests below run.
#[test]
#[ignore = "what the ranks of the other tests run"]
fn nccl_rank() {
    let Ok(role) = env::var(ROLE) else { return };
    // A rank that hangs fails its test instead of blocking it.
    std::thread::spawn(|| {
        std::thread::sleep(4 * DEADLINE);
        std::process::exit(3);
    });
    let words: Vec<&str> = role.split(' ').collect();
    let [rank, meeting, part] = words[..] else { panic!("{role}") };
    let rank: usize = rank.parse().unwrap();
    let world = shm::join(ShmOptions { deadline: DEADLINE, ..ShmOptions::new(rank, 2, meeting) }).unwrap();
    let processor = real_processor();
    let library = Library::load(&Search {
        given: env::var_os("SHARDWISE_NCCL").map(PathBuf::from),
        libtorch: env::var_os("LIBTORCH").map(PathBuf::from),
    });
    let compute = processor.stream().clone();
    let group = Nccl::new(world, library.unwrap(), Arc::clone(&processor), Arc::clone(&compute)).unwrap();
    let gpu = processor.gpu();
    match part {
        "exchange" => {
            for (seed, log) in [(1, Log::Kept), (2, Log::None), (3, Log::Kept)] {
                let ground = Ground::Gpu { gpu, compute: &compute, log };
                let got = run_on(&group, ground, &PROGRAM, seed);
                assert!(got == reference(2, rank, &PROGRAM, seed), "bits of program {seed}");
            }
            group.barrier().unwrap();
        }
        _ => {
            let error = until_it_fails(&group, rank, &mut on_gpu(gpu, 1 << 20));
            assert!(matches!(error, CommError::Died { rank: 1, .. }), "{error}");
            // The stream is free again.
            compute.synchronize().unwrap();
        }
    }
    println!("\nrank {rank} is done");
}

/// Reduces on; rank 1 dies in the middle of it.
fn until_it_fails(group: &Group, rank: usize, buffer: &mut shardwise_device::Buffer) -> CommError {
    let began = Instant::now();
    for call in 0.. {
        if (rank, call) == (1, 20) {
            std::process::abort();
        }
        if let Err(error) = group.all_reduce(buffer.view_mut()) {
            return error;
        }
        assert!(began.elapsed() < DEADLINE, "nobody has noticed");
    }
    unreachable!("an endless count")
}

fn start(rank: usize, meeting: &str, part: &str) -> Child {
    Command::new(env::current_exe().unwrap())
        .args(["--ignored", "--exact", "real::nccl_rank", "--nocapture", "--test-threads=1"])
        .env(ROLE, format!("{rank} {meeting} {part}"))
        .env("NCCL_HOSTID", format!("host-{rank}"))
        .envs([("NCCL_P2P_DISABLE", "1"), ("NCCL_SHM_DISABLE", "1"), ("NCCL_NET", "Socket")])
        .env("NCCL_SOCKET_IFNAME", "lo")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// What both ranks said, in their order.
fn both(part: &str) -> [Output; 2] {
    let meeting = format!("nccl-{part}-{}", std::process::id());
    [0, 1].map(|rank| start(rank, &meeting, part)).map(|child| child.wait_with_output().unwrap())
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
#[ignore = "needs a GPU"]
fn two_processes_exchange_by_nccl() {
    for output in both("exchange") {
        assert!(output.status.success() && said(&output).contains("is done"), "{}", said(&output));
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_process_that_dies_is_named_by_the_other() {
    let [survivor, _] = both("die");
    assert!(survivor.status.success() && said(&survivor).contains("rank 0 is done"), "{}", said(&survivor));
}
