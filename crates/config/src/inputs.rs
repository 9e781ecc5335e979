//! The files a run will read: resolved against the run file's folder, and looked for on request.
//!
//! Loading does not touch them, so that a run can be planned where its data is not at hand.

use std::path::{Path, PathBuf};

use crate::error::ConfigError;
use crate::value::Origin;

/// One path of a configuration.
#[derive(Debug, Clone)]
pub(crate) struct Input {
    at: Origin,
    key: String,
    pub path: PathBuf,
    /// The path as a glob pattern in which only the part the user wrote is special.
    pattern: String,
    is_special: bool,
    kind: InputKind,
}

/// What a path has to lead to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum InputKind {
    ModelFolder,
    File,
    /// A file, or a pattern that fits at least one.
    Pattern,
}

impl Input {
    pub fn new(at: Origin, key: String, folder: &Path, written: &str, kind: InputKind) -> Input {
        let escaped = glob::Pattern::escape(&folder.to_string_lossy());
        let pattern = Path::new(&escaped).join(written).to_string_lossy().into_owned();
        let is_special = written.contains(['*', '?', '[']);
        Input { at, key, path: folder.join(written), pattern, is_special, kind }
    }

    /// The files it stands for; for a folder, the folder.
    pub fn find(&self) -> Result<Vec<PathBuf>, ConfigError> {
        let problem = |problem| {
            Err(ConfigError::Input {
                at: self.at.clone(),
                key: self.key.clone(),
                path: self.path.clone(),
                problem,
            })
        };
        let path = &self.path;
        match self.kind {
            _ if path.is_dir() && self.kind != InputKind::ModelFolder => {
                problem("which is a folder, not a file")
            }
            InputKind::ModelFolder if path.is_file() => problem("which is a file, not a folder"),
            InputKind::ModelFolder if path.is_dir() && !path.join("config.json").is_file() => {
                problem("a folder without a `config.json`")
            }
            // A name that happens to hold a special character is still a name.
            _ if path.exists() => Ok(vec![path.clone()]),
            InputKind::ModelFolder | InputKind::File => problem("which does not exist"),
            InputKind::Pattern if !self.is_special => problem("which does not exist"),
            InputKind::Pattern => {
                let Ok(found) = glob::glob(&self.pattern) else {
                    return problem("which is not a valid pattern");
                };
                let files: Vec<PathBuf> = found.flatten().filter(|file| file.is_file()).collect();
                if files.is_empty() { problem("which fits no file") } else { Ok(files) }
            }
        }
    }

    pub fn is_text(&self) -> bool {
        self.kind == InputKind::Pattern
    }
}
