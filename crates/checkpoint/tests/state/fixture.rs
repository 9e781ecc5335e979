//! A checkpoint of version 1, kept: every later version has to read it.

use std::fs;
use std::path::{Path, PathBuf};

use shardwise_checkpoint::state::{Checkpoint, Keep};

use crate::common::{Layout, copy_dir, read_as, save};

const LAYOUT: Layout = Layout { data: 2, tensor: 2 };

fn kept() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/state-v1")
}

#[test]
fn version_1_is_read() {
    let checkpoint = Checkpoint::open(kept()).unwrap();
    assert_eq!((checkpoint.version(), checkpoint.step()), (1, 7));
    assert!(checkpoint.verify(|_| ()).findings.is_empty());
    for reader in [Layout::zero(1), Layout::zero(3), LAYOUT] {
        read_as(&checkpoint, reader).unwrap();
    }
    assert_eq!(checkpoint.read_attached("config.json").unwrap().unwrap(), br#"{"model_type":"llama"}"#);
}

/// What writes the fixture: as long as the version is 1, today's bytes are the kept ones. A new version gets a
/// fixture of its own, and this test then makes that one.
#[test]
fn version_1_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let committed = save(dir.path(), LAYOUT, 7, 0x51, Keep::All).unwrap();
    if !kept().exists() {
        copy_dir(&committed.dir, &kept());
        panic!("the fixture was not there; it is now");
    }
    for entry in fs::read_dir(&committed.dir).unwrap() {
        let entry = entry.unwrap();
        let (now, then) =
            (fs::read(entry.path()).unwrap(), fs::read(kept().join(entry.file_name())).unwrap());
        assert!(now == then, "{:?} has other bytes than the kept one", entry.file_name());
    }
}
