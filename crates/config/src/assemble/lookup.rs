//! What the assembly of a configuration is made of: looking settings up, recording sources, reporting conflicts.
//!
//! A lookup gives the value with its source, or `None` where there is no usable one; in that case an error has
//! been reported, unless the key is optional.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::check::{Checked, Setting, literal};
use crate::effective::{Note, NoteKind, Source};
use crate::error::ConfigError;
use crate::inputs::{Input, InputKind};
use crate::schema::Unset;
use crate::value::{Data, Origin, Value, join};

/// A value and where it came from.
#[derive(Debug, Clone)]
pub(crate) struct Found<T> {
    pub value: T,
    pub source: Source,
}

/// Checked settings on their way into a [`crate::RunConfig`].
pub(crate) struct Assembler<'a> {
    pub checked: Checked,
    /// Relative paths start here.
    pub folder: &'a Path,
    pub world_size: usize,
    /// Where each value of the configuration came from, by its path there.
    pub sources: BTreeMap<String, Source>,
    pub inputs: Vec<Input>,
}

impl Assembler<'_> {
    // Looking up

    /// The value the user set, if it is usable.
    pub fn setting(&self, path: &str) -> Option<Setting> {
        if self.is_bad(path) { None } else { self.checked.set.get(path).cloned() }
    }

    /// An error has been reported on this key or on a group above it.
    pub fn is_bad(&self, path: &str) -> bool {
        let dots = path.match_indices('.').map(|(at, _)| &path[..at]);
        dots.chain([path]).any(|part| self.checked.bad.contains(part))
    }

    /// The value the user set, or else the default of the key table. `None` if there is no usable one.
    pub fn get<T>(&mut self, path: &str, convert: impl Fn(&Value) -> Option<T>) -> Option<Found<T>> {
        const CHECKED: &str = "the check admits only values of the key's kind";
        if self.is_bad(path) {
            return None;
        }
        if let Some(setting) = self.checked.set.get(path) {
            return Some(Found { value: convert(&setting.value).expect(CHECKED), source: set(setting) });
        }
        let json = match self.checked.schema.key(path).expect("looked-up keys are in the key tables").default
        {
            Unset::Nothing | Unset::Required(_) => return None,
            Unset::Is(json) => json,
            Unset::Remarkable(json, reason) => {
                self.default_note(path, literal(json).to_json(), reason);
                json
            }
        };
        Some(Found { value: convert(&literal(json)).expect(CHECKED), source: Source::Default })
    }

    /// Like [`get`](Self::get) for a key that may be left unset. `None` if it is set to something unusable.
    pub fn optional<T>(
        &mut self,
        path: &str,
        convert: impl Fn(&Value) -> Option<T>,
    ) -> Option<Found<Option<T>>> {
        if self.is_bad(path) {
            return None;
        }
        match self.get(path, convert) {
            Some(Found { value, source }) => Some(Found { value: Some(value), source }),
            None => Some(Found { value: None, source: Source::Default }),
        }
    }

    /// Like [`get`](Self::get) with a default of the caller's.
    pub fn get_or<T>(
        &mut self,
        path: &str,
        convert: impl Fn(&Value) -> Option<T>,
        default: T,
    ) -> Option<Found<T>> {
        let Found { value, source } = self.optional(path, convert)?;
        Some(Found { value: value.unwrap_or(default), source })
    }

    /// Whether the user turned a switch on, or set a number.
    pub fn asked_for(&self, path: &str) -> Option<Setting> {
        self.setting(path).filter(|setting| switch(&setting.value) != Some(false))
    }

    pub fn seed_or(&mut self, path: &str, seed: Option<Found<u64>>) -> Option<Found<u64>> {
        match self.optional(path, whole)? {
            Found { value: Some(value), source } => Some(Found { value, source }),
            _ => Some(Found { value: seed?.value, source: Source::Derived("`seed`".to_string()) }),
        }
    }

    /// The key as it would be written where its group is.
    pub fn key_here(&self, path: &str) -> String {
        let groups = path.rmatch_indices('.').map(|(at, _)| &path[..at]);
        let group = groups.filter_map(|group| self.checked.set.get(group)).next();
        group.map_or_else(|| path.to_string(), |group| group.value.at.key(path))
    }

    // Recording

    pub fn keep<T>(&mut self, name: &str, found: Found<T>) -> T {
        self.sources.insert(name.to_string(), found.source);
        found.value
    }

    pub fn keep_set(&mut self, name: &str, setting: &Setting) {
        self.sources.insert(name.to_string(), set(setting));
    }

    pub fn note(&mut self, setting: &Setting, kind: NoteKind, reason: &str) {
        self.checked.notes.push(Note {
            kind,
            key: setting.value.at.key(&setting.key),
            value: setting.value.to_json(),
            source: setting.value.at.to_string(),
            reason: reason.to_string(),
        });
    }

    /// The setting, if there is one, changes nothing.
    pub fn no_effect(&mut self, path: &str, reason: &str) {
        if let Some(setting) = self.setting(path) {
            self.note(&setting, NoteKind::NoEffect, reason);
        }
    }

    /// The default of a key that is not set may surprise.
    pub fn default_note(&mut self, path: &str, value: serde_json::Value, reason: &str) {
        let (kind, key) = (NoteKind::Default, self.key_here(path));
        let (source, reason) = ("default".to_string(), reason.to_string());
        self.checked.notes.push(Note { kind, key, value, source, reason });
    }

    /// A path, relative to the run file's folder, that the run will read.
    pub fn input(&mut self, setting: &Setting, value: &Value, kind: InputKind) -> Option<PathBuf> {
        let input =
            Input::new(value.at.clone(), value.at.key(&setting.key), self.folder, value.text()?, kind);
        let path = input.path.clone();
        self.inputs.push(input);
        Some(path)
    }

    /// Records a source for every value of an object that is passed on as it is.
    pub fn inline(&mut self, path: &str, value: &Value) {
        match &value.data {
            Data::Object(members) if !members.is_empty() => {
                for (name, member) in members {
                    self.inline(&join(path, name), member);
                }
            }
            _ => {
                let source = Source::Set { at: value.at.clone(), key: path.to_string() };
                self.sources.insert(path.to_string(), source);
            }
        }
    }

    // Reporting

    pub fn conflict(&mut self, at: Origin, message: String, hint: &str) {
        self.checked.errors.push(ConfigError::Conflict { at, message, hint: hint.to_string() });
    }

    /// Refuses a value, where the table cannot.
    pub fn not_supported(&mut self, setting: &Setting, hint: &str) {
        self.checked.errors.push(ConfigError::NotSupported {
            at: setting.value.at.clone(),
            key: setting.value.at.key(&setting.key),
            value: (!matches!(setting.value.data, Data::Bool(_))).then(|| setting.value.to_string()),
            hint: hint.to_string(),
        });
    }

    pub fn both(&mut self, first: &Setting, second: &Setting, why: &str) {
        let (at, other) = (&second.value.at, &first.value.at);
        let message =
            format!("`{}` and `{}` are both set, but {why}", other.key(&first.key), at.key(&second.key));
        self.conflict(at.clone(), message, "keep one of the two");
    }

    /// Neither of two keys is set. Silent if one of them was unusable, which has been reported.
    pub fn neither(&mut self, group: &str, key: &str, or: &str) {
        let others = self.checked.bad.iter().any(|bad| bad.starts_with(&format!("{group}.")));
        if let Some(setting) = self.setting(group).filter(|_| !others) {
            let at = setting.value.at;
            self.checked.errors.push(ConfigError::Missing {
                key: at.key(key),
                at,
                hint: format!("set it, {or}"),
            });
        }
    }

    /// `key` has to be set here, though not everywhere.
    pub fn needs(&mut self, group: &str, key: &str, hint: &str) {
        if self.setting(key).is_none()
            && !self.is_bad(key)
            && let Some(setting) = self.setting(group)
        {
            let (at, hint) = (setting.value.at, hint.to_string());
            self.checked.errors.push(ConfigError::Missing { key: at.key(key), at, hint });
        }
    }

    pub fn only_with(&mut self, key: &str, other: &str) {
        if let Some(setting) = self.setting(key) {
            let at = setting.value.at;
            self.conflict(
                at,
                format!("`{key}` is set, but it says something about `{other}` only"),
                "leave it out",
            );
        }
    }
}

/// The source of a value the user set.
pub(crate) fn set(setting: &Setting) -> Source {
    Source::Set { at: setting.value.at.clone(), key: setting.key.clone() }
}

/// A whole number of at least 0.
pub(crate) fn whole(value: &Value) -> Option<u64> {
    u64::try_from(value.whole()?).ok()
}

/// The source of a value that follows from others.
pub(crate) fn derived(from: &str) -> Source {
    Source::Derived(from.to_string())
}

/// A word in lower case.
pub(crate) fn word(value: &Value) -> Option<String> {
    Some(value.text()?.to_ascii_lowercase())
}

/// A switch.
pub(crate) fn switch(value: &Value) -> Option<bool> {
    match value.data {
        Data::Bool(on) => Some(on),
        _ => None,
    }
}
