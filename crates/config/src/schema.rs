//! What a key table says, and how to look a key up in it.
//!
//! The tables in [`crate::keys`] list every key we know: its path, what it takes, its default, and what becomes of
//! it. Every refusal, note and "did you mean" comes from them. To support another key later, change its [`Fate`] to
//! [`Fate::Used`] and read it where the [`crate::RunConfig`] is assembled.

use std::borrow::Cow;
use std::collections::BTreeMap;

use shardwise_plan::pipeline::{ScheduleKind, StageCut};
use shardwise_plan::{Bytes, NamePattern};

use crate::keys;
use crate::value::{Value, join};

/// One row of a table.
pub(crate) struct Key {
    /// The dotted path below the table's root.
    pub path: &'static str,
    pub kind: Kind,
    pub default: Unset,
    pub fate: Fate,
}

/// What a key takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Kind {
    Bool,
    /// A whole number in a range, both ends included.
    Int(i64, i64),
    /// A number of at least this.
    AtLeast(f64),
    /// A number greater than this.
    Above(f64),
    /// A number in a range, the upper end excluded.
    Within(f64, f64),
    /// A number in a range, both ends included.
    Between(f64, f64),
    Text,
    /// A number of bytes, at least one: whole, or as text with a unit.
    Bytes,
    /// One of these words, in any case.
    Choice(&'static [&'static str]),
    Texts,
    TextOrTexts,
    /// The two decay rates of Adam.
    Betas,
    /// A whole number in a range, or `"auto"`.
    IntOrAuto(i64, i64),
    /// The name of a pipeline schedule.
    Schedule,
    /// How layers are cut into pipeline stages.
    StageCut,
    /// The same in DeepSpeed's words.
    Partition,
    /// An object whose members have rows of their own.
    Group,
    TextOrGroup,
    /// A list of objects whose members have rows of their own, below the path with `[]`.
    Groups,
    /// An object that is passed on as it is.
    Object,
    Any,
}

/// What holds when a key is not set.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Unset {
    /// Nothing: the key is optional, and `null` means the same.
    Nothing,
    /// This value, written as JSON.
    Is(&'static str),
    /// This value, with a remark because users may expect another.
    Remarkable(&'static str, &'static str),
    /// The key has to be set; the text says how.
    Required(&'static str),
}

/// What becomes of a value that has been set.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Fate {
    /// It ends up in the [`crate::RunConfig`].
    Used,
    /// These values (as JSON) are taken, others are not supported yet. The text is the hint of the refusal.
    Only(&'static [&'static str], &'static str),
    /// These values ask for what is done in any case, and a note says so with this reason; others are refused.
    Always(&'static [&'static str], &'static str),
    /// Any value is taken, and a note says why it changes nothing.
    NoEffect(&'static str),
    /// A parameter of the optimizers or schedulers named here; beside another one it is refused.
    BelongsTo(&'static [&'static str]),
    /// Refused, whatever the value.
    Refused(&'static str),
    /// A member of a group that is refused as a whole.
    Inner,
    /// Not a key at all, but people set it; the text says what to set instead.
    Misplaced(&'static str),
}

impl Key {
    /// `"auto"` is an ordinary value of this key.
    pub fn takes_auto(&self) -> bool {
        let listed = match self.fate {
            Fate::Only(values, _) | Fate::Always(values, _) => values.contains(&"\"auto\""),
            _ => false,
        };
        listed
            || matches!(self.kind, Kind::Choice(words) if words.contains(&"auto"))
            || matches!(self.kind, Kind::IntOrAuto(..) | Kind::Any)
    }
}

impl Kind {
    /// "expected ...", as messages say it.
    pub fn describe(&self) -> String {
        match *self {
            Kind::Bool => "`true` or `false`".to_string(),
            Kind::Int(min, i64::MAX) => format!("a whole number of at least {min}"),
            Kind::Int(min, max) => format!("a whole number from {min} to {max}"),
            Kind::IntOrAuto(min, max) => format!("a whole number from {min} to {max} or `\"auto\"`"),
            Kind::AtLeast(min) => format!("a number of at least {min}"),
            Kind::Above(f64::NEG_INFINITY) => "a number".to_string(),
            Kind::Above(min) => format!("a number above {min}"),
            Kind::Within(min, max) => format!("a number of at least {min} and below {max}"),
            Kind::Between(min, max) => format!("a number from {min} to {max}"),
            Kind::Text => "text".to_string(),
            Kind::Bytes => "bytes, such as `\"16GB\"`, `\"16GiB\"` or a whole number above 0".to_string(),
            Kind::Choice(words) => one_of(&quoted(words)),
            Kind::Texts => "a list of texts".to_string(),
            Kind::TextOrTexts => "text or a list of texts".to_string(),
            Kind::Schedule => {
                "`gpipe`, `1f1b`, `interleaved`, `interleaved:CHUNKS` or `zero-bubble`".to_string()
            }
            Kind::StageCut => "`parameters`, `time`, `uniform` or `pattern:NAMES`".to_string(),
            Kind::Partition => "`parameters`, `uniform`, `best` or `type:NAME`".to_string(),
            Kind::Betas => "two numbers of at least 0 and below 1".to_string(),
            Kind::Groups => "a list of objects".to_string(),
            Kind::Group | Kind::Object => "an object".to_string(),
            Kind::TextOrGroup => "text or an object".to_string(),
            Kind::Any => "any value".to_string(),
        }
    }
}

/// A pipeline schedule by its name.
pub(crate) fn schedule_kind(text: &str) -> Option<ScheduleKind> {
    text.to_ascii_lowercase().parse().ok()
}

/// A number of bytes above 0.
pub(crate) fn bytes(value: &Value) -> Option<u64> {
    let bytes = match value.text() {
        Some(text) => text.parse().ok().map(|Bytes(bytes)| bytes),
        None => value.whole().and_then(|number| u64::try_from(number).ok()),
    };
    bytes.filter(|&bytes| bytes > 0)
}

/// What DeepSpeed's word for a cut means; `None` within for `best`, which leaves it open: DeepSpeed reads it nowhere, and its
/// module's own default holds.
pub(crate) fn partition(text: &str) -> Option<Option<StageCut>> {
    match text.to_ascii_lowercase().as_str() {
        "best" => Some(None),
        "parameters" => Some(Some(StageCut::Parameters)),
        "uniform" => Some(Some(StageCut::Uniform)),
        lower if lower.starts_with("type:") => {
            let name = &text["type:".len()..];
            Some(Some(StageCut::Pattern(NamePattern::new(format!("*{name}*")))))
        }
        _ => None,
    }
}

/// Words as messages show values that are text.
pub(crate) fn quoted(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| format!("`\"{word}\"`")).collect()
}

/// "a, b or c".
pub(crate) fn one_of<T: AsRef<str>>(words: &[T]) -> String {
    let words: Vec<&str> = words.iter().map(AsRef::as_ref).collect();
    match words.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => words.concat(),
    }
}

/// Every known key by its full path in the run file's tree.
pub(crate) struct Schema {
    keys: BTreeMap<String, &'static Key>,
    aliases: BTreeMap<String, String>,
}

impl Schema {
    pub fn new() -> Schema {
        let mut keys = BTreeMap::new();
        for (root, table) in keys::TABLES {
            for key in table.iter() {
                keys.insert(join(root, key.path), key);
            }
        }
        let full = |path: &str| join(keys::DEEPSPEED, path);
        let aliases = keys::deepspeed::ALIASES.iter().map(|(alias, key)| (full(alias), full(key))).collect();
        Schema { keys, aliases }
    }

    pub fn key(&self, path: &str) -> Option<&'static Key> {
        self.keys.get(general(path).as_ref()).copied()
    }

    /// The path of the key that `path` is another name of, or `path` itself.
    pub fn canonical<'a>(&'a self, path: &'a str) -> &'a str {
        self.aliases.get(path).map_or(path, String::as_str)
    }

    /// Every key with its full path.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &'static Key)> {
        self.keys.iter().map(|(path, key)| (path.as_str(), *key))
    }

    /// A known key that `name` inside `group` may stand for: a sibling spelled alike, or else the only key of
    /// that name anywhere.
    pub fn suggest(&self, group: &str, name: &str) -> Option<String> {
        let group = general(group);
        let settable = || {
            self.iter()
                .filter(|(_, key)| !matches!(key.fate, Fate::Misplaced(_)))
                .map(|(path, _)| split(path))
        };
        let sibling = settable()
            .filter(|(parent, _)| *parent == group.as_ref())
            .map(|(_, sibling)| (strsim::normalized_damerau_levenshtein(name, sibling), sibling))
            .max_by(|a, b| a.0.total_cmp(&b.0))
            .filter(|(likeness, _)| *likeness >= 0.6);
        if let Some((_, sibling)) = sibling {
            return Some(sibling.to_string());
        }
        let mut elsewhere = settable().filter(|(_, other)| *other == name);
        match (elsewhere.next(), elsewhere.next()) {
            (Some((parent, name)), None) => Some(join(parent, name)),
            _ => None,
        }
    }
}

/// The path as the tables have it: `a[0].b` and `a[1].b` are `a[].b`.
pub(crate) fn general(path: &str) -> Cow<'_, str> {
    if !path.contains('[') {
        return Cow::Borrowed(path);
    }
    let mut inside = false;
    let kept = path.chars().filter(|&c| {
        inside = (inside || c == '[') && c != ']';
        !inside || c == '['
    });
    Cow::Owned(kept.collect())
}

/// A path's group and its last part.
fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('.').unwrap_or(("", path))
}
