//! Every key that a configuration may hold, as tables.
//!
//! A row reads: path, what it takes, default, what becomes of it. DeepSpeed's names stay inside this crate.

pub(crate) mod deepspeed;
mod features;
pub(crate) mod optimizer;
mod run;
mod zero;

use crate::schema::{Fate, Key, Kind, Unset};

/// The key of the run file that holds a DeepSpeed configuration.
pub(crate) const DEEPSPEED: &str = "deepspeed";

/// The tables, each with the path its rows start from.
pub(crate) const TABLES: &[(&str, &[Key])] = &[
    ("", run::KEYS),
    (DEEPSPEED, deepspeed::KEYS),
    (DEEPSPEED, optimizer::KEYS),
    (DEEPSPEED, zero::KEYS),
    (DEEPSPEED, features::KEYS),
];

const BOOL: Kind = Kind::Bool;
const TEXT: Kind = Kind::Text;
const TEXTS: Kind = Kind::Texts;
const ANY: Kind = Kind::Any;
const INT: Kind = Kind::Int(i64::MIN, i64::MAX);
/// A whole number of at least 0.
const SIZE: Kind = Kind::Int(0, i64::MAX);
/// A whole number of at least 1.
const COUNT: Kind = Kind::Int(1, i64::MAX);
/// Ranks along an axis.
const DEGREE: Kind = Kind::Int(1, 1 << 20);
const NUMBER: Kind = Kind::Above(f64::NEG_INFINITY);
/// A number of at least 0.
const POSITIVE: Kind = Kind::AtLeast(0.0);
/// A floating-point type.
const FLOAT: Kind = Kind::Choice(&["fp32", "bf16", "fp16"]);

const NONE: Unset = Unset::Nothing;
const FALSE: Unset = Unset::Is("false");
const TRUE: Unset = Unset::Is("true");

const fn is(json: &'static str) -> Unset {
    Unset::Is(json)
}

const fn used(path: &'static str, kind: Kind, default: Unset) -> Key {
    Key { path, kind, default, fate: Fate::Used }
}

/// An object; its members follow in rows of their own.
const fn group(path: &'static str) -> Key {
    Key { path, kind: Kind::Group, default: NONE, fate: Fate::Used }
}

const fn only(
    path: &'static str,
    kind: Kind,
    default: Unset,
    values: &'static [&'static str],
    hint: &'static str,
) -> Key {
    Key { path, kind, default, fate: Fate::Only(values, hint) }
}

/// A switch that can stay off.
const fn off(path: &'static str, hint: &'static str) -> Key {
    only(path, BOOL, FALSE, &["false"], hint)
}

const fn always(
    path: &'static str,
    kind: Kind,
    default: Unset,
    values: &'static [&'static str],
    why: &'static str,
) -> Key {
    Key { path, kind, default, fate: Fate::Always(values, why) }
}

const fn no_effect(path: &'static str, kind: Kind, default: Unset, why: &'static str) -> Key {
    Key { path, kind, default, fate: Fate::NoEffect(why) }
}

/// A parameter of some optimizers or schedulers.
const fn belongs_to(path: &'static str, kind: Kind, owners: &'static [&'static str]) -> Key {
    Key { path, kind, default: NONE, fate: Fate::BelongsTo(owners) }
}

const fn refused(path: &'static str, kind: Kind, hint: &'static str) -> Key {
    Key { path, kind, default: NONE, fate: Fate::Refused(hint) }
}

/// A member of a group that is refused as a whole.
const fn inner(path: &'static str, kind: Kind) -> Key {
    Key { path, kind, default: NONE, fate: Fate::Inner }
}

const fn misplaced(path: &'static str, hint: &'static str) -> Key {
    Key { path, kind: ANY, default: NONE, fate: Fate::Misplaced(hint) }
}
