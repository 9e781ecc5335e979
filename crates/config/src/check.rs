//! Holds a tree of values against the key tables.
//!
//! Afterwards every key is known, of the right type and in range, nothing is `auto` but batch sizes, and what
//! this version cannot do has been refused by name. What is left to the assembly is how values fit together.

use std::collections::{BTreeMap, BTreeSet};

use shardwise_plan::pipeline::StageCut;

use crate::effective::{Note, NoteKind};
use crate::error::ConfigError;
use crate::json;
use crate::schema::{Fate, Key, Kind, Schema, Unset, bytes, general, partition, schedule_kind};
use crate::value::{Data, Origin, Value, join};

/// The batch sizes: the only keys where `"auto"` may be worked out.
pub(crate) const BATCH_KEYS: [&str; 3] = [
    "deepspeed.train_batch_size",
    "deepspeed.train_micro_batch_size_per_gpu",
    "deepspeed.gradient_accumulation_steps",
];

/// A value the user set.
#[derive(Debug, Clone)]
pub(crate) struct Setting {
    pub value: Value,
    /// The key path as the user wrote it.
    pub key: String,
}

/// The outcome of a check.
pub(crate) struct Checked {
    pub schema: Schema,
    /// Every well-formed value by its canonical path, groups included; those refused are in `bad` as well.
    pub set: BTreeMap<String, Setting>,
    /// Keys whose value is not usable; an error says why.
    pub bad: BTreeSet<String>,
    pub notes: Vec<Note>,
    pub errors: Vec<ConfigError>,
}

/// Checks the run file's tree, an object. `bad` names keys that have been reported on already.
pub(crate) fn check(root: &Value, bad: BTreeSet<String>, errors: Vec<ConfigError>) -> Checked {
    let mut checked = Checked { schema: Schema::new(), set: BTreeMap::new(), bad, notes: Vec::new(), errors };
    if let Data::Object(members) = &root.data {
        checked.members(members, "", "");
        checked.required(&root.at);
    }
    checked
}

impl Checked {
    /// Checks the members of a group. `typed` is its path as written, `path` its canonical one.
    fn members(&mut self, members: &[(String, Value)], typed: &str, path: &str) {
        for (name, value) in members {
            let typed = join(typed, name);
            let child = join(path, name);
            let child = self.schema.canonical(&child).to_string();
            match self.schema.key(&child) {
                Some(key) => self.setting(key, value, typed, child),
                None => self.errors.push(ConfigError::UnknownKey {
                    at: value.at.clone(),
                    key: value.at.key(&typed),
                    suggestion: self.schema.suggest(path, name).map(|known| value.at.key(&known)),
                }),
            }
        }
    }

    fn setting(&mut self, key: &Key, value: &Value, typed: String, path: String) {
        if self.bad.contains(&path) || (value.data == Data::Null && key.default == Unset::Nothing) {
            return;
        }
        if let Fate::Misplaced(hint) = key.fate {
            let (at, key) = (value.at.clone(), value.at.key(&typed));
            self.errors.push(ConfigError::Misplaced { at, key, hint: hint.to_string() });
            return;
        }
        if let Err(error) = well_formed(key, value, &typed, &path) {
            self.bad.insert(path);
            self.errors.push(error);
            return;
        }
        if let Some(other) = self.set.get(&path) {
            self.errors.push(ConfigError::Conflict {
                at: value.at.clone(),
                message: format!(
                    "`{}` and `{}` are the same setting",
                    value.at.key(&typed),
                    other.value.at.key(&other.key)
                ),
                hint: "keep one of the two".to_string(),
            });
            return;
        }
        if !self.accept(key, value, &typed) {
            self.bad.insert(path.clone());
        }
        if let (Kind::Group | Kind::TextOrGroup, Data::Object(members)) = (key.kind, &value.data) {
            self.members(members, &typed, &path);
        }
        if let (Kind::Groups, Data::List(items)) = (key.kind, &value.data) {
            for (i, item) in items.iter().enumerate() {
                if let Data::Object(members) = &item.data {
                    self.members(members, &format!("{typed}[{i}]"), &format!("{path}[{i}]"));
                    let setting = Setting { value: item.clone(), key: format!("{typed}[{i}]") };
                    self.set.insert(format!("{path}[{i}]"), setting);
                }
            }
        }
        self.set.insert(path, Setting { value: value.clone(), key: typed });
    }

    /// Decides by the key's fate; a refusal becomes an error.
    fn accept(&mut self, key: &Key, value: &Value, typed: &str) -> bool {
        let mut note = |kind, reason: &str| {
            let (source, key) = (value.at.to_string(), value.at.key(typed));
            self.notes.push(Note { kind, key, value: value.to_json(), source, reason: reason.to_string() });
        };
        let (values, hint) = match key.fate {
            Fate::Always(values, reason) if among(values, value) => {
                note(NoteKind::AsAlways, reason);
                return true;
            }
            Fate::NoEffect(reason) => {
                note(NoteKind::NoEffect, reason);
                return true;
            }
            Fate::Only(values, _) if among(values, value) => return true,
            Fate::Only(values, hint) | Fate::Always(values, hint) => (values, hint),
            Fate::Refused(hint) => (&[][..], hint),
            Fate::Used | Fate::Inner | Fate::BelongsTo(_) | Fate::Misplaced(_) => return true,
        };
        let mut parts = Vec::new();
        if let Some(first) = values.first() {
            parts.push(format!("set it to `{first}` or leave it out"));
        }
        if !hint.is_empty() {
            parts.push(hint.to_string());
        }
        // A switch says it all by its name; otherwise the value is what is refused.
        let says = !values.is_empty() && !matches!(value.data, Data::Bool(_) | Data::Object(_));
        self.errors.push(ConfigError::NotSupported {
            at: value.at.clone(),
            key: value.at.key(typed),
            value: says.then(|| value.to_string()),
            hint: parts.join("; "),
        });
        false
    }

    /// Reports keys without a default that are not set, where their group is.
    fn required(&mut self, root: &Origin) {
        let mut missing = Vec::new();
        for (path, key) in self.schema.iter() {
            let Unset::Required(hint) = key.default else { continue };
            let (group, name) = path.rsplit_once('.').unwrap_or(("", path));
            // A list of groups has as many places for the key as members.
            let groups = self.set.iter().filter(|(set, _)| general(set) == group);
            let groups = groups.filter(|(_, setting)| matches!(setting.value.data, Data::Object(_)));
            let mut places: Vec<_> =
                groups.map(|(path, setting)| (path.as_str(), &setting.value.at)).collect();
            if group.is_empty() {
                places.push(("", root));
            }
            for (group, at) in places {
                let path = join(group, name);
                if !self.set.contains_key(&path) && !self.bad.contains(&path) {
                    let (at, key) = (at.clone(), at.key(&path));
                    missing.push(ConfigError::Missing { at, key, hint: hint.to_string() });
                }
            }
        }
        self.errors.extend(missing);
    }
}

/// Whether a value means one of those listed (as JSON) in a table.
fn among(listed: &[&str], value: &Value) -> bool {
    listed.iter().any(|json| literal(json).means(value))
}

/// A value written in a table.
pub(crate) fn literal(json: &str) -> Value {
    json::read_override(json, &"default".into(), "")
        .expect("values in the key tables are JSON, as a test checks")
}

fn well_formed(key: &Key, value: &Value, typed: &str, path: &str) -> Result<(), ConfigError> {
    let at = || value.at.clone();
    if value.text() == Some("auto") && !key.takes_auto() {
        if BATCH_KEYS.contains(&path) {
            return Ok(());
        }
        let hint = match key.fate {
            Fate::NoEffect(_) => "leave it out: it has no effect here",
            _ if key.default == Unset::Nothing => "set it, or leave it out",
            _ => "set it, or leave it out for its default",
        };
        return Err(ConfigError::Auto { at: at(), key: value.at.key(typed), hint: hint.to_string() });
    }
    if matches(key.kind, value) {
        return Ok(());
    }
    Err(ConfigError::Invalid {
        at: at(),
        key: value.at.key(typed),
        got: value.to_string(),
        expected: key.kind.describe(),
        hint: type_hint(key, value),
    })
}

pub(crate) fn matches(kind: Kind, value: &Value) -> bool {
    let texts = |items: &[Value]| items.iter().all(|item| item.text().is_some());
    match (kind, &value.data) {
        (Kind::Any, _) => true,
        (Kind::Bool, Data::Bool(_)) => true,
        (Kind::Int(min, max), _) => {
            value.whole().is_some_and(|n| (i128::from(min)..=i128::from(max)).contains(&n))
        }
        (Kind::IntOrAuto(min, max), _) => value.text() == Some("auto") || matches(Kind::Int(min, max), value),
        (Kind::Bytes, _) => bytes(value).is_some(),
        (Kind::Schedule, Data::Text(text)) => schedule_kind(text).is_some(),
        (Kind::StageCut, Data::Text(text)) => text.parse::<StageCut>().is_ok(),
        (Kind::Partition, Data::Text(text)) => partition(text).is_some(),
        (Kind::Between(min, max), _) => value.number().is_some_and(|n| (min..=max).contains(&n)),
        (Kind::AtLeast(min), _) => value.number().is_some_and(|n| n >= min),
        (Kind::Above(min), _) => value.number().is_some_and(|n| n > min),
        (Kind::Within(min, max), _) => value.number().is_some_and(|n| (min..max).contains(&n)),
        (Kind::Choice(words), Data::Text(text)) => words.iter().any(|word| word.eq_ignore_ascii_case(text)),
        (Kind::Text | Kind::TextOrTexts | Kind::TextOrGroup, Data::Text(_)) => true,
        (Kind::TextOrTexts, Data::List(items)) => !items.is_empty() && texts(items),
        (Kind::Texts, Data::List(items)) => texts(items),
        (Kind::Groups, Data::List(items)) => items.iter().all(|item| matches!(item.data, Data::Object(_))),
        (Kind::Betas, Data::List(items)) => {
            items.len() == 2 && items.iter().all(|item| matches(Kind::Within(0.0, 1.0), item))
        }
        (Kind::Group | Kind::TextOrGroup | Kind::Object, Data::Object(_)) => true,
        _ => false,
    }
}

/// The usual slips: quotes around a number or a switch, `null` for "default", text that needs quotes in `--set`.
fn type_hint(key: &Key, value: &Value) -> Option<String> {
    match &value.data {
        Data::Null => Some("leave the key out for its default".to_string()),
        Data::Text(text) => {
            let unquoted = json::read_override(text, &"".into(), "").ok()?;
            matches(key.kind, &unquoted).then(|| "remove the quotes".to_string())
        }
        Data::List(_) | Data::Object(_) => None,
        _ => {
            let quoted = Value { at: value.at.clone(), data: Data::Text(value.to_string()) };
            matches(key.kind, &quoted).then(|| "put quotes around it".to_string())
        }
    }
}
