//! What is in the folder after a save, a failed one, and the next.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use shardwise_checkpoint::state::{Attachment, Background, Cancel, Checkpoint, Keep, Save};
use shardwise_checkpoint::{CheckpointError, FileDType};

use crate::common::{Layout, bytes, contents, fragments, newest_of, read_as, save, write_rank};

const TWO: Layout = Layout::zero(2);

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn newest(dir: &Path) -> u64 {
    let found = Checkpoint::newest(dir).unwrap().unwrap();
    assert!(found.damaged.is_empty());
    read_as(&found.checkpoint, Layout::zero(3)).unwrap();
    found.checkpoint.step()
}

#[test]
fn a_folder_of_checkpoints() {
    let run = tempfile::tempdir().unwrap();
    let dir = run.path().join("checkpoints");
    assert!(Checkpoint::newest(&dir).unwrap().is_none());
    for step in [10, 20, 30, 40] {
        let committed = save(&dir, TWO, step, 1, newest_of(2)).unwrap();
        assert!(committed.clean_up.is_ok());
        assert_eq!(newest(run.path()), step);
    }
    assert_eq!(names(&dir), ["latest", "step-000030", "step-000040"]);
    assert_eq!(fs::read_to_string(dir.join("latest")).unwrap(), "step-000040\n");
    let inside = dir.join("step-000040");
    assert_eq!(
        names(&inside),
        ["config.json", "manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"]
    );
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&dir), mode(&inside)), (0o700, 0o700));
    for name in names(&inside) {
        assert_eq!(mode(&inside.join(&name)), 0o600, "{name}");
    }
    // The folder, the run and the checkpoint itself are all ways to name it.
    for path in [&dir, &inside, run.path()] {
        assert_eq!(Checkpoint::find(path).unwrap().checkpoint.step(), 40);
    }
}

#[test]
fn the_newest_is_the_one_saved_last() {
    let dir = tempfile::tempdir().unwrap();
    for step in [100, 200, 300] {
        save(dir.path(), TWO, step, 1, Keep::All).unwrap();
    }
    // Another run goes back to step 100 and takes another way.
    save(dir.path(), Layout::zero(3), 150, 2, newest_of(3)).unwrap();
    assert_eq!(newest(dir.path()), 150);
    assert_eq!(names(dir.path()), ["latest", "step-000150", "step-000200", "step-000300"]);
    save(dir.path(), Layout::zero(3), 200, 2, newest_of(3)).unwrap();
    assert_eq!(newest(dir.path()), 200);
    assert_eq!(names(dir.path()), ["latest", "step-000150", "step-000200", "step-000300"]);
    assert_eq!(Checkpoint::open(dir.path().join("step-000200")).unwrap().mesh().world_size, 3);
    // The one just written stays, whatever else there is.
    save(dir.path(), TWO, 10, 3, newest_of(1)).unwrap();
    assert_eq!(names(dir.path()), ["latest", "step-000010"]);
}

#[test]
fn leftovers_of_dead_runs_go_and_other_things_stay() {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), TWO, 10, 1, Keep::All).unwrap();
    write_rank(dir.path(), TWO, 20, 1, 1).unwrap();
    fs::create_dir(dir.path().join(".old-step-000005-0000000000000001")).unwrap();
    fs::write(dir.path().join(".latest-0000000000000001"), "x").unwrap();
    fs::create_dir(dir.path().join("best")).unwrap();
    fs::write(dir.path().join("latest"), "nonsense").unwrap();
    assert_eq!(newest(dir.path()), 10);
    assert_eq!(names(dir.path()).len(), 6);
    // The next run clears up when it saves, whichever rank comes first.
    let late = write_rank(dir.path(), TWO, 20, 2, 1).unwrap();
    let first = write_rank(dir.path(), TWO, 20, 2, 0).unwrap();
    assert_eq!(names(dir.path()), [".tmp-step-000020-0000000000000002", "best", "latest", "step-000010"]);
    first.commit(&contents(TWO, 20), Keep::All).unwrap();
    drop(late);
    assert_eq!(newest(dir.path()), 20);
}

#[test]
fn a_damaged_one_is_passed_over_and_named() {
    let dir = tempfile::tempdir().unwrap();
    for step in [10, 20] {
        save(dir.path(), TWO, step, 1, Keep::All).unwrap();
    }
    let file = dir.path().join("step-000020/rank-00001.safetensors");
    fs::write(&file, "short").unwrap();
    let found = Checkpoint::newest(dir.path()).unwrap().unwrap();
    assert_eq!(found.checkpoint.step(), 10);
    let says = found.damaged[0].1.to_string();
    assert!(
        says.starts_with(&format!(
            "`{}`, which holds `param` of `down.weight` and 17 more: it has `5` bytes",
            file.display()
        )),
        "{says}"
    );

    // Damaged ones are evidence: they do not count as kept, and are not removed.
    save(dir.path(), TWO, 30, 1, newest_of(2)).unwrap();
    assert_eq!(names(dir.path()), ["latest", "step-000010", "step-000020", "step-000030"]);

    for step in [10, 30] {
        fs::remove_file(dir.path().join(format!("step-0000{step}/manifest.json"))).unwrap();
    }
    let error = Checkpoint::newest(dir.path()).unwrap_err().to_string();
    assert!(error.contains("holds no complete checkpoint; the newest: could not open"), "{error}");
}

#[test]
fn parts_that_do_not_fit_are_refused_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), TWO, 10, 1, Keep::All).unwrap();
    let before = names(dir.path());
    let refuse = |save: Save, layout: Layout, expected: &str| {
        let error = save.commit(&contents(layout, 20), newest_of(1)).unwrap_err().to_string();
        assert!(
            error.starts_with("checkpoint of step `20` was not saved: ") && error.contains(expected),
            "{error}"
        );
        assert_eq!(names(dir.path()), before);
    };
    // A rank has not finished.
    let save = write_rank(dir.path(), TWO, 20, 1, 0).unwrap();
    refuse(save, TWO, "rank `1` has left no index");
    // Ranks of different layouts: elements missing, or there twice.
    let save = write_rank(dir.path(), TWO, 20, 1, 0).unwrap();
    write_rank(dir.path(), Layout::zero(3), 20, 1, 1).unwrap();
    refuse(save, TWO, "`param` of `down.weight`: elements");
    // A mesh that is none.
    let save = write_rank(dir.path(), TWO, 20, 1, 0).unwrap();
    write_rank(dir.path(), TWO, 20, 1, 1).unwrap();
    let mut wrong = contents(TWO, 20);
    wrong.mesh.pipeline = 2;
    let error = save.commit(&wrong, Keep::All).unwrap_err().to_string();
    assert!(error.contains("`mesh.world_size` is `2`, expected the product of the degrees"), "{error}");
    // Files that would leave the folder, or take the place of another.
    for name in ["../x", "a/b", "", ".hidden", "manifest.json", "rank-00000.safetensors"] {
        let save = write_rank(dir.path(), Layout::zero(1), 20, 1, 0).unwrap();
        let mut wrong = contents(Layout::zero(1), 20);
        wrong.attached.push(Attachment { name: name.to_owned(), bytes: [].into() });
        let error = save.commit(&wrong, Keep::All).unwrap_err().to_string();
        assert!(error.contains(&format!("`{name}` cannot be attached")), "{error}");
    }
    // The index of another save.
    let save = write_rank(dir.path(), TWO, 20, 1, 0).unwrap();
    let other = tempfile::tempdir().unwrap();
    write_rank(other.path(), TWO, 21, 1, 1).unwrap();
    for file in ["rank-00001.index.json", "rank-00001.safetensors"] {
        let from = other.path().join(".tmp-step-000021-0000000000000001").join(file);
        fs::copy(from, dir.path().join(".tmp-step-000020-0000000000000001").join(file)).unwrap();
    }
    refuse(save, TWO, "it is of rank `1`, step `21`, save `0000000000000001`");
    // Given up.
    write_rank(dir.path(), TWO, 20, 1, 0).unwrap().abandon().unwrap();
    assert_eq!(names(dir.path()), before);
    assert_eq!(newest(dir.path()), 10);
}

#[test]
fn fragments_are_written_as_declared() {
    let dir = tempfile::tempdir().unwrap();
    let save = Save::begin(dir.path(), 1, 1, 0).unwrap();
    let good = fragments(Layout::zero(1), 0);
    let says = |result: Result<(), CheckpointError>| {
        fs::remove_file(dir.path().join(".tmp-step-000001-0000000000000001/rank-00000.safetensors")).unwrap();
        result.unwrap_err().to_string().split_once("not saved: ").unwrap().1.to_owned()
    };
    let mut writer = save.shard_writer(&good).unwrap();
    assert_eq!(says(writer.write(1, &[0; 20])), "`param` of `norm.weight` was written out of order");
    let mut writer = save.shard_writer(&good).unwrap();
    assert_eq!(
        says(writer.write(0, &[0; 261])),
        "`param` of `embed.weight`: `260` bytes are declared, got `261`"
    );
    let mut writer = save.shard_writer(&good).unwrap();
    assert_eq!(
        says(writer.write(0, &[0; 259])),
        "`param` of `embed.weight`: `260` bytes are declared, got `259`"
    );
    let mut writer = save.shard_writer(&good).unwrap();
    writer.write(0, &bytes(&good[0], 1)).unwrap();
    assert_eq!(says(writer.finish().map(drop)), "`param` of `norm.weight`: `20` bytes are declared, got `0`");
    for change in [
        (|f| f.name.clear()) as fn(&mut shardwise_checkpoint::state::Fragment),
        |f| f.kind = "a/b".to_owned(),
        |f| f.dtype = FileDType::F4,
        |f| f.shape = vec![12, 5],
        |f| f.region.range.end += 1,
    ] {
        let mut bad = good.clone();
        change(&mut bad[0]);
        assert!(matches!(save.shard_writer(&bad).unwrap_err(), CheckpointError::Save { .. }));
    }
    let twice = [good[0].clone(), good[0].clone()];
    assert!(save.shard_writer(&twice).unwrap_err().to_string().ends_with("it is listed twice"));
}

#[test]
fn saving_goes_on_behind() {
    let dir = tempfile::tempdir().unwrap();
    let mut saving = Background::new();
    let path = dir.path().to_owned();
    saving.start(1, move |_: &Cancel| save(&path, TWO, 1, 1, Keep::All)).unwrap();
    let committed = saving.wait().unwrap().unwrap();
    assert_eq!(Checkpoint::open(&committed.dir).unwrap().step(), 1);

    // Cancelled, the writer ends with an error that says so.
    let path = dir.path().to_owned();
    let job = move |cancel: &Cancel| {
        cancel.cancel();
        let save = Save::begin(&path, 2, 1, 0)?;
        let writer = save.shard_writer(&[])?.cancelled_by(cancel);
        writer.finish().map(drop)
    };
    let mut saving = Background::new();
    saving.start(2, job).unwrap();
    let error = saving.wait().unwrap().unwrap_err();
    assert_eq!(error.to_string(), "checkpoint of step `2` was not saved: it was cancelled");
}
