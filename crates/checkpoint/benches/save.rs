//! How fast a checkpoint is written and read, beside `dd` with a sync on the same disk.
//!
//! `cargo bench -p shardwise-checkpoint` writes 1 GiB to the build folder's disk, in turns with `dd`; `SAVE_BENCH_MIB`
//! and `SAVE_BENCH_DIR` choose another size and another disk.
#![allow(clippy::unwrap_used, reason = "a benchmark that fails may panic")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::json;
use shardwise_checkpoint::FileDType;
use shardwise_checkpoint::state::{Checkpoint, Contents, Fragment, Keep, Mesh, Region, Save};

const ROUNDS: usize = 3;
/// Elements of one tensor: a layer's matrix.
const TENSOR_NUMEL: usize = 4 << 20;

fn main() {
    // Cargo builds and starts it for tests too.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let mib: usize = std::env::var("SAVE_BENCH_MIB").map_or(1024, |text| text.parse().unwrap());
    let dir = std::env::var("SAVE_BENCH_DIR").unwrap_or_else(|_| env!("CARGO_TARGET_TMPDIR").to_owned());
    let dir = tempfile::tempdir_in(dir).unwrap();
    let values: Vec<f32> = (0..mib << 18).map(|i| i as f32).collect();
    let speed = |seconds: f64| (mib << 20) as f64 / 1e9 / seconds;

    let checksum = timed(|| {
        values.chunks(1 << 16).map(|piece| crc32c::crc32c(bytemuck::cast_slice(piece))).sum::<u32>()
    });
    println!("checksum  {:6.2} GB/s", speed(checksum));
    let mut copy = vec![0.0; values.len()];
    let copying = timed(|| copy.copy_from_slice(&values));
    println!("copy      {:6.2} GB/s", speed(copying));
    drop(copy);

    // `dd` as it is, and into a file whose space is reserved, as ours is: some disks make much of the difference.
    let (mut plain, mut reserved, mut saved) = (f64::INFINITY, f64::INFINITY, f64::INFINITY);
    for round in 0..ROUNDS {
        plain = plain.min(dd(&dir.path().join("dd"), mib, &[]));
        reserved = reserved.min(dd(&dir.path().join("dd"), mib, &["conv=notrunc"]));
        saved = saved.min(timed(|| save(dir.path(), round as u64, &values)));
    }
    println!("dd        {:6.2} GB/s   best of {ROUNDS}, with conv=fsync", speed(plain));
    println!("dd        {:6.2} GB/s   into a reserved file", speed(reserved));
    println!(
        "save      {:6.2} GB/s   {:.2} of dd, {:.2} of dd into a reserved file",
        speed(saved),
        plain / saved,
        reserved / saved
    );

    let checkpoint = Checkpoint::newest(dir.path()).unwrap().unwrap().checkpoint;
    let verify = timed(|| assert!(checkpoint.verify(|_| ()).findings.is_empty()));
    println!("verify    {:6.2} GB/s", speed(verify));
    let mut got = vec![0.0; TENSOR_NUMEL];
    let read = timed(|| {
        for tensor in checkpoint.tensors() {
            checkpoint
                .read_f32(tensor.name, tensor.kind, &Region::whole(tensor.shape), &mut got[..tensor.numel()])
                .unwrap();
        }
    });
    println!("read      {:6.2} GB/s", speed(read));
}

fn timed<T>(work: impl FnOnce() -> T) -> f64 {
    let start = Instant::now();
    std::hint::black_box(work());
    start.elapsed().as_secs_f64()
}

/// Seconds that `dd` takes, without removing the file.
fn dd(path: &Path, mib: usize, options: &[&str]) -> f64 {
    let file = std::fs::File::create(path).unwrap();
    if !options.is_empty() {
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, (mib as u64) << 20).unwrap();
    }
    let mut command = Command::new("dd");
    command
        .args([
            "if=/dev/zero",
            &format!("of={}", path.display()),
            "bs=1M",
            &format!("count={mib}"),
            "conv=fsync",
        ])
        .args(options)
        .stderr(Stdio::null());
    let seconds = timed(|| assert!(command.status().unwrap().success()));
    std::fs::remove_file(path).unwrap();
    seconds
}

fn save(dir: &Path, step: u64, values: &[f32]) -> PathBuf {
    let fragments: Vec<_> = values
        .chunks(TENSOR_NUMEL)
        .enumerate()
        .map(|(i, piece)| Fragment {
            name: format!("layers.{i}.weight"),
            kind: "param".to_owned(),
            dtype: FileDType::F32,
            shape: vec![piece.len()],
            region: Region::whole(&[piece.len()]),
        })
        .collect();
    let save = Save::begin(dir, step, 1, 0).unwrap();
    let mut writer = save.shard_writer(&fragments).unwrap();
    for (i, piece) in values.chunks(TENSOR_NUMEL).enumerate() {
        writer.write(i, bytemuck::cast_slice(piece)).unwrap();
    }
    writer.finish().unwrap();
    let mesh = Mesh { world_size: 1, zero_stage: 0, pipeline: 1, data: 1, tensor: 1 };
    let contents = Contents {
        program: "bench".to_owned(),
        mesh,
        config: json!({}),
        run_state: json!({}),
        attached: vec![],
    };
    save.commit(&contents, Keep::Newest(std::num::NonZeroUsize::MIN)).unwrap().dir
}
