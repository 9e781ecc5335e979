//! Milliseconds a call between two processes of this host, one thread each.
//!
//! `cargo bench -p shardwise-comm` runs every row; words after `--` choose the rows whose operation contains
//! one of them, `repeat=N` changes how often each size is measured, `numel=N` leaves out smaller buffers,
//! `slot_kib=N` changes the pieces that calls go in, and `pin=1` gives each rank a core of its own, where
//! ranks that compute are, too. The first rows have the sizes and shapes of the usual gloo benchmark (a full
//! buffer of so many elements, a shard of half), the others those of a training step: 16-bit gradients
//! reduced into 32-bit shards, 16-bit parameters gathered in place. Shown is the median over rounds, the best
//! round, and the full buffer's bytes by the median time.

use std::process::Command;
use std::time::Instant;

use shardwise_comm::shm::{self, ShmOptions};
use shardwise_comm::{Group, Part};
use shardwise_device::{Buffer, DType, Place};

const RANKS: usize = 2;

struct Row {
    name: &'static str,
    dtype: DType,
    numel: usize,
}

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for numel in [1024, 65_536, 1_048_576, 33_554_432] {
        for name in ["all_reduce", "all_gather", "reduce_scatter"] {
            rows.push(Row { name, dtype: DType::F32, numel });
        }
    }
    for megabytes in [1usize, 8, 35] {
        rows.push(Row { name: "reduce_scatter_to_f32", dtype: DType::Bf16, numel: megabytes << 19 });
    }
    for megabytes in [10usize, 35, 70] {
        rows.push(Row { name: "all_gather_in_place", dtype: DType::Bf16, numel: megabytes << 19 });
    }
    for name in ["all_reduce", "all_to_all", "broadcast", "send_recv"] {
        rows.push(Row { name, dtype: DType::Bf16, numel: 16 << 20 });
    }
    rows.push(Row { name: "barrier", dtype: DType::U8, numel: 0 });
    rows
}

/// One row's buffers.
struct Bench {
    group: Group,
    name: &'static str,
    full: Buffer,
    other: Buffer,
    shard: Buffer,
    shard_f32: Buffer,
}

impl Bench {
    fn new(group: &Group, row: &Row) -> Self {
        let buffer = |dtype, numel| {
            let mut buffer = Buffer::zeroed(dtype, numel, Place::Cpu).expect("memory");
            buffer.view_mut().bytes().fill(1);
            buffer
        };
        let needs = |names: &[&str], numel| if names.contains(&row.name) { numel } else { 0 };
        Bench {
            group: group.clone(),
            name: row.name,
            full: buffer(row.dtype, row.numel),
            other: buffer(row.dtype, needs(&["all_to_all"], row.numel)),
            shard: buffer(row.dtype, needs(&["all_gather", "reduce_scatter"], row.numel / RANKS)),
            shard_f32: buffer(DType::F32, needs(&["reduce_scatter_to_f32"], row.numel / RANKS)),
        }
    }

    fn call(&mut self) {
        let group = &self.group;
        let full = &mut self.full;
        let done = match self.name {
            "all_reduce" => group.all_reduce(full.view_mut()),
            "all_gather" => group.all_gather(self.shard.view(), full.view_mut()),
            "all_gather_in_place" => group.all_gather_in_place(full.view_mut()),
            "reduce_scatter" => group.reduce_scatter(&[Part::Data(full.view())], self.shard.view_mut()),
            "reduce_scatter_to_f32" => {
                group.reduce_scatter(&[Part::Data(full.view())], self.shard_f32.view_mut())
            }
            "all_to_all" => group.all_to_all(full.view(), self.other.view_mut()),
            "broadcast" => group.broadcast(full.view_mut(), 0),
            "send_recv" if group.group_rank() == 0 => group.send(full.view(), 1),
            "send_recv" => group.recv(full.view_mut(), 0),
            _ => group.barrier(),
        };
        done.expect("the other rank lives");
    }
}

fn run(group: &Group, chosen: &[String], min_numel: usize, num_rounds: usize) {
    let is_first = group.group_rank() == 0;
    if is_first {
        println!(
            "{:24}{:>6}{:>12}{:>12}{:>12}{:>9}",
            "operation", "type", "numel", "median ms", "best ms", "GB/s"
        );
    }
    for row in rows() {
        let is_chosen = chosen.is_empty() || chosen.iter().any(|word| row.name.contains(word.as_str()));
        if !is_chosen || row.numel < min_numel {
            continue;
        }
        let mut bench = Bench::new(group, &row);
        let num_bytes = row.numel * row.dtype.size_bytes();
        let num_calls = ((64 << 20) / num_bytes.max(64 << 10)).max(2);
        bench.call();
        let mut rounds: Vec<f64> = (0..num_rounds)
            .map(|_| {
                group.barrier().expect("the other rank lives");
                let started = Instant::now();
                (0..num_calls).for_each(|_| bench.call());
                started.elapsed().as_secs_f64() / num_calls as f64
            })
            .collect();
        rounds.sort_by(f64::total_cmp);
        let (median, best) = (rounds[num_rounds / 2], rounds[0]);
        if is_first {
            println!(
                "{:24}{:>6}{:>12}{:>12.4}{:>12.4}{:>9.2}",
                row.name,
                row.dtype.name(),
                row.numel,
                median * 1e3,
                best * 1e3,
                num_bytes as f64 / median / 1e9
            );
        }
    }
}

fn main() {
    // What `cargo bench` adds is of no use here.
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let value = |key: &str| words.iter().find_map(|word| word.strip_prefix(key)?.parse::<usize>().ok());
    let chosen: Vec<String> = words.iter().filter(|word| !word.contains('=')).cloned().collect();
    let meeting = value("meet=").unwrap_or(std::process::id() as usize);
    let rank = value("rank=").unwrap_or(0);
    let num_rounds = value("repeat=").unwrap_or(15).max(1);
    let mut child = None;
    if rank == 0 {
        let program = std::env::current_exe().expect("this program has a path");
        let mut command = Command::new(program);
        command.args(&words).args(["rank=1".to_owned(), format!("meet={meeting}")]);
        child = Some(command.spawn().expect("the second rank starts"));
    }
    if words.iter().any(|word| word == "pin=1") {
        let mut own = rustix::thread::CpuSet::new();
        own.set(rank);
        rustix::thread::sched_setaffinity(None, &own).expect("there is a core for each rank");
    }
    let mut options = ShmOptions::new(rank, RANKS, format!("bench-{meeting}"));
    if let Some(kib) = value("slot_kib=") {
        options.slot_bytes = kib << 10;
    }
    let group = shm::join(options).expect("both ranks join");
    run(&group, &chosen, value("numel=").unwrap_or(0), num_rounds);
    drop(group);
    if let Some(mut child) = child {
        assert!(child.wait().expect("the second rank ends").success());
    }
}
