//! Whatever wrote a checkpoint, whatever reads it: the same bits.

use half::{bf16, f16};
use shardwise_checkpoint::state::{Block, Checkpoint, Contents, Fragment, Keep, Region, Save};
use shardwise_checkpoint::{CheckpointError, FileDType, HfReader};

use crate::common::{self, Layout, contents, newest_of, read_as, save, values};

#[test]
fn every_layout_reads_every_other() {
    let zero = [1, 2, 3, 4, 8].map(Layout::zero);
    let grids = [(1, 2), (2, 2), (1, 3), (3, 2), (2, 4)].map(|(data, tensor)| Layout { data, tensor });
    let layouts = [&zero[..], &grids[..]].concat();
    let dir = tempfile::tempdir().unwrap();
    for (step, &writer) in layouts.iter().enumerate() {
        let committed = save(dir.path(), writer, step as u64, 1, newest_of(2)).unwrap();
        committed.clean_up.unwrap();
        let checkpoint = Checkpoint::open(&committed.dir).unwrap();
        assert_eq!(checkpoint.mesh(), &contents(writer, 0).mesh);
        assert!(checkpoint.verify(|_| ()).findings.is_empty());
        for &reader in &layouts {
            read_as(&checkpoint, reader).unwrap_or_else(|error| panic!("{writer:?} to {reader:?}: {error}"));
        }
    }
}

#[test]
fn other_types_and_streams_in_pieces() {
    let dir = tempfile::tempdir().unwrap();
    let save = Save::begin(dir.path(), 5, 1, 0).unwrap();
    let fragment = |name: &str, dtype, numel: usize| Fragment {
        name: name.to_owned(),
        kind: "param".to_owned(),
        dtype,
        shape: vec![numel],
        region: Region::whole(&[numel]),
    };
    // The odd byte would misalign what follows, if it were written in this order.
    let fragments = [
        fragment("flags", FileDType::U8, 3),
        fragment("bf16", FileDType::Bf16, 500_000),
        fragment("f16", FileDType::F16, 7),
        fragment("i64", FileDType::I64, 2),
        fragment("nothing", FileDType::F32, 0),
        fragment("f32", FileDType::F32, 3_000_000),
    ];
    let number = |i: usize| (i % 200) as f32 - 100.0;
    let content: [Vec<u8>; 6] = [
        vec![1, 2, 3],
        (0..500_000).flat_map(|i| bf16::from_f32(number(i)).to_le_bytes()).collect(),
        (0..7).flat_map(|i| f16::from_f32(number(i)).to_le_bytes()).collect(),
        [-1_i64, i64::MAX].into_iter().flat_map(i64::to_le_bytes).collect(),
        vec![],
        (0..3_000_000).flat_map(|i| number(i).to_le_bytes()).collect(),
    ];
    let (report, reports) = std::sync::mpsc::channel();
    let mut writer =
        save.shard_writer(&fragments).unwrap().on_progress(move |progress| report.send(progress).unwrap());
    let order: Vec<_> = writer.order().collect();
    assert_eq!(order, [3, 4, 5, 1, 2, 0]);
    for i in order {
        // Large ones in pieces that fit nothing; the empty one need not come.
        if !content[i].is_empty() {
            writer.begin(i).unwrap();
            content[i].chunks(4_999_999).for_each(|piece| writer.append(piece).unwrap());
        }
    }
    let total_bytes = writer.total_bytes();
    assert_eq!(writer.finish().unwrap().num_bytes(), total_bytes);
    let progress: Vec<_> = reports.iter().collect();
    assert!(progress.len() > 2 && progress.windows(2).all(|pair| pair[0].done_bytes < pair[1].done_bytes));
    assert!(
        progress.last().is_some_and(|last| last.done_bytes == total_bytes && last.total_bytes == total_bytes)
    );

    let committed = save.commit(&contents(Layout::zero(1), 5), Keep::All).unwrap();
    let checkpoint = Checkpoint::open(&committed.dir).unwrap();
    assert!(checkpoint.verify(|_| ()).findings.is_empty());
    for (fragment, content) in fragments.iter().zip(&content) {
        let mut got = vec![0; content.len()];
        checkpoint.read_bytes(&fragment.name, "param", &fragment.region, &mut got).unwrap();
        assert!(got == *content, "{}", fragment.name);
    }
    for (name, range) in [("bf16", 131_000..400_123), ("f16", 2..7), ("f32", 262_000..2_900_001)] {
        let region = Region::flat(checkpoint.tensor(name, "param").unwrap().shape, range.clone());
        let mut got = vec![0.0; range.len()];
        checkpoint.read_f32(name, "param", &region, &mut got).unwrap();
        assert!(got.into_iter().eq(range.map(number)), "{name}");
    }
    let error = checkpoint.read_f32("flags", "param", &Region::whole(&[3]), &mut [0.0; 3]).unwrap_err();
    assert!(matches!(error, CheckpointError::NotFloat { .. }));
}

/// The file of a run on one rank holds whole tensors under plain names, for any reader of safetensors.
#[test]
fn files_are_plain_safetensors() {
    let dir = tempfile::tempdir().unwrap();
    let committed = save(dir.path(), Layout::zero(1), 3, 1, Keep::All).unwrap();
    let path = committed.dir.join("rank-00000.safetensors");
    let reader = HfReader::open(&path).unwrap();
    let up = reader.expect("exp_avg/up.weight", &[11, 5]).unwrap();
    assert_eq!(up.numel(), 55);
    let expected = values("up.weight", "exp_avg", 3, &[11, 5], &Region::whole(&[11, 5]));
    assert_eq!(reader.read_f32("exp_avg/up.weight").unwrap(), expected);
    let bytes = std::fs::read(&path).unwrap();
    let reference = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(reference.len(), 18);

    let committed = save(dir.path(), Layout { data: 2, tensor: 2 }, 4, 1, Keep::All).unwrap();
    let reader = HfReader::open(committed.dir.join("rank-00003.safetensors")).unwrap();
    let names: Vec<_> = reader.tensors().iter().map(|tensor| tensor.name.as_str()).collect();
    assert!(names.contains(&"param/down.weight[0:5,3:11]@13..40"), "{names:?}");
}

#[test]
fn what_is_not_there_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let committed = save(dir.path(), Layout::zero(2), 3, 1, Keep::All).unwrap();
    let checkpoint = Checkpoint::open(&committed.dir).unwrap();
    let folder = committed.dir.display();
    let whole = Region::whole(&[5]);
    let says = |result: Result<(), CheckpointError>| result.unwrap_err().to_string();
    assert_eq!(
        says(checkpoint.read_f32("norm.weigth", "param", &whole, &mut [0.0; 5])),
        format!("no tensor `norm.weigth` in `param` of `{folder}`; did you mean `norm.weight`?")
    );
    assert_eq!(
        says(checkpoint.read_f32("norm.weight", "momentum", &whole, &mut [0.0; 5])),
        format!("no tensor `norm.weight` in `momentum` of `{folder}`")
    );
    for (region, buffer) in [
        (Region::flat(&[5], 0..6), 6),
        (Region::whole(&[5]), 4),
        (Region::whole(&[5, 1]), 5),
        (Region::block(Block { offset: vec![1], shape: vec![5] }), 5),
    ] {
        let error = checkpoint.read_f32("norm.weight", "param", &region, &mut vec![0.0; buffer]).unwrap_err();
        assert!(matches!(error, CheckpointError::WrongRegion { .. }), "{error}");
    }
    let error = checkpoint.read_bytes("norm.weight", "param", &whole, &mut [0; 19]).unwrap_err();
    assert!(matches!(error, CheckpointError::WrongRegion { .. }), "{error}");

    let manifest = committed.dir.join("manifest.json");
    let mut tensors = common::TENSORS.to_vec();
    tensors[0].1 = &[5, 13];
    assert_eq!(
        says(checkpoint.expect_exactly("param", tensors.clone())),
        format!("tensor `embed.weight` in `{}`: expected shape `[5, 13]`, got `[13, 5]`", manifest.display())
    );
    tensors[0] = ("more.weight", &[1]);
    assert!(
        says(checkpoint.expect_exactly("param", tensors.clone())).starts_with("no tensor `more.weight` in")
    );
    assert_eq!(
        says(checkpoint.expect_exactly("param", tensors[1..].to_vec())),
        format!("`{}` has `param` of `embed.weight`, which the model does not", manifest.display())
    );
}

#[test]
fn everything_said_is_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout { data: 2, tensor: 3 };
    let said: Contents = contents(layout, 7);
    let committed = save(dir.path(), layout, 7, 0xabc, Keep::All).unwrap();
    let checkpoint = Checkpoint::open(&committed.dir).unwrap();
    assert_eq!((checkpoint.config(), checkpoint.run_state()), (&said.config, &said.run_state));
    assert_eq!((checkpoint.program(), checkpoint.save()), ("shardwise 0.1.0", "0000000000000abc"));
    assert_eq!(
        (checkpoint.step(), checkpoint.version(), checkpoint.num_bytes()),
        (7, 1, committed.num_bytes)
    );
    assert_eq!(checkpoint.attached().collect::<Vec<_>>(), ["config.json"]);
    assert_eq!(checkpoint.read_attached("config.json").unwrap().unwrap(), *said.attached[0].bytes);
    assert_eq!(checkpoint.read_attached("tokenizer.json").unwrap(), None);
    assert_eq!(checkpoint.tensors().count(), 18);
}
