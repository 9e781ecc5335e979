//! What a failed run tells people: who, where, why, and the end of that rank's log.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use shardwise_monitor::RunDir;

use crate::supervise::Failure;

const LOG_LINES: usize = 15;
/// Lines are looked for in this much of the log's end.
const LOG_BYTES: u64 = 64 << 10;

/// The lines below the error and its hint. A rank that refused its configuration has said all there is to say.
pub fn details(failure: &Failure, run: &RunDir, num_ranks: usize) -> String {
    let mut text = String::new();
    if failure.is_configuration() && failure.error.is_some() {
        return text;
    }
    let log = run.rank_log(failure.rank);
    match log_tail(&log) {
        Ok(lines) if lines.is_empty() => text += &format!("`{}` is empty\n", log.display()),
        Ok(lines) => {
            text += &format!("end of `{}`:\n", log.display());
            lines.iter().for_each(|line| text += &format!("  | {line}\n"));
        }
        Err(error) => text += &format!("could not read `{}`: {error}\n", log.display()),
    }
    if num_ranks > 1 {
        text += "the other ranks have been ended too\n";
    }
    text
}

fn log_tail(path: &Path) -> std::io::Result<Vec<String>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(LOG_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().map(harmless).collect();
    Ok(lines[lines.len().saturating_sub(LOG_LINES)..].to_vec())
}

/// A line that moves no cursor and changes no colour.
fn harmless(line: &str) -> String {
    line.chars().filter(|&c| c == '\t' || !c.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervise::{Ending, Place};

    fn failure(ending: Ending) -> Failure {
        Failure { rank: 1, place: Place::default(), error: None, ending: Some(ending) }
    }

    #[test]
    fn shows_the_end_of_the_log() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::new(folder.path());
        std::fs::create_dir(run.ranks()).unwrap();
        assert!(details(&failure(Ending::Killed(9)), &run, 1).starts_with("could not read"));
        std::fs::write(run.rank_log(1), "").unwrap();
        assert!(
            details(&failure(Ending::Killed(9)), &run, 2)
                .ends_with("is empty\nthe other ranks have been ended too\n")
        );
        let log: String = (0..30).map(|i| format!("\x1b[31mline {i}\x1b[0m\n")).collect();
        std::fs::write(run.rank_log(1), log + "last \u{7}words").unwrap();
        let text = details(&failure(Ending::Exited(1)), &run, 4);
        let shown: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("  | ")).collect();
        assert_eq!(shown.len(), LOG_LINES);
        assert_eq!((shown[0], shown[14]), ("[31mline 16[0m", "last words"));
        assert!(text.ends_with("the other ranks have been ended too\n"), "{text}");
    }

    #[test]
    fn a_huge_or_binary_log_is_no_trouble() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        std::fs::write(&path, vec![0xff; 1 << 20]).unwrap();
        assert_eq!(log_tail(&path).unwrap().len(), 1);
    }
}
