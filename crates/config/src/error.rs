//! What can be wrong with a configuration, and how to mend it.
//!
//! Loading reports every problem it finds, not only the first. One problem prints as
//!
//! ```text
//! error: run.json:12: `deepspeed.zero_optimization.stge` is not a known key
//! hint: did you mean `stage`?
//! ```
//!
//! where the key path is the one the reader of that place sees: in a DeepSpeed file of its own it starts at
//! that file's root.

use std::fmt;
use std::path::PathBuf;

use shardwise_plan::run::RunShapeError;
use shardwise_plan::zoo::ModelConfigError;

use crate::value::Origin;

/// One problem of a configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A file could not be read.
    #[error("{}could not read `{}`: {source}", located(at), path.display())]
    Read {
        /// Where the file is named; `None` for the run file itself.
        at: Option<Origin>,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// An input that a run would read does not exist or is of the wrong kind.
    #[error("{at}: `{key}` names `{}`, {problem}", path.display())]
    Input {
        /// Where the path is set.
        at: Origin,
        /// The key.
        key: String,
        /// The path or pattern, relative paths already joined to the run file's folder.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The text is not JSON or TOML.
    #[error("{at}:{column}: {message}")]
    Syntax {
        /// The line.
        at: Origin,
        /// The column, from 1.
        column: usize,
        /// What was found.
        message: String,
        /// How to mend it.
        hint: Option<String>,
    },
    /// A key stands twice in one object.
    #[error("{at}: `{key}` is set twice, first at {first}")]
    DuplicateKey {
        /// The second place.
        at: Origin,
        /// The key path.
        key: String,
        /// The first place.
        first: Origin,
    },
    /// A key that nothing knows.
    #[error("{at}: `{key}` is not a known key")]
    UnknownKey {
        /// Where it is set.
        at: Origin,
        /// The key path.
        key: String,
        /// A known key it may stand for.
        suggestion: Option<String>,
    },
    /// A key that exists nowhere, but that people set, with the key that does the job.
    #[error("{at}: `{key}` is not a setting")]
    Misplaced {
        /// Where it is set.
        at: Origin,
        /// The key path.
        key: String,
        /// What to set instead.
        hint: String,
    },
    /// A value of the wrong type, or outside its range.
    #[error("{at}: `{key}` is `{got}`, expected {expected}")]
    Invalid {
        /// Where it is set.
        at: Origin,
        /// The key path.
        key: String,
        /// The value.
        got: String,
        /// What the key takes.
        expected: String,
        /// How to mend it.
        hint: Option<String>,
    },
    /// `"auto"`, which another program was meant to fill in.
    #[error("{at}: `{key}` is `\"auto\"`, and nothing fills in `auto` here")]
    Auto {
        /// Where it is set.
        at: Origin,
        /// The key path.
        key: String,
        /// What to do instead.
        hint: String,
    },
    /// A known key asks for something this version does not do.
    #[error("{at}: `{key}`{} is not supported yet", equals(value))]
    NotSupported {
        /// Where it is set.
        at: Origin,
        /// The key path.
        key: String,
        /// The value, where another one would do.
        value: Option<String>,
        /// What to do instead.
        hint: String,
    },
    /// A key that has no default.
    #[error("{at}: `{key}` is missing")]
    Missing {
        /// The object it is missing from.
        at: Origin,
        /// The key path.
        key: String,
        /// What to write.
        hint: String,
    },
    /// Values that do not go together.
    #[error("{at}: {message}")]
    Conflict {
        /// Where one of them is set.
        at: Origin,
        /// Which they are, and why not.
        message: String,
        /// How to mend it.
        hint: String,
    },
    /// A `--set` that is no `KEY.PATH=VALUE`, or whose path leads nowhere.
    #[error("--set {text}: {problem}")]
    Override {
        /// The argument.
        text: String,
        /// What is wrong with it.
        problem: String,
        /// How to mend it.
        hint: String,
    },
    /// A path that JSON cannot hold.
    #[error("the path `{}` is not UTF-8", path.display())]
    NotUtf8 {
        /// The run file.
        path: PathBuf,
    },
    /// The description of a model is none of ours.
    #[error("`{place}`: {source}")]
    Model {
        /// The `config.json`, or the key that stands for it.
        place: String,
        /// Which of its keys, and what is wrong with it.
        source: ModelConfigError,
    },
    /// The tokenizer has tokens that the model has no place for.
    #[error("the tokenizer has `{tokens}` tokens, the model's `vocab_size` is `{vocab_size}`")]
    TokenizerTooLarge {
        /// Tokens of the tokenizer.
        tokens: usize,
        /// Tokens of the model.
        vocab_size: usize,
    },
    /// The model cannot be trained as asked.
    #[error(transparent)]
    Shape(#[from] RunShapeError),
    /// A run of no ranks.
    #[error("a run needs at least one rank, got `-n 0`")]
    NoRanks,
}

fn located(at: &Option<Origin>) -> String {
    at.as_ref().map(|at| format!("{at}: ")).unwrap_or_default()
}

fn equals(value: &Option<String>) -> String {
    value.as_ref().map(|value| format!(" = `{value}`")).unwrap_or_default()
}

impl ConfigError {
    /// How to mend it.
    pub fn hint(&self) -> Option<String> {
        match self {
            ConfigError::Read { at: None, .. } => None,
            ConfigError::Read { .. } | ConfigError::Input { .. } => {
                Some("relative paths start at the run file's folder".to_string())
            }
            ConfigError::Syntax { hint, .. } | ConfigError::Invalid { hint, .. } => hint.clone(),
            ConfigError::DuplicateKey { .. } => Some("keep one of the two".to_string()),
            ConfigError::UnknownKey { suggestion, .. } => {
                suggestion.as_ref().map(|known| format!("did you mean `{known}`?"))
            }
            ConfigError::Misplaced { hint, .. }
            | ConfigError::Auto { hint, .. }
            | ConfigError::NotSupported { hint, .. }
            | ConfigError::Missing { hint, .. }
            | ConfigError::Conflict { hint, .. }
            | ConfigError::Override { hint, .. } => Some(hint.clone()),
            ConfigError::Model { source, .. } => ConfigError::model_hint(source),
            ConfigError::TokenizerTooLarge { .. } => {
                Some("use the model's own tokenizer, or a smaller vocabulary".to_string())
            }
            ConfigError::Shape(error) => ConfigError::shape_hint(error),
            ConfigError::NotUtf8 { .. } => {
                Some("rename the folder, or copy the run file elsewhere".to_string())
            }
            ConfigError::NoRanks => Some("`-n 1` runs on this process alone".to_string()),
        }
    }
}

/// Every problem found in a configuration; at least one.
#[derive(Debug)]
pub struct ConfigErrors(Vec<ConfigError>);

impl ConfigErrors {
    pub(crate) fn new(errors: Vec<ConfigError>) -> ConfigErrors {
        debug_assert!(!errors.is_empty(), "a failure has a reason");
        ConfigErrors(errors)
    }

    /// The problems, in the order they were found.
    pub fn iter(&self) -> std::slice::Iter<'_, ConfigError> {
        self.0.iter()
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, error) in self.0.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            write!(f, "error: {error}")?;
            if let Some(hint) = error.hint() {
                write!(f, "\nhint: {hint}")?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}
