//! Disks that fail: the error says what and where, nothing half is committed, and what was there stays.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rustix::process::Uid;
use serde_json::json;

use crate::state::shard::{SaveKey, ShardWriter};
use crate::state::sink::Sink;
use crate::state::{Checkpoint, Contents, Fragment, Keep, Mesh, Region, Save};
use crate::{CheckpointError, FileDType};

const NUMEL: usize = 3 << 20;

fn fragment() -> Fragment {
    Fragment {
        name: "w".to_owned(),
        kind: "param".to_owned(),
        dtype: FileDType::F32,
        shape: vec![NUMEL],
        region: Region::whole(&[NUMEL]),
    }
}

fn contents() -> Contents {
    let mesh = Mesh { world_size: 1, zero_stage: 0, pipeline: 1, data: 1, tensor: 1 };
    let (config, run_state) = (json!({}), json!({}));
    Contents { program: "test".to_owned(), mesh, config, run_state, attached: Vec::new() }
}

fn save(dir: &Path, step: u64) -> Result<(), CheckpointError> {
    let save = Save::begin(dir, step, 1, 0)?;
    let mut writer = save.shard_writer(&[fragment()])?;
    writer.write(0, bytemuck::cast_slice(&vec![step as f32; NUMEL]))?;
    writer.finish()?;
    save.commit(&contents(), Keep::All)?.clean_up
}

/// Writes with a sink of the test's; the error's text with its source.
fn write_to(dir: &Path, sink: impl Sink + 'static) -> Result<(), String> {
    let save = Save::begin(dir, 2, 1, 0).map_err(|error| error.to_string())?;
    let temp = dir.join(".tmp-step-000002-0000000000000001");
    let key = SaveKey { save: "0000000000000001".to_owned(), step: 2 };
    let write = || {
        let mut writer =
            ShardWriter::create_in(&temp, &key, 0, &[fragment()], 1 << 20, |_, _| Ok(Box::new(sink)))?;
        writer.write(0, &vec![0; NUMEL * 4])?;
        writer.finish().map(drop)
    };
    let result: Result<(), CheckpointError> = write();
    let text = result.map_err(|error| {
        let source = std::error::Error::source(&error).map(ToString::to_string);
        format!("{error}: {}", source.unwrap_or_default())
    });
    // No index was left, so a commit cannot succeed; it clears up.
    let error = save.commit(&contents(), Keep::All).unwrap_err();
    assert!(error.to_string().contains("rank `0` has left no index"), "{error}");
    assert!(!temp.exists());
    text
}

/// A disk of so many bytes that is told of the rest by `full`, or forgets everything when it syncs.
struct Disk {
    room: usize,
    full: io::ErrorKind,
    sync: io::Result<()>,
}

impl Sink for Disk {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.room = self.room.checked_sub(bytes.len()).ok_or(self.full)?;
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        std::mem::replace(&mut self.sync, Ok(()))
    }
}

/// The system's own full device.
struct Full(File);

impl Sink for Full {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_disk_that_fails_leaves_the_earlier_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), 1).unwrap();
    let file = dir.path().join(".tmp-step-000002-0000000000000001/rank-00000.safetensors");

    let device = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let error = write_to(dir.path(), Full(device)).unwrap_err();
    assert_eq!(error, format!("could not write `{}`: No space left on device (os error 28)", file.display()));

    let disk = Disk { room: 5 << 20, full: io::ErrorKind::WriteZero, sync: Ok(()) };
    let error = write_to(dir.path(), disk).unwrap_err();
    assert_eq!(error, format!("could not write `{}`: write zero", file.display()));

    let disk =
        Disk { room: usize::MAX, full: io::ErrorKind::Other, sync: Err(io::Error::from_raw_os_error(5)) };
    let error = write_to(dir.path(), disk).unwrap_err();
    assert_eq!(error, format!("could not sync `{}`: Input/output error (os error 5)", file.display()));

    assert_eq!(Checkpoint::newest(dir.path()).unwrap().unwrap().checkpoint.step(), 1);
}

/// Runs `work` as a user that permissions bind.
fn as_ordinary_user<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            if rustix::process::geteuid().is_root() {
                // Of this thread alone.
                rustix::thread::set_thread_uid(Uid::from_raw(65534)).unwrap();
            }
            work()
        });
        thread.join().unwrap()
    })
}

#[test]
fn a_read_only_folder_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("checkpoints");
    save(&folder, 1).unwrap();
    for path in [dir.path(), &folder, &folder.join("step-000001")] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o555)).unwrap();
    }
    for entry in fs::read_dir(folder.join("step-000001")).unwrap() {
        fs::set_permissions(entry.unwrap().path(), fs::Permissions::from_mode(0o444)).unwrap();
    }
    let (error, newest) = as_ordinary_user(|| {
        let error = save(&folder, 2).unwrap_err();
        (error, Checkpoint::newest(&folder).unwrap().unwrap().checkpoint.step())
    });
    let temp = folder.join(".tmp-step-000002-0000000000000001");
    assert_eq!(error.to_string(), format!("could not create `{}`", temp.display()));
    assert_eq!(newest, 1);
    for path in [dir.path(), &folder, &folder.join("step-000001")] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
}
