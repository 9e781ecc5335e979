//! A small model, the ways to cut it, and its numbers.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::Path;

use serde_json::json;
use shardwise_checkpoint::state::{
    Attachment, Block, Checkpoint, Committed, Contents, Fragment, Keep, Mesh, Region, Save,
};
use shardwise_checkpoint::{CheckpointError, FileDType};

pub const KINDS: [&str; 3] = ["param", "exp_avg", "exp_avg_sq"];

/// Odd sizes, a scalar, and matrices that are cut in both dimensions.
pub const TENSORS: [(&str, &[usize]); 6] = [
    ("embed.weight", &[13, 5]),
    ("norm.weight", &[5]),
    ("up.weight", &[11, 5]),
    ("down.weight", &[5, 11]),
    ("experts.weight", &[3, 4, 7]),
    ("scale", &[]),
];

/// How ranks share a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Layout {
    pub data: usize,
    pub tensor: usize,
}

impl Layout {
    pub const fn zero(data: usize) -> Self {
        Layout { data, tensor: 1 }
    }

    pub fn world_size(self) -> usize {
        self.data * self.tensor
    }

    /// What `rank` owns of each tensor: a slice of one dimension for its tensor rank, of which its data rank has an
    /// element range. Slices and ranges are uneven, and some are empty.
    pub fn regions(self, rank: usize) -> Vec<(&'static str, &'static [usize], Region)> {
        let (data_rank, tensor_rank) = (rank / self.tensor, rank % self.tensor);
        let mut regions = Vec::new();
        for (i, (name, shape)) in TENSORS.into_iter().enumerate() {
            let block = if shape.len() >= 2 {
                let dim = i % 2;
                Block::slice(shape, dim, part(shape[dim], tensor_rank, self.tensor))
            } else if tensor_rank == 0 {
                Block::whole(shape)
            } else {
                continue;
            };
            let numel = block.shape.iter().product();
            regions.push((name, shape, Region { block, range: part(numel, data_rank, self.data) }));
        }
        regions
    }
}

/// Piece `i` of `n` of `0..len`, the later the longer.
fn part(len: usize, i: usize, n: usize) -> Range<usize> {
    let edge = |i: usize| len * i * (i + 1) / (n * (n + 1));
    edge(i)..edge(i + 1)
}

/// Element `element` of a flattened tensor after step `step`.
pub fn value(name: &str, kind: &str, step: u64, element: usize) -> f32 {
    let salt = (name.len() * 31 + kind.len() * 7) as u64 + step * 1013;
    ((element as u64 * 7919 + salt * 104_729) % 20_011) as f32 / 64.0 - 150.0
}

/// The elements of a region, one by one.
pub fn values(name: &str, kind: &str, step: u64, shape: &[usize], region: &Region) -> Vec<f32> {
    let Block { offset, shape: block } = &region.block;
    let global = |mut flat: usize| {
        let (mut global, mut stride) = (0, 1);
        for dim in (0..shape.len()).rev() {
            global += (offset[dim] + flat % block[dim]) * stride;
            flat /= block[dim];
            stride *= shape[dim];
        }
        global
    };
    region.range.clone().map(|flat| value(name, kind, step, global(flat))).collect()
}

pub fn fragments(layout: Layout, rank: usize) -> Vec<Fragment> {
    let regions = layout.regions(rank);
    let of_kind = |kind: &str| {
        let fragment = |(name, shape, region): &(&str, &[usize], Region)| Fragment {
            name: (*name).to_owned(),
            kind: kind.to_owned(),
            dtype: FileDType::F32,
            shape: shape.to_vec(),
            region: region.clone(),
        };
        regions.iter().map(fragment).collect::<Vec<_>>()
    };
    KINDS.iter().flat_map(|kind| of_kind(kind)).collect()
}

pub fn bytes(fragment: &Fragment, step: u64) -> Vec<u8> {
    let values = values(&fragment.name, &fragment.kind, step, &fragment.shape, &fragment.region);
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

pub fn contents(layout: Layout, step: u64) -> Contents {
    Contents {
        program: "shardwise 0.1.0".to_owned(),
        mesh: Mesh {
            world_size: layout.world_size(),
            zero_stage: 2,
            pipeline: 1,
            data: layout.data,
            tensor: layout.tensor,
        },
        config: json!({ "steps": 12, "seed": 7 }),
        run_state: json!({ "applied": step, "loss_scale": null }),
        attached: vec![Attachment {
            name: "config.json".to_owned(),
            bytes: (*br#"{"model_type":"llama"}"#).into(),
        }],
    }
}

/// What one rank does.
pub fn write_rank(
    dir: &Path,
    layout: Layout,
    step: u64,
    nonce: u64,
    rank: usize,
) -> Result<Save, CheckpointError> {
    let save = Save::begin(dir, step, nonce, rank)?.chunk_bytes(256);
    let fragments = fragments(layout, rank);
    let mut writer = save.shard_writer(&fragments)?;
    for (i, fragment) in fragments.iter().enumerate() {
        writer.write(i, &bytes(fragment, step))?;
    }
    writer.finish()?;
    Ok(save)
}

/// Saves with all ranks, one after the other.
pub fn save(
    dir: &Path,
    layout: Layout,
    step: u64,
    nonce: u64,
    keep: Keep,
) -> Result<Committed, CheckpointError> {
    let mut saves = Vec::new();
    for rank in 0..layout.world_size() {
        saves.push(write_rank(dir, layout, step, nonce, rank)?);
    }
    saves.swap_remove(0).commit(&contents(layout, step), keep)
}

pub fn newest_of(count: usize) -> Keep {
    Keep::Newest(NonZeroUsize::new(count).unwrap())
}

/// Reads what every rank of `layout` owns and compares it bit for bit.
pub fn read_as(checkpoint: &Checkpoint, layout: Layout) -> Result<(), CheckpointError> {
    for kind in KINDS {
        checkpoint.expect_exactly(kind, TENSORS)?;
    }
    for rank in 0..layout.world_size() {
        for fragment in fragments(layout, rank) {
            let Fragment { name, kind, shape, region, .. } = &fragment;
            let mut got = vec![f32::NAN; region.numel()];
            checkpoint.read_f32(name, kind, region, &mut got)?;
            assert_eq!(got, values(name, kind, checkpoint.step(), shape, region), "{fragment:?}");
        }
    }
    Ok(())
}

/// Small xorshift: the same cases in every run.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

pub fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}
