//! Manifests that carry the right checksum and lie: refused or right, never a panic.

use proptest::prelude::*;
use serde_json::{Value, json};

use crate::state::manifest::Manifest;
use crate::state::sealed;

fn good() -> Value {
    let file = |name: &str| json!({"name": name, "bytes": 140, "crc32c": "000000000000000000000000"});
    json!({
        "format": "shardwise-checkpoint", "version": 1, "program": "p", "save": "s", "sequence": 1, "step": 7,
        "mesh": {"world_size": 2, "zero_stage": 1, "pipeline": 1, "data": 2, "tensor": 1},
        "chunk_bytes": 64, "config": {}, "run_state": {},
        "files": [file("a"), file("b")],
        "attached": [{"name": "config.json", "bytes": 0, "crc32c": ""}],
        "tensors": [
            {"name": "w", "kind": "param", "dtype": "F32", "shape": [4, 5], "pieces": [
                {"file": 0, "offset": 100, "range": [0, 10]},
                {"file": 1, "offset": 100, "range": [10, 20]}]},
            {"name": "u", "kind": "param", "dtype": "BF16", "shape": [4, 5], "pieces": [
                {"file": 0, "offset": 0, "range": [0, 12], "block": {"offset": [0, 0], "shape": [4, 3]}},
                {"file": 1, "offset": 0, "range": [0, 8], "block": {"offset": [0, 3], "shape": [4, 2]}}]},
            {"name": "v", "kind": "param", "dtype": "F32", "shape": [0], "pieces": []}],
    })
}

fn parse(manifest: &Value) -> Result<Manifest, String> {
    let Value::Object(entries) = manifest else { return Err("no object".to_owned()) };
    let entries: Vec<_> = entries.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
    Manifest::parse(&mut sealed::seal(&entries)).map_err(|problem| problem.to_string())
}

#[test]
fn each_lie_is_named() {
    let manifest = parse(&good()).unwrap();
    assert_eq!(Manifest::parse(&mut manifest.to_bytes()).unwrap(), manifest);
    for (place, value, expected) in [
        ("/format", json!("zip"), "its format is `zip`"),
        (
            "/version",
            json!(2),
            "its format version is `2`, this program reads up to `1`; use the program that wrote it",
        ),
        ("/version", json!(0), "its format version is `0`"),
        ("/step", json!(-1), "malformed: invalid value"),
        ("/mesh/zero_stage", json!(4), "`mesh.zero_stage` is `4`, expected 0 to 3"),
        ("/mesh/data", json!(3), "`mesh.world_size` is `2`, expected the product of the degrees"),
        ("/mesh/data", json!(u64::MAX), "`mesh.world_size` is `2`"),
        (
            "/mesh",
            json!({"world_size": 2, "zero_stage": 1, "pipeline": 1, "data": 2, "tensor": 1, "x": 1}),
            "malformed: unknown field `x`",
        ),
        ("/chunk_bytes", json!(0), "`chunk_bytes` is `0`"),
        ("/chunk_bytes", json!(96), "`chunk_bytes` is `96`"),
        ("/chunk_bytes", json!(1u64 << 40), "`chunk_bytes` is `1099511627776`"),
        ("/files/0/name", json!("../a"), "`../a` cannot be the name of a file"),
        ("/files/0/name", json!("/etc/passwd"), "`/etc/passwd` cannot be the name"),
        ("/attached/0/name", json!("manifest.json"), "`manifest.json` cannot be the name"),
        ("/attached/0/name", json!("a"), "file `a` is listed twice"),
        ("/files/0/bytes", json!(u64::MAX), "file `a` of `18446744073709551615` bytes has `3` checksums"),
        ("/files/1/crc32c", json!("0000000"), "malformed: checksums are not groups"),
        ("/files", json!([]), "it lists the files of `0` ranks, the mesh has `2`"),
        ("/tensors/0/name", json!("u"), "`param` of `u` is listed twice"),
        ("/tensors/0/kind", json!("a/b"), "its kind is empty or has one of"),
        ("/tensors/0/dtype", json!("F4"), "its elements are no whole bytes"),
        ("/tensors/0/dtype", json!("F33"), "malformed: unknown variant `F33`"),
        ("/tensors/0/shape", json!([u64::MAX, 5]), "its shape is too large"),
        ("/tensors/0/shape", json!([1u64 << 62]), "its shape is too large"),
        ("/tensors/0/shape", json!([5, 5]), "`param` of `w`: elements `20..25` are missing"),
        ("/tensors/0/pieces/1/range", json!([9, 20]), "elements `9..10` are there twice"),
        ("/tensors/0/pieces/1/range", json!([20, 10]), "a piece leaves the tensor"),
        ("/tensors/0/pieces/0/file", json!(2), "are not inside of file `number 2`"),
        ("/tensors/0/pieces/0/offset", json!(101), "bytes `101..141` are not inside of file `a`"),
        ("/tensors/0/pieces/0/offset", json!(u64::MAX), "are not inside of file `a`"),
        (
            "/tensors/0/pieces/0/offset",
            json!(20),
            "begins at byte `20` of file `a`, inside of another tensor",
        ),
        ("/tensors/1/pieces/0/block/offset", json!([u64::MAX, 0]), "a piece leaves the tensor"),
        (
            "/tensors/1/pieces/0/block/offset",
            json!([0, 1]),
            "blocks `[0, 1] + [4, 3]` and `[0, 3] + [4, 2]` overlap",
        ),
        ("/tensors/1/pieces/0/block/shape", json!([4]), "a piece leaves the tensor"),
        ("/tensors/2/shape", json!([1]), "`param` of `v`: `1` of its `1` elements are missing"),
    ] {
        let mut manifest = good();
        *manifest.pointer_mut(place).unwrap() = value;
        let problem = parse(&manifest).unwrap_err();
        assert!(problem.contains(expected), "{place}: {problem}");
    }
    let deep = json!({"x": (0..200).fold(json!(1), |inner, _| json!([inner]))});
    let mut manifest = good();
    manifest["run_state"] = deep;
    assert!(parse(&manifest).unwrap_err().contains("recursion limit"));
}

/// Some place in the manifest.
fn places(value: &Value, at: &str, all: &mut Vec<String>) {
    all.push(at.to_owned());
    match value {
        Value::Object(map) => map.iter().for_each(|(key, value)| places(value, &format!("{at}/{key}"), all)),
        Value::Array(list) => list.iter().enumerate().for_each(|(i, v)| places(v, &format!("{at}/{i}"), all)),
        _ => {}
    }
}

fn something() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u64>().prop_map(|n| json!(n)),
        (0u64..40).prop_map(|n| json!(n)),
        any::<i64>().prop_map(|n| json!(n)),
        any::<f64>().prop_map(|n| json!(n)),
        prop::collection::vec(prop_oneof![0u64..30, any::<u64>()], 0..5).prop_map(|n| json!(n)),
        "[a-zA-Z0-9/.@_-]{0,24}".prop_map(|text| json!(text)),
        Just(Value::Null),
        Just(json!({})),
        Just(json!({"offset": [0, 0], "shape": [4, 5]})),
    ]
}

proptest! {
    #[test]
    fn altered_manifests_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), something()), 1..4)
    ) {
        let mut manifest = good();
        for (place, value) in changes {
            let mut all = Vec::new();
            places(&manifest, "", &mut all);
            if let Some(target) = manifest.pointer_mut(&all[place.index(all.len())]) {
                *target = value;
            }
        }
        // What is accepted is consistent in itself, so it survives being written and read again.
        if let Ok(manifest) = parse(&manifest) {
            prop_assert!(manifest.check().is_ok());
            prop_assert_eq!(Manifest::parse(&mut manifest.to_bytes()).unwrap(), manifest);
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..400), is_sealed in any::<bool>()) {
        if is_sealed {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            bytes = sealed::seal(&[("format", json!("shardwise-checkpoint")), ("version", json!(1)), ("x", json!(text))]);
        }
        prop_assert!(Manifest::parse(&mut bytes).is_err());
    }
}
