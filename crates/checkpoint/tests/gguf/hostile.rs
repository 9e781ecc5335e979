//! Damaged and hostile files: each is an error that says what is wrong, and none is a panic.

use proptest::prelude::*;
use shardwise_checkpoint::gguf::{GgufReader, ImportOptions, TokenizerImport, import};
use shardwise_checkpoint::{CheckpointError, FileDType};

use crate::file::{F32, Gguf, Q8_0, tiny_llama};

fn open(bytes: &[u8]) -> Result<GgufReader, CheckpointError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    // The open file outlives its name.
    GgufReader::open(path)
}

fn problem(bytes: &[u8]) -> String {
    match open(bytes) {
        Err(CheckpointError::Gguf { path, problem }) => {
            assert!(path.ends_with("model.gguf"));
            problem.to_string()
        }
        other => panic!("expected a problem, got {other:?}"),
    }
}

fn one(name: &str) -> Gguf {
    Gguf::new().tensor_f32(name, &[2, 4], &[1.0; 8])
}

/// All that a caller might do with a file; errors are fine.
fn use_all(bytes: &[u8]) {
    let Ok(file) = open(bytes) else { return };
    for (_, value) in file.values() {
        let _ = value.to_string();
    }
    let numel: usize = file.tensors().iter().map(|tensor| tensor.numel()).sum();
    // Quantising saves a factor of 16 at most, so what opens is no larger than its file.
    assert!(numel <= bytes.len() * 16);
    for tensor in file.tensors() {
        let _ = file.read_f32(&tensor.name);
    }
    let dir = tempfile::tempdir().unwrap();
    for tokenizer in [TokenizerImport::Needed, TokenizerImport::LeaveOut] {
        let options = ImportOptions { dtype: FileDType::F32, max_shard_bytes: 1 << 20, tokenizer };
        let _ = import::<CheckpointError>(&file, dir.path(), &options, |_| Ok(()));
    }
}

#[test]
fn the_smallest_files_open() {
    let empty = open(&Gguf::new().bytes()).unwrap();
    assert_eq!((empty.tensors().len(), empty.values().count()), (0, 0));
    let file = open(&Gguf { version: 2, ..one("a") }.bytes()).unwrap();
    assert_eq!((file.version(), file.info("a").unwrap().shape.as_slice()), (2, &[2, 4][..]));
    assert_eq!(file.read_f32("a").unwrap(), [1.0; 8]);
}

#[test]
fn other_formats() {
    assert_eq!(problem(b"PK\x03\x04 and more"), "it does not begin with `GGUF`");
    assert_eq!(problem(&Gguf { version: 1, ..one("a") }.bytes()), "it is GGUF version `1`, expected 2 or 3");
    let big_endian = Gguf { version: 3_u32.swap_bytes(), ..one("a") };
    assert_eq!(problem(&big_endian.bytes()), "it is big-endian, expected a little-endian GGUF file");
}

#[test]
fn counts_that_the_file_cannot_hold() {
    let count_at = |bytes: &[u8], at: usize| {
        let mut bytes = bytes.to_vec();
        bytes[at..at + 8].fill(0xff);
        problem(&bytes)
    };
    let all = u64::MAX;
    let bytes = one("a").bytes();
    assert_eq!(count_at(&bytes, 8), format!("it claims `{all}` tensors, more than the file can hold"));
    assert_eq!(count_at(&bytes, 16), format!("it claims `{all}` keys, more than the file can hold"));
    assert!(count_at(&bytes, 24).contains("a tensor's name at byte `32` needs `18446744073709551615` more"));
    let array = Gguf::new().i32s("k", &[1, 2]).bytes();
    let at = 24 + 8 + 1 + 4 + 4;
    assert!(count_at(&array, at).contains("values in an array, more than the file can hold"));
}

#[test]
fn values() {
    let with = |type_id: u32, bytes: Vec<u8>| {
        let mut file = one("a");
        file.values.push(("k".into(), type_id, bytes));
        problem(&file.bytes())
    };
    assert_eq!(with(13, vec![0; 8]), "key `k` has a value of type `13`, expected 0 to 12");
    assert_eq!(with(7, vec![2]), "key `k` has a boolean of `2`, expected 0 or 1");
    assert_eq!(with(8, [&1u64.to_le_bytes()[..], b"\xff"].concat()), "a text at byte `45` is not UTF-8");
    // An array of an array of an array...
    let nested = [9u32.to_le_bytes().as_slice(), &1u64.to_le_bytes()].concat();
    assert_eq!(with(9, nested.repeat(50_000)), "key `k` has arrays nested deeper than `4`");
    let mut twice = one("a").u32("k", 1);
    twice.values.push(twice.values[0].clone());
    assert_eq!(problem(&twice.bytes()), "key `k` is there twice");
    for alignment in [0, 3, 1 << 30] {
        let said = problem(&one("a").u32("general.alignment", alignment).bytes());
        assert_eq!(
            said,
            format!("key `general.alignment` is `{alignment}`, expected a power of two up to 1048576")
        );
    }
}

#[test]
fn nested_arrays_open() {
    let inner = [4u32.to_le_bytes().as_slice(), &1u64.to_le_bytes(), &7u32.to_le_bytes()].concat();
    let file = open(&Gguf::new().array("k", 9, 2, inner.repeat(2)).u32("after", 5).bytes()).unwrap();
    assert_eq!(file.value("k").unwrap().to_string(), "an array of 2 values");
    assert_eq!(file.value("after").unwrap().as_u64(), Some(5));
}

#[test]
fn tensors() {
    let with = |change: &dyn Fn(&mut Gguf)| {
        let mut file = one("a").tensor_f32("b", &[8], &[2.0; 8]);
        change(&mut file);
        problem(&file.bytes())
    };
    assert_eq!(with(&|file| file.tensors[1].name = "a".into()), "tensor `a` is there twice");
    assert_eq!(
        with(&|file| file.tensors[0].sizes = vec![1; 5]),
        "tensor `a` has `5` dimensions, expected at most 4"
    );
    let type_4 = "tensor `a` has type `4`, which no known version of the format defines";
    assert_eq!(with(&|file| file.tensors[0].type_id = 4), type_4);
    assert_eq!(
        with(&|file| file.tensors[0].offset = Some(4)),
        "tensor `a` begins at `4`, expected a multiple of `32`"
    );
    let not_whole = "is not a whole, addressable number of blocks";
    for sizes in [vec![4, 2, 0], vec![1 << 32, 1 << 32], vec![u64::MAX], vec![1 << 62]] {
        let said = with(&|file| file.tensors[0].sizes.clone_from(&sizes));
        assert_eq!(said, format!("tensor `a`: shape `{sizes:?}` of `F32` {not_whole}"));
    }
    let said = with(&|file| file.tensors[0].type_id = Q8_0);
    assert_eq!(said, format!("tensor `a`: shape `[4, 2]` of `Q8_0` {not_whole}"));
    assert_eq!(
        with(&|file| file.tensors[1].offset = Some(0)),
        "tensor `b` begins at `0`, inside of tensor `a`"
    );
    for offset in [64, u64::MAX - 31] {
        let said = with(&|file| file.tensors[1].offset = Some(offset));
        assert_eq!(
            said,
            format!(
                "tensor `b`: `32` bytes at `{offset}` lie outside of the `64` bytes of data (truncated?)"
            )
        );
    }
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let bytes = one("a").text("k", "text").i32s("l", &[1, 2, 3]).bytes();
    assert!(open(&bytes).is_ok());
    for len in 0..bytes.len() {
        assert!(open(&bytes[..len]).is_err(), "{len} of {} bytes", bytes.len());
    }
}

#[test]
fn ranges_are_checked() {
    let file =
        open(&Gguf::new().tensor("q", &[2, 32], Q8_0, vec![0; 68]).tensor("i", &[2], 26, vec![0; 8]).bytes());
    let file = file.unwrap();
    let read = |name: &str, range: std::ops::Range<usize>, len: usize| {
        file.read_range_f32(name, range, &mut vec![0.0; len]).map_err(|error| error.to_string())
    };
    assert_eq!(read("q", 32..64, 32), Ok(()));
    for (range, len) in [(0..16, 16), (16..48, 32), (32..96, 64), (0..32, 64)] {
        let said = format!("tensor `q`: range `{range:?}` of `64` elements into a buffer of `{len}`");
        assert_eq!(read("q", range, len), Err(said));
    }
    assert!(read("i", 0..2, 2).unwrap_err().ends_with(
        "tensor `i` has type `I32`, expected one of `F32`, `F16`, `BF16`, `Q4_0`, `Q4_1`, `Q5_0`, `Q5_1`, `Q8_0`, \
         `Q4_K`, `Q5_K`, `Q6_K`"
    ));
    assert!(read("Q", 0..2, 2).unwrap_err().starts_with("no tensor `Q` in `"));
}

/// A change to a file that opens.
#[derive(Debug, Clone)]
enum Damage {
    Byte { at: usize, value: u8 },
    Word { at: usize, value: u64 },
    Cut { at: usize },
    Insert { at: usize, bytes: Vec<u8> },
}

fn damage() -> impl Strategy<Value = Damage> {
    let word = prop_oneof![any::<u64>(), 0..300u64, Just(u64::MAX), Just(1 << 32), Just(1 << 63)];
    // Most of the header first, then anywhere.
    let at = prop_oneof![3 => 0..1200usize, 1 => any::<usize>()];
    (at, word, any::<u8>(), prop::collection::vec(any::<u8>(), 1..40), 0..4).prop_map(
        |(at, word, byte, bytes, kind)| match kind {
            0 => Damage::Byte { at, value: byte },
            1 => Damage::Word { at, value: word },
            2 => Damage::Cut { at },
            _ => Damage::Insert { at, bytes },
        },
    )
}

fn apply(bytes: &mut Vec<u8>, damage: &Damage) {
    let place = |at: usize, bytes: &Vec<u8>| at % bytes.len().max(1);
    match damage {
        Damage::Byte { at, value } => {
            let at = place(*at, bytes);
            if let Some(byte) = bytes.get_mut(at) {
                *byte = *value;
            }
        }
        Damage::Word { at, value } => {
            let at = place(*at, bytes);
            let end = (at + 8).min(bytes.len());
            let len = end - at;
            bytes[at..end].copy_from_slice(&value.to_le_bytes()[..len]);
        }
        Damage::Cut { at } => bytes.truncate(place(*at, bytes)),
        Damage::Insert { at, bytes: more } => {
            let at = place(*at, bytes);
            bytes.splice(at..at, more.iter().copied());
        }
    }
}

proptest! {
    #[test]
    fn random_bytes_never_panic(version in 2..=3u32, bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        use_all(&bytes);
        use_all(&[b"GGUF", &version.to_le_bytes()[..], &bytes].concat());
    }

    #[test]
    fn a_random_tensor_never_panics(
        sizes in prop::collection::vec(prop_oneof![0..300u64, any::<u64>()], 0..6),
        type_id in prop_oneof![0..45u32, any::<u32>()],
        offset in prop_oneof![Just(0), Just(32), any::<u64>()],
        data in prop::collection::vec(any::<u8>(), 0..2000),
    ) {
        let mut file = Gguf::new().tensor("a", &[], F32, data);
        file.tensors[0] = crate::file::Tensor { sizes, type_id, offset: Some(offset), ..file.tensors[0].clone() };
        use_all(&file.bytes());
    }

    #[test]
    fn a_damaged_model_never_panics(damages in prop::collection::vec(damage(), 1..4)) {
        let mut bytes = TINY.with(Clone::clone);
        damages.iter().for_each(|damage| apply(&mut bytes, damage));
        use_all(&bytes);
    }
}

thread_local! {
    static TINY: Vec<u8> = tiny_llama().bytes();
}
