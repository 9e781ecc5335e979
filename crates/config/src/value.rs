//! A configuration as a tree of values, each of which knows where it was written.
//!
//! JSON, TOML and `--set` all become this one tree, so that every check after reading has one form to look at
//! and every message can name a file and a line. Objects keep the order of the file.

use std::fmt;
use std::sync::Arc;

/// A file that took part in a configuration.
#[derive(Debug, PartialEq, Eq)]
pub struct SourceFile {
    /// The path as messages show it.
    pub name: String,
    /// Where the file's root sits in the run file's tree: empty for the run file itself, `deepspeed` for a
    /// DeepSpeed configuration in a file of its own.
    pub root: &'static str,
}

/// Where a value was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A line of a file, counted from 1.
    Line {
        /// The file.
        file: Arc<SourceFile>,
        /// The line, from 1.
        line: u32,
    },
    /// A `--set KEY.PATH=VALUE` of the command line, given here as `KEY.PATH=VALUE`.
    Override(Arc<str>),
}

impl Origin {
    /// The key path as the reader of this place sees it: below the root of the file it was written in.
    pub(crate) fn key(&self, path: &str) -> String {
        match self {
            Origin::Line { file, .. } => {
                let below = path.strip_prefix(file.root).unwrap_or(path);
                below.strip_prefix('.').unwrap_or(below).to_string()
            }
            Origin::Override(_) => path.to_string(),
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Line { file, line } => write!(f, "{}:{line}", file.name),
            Origin::Override(text) => write!(f, "--set {text}"),
        }
    }
}

/// A value and where it was written. For a member of an object that is the line of its key.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Value {
    pub at: Origin,
    pub data: Data,
}

/// What a value holds. Whole numbers stay exact; `5e8` and `3.0` are floats here, and whole to [`Value::whole`].
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Data {
    Null,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
    List(Vec<Value>),
    Object(Vec<(String, Value)>),
}

impl Value {
    #[cfg(test)]
    pub fn member(&self, name: &str) -> Option<&Value> {
        match &self.data {
            Data::Object(members) => members.iter().find(|(key, _)| key == name).map(|(_, value)| value),
            _ => None,
        }
    }

    pub fn text(&self) -> Option<&str> {
        match &self.data {
            Data::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The value as a whole number, if it is one: integral floats such as `5e8` are.
    pub fn whole(&self) -> Option<i128> {
        match self.data {
            Data::Int(number) => Some(number),
            // Below 2^53 every whole float is exact; above, a float no longer says which number was meant.
            Data::Float(number) if number.fract() == 0.0 && number.abs() <= 9_007_199_254_740_992.0 => {
                Some(number as i128)
            }
            _ => None,
        }
    }

    pub fn number(&self) -> Option<f64> {
        match self.data {
            Data::Int(number) => Some(number as f64),
            Data::Float(number) => Some(number),
            _ => None,
        }
    }

    /// Equal in meaning, wherever written: `1` is `1.0`, and text is compared without case.
    pub fn means(&self, other: &Value) -> bool {
        match (&self.data, &other.data) {
            (Data::Null, Data::Null) => true,
            (Data::Bool(a), Data::Bool(b)) => a == b,
            (Data::Text(a), Data::Text(b)) => a.eq_ignore_ascii_case(b),
            (Data::List(a), Data::List(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.means(b)),
            _ => match (self.number(), other.number()) {
                (Some(a), Some(b)) => a == b,
                _ => false,
            },
        }
    }

    pub fn to_json(&self) -> serde_json::Value {
        match &self.data {
            Data::Null => serde_json::Value::Null,
            Data::Bool(value) => (*value).into(),
            Data::Int(value) => match (i64::try_from(*value), u64::try_from(*value)) {
                (Ok(value), _) => value.into(),
                (_, Ok(value)) => value.into(),
                _ => (*value as f64).into(),
            },
            Data::Float(value) => (*value).into(),
            Data::Text(value) => value.as_str().into(),
            Data::List(items) => items.iter().map(Value::to_json).collect(),
            Data::Object(members) => {
                members.iter().map(|(key, value)| (key.clone(), value.to_json())).collect()
            }
        }
    }
}

/// Compact JSON, cut short where a message would drown in it.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.to_json().to_string();
        match text.char_indices().nth(60) {
            Some((cut, _)) => write!(f, "{}...", &text[..cut]),
            None => f.write_str(&text),
        }
    }
}

/// Joins two parts of a key path; either may be empty.
pub(crate) fn join(group: &str, name: &str) -> String {
    match (group.is_empty(), name.is_empty()) {
        (true, _) => name.to_string(),
        (_, true) => group.to_string(),
        _ => format!("{group}.{name}"),
    }
}
