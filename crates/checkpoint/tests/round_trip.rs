//! What is written is read back, by us and by the reference crate, in every type and however it is split.
#![allow(clippy::unwrap_used)] // a failed test may panic anywhere

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use half::{bf16, f16};
use proptest::prelude::*;
use shardwise_checkpoint::{CheckpointError, FileDType, HfReader, HfWriter, TensorMeta};

const WRITABLE: [FileDType; 4] = [FileDType::F64, FileDType::F32, FileDType::F16, FileDType::Bf16];

fn meta(name: &str, shape: &[usize], dtype: FileDType) -> TensorMeta {
    TensorMeta { name: name.to_owned(), shape: shape.to_vec(), dtype }
}

/// Values that differ from element to element, already rounded to `dtype`.
fn values(numel: usize, salt: usize, dtype: FileDType) -> Vec<f32> {
    let raw = (0..numel).map(|i| ((i * 7919 + salt * 104_729) % 2003) as f32 / 64.0 - 15.0);
    raw.map(|value| match dtype {
        FileDType::F16 => f16::from_f32(value).to_f32(),
        FileDType::Bf16 => bf16::from_f32(value).to_f32(),
        _ => value,
    })
    .collect()
}

fn file_names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_file_written_by_python_is_read() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/python.safetensors");
    let reader = HfReader::open(path).unwrap();
    let expected: Vec<f32> = (-6..6).map(|i| i as f32 / 4.0).collect();
    for name in ["f64", "f32", "f16", "bf16"] {
        reader.expect(name, &[3, 4]).unwrap();
        assert_eq!(reader.read_f32(name).unwrap(), expected, "{name}");
    }
    assert_eq!(reader.read_f32("scalar").unwrap(), [2.5]);
    assert_eq!(reader.info("scalar").unwrap().shape, [0usize; 0]);
    assert_eq!(reader.read_f32("empty").unwrap(), [0.0; 0]);
    assert_eq!(reader.info("mask").unwrap().dtype, FileDType::Bool);
    assert_eq!(reader.info("f8").unwrap().dtype, FileDType::F8E4M3);
    assert_eq!(
        reader.read_f32("ids").unwrap_err().to_string(),
        "tensor `ids` has type `I64`, expected one of `F64`, `F32`, `F16`, `BF16`"
    );
}

#[test]
fn the_reference_crate_reads_what_we_write() {
    let dir = tempfile::tempdir().unwrap();
    // Odd sizes: a narrow tensor between wide ones must not misalign them.
    let tensors = [
        meta("a", &[3], FileDType::Bf16),
        meta("b", &[2, 2], FileDType::F64),
        meta("c", &[5], FileDType::F16),
        meta("d", &[], FileDType::F32),
        meta("e", &[0, 4], FileDType::F32),
    ];
    let mut writer = HfWriter::create(dir.path(), &tensors, u64::MAX).unwrap();
    // Not in the declared order.
    for (salt, t) in tensors.iter().enumerate().rev() {
        writer.write(&t.name, &values(t.shape.iter().product(), salt, t.dtype)).unwrap();
    }
    let files = writer.finish().unwrap();
    assert_eq!(files, [dir.path().join("model.safetensors")]);
    assert_eq!(file_names(dir.path()), ["model.safetensors"]);
    assert_eq!(fs::metadata(&files[0]).unwrap().permissions().mode() & 0o600, 0o600);

    let bytes = fs::read(&files[0]).unwrap();
    let (header_bytes, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
    let reference = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    for (salt, t) in tensors.iter().enumerate() {
        let expected = values(t.shape.iter().product(), salt, t.dtype);
        let view = reference.tensor(&t.name).unwrap();
        assert_eq!(view.shape(), t.shape);
        let got: Vec<f32> = match t.dtype {
            FileDType::F64 => {
                view.data().chunks(8).map(|b| f64::from_le_bytes(b.try_into().unwrap()) as f32).collect()
            }
            FileDType::F32 => {
                view.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
            }
            FileDType::F16 => {
                view.data().chunks(2).map(|b| f16::from_le_bytes(b.try_into().unwrap()).into()).collect()
            }
            _ => view.data().chunks(2).map(|b| bf16::from_le_bytes(b.try_into().unwrap()).into()).collect(),
        };
        assert_eq!(got, expected, "{}", t.name);
        let begin = 8 + header_bytes + metadata.info(&t.name).unwrap().data_offsets.0;
        assert!(begin.is_multiple_of(t.dtype.size_bits() / 8), "`{}` begins at {begin}", t.name);
    }
}

#[test]
fn shards_are_named_and_indexed_as_hugging_face_does() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = [
        meta("a", &[4], FileDType::F32),
        meta("large", &[9], FileDType::F32),
        meta("b", &[2], FileDType::F16),
    ];
    let mut writer = HfWriter::create(dir.path().join("new/folder"), &tensors, 20).unwrap();
    for t in &tensors {
        writer.write(&t.name, &values(t.shape[0], 0, t.dtype)).unwrap();
    }
    writer.finish().unwrap();
    let dir = dir.path().join("new/folder");
    assert_eq!(
        file_names(&dir),
        [
            "model-00001-of-00003.safetensors",
            "model-00002-of-00003.safetensors",
            "model-00003-of-00003.safetensors",
            "model.safetensors.index.json"
        ]
    );
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(dir.join("model.safetensors.index.json")).unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_size"], 16 + 36 + 4);
    assert_eq!(index["weight_map"]["large"], "model-00002-of-00003.safetensors");
    let reader = HfReader::open(&dir).unwrap();
    assert_eq!(reader.tensors().len(), 3);
    assert_eq!(reader.read_f32("b").unwrap(), values(2, 0, FileDType::F16));
}

#[test]
fn an_older_model_in_the_folder_is_replaced_whole() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, max_shard_bytes| {
        let tensors = [meta(name, &[4], FileDType::F32), meta("other", &[4], FileDType::F32)];
        let mut writer = HfWriter::create(dir.path(), &tensors, max_shard_bytes).unwrap();
        writer.write(name, &[1.0; 4]).unwrap();
        writer.write("other", &[2.0; 4]).unwrap();
        writer.finish().unwrap();
        HfReader::open(dir.path()).unwrap()
    };
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    for (name, max_shard_bytes) in [("one", 1000), ("two", 16), ("three", 16), ("four", 1000)] {
        let reader = write(name, max_shard_bytes);
        assert!(reader.contains(name), "{name}");
        assert_eq!(reader.tensors().len(), 2);
    }
    assert_eq!(file_names(dir.path()), ["config.json", "model.safetensors"]);
}

#[test]
fn a_writer_that_is_dropped_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = [meta("a", &[4], FileDType::F32), meta("b", &[4], FileDType::F32)];
    let mut writer = HfWriter::create(dir.path(), &tensors, 16).unwrap();
    writer.write("a", &[1.0; 4]).unwrap();
    drop(writer);
    assert_eq!(file_names(dir.path()), [""; 0]);
}

#[test]
fn incomplete_and_oversized_tensors_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = [meta("a", &[4], FileDType::F32), meta("b", &[4], FileDType::F32)];
    let create = || HfWriter::create(dir.path(), &tensors, 1000).unwrap();

    let mut writer = create();
    writer.write("a", &[1.0; 4]).unwrap();
    let error = writer.finish().unwrap_err();
    assert_eq!(error.to_string(), "tensor `b` is declared with `4` elements, got `0`");

    let mut writer = create();
    writer.begin("a").unwrap();
    writer.append(&[1.0; 3]).unwrap();
    let error = writer.append(&[1.0; 2]).unwrap_err();
    assert_eq!(error.to_string(), "tensor `a` is declared with `4` elements, got `5`");
    let error = writer.begin("b").unwrap_err();
    assert_eq!(error.to_string(), "tensor `a` is declared with `4` elements, got `3`");
    writer.append(&[1.0]).unwrap();
    let error = writer.write("b", &[1.0; 3]).unwrap_err();
    assert!(matches!(error, CheckpointError::WrongNumel { expected: 4, got: 3, .. }));

    let mut writer = create();
    writer.write("a", &[1.0; 4]).unwrap();
    assert_eq!(writer.begin("a").unwrap_err().to_string(), "cannot write tensor `a`: it is written already");
    assert_eq!(writer.begin("c").unwrap_err().to_string(), "cannot write tensor `c`: it was not declared");
}

#[test]
fn what_cannot_be_laid_out_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let refusal =
        |tensors: &[TensorMeta]| HfWriter::create(dir.path(), tensors, 1000).unwrap_err().to_string();
    let a = meta("a", &[1], FileDType::F32);
    assert_eq!(refusal(&[a.clone(), a]), "cannot write tensor `a`: it is declared twice");
    assert_eq!(
        refusal(&[meta("__metadata__", &[1], FileDType::F32)]),
        "cannot write tensor `__metadata__`: the format reserves this name"
    );
    assert_eq!(
        refusal(&[meta("a", &[usize::MAX, 2], FileDType::F32)]),
        "cannot write tensor `a`: its shape is too large"
    );
    assert!(refusal(&[meta("a", &[1], FileDType::I64)]).starts_with("tensor `a` has type `I64`"));
}

#[test]
fn a_number_that_does_not_fit_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = HfWriter::create(dir.path(), &[meta("a", &[300_000], FileDType::F16)], 1 << 30).unwrap();
    let mut values = vec![1.0; 300_000];
    values[250_000] = 1e6;
    let error = writer.write("a", &values).unwrap_err();
    assert_eq!(error.to_string(), "tensor `a`, element `250000`: `1e6` does not fit in `F16`");
}

#[test]
fn asking_for_what_is_not_there_helps() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = [
        meta("model.layers.0.mlp.up_proj.weight", &[2, 3], FileDType::F32),
        meta("model.norm.weight", &[2], FileDType::F32),
    ];
    let mut writer = HfWriter::create(dir.path(), &tensors, 1000).unwrap();
    writer.write("model.layers.0.mlp.up_proj.weight", &[0.0; 6]).unwrap();
    writer.write("model.norm.weight", &[0.0; 2]).unwrap();
    writer.finish().unwrap();
    let reader = HfReader::open(dir.path()).unwrap();
    let file = dir.path().join("model.safetensors").display().to_string();

    let missing = |name: &str| reader.info(name).unwrap_err().to_string();
    assert_eq!(
        missing("norm.weight"),
        format!("no tensor `norm.weight` in `{file}`; did you mean `model.norm.weight`?")
    );
    assert!(
        missing("model.layers.0.mlp.up_proj.weigth")
            .contains("did you mean `model.layers.0.mlp.up_proj.weight`?")
    );
    assert_eq!(missing("lm_head"), format!("no tensor `lm_head` in `{file}`"));
    assert_eq!(
        reader.expect("model.norm.weight", &[2, 1]).unwrap_err().to_string(),
        format!("tensor `model.norm.weight` in `{file}`: expected shape `[2, 1]`, got `[2]`")
    );
    assert_eq!(
        reader.read_range_f32("model.norm.weight", 1..3, &mut [0.0; 2]).unwrap_err().to_string(),
        "tensor `model.norm.weight`: range `1..3` of `2` elements into a buffer of `2`"
    );
    assert!(reader.read_range_f32("model.norm.weight", 0..2, &mut [0.0; 1]).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any tensors, cut into any shards, written in any pieces, read in any ranges.
    #[test]
    fn any_split_reads_back(
        sizes in prop::collection::vec((0usize..300, 0usize..4), 1..12),
        max_shard_bytes in 0u64..4000,
        piece in 1usize..97,
        cuts in prop::collection::vec(0.0f64..1.0, 2),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let tensors: Vec<_> = sizes.iter().enumerate()
            .map(|(i, &(numel, dtype))| meta(&format!("t{i}"), &[numel], WRITABLE[dtype]))
            .collect();
        let mut writer = HfWriter::create(dir.path(), &tensors, max_shard_bytes).unwrap();
        for (i, t) in tensors.iter().enumerate() {
            writer.begin(&t.name).unwrap();
            for part in values(t.shape[0], i, t.dtype).chunks(piece) {
                writer.append(part).unwrap();
            }
        }
        writer.finish().unwrap();

        let reader = HfReader::open(dir.path()).unwrap();
        prop_assert_eq!(reader.tensors().len(), tensors.len());
        for (i, t) in tensors.iter().enumerate() {
            let expected = values(t.shape[0], i, t.dtype);
            let info = reader.expect(&t.name, &t.shape).unwrap();
            prop_assert_eq!(info.dtype, t.dtype);
            let mut ends = [(cuts[0] * t.shape[0] as f64) as usize, (cuts[1] * t.shape[0] as f64) as usize];
            ends.sort();
            let mut got = vec![f32::NAN; ends[1] - ends[0]];
            reader.read_range_f32(&t.name, ends[0]..ends[1], &mut got).unwrap();
            prop_assert_eq!(&got, &expected[ends[0]..ends[1]]);
        }
    }
}

/// Ranges longer than the internal buffer, beginning and ending at odd places.
#[test]
fn long_ranges_cross_the_buffer() {
    let dir = tempfile::tempdir().unwrap();
    let numel = 400_003;
    let tensors: Vec<_> = WRITABLE.iter().map(|&dtype| meta(dtype.name(), &[numel], dtype)).collect();
    let mut writer = HfWriter::create(dir.path(), &tensors, 1 << 20).unwrap();
    for t in &tensors {
        writer.write(&t.name, &values(numel, 1, t.dtype)).unwrap();
    }
    writer.finish().unwrap();
    let reader = HfReader::open(dir.path()).unwrap();
    for t in &tensors {
        let expected = values(numel, 1, t.dtype);
        let range = 131_071..numel - 1;
        let mut got = vec![0.0; range.len()];
        reader.read_range_f32(&t.name, range.clone(), &mut got).unwrap();
        assert!(got == expected[range], "{}", t.name);
    }
}
