//! Damaged and hostile files: each is an error that says what is wrong, and none is a panic.
#![allow(clippy::unwrap_used)] // a failed test may panic anywhere

use std::fs;

use shardwise_checkpoint::{CheckpointError, FileDType, HfReader, HfWriter, TensorMeta};

/// The bytes of a file with this header and `data_bytes` of data.
fn file_bytes(header: impl AsRef<[u8]>, data_bytes: usize) -> Vec<u8> {
    let header = header.as_ref();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.resize(bytes.len() + data_bytes, 0);
    bytes
}

fn open(bytes: &[u8]) -> Result<HfReader, CheckpointError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    fs::write(&path, bytes).unwrap();
    HfReader::open(path)
}

/// What our reader says about a file that the reference crate refuses as well.
fn problem(bytes: &[u8]) -> String {
    assert!(safetensors::SafeTensors::deserialize(bytes).is_err(), "the reference accepts this file");
    problem_of_ours(bytes)
}

/// What our reader says about a file, whatever the reference thinks.
fn problem_of_ours(bytes: &[u8]) -> String {
    match open(bytes) {
        Err(CheckpointError::Header { problem, path }) => {
            assert!(path.ends_with("model.safetensors"));
            problem.to_string()
        }
        other => panic!("expected a header problem, got {other:?}"),
    }
}

const A: &str = r#""a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;

#[test]
fn the_smallest_valid_file_opens() {
    assert!(open(&file_bytes("{}", 0)).unwrap().tensors().is_empty());
    assert_eq!(open(&file_bytes(format!("{{{A}}}"), 8)).unwrap().tensors().len(), 1);
}

#[test]
fn empty_file() {
    assert_eq!(problem(&[]), "it has `0` bytes, expected at least 8");
}

#[test]
fn truncated_header() {
    let bytes = file_bytes(format!("{{{A}}}"), 8);
    assert_eq!(problem(&bytes[..30]), "its header claims `54` bytes, the file has `30` in all (truncated?)");
}

#[test]
fn oversized_header_length() {
    let mut bytes = file_bytes("{}", 0);
    bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert_eq!(problem(&bytes), "its header claims `18446744073709551615` bytes, the limit is `100000000`");
}

#[test]
fn header_that_is_not_an_object() {
    assert_eq!(problem(&file_bytes("[]", 0)), "its header does not begin with `{`");
    assert_eq!(problem(&file_bytes("", 0)), "its header does not begin with `{`");
    assert_eq!(problem_of_ours(&file_bytes(" {}", 0)), "its header does not begin with `{`");
}

#[test]
fn header_that_is_not_json() {
    assert!(problem(&file_bytes("{\"a\":", 0)).contains("EOF while parsing"));
    assert!(problem(&file_bytes("{}x", 0)).contains("trailing characters"));
    assert!(problem(&file_bytes(b"{\"\xff\":1}", 0)).starts_with("its header is malformed"));
}

#[test]
fn deeply_nested_header() {
    let header = format!("{{\"a\":{}", "[".repeat(1_000_000));
    assert!(problem(&file_bytes(header, 0)).starts_with("its header is malformed"));
}

#[test]
fn unknown_dtype_and_unknown_field() {
    let header = r#"{"a":{"dtype":"F33","shape":[2],"data_offsets":[0,8]}}"#;
    assert!(problem(&file_bytes(header, 8)).contains("tensor `a`: unknown variant `F33`"));
    let header = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1}}"#;
    assert!(problem_of_ours(&file_bytes(header, 8)).contains("tensor `a`: unknown field `x`"));
}

#[test]
fn negative_and_fractional_sizes() {
    for shape in ["[-2]", "[2.0]", "[1e99]", "2", "null"] {
        let header = format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,8]}}}}"#);
        assert!(problem(&file_bytes(header, 8)).contains("tensor `a`: "), "{shape}");
    }
}

#[test]
fn metadata_that_is_not_text() {
    assert!(problem(&file_bytes(r#"{"__metadata__":{"a":1}}"#, 0)).contains("invalid type: integer"));
    let twice = r#"{"__metadata__":{},"__metadata__":{}}"#;
    assert!(problem(&file_bytes(twice, 0)).contains("`__metadata__` is there twice"));
}

#[test]
fn duplicate_name() {
    // The reference crate takes the second and says nothing.
    assert_eq!(problem_of_ours(&file_bytes(format!("{{{A},{A}}}"), 8)), "tensor `a` is in its header twice");
}

#[test]
fn shape_that_overflows() {
    for shape in
        ["[4611686018427387904,4]", "[9223372036854775808]", "[18446744073709551615,18446744073709551615]"]
    {
        let header = format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}}}"#);
        assert!(
            problem(&file_bytes(header, 0)).ends_with("is not a whole, addressable number of bytes"),
            "{shape}"
        );
    }
}

#[test]
fn shape_and_offsets_that_disagree() {
    let header = r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#;
    assert_eq!(
        problem(&file_bytes(header, 8)),
        "tensor `a`: shape `[3]` of `F32` needs `12` bytes, offsets `0..8` span others"
    );
}

#[test]
fn offsets_outside_of_the_file() {
    let truncated = problem(&file_bytes(format!("{{{A}}}"), 7));
    assert_eq!(truncated, "tensor `a`: offsets `0..8` lie outside of the `7` bytes of data (truncated?)");
    let header =
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[18446744073709551608,18446744073709551615]}}"#;
    assert!(problem(&file_bytes(header, 8)).contains("lie outside of the `8` bytes"));
    let header = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#;
    assert!(problem(&file_bytes(header, 8)).contains("offsets `8..0` lie outside"));
}

#[test]
fn overlapping_tensors() {
    let header = format!(r#"{{{A},"b":{{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}}}"#);
    assert_eq!(problem(&file_bytes(header, 12)), "tensor `b` begins at `4`, inside of tensor `a`");
}

#[test]
fn bytes_that_belong_to_no_tensor() {
    let header = format!(r#"{{{A},"b":{{"dtype":"F32","shape":[2],"data_offsets":[12,20]}}}}"#);
    assert_eq!(problem(&file_bytes(header, 20)), "bytes `8..12` of its data belong to no tensor");
    assert_eq!(problem(&file_bytes(format!("{{{A}}}"), 9)), "bytes `8..9` of its data belong to no tensor");
}

#[test]
fn packed_elements_that_end_inside_a_byte() {
    let header = r#"{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}}"#;
    assert!(problem(&file_bytes(header, 2)).ends_with("is not a whole, addressable number of bytes"));
}

#[test]
fn file_cut_short_after_it_was_opened() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    fs::write(&path, file_bytes(format!("{{{A}}}"), 8)).unwrap();
    let reader = HfReader::open(&path).unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(64).unwrap();
    let error = reader.read_f32("a").unwrap_err();
    assert_eq!(error.to_string(), format!("could not read `{}`", path.display()));
}

#[test]
fn folder_without_weights() {
    let dir = tempfile::tempdir().unwrap();
    let error = HfReader::open(dir.path()).unwrap_err().to_string();
    assert!(error.ends_with("holds neither `model.safetensors` nor `model.safetensors.index.json`"));
    let error = HfReader::open(dir.path().join("nowhere")).unwrap_err().to_string();
    assert!(error.starts_with("could not open `"));
}

/// What our reader says about a folder with this index and one shard, `shard.safetensors`, that holds `a`.
fn index_problem(index: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("shard.safetensors"), file_bytes(format!("{{{A}}}"), 8)).unwrap();
    fs::write(dir.path().join("copy.safetensors"), file_bytes(format!("{{{A}}}"), 8)).unwrap();
    fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    match HfReader::open(dir.path()) {
        Err(CheckpointError::Index { problem, path }) => {
            assert!(path.ends_with("model.safetensors.index.json"));
            problem.to_string()
        }
        Err(other) => panic!("expected an index problem, got {other}"),
        Ok(reader) => format!("{} tensors", reader.tensors().len()),
    }
}

#[test]
fn index_that_fits() {
    assert_eq!(index_problem(r#"{"weight_map":{"a":"shard.safetensors"}}"#), "1 tensors");
}

#[test]
fn index_that_is_malformed() {
    for index in ["", "{}", "[]", r#"{"weight_map":[]}"#, r#"{"weight_map":{"a":1}}"#, r#"{"weight_map":{}"#]
    {
        assert!(index_problem(index).starts_with("malformed: "), "{index}");
    }
}

#[test]
fn index_with_a_duplicate_name() {
    let index = r#"{"weight_map":{"a":"shard.safetensors","a":"copy.safetensors"}}"#;
    assert_eq!(index_problem(index), "tensor `a` is listed twice");
}

#[test]
fn index_that_leaves_the_folder() {
    for file in
        ["../model.safetensors", "/etc/passwd", "x/y.safetensors", "", ".", "..", "./shard.safetensors"]
    {
        let index = serde_json::json!({ "weight_map": { "a": file } }).to_string();
        assert_eq!(
            index_problem(&index),
            format!("tensor `a` is in file `{file}`, expected a plain file name")
        );
    }
}

#[test]
fn index_that_names_a_missing_file() {
    let index = r#"{"weight_map":{"a":"gone.safetensors"}}"#;
    assert_eq!(index_problem(index), "tensor `a` is in file `gone.safetensors`, which does not exist");
}

#[test]
fn index_that_names_a_missing_tensor() {
    let index = r#"{"weight_map":{"a":"shard.safetensors","b":"shard.safetensors"}}"#;
    assert_eq!(index_problem(index), "tensor `b` is not in file `shard.safetensors`");
}

#[test]
fn tensor_in_two_shards() {
    let index = r#"{"weight_map":{"a":"shard.safetensors","b":"copy.safetensors"}}"#;
    assert_eq!(
        index_problem(index),
        "tensor `a` is in file `shard.safetensors` and in file `copy.safetensors`"
    );
}

/// Flips bytes of a small valid model and opens it: an error or a model, never a panic; and what we accept, the
/// reference accepts with the same types and shapes.
#[test]
fn flipped_bytes_never_panic() {
    let dir = tempfile::tempdir().unwrap();
    let dtypes = [FileDType::F32, FileDType::Bf16, FileDType::F16, FileDType::F64];
    let tensors: Vec<_> = dtypes
        .iter()
        .map(|&dtype| TensorMeta { name: format!("model.{dtype}"), shape: vec![2, 3], dtype })
        .collect();
    let mut writer = HfWriter::create(dir.path(), &tensors, u64::MAX).unwrap();
    for tensor in &tensors {
        writer.write(&tensor.name, &[1.5; 6]).unwrap();
    }
    let path = writer.finish().unwrap().remove(0);
    let valid = fs::read(&path).unwrap();

    let (mut accepted, mut refused) = (0, 0);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    for _ in 0..2000 {
        let mut bytes = valid.clone();
        for _ in 0..=random(3) {
            let place = random(bytes.len());
            bytes[place] ^= 1 << random(8);
        }
        if random(4) == 0 {
            bytes.truncate(random(bytes.len()));
        }
        fs::write(&path, &bytes).unwrap();
        match HfReader::open(&path) {
            Err(_) => refused += 1,
            Ok(reader) => {
                accepted += 1;
                let reference =
                    safetensors::SafeTensors::deserialize(&bytes).expect("the reference accepts it too");
                assert_eq!(reader.tensors().len(), reference.len());
                for tensor in reader.tensors() {
                    let view = reference.tensor(&tensor.name).unwrap();
                    assert_eq!(view.shape(), tensor.shape);
                    assert_eq!(view.dtype().to_string(), tensor.dtype.to_string());
                    // Flipped bits of an `F64` may be too large for `f32`, and a flipped type may be no float.
                    let _ = reader.read_f32(&tensor.name);
                }
            }
        }
    }
    assert!(accepted > 100 && refused > 100, "{accepted} accepted, {refused} refused: the test tests little");
}
