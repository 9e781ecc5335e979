//! Saves killed at random moments: there is always a complete newest checkpoint.
//!
//! The test binary starts itself again as the program that saves; [`save_for_ever`] is no test of its own.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use shardwise_checkpoint::state::Checkpoint;

use crate::common::{Layout, Random, newest_of, read_as, save};

const FOLDER: &str = "CHECKPOINT_TEST_FOLDER";

/// In memory if there is such a place: a killed process loses nothing that the system has taken, disk or not.
fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory).unwrap() } else { tempfile::tempdir().unwrap() }
}

fn newest(dir: &Path) -> Option<u64> {
    let found = Checkpoint::newest(dir).unwrap()?;
    assert!(found.damaged.is_empty(), "{:?}", found.damaged);
    assert!(found.checkpoint.verify(|_| ()).findings.is_empty());
    read_as(&found.checkpoint, Layout::zero(2)).unwrap();
    Some(found.checkpoint.step())
}

#[test]
#[ignore = "what the other test starts and kills"]
fn save_for_ever() {
    let Some(dir) = std::env::var_os(FOLDER).map(PathBuf::from) else { return };
    let first = newest(&dir).map_or(0, |step| step + 1);
    println!("\nready");
    for step in first.. {
        // Now and then the same step again, as after going back.
        let step = if step % 5 == 4 { step - 1 } else { step };
        let layout = Layout::zero(1 + step as usize % 3);
        save(&dir, layout, step, std::process::id().into(), newest_of(2)).unwrap().clean_up.unwrap();
    }
}

#[test]
fn two_hundred_kills_leave_a_complete_newest_checkpoint() {
    let dir = scratch();
    let mut random = Random(0x1234_5678_9abc_def1);
    let (mut steps, mut leftovers) = (Vec::new(), 0);
    for _ in 0..200 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "kill::save_for_ever", "--nocapture", "--test-threads=1"])
            .env(FOLDER, dir.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let ready = BufReader::new(child.stdout.take().unwrap()).lines().any(|line| line.unwrap() == "ready");
        assert!(ready, "the program did not begin");
        std::thread::sleep(Duration::from_micros(random.below(12_000) as u64));
        child.kill().unwrap();
        child.wait().unwrap();
        let names = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
        leftovers += usize::from(names.into_iter().any(|name| name.to_string_lossy().starts_with('.')));
        steps.extend(newest(dir.path()));
    }
    assert!(steps.windows(2).all(|pair| pair[0] <= pair[1] + 1), "steps went back: {steps:?}");
    assert!(steps.last() > steps.first(), "nothing was saved");
    assert!(leftovers > 50, "only {leftovers} kills came in the middle: the test tests little");
}
