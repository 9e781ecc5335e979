//! The effective configuration: every value of a run with where it came from, and what was taken without effect.
//!
//! It prints as an aligned table for people and becomes `effective-config.json` for everything else. The values are
//! those of the [`RunConfig`] itself, so the two cannot disagree.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use crate::run_config::RunConfig;
use crate::value::{Origin, join};

/// Where a value came from.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Source {
    /// Nothing set it.
    Default,
    /// The user set it, under this key of the tree.
    Set { at: Origin, key: String },
    /// It follows from other values.
    Derived(String),
    /// An argument of the command line.
    Argument(&'static str),
}

impl Source {
    /// The text for a value called `name`: the key is repeated only where it goes by another name.
    fn describe(&self, name: &str) -> String {
        match self {
            Source::Default => "default".to_string(),
            Source::Set { at: at @ Origin::Override(_), .. } => at.to_string(),
            Source::Set { at, key } if key == name => at.to_string(),
            Source::Set { at, key } => format!("{at} `{}`", at.key(key)),
            Source::Derived(from) => format!("derived from {from}"),
            Source::Argument(argument) => argument.to_string(),
        }
    }
}

/// One value of the effective configuration.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct EffectiveValue {
    /// Its path in [`RunConfig`].
    pub key: String,
    /// The value.
    pub value: serde_json::Value,
    /// Where it came from.
    pub source: String,
}

/// A setting that was accepted and needs a remark.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Note {
    /// What kind of remark.
    pub kind: NoteKind,
    /// The key as the user sees it.
    pub key: String,
    /// Its value.
    pub value: serde_json::Value,
    /// Where it is set.
    pub source: String,
    /// The remark.
    pub reason: String,
}

/// Why a setting carries a note.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NoteKind {
    /// A default that users may not expect.
    Default,
    /// The setting does something that users may not expect.
    Remark,
    /// The setting changes nothing.
    NoEffect,
    /// The setting asks for what is done in any case.
    AsAlways,
}

/// Every value of a run with its source, and the notes.
#[derive(Debug, Clone, PartialEq)]
pub struct Effective {
    values: Vec<EffectiveValue>,
    notes: Vec<Note>,
}

impl Effective {
    pub(crate) fn new(config: &RunConfig, sources: &BTreeMap<String, Source>, notes: Vec<Note>) -> Effective {
        let tree = serde_json::to_value(config).expect("a run configuration is plain data with UTF-8 paths");
        let mut values = Vec::new();
        flatten(tree, "", sources, &mut values);
        Effective { values, notes }
    }

    /// Every value, in the order of [`RunConfig`].
    pub fn values(&self) -> &[EffectiveValue] {
        &self.values
    }

    /// The notes, in the order of the files.
    pub fn notes(&self) -> &[Note] {
        &self.notes
    }

    /// The content of `effective-config.json`: `{"key": {"value": ..., "source": ...}, ..., "notes": [...]}`.
    pub fn to_json(&self) -> serde_json::Value {
        let mut object = serde_json::Map::new();
        for EffectiveValue { key, value, source } in &self.values {
            object.insert(key.clone(), serde_json::json!({ "value": value, "source": source }));
        }
        let notes = self.notes.iter().map(|note| serde_json::json!(note)).collect();
        object.insert("notes".to_string(), notes);
        object.into()
    }
}

/// Turns the tree into rows, one for each value that is not an object with members.
fn flatten(
    tree: serde_json::Value,
    path: &str,
    sources: &BTreeMap<String, Source>,
    rows: &mut Vec<EffectiveValue>,
) {
    match tree {
        serde_json::Value::Object(members) if !members.is_empty() => {
            for (name, member) in members {
                flatten(member, &join(path, &name), sources, rows);
            }
        }
        value => {
            let source =
                sources.get(path).unwrap_or_else(|| panic!("`{path}` was assembled without a source"));
            rows.push(EffectiveValue { key: path.to_string(), value, source: source.describe(path) });
        }
    }
}

impl fmt::Display for Effective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Values past this width push only their own source aside, not the whole column.
        const WIDEST: usize = 36;
        let width =
            |texts: &mut dyn Iterator<Item = usize>| texts.filter(|n| *n <= WIDEST).max().unwrap_or(0);
        let values: Vec<String> = self.values.iter().map(|row| row.value.to_string()).collect();
        let key_width = width(&mut self.values.iter().map(|row| row.key.chars().count()));
        let value_width = width(&mut values.iter().map(|value| value.chars().count()));
        for (row, value) in self.values.iter().zip(&values) {
            writeln!(f, "{:key_width$}  {value:value_width$}  {}", row.key, row.source)?;
        }
        // Settings with the same remark share a line.
        let mut lines: Vec<(NoteKind, &str, Vec<String>)> = Vec::new();
        for note in &self.notes {
            let key = match note.kind {
                NoteKind::Default => format!("`{}` is not set", note.key),
                NoteKind::Remark | NoteKind::NoEffect | NoteKind::AsAlways => {
                    format!("`{}` ({})", note.key, note.source)
                }
            };
            match lines.iter_mut().find(|(kind, reason, _)| (*kind, *reason) == (note.kind, &note.reason)) {
                Some((_, _, keys)) => keys.push(key),
                None => lines.push((note.kind, &note.reason, vec![key])),
            }
        }
        lines.sort_by_key(|(kind, _, _)| *kind);
        for (kind, reason, keys) in lines {
            let kind = match kind {
                NoteKind::Default | NoteKind::Remark => "",
                NoteKind::NoEffect => "no effect: ",
                NoteKind::AsAlways => "as always: ",
            };
            writeln!(f, "note: {}: {kind}{reason}", keys.join(", "))?;
        }
        Ok(())
    }
}
