//! Damage of every kind: refused with the file's name, never a panic, never a wrong number.

use std::fs;
use std::path::Path;

use shardwise_checkpoint::CheckpointError;
use shardwise_checkpoint::state::{Checkpoint, Keep};

use crate::common::{Layout, Random, copy_dir, read_as, save};

const LAYOUT: Layout = Layout { data: 2, tensor: 2 };

/// Opens, verifies and reads all; the errors' texts.
fn complaints(dir: &Path) -> Vec<String> {
    let checkpoint = match Checkpoint::open(dir) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return vec![error.to_string()],
    };
    let mut says: Vec<_> =
        checkpoint.verify(|_| ()).findings.iter().map(|f| format!("{}: {}", f.file, f.damage)).collect();
    // A read of all tensors sees numbers as they were written, or says which file is damaged.
    says.extend(read_as(&checkpoint, Layout::zero(3)).err().map(|error| error.to_string()));
    for name in checkpoint.attached() {
        says.extend(checkpoint.read_attached(name).err().map(|error| error.to_string()));
    }
    says
}

#[test]
fn flipped_bits_are_found_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let committed = save(dir.path(), LAYOUT, 5, 1, Keep::All).unwrap();
    let mut files: Vec<_> =
        fs::read_dir(&committed.dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert_eq!(complaints(&committed.dir), [""; 0]);
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for case in 0..1000 {
        let path = &files[case % files.len()];
        let good = fs::read(path).unwrap();
        let mut bad = good.clone();
        for _ in 0..=random.below(3) {
            let place = random.below(bad.len());
            bad[place] ^= 1 << random.below(8);
        }
        if bad == good {
            continue;
        }
        fs::write(path, &bad).unwrap();
        let says = complaints(&committed.dir);
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(!says.is_empty() && says.iter().all(|text| text.contains(name)), "{name}: {says:?}");
        fs::write(path, &good).unwrap();
    }
    assert_eq!(complaints(&committed.dir), [""; 0]);
}

#[test]
fn truncated_grown_and_missing_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let committed = save(dir.path(), LAYOUT, 5, 1, Keep::All).unwrap();
    let mut random = Random(7);
    for entry in fs::read_dir(&committed.dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let good = fs::read(&path).unwrap();
        let cuts: Vec<_> = (0..20).map(|_| random.below(good.len())).chain([0, good.len() - 1]).collect();
        for cut in cuts {
            fs::write(&path, &good[..cut]).unwrap();
            let says = complaints(&committed.dir);
            assert!(says.len() == 1 && says[0].contains(&name), "{name} cut to {cut}: {says:?}");
        }
        fs::write(&path, [&good[..], b" "].concat()).unwrap();
        assert!(complaints(&committed.dir)[0].contains(&name), "{name}");
        fs::remove_file(&path).unwrap();
        assert!(complaints(&committed.dir)[0].contains(&name), "{name}");
        fs::create_dir(&path).unwrap();
        assert!(complaints(&committed.dir)[0].contains(&name), "{name}");
        fs::remove_dir(&path).unwrap();
        fs::write(&path, &good).unwrap();
    }
    assert_eq!(complaints(&committed.dir), [""; 0]);
}

#[test]
fn a_file_cut_after_it_was_opened() {
    let dir = tempfile::tempdir().unwrap();
    let committed = save(dir.path(), LAYOUT, 5, 1, Keep::All).unwrap();
    let checkpoint = Checkpoint::open(&committed.dir).unwrap();
    read_as(&checkpoint, LAYOUT).unwrap();
    let path = committed.dir.join("rank-00002.safetensors");
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(100).unwrap();
    let error = read_as(&checkpoint, LAYOUT).unwrap_err();
    assert!(
        matches!(error, CheckpointError::Damaged { .. }) && error.to_string().contains("rank-00002"),
        "{error}"
    );
}

#[test]
fn swapped_files_are_foreign() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    // The same model in the same layout: sizes are equal, and some bytes too.
    for (run, step, nonce) in [("a", 5, 1), ("a", 6, 1), ("b", 5, 2)] {
        save(&root.join(run), Layout::zero(1), step, nonce, Keep::All).unwrap();
    }
    let one = root.join("a/step-000005");
    let swapped = root.join("swapped");
    let try_with = |from: &str, file: &str| {
        copy_dir(&one, &swapped);
        fs::copy(root.join(from).join(file), swapped.join(file)).unwrap();
        let says = complaints(&swapped);
        fs::remove_dir_all(&swapped).unwrap();
        says
    };
    let rank0 = "rank-00000.safetensors";
    let says = try_with("a/step-000006", rank0);
    assert!(says.iter().all(|s| s.contains("it is the file of rank `0` of step `6`, save `0000000000000001` (swapped?)")), "{says:?}");
    assert_eq!(says.len(), 2);
    // The same numbers in another run's file: reading them does no harm, verifying tells.
    let says = try_with("b/step-000005", rank0);
    assert!(says[0].contains("of step `5`, save `0000000000000002` (swapped?)"), "{says:?}");
    let says = try_with("a/step-000006", "manifest.json");
    assert!(says.iter().any(|s| s.contains("of step `5`")), "{says:?}");

    // Under the folder's own name a manifest of another step is refused at once.
    fs::copy(root.join("a/step-000006/manifest.json"), one.join("manifest.json")).unwrap();
    let says = complaints(&one);
    assert!(
        says.len() == 1
            && says[0]
                .ends_with("it is of step `6`, its folder is of step `5` (copied from another checkpoint?)"),
        "{says:?}"
    );

    // Two ranks of one checkpoint; the second holds as much as the first.
    let committed = save(&root.join("c"), Layout { data: 1, tensor: 2 }, 5, 1, Keep::All).unwrap();
    let [a, b] = [0, 1].map(|rank| committed.dir.join(format!("rank-{rank:05}.safetensors")));
    let (bytes_a, bytes_b) = (fs::read(&a).unwrap(), fs::read(&b).unwrap());
    fs::write(&a, &bytes_b).unwrap();
    fs::write(&b, &bytes_a).unwrap();
    let says = complaints(&committed.dir);
    assert!(says.iter().all(|s| s.contains("rank-0000")) && !says.is_empty(), "{says:?}");
}
