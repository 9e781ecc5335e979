//! `--set KEY.PATH=VALUE`: changes a tree before it is checked.
//!
//! The value is read as JSON and taken as text where it is none. A path may reach into a DeepSpeed configuration
//! that lives in a file of its own; the caller then loads that file first. Whether the key exists is decided by the check
//! that follows, which sees the override as the value's origin.

use std::sync::Arc;

use crate::error::ConfigError;
use crate::json;
use crate::value::{Data, Origin, Value};

/// As deep as a file may nest.
const MAX_PARTS: usize = 64;

/// A parsed override.
pub(crate) struct Override {
    text: Arc<str>,
    pub path: Vec<String>,
    value: Value,
}

impl Override {
    pub fn parse(text: &str) -> Result<Override, ConfigError> {
        let fail = |problem: &str, hint: &str| ConfigError::Override {
            text: text.to_string(),
            problem: problem.to_string(),
            hint: hint.to_string(),
        };
        let Some((path, value)) = text.split_once('=') else {
            return Err(fail(
                "there is no `=`",
                "write `--set KEY.PATH=VALUE`, for example `--set steps=10`",
            ));
        };
        let path: Vec<String> = path.trim().split('.').map(str::to_string).collect();
        if path.iter().any(String::is_empty) {
            return Err(fail(
                "a part of the key path is empty",
                "write it like `deepspeed.zero_optimization.stage`",
            ));
        }
        if path.len() > MAX_PARTS {
            return Err(fail("the key path is too long", "no key lies that deep"));
        }
        let origin: Arc<str> = text.into();
        let at = Origin::Override(Arc::clone(&origin));
        let value = match json::read_override(value, &origin, &path.join(".")) {
            Ok(value) => value,
            Err(errors) => match errors.into_iter().find(|e| matches!(e, ConfigError::DuplicateKey { .. })) {
                Some(duplicate) => return Err(duplicate),
                None => Value { at, data: Data::Text(value.to_string()) },
            },
        };
        Ok(Override { text: origin, path, value })
    }

    /// Puts the value where the path leads, making objects on the way.
    pub fn apply(self, root: &mut Value) -> Result<(), ConfigError> {
        let at = Origin::Override(Arc::clone(&self.text));
        let mut here = root;
        for (depth, part) in self.path.iter().enumerate() {
            // `null` means "not set", so there is room for an object.
            if here.data == Data::Null {
                *here = Value { at: at.clone(), data: Data::Object(Vec::new()) };
            }
            let shown = here.to_string();
            let Data::Object(members) = &mut here.data else {
                return Err(ConfigError::Override {
                    text: self.text.to_string(),
                    problem: format!("`{}` is `{shown}`, which has no keys", self.path[..depth].join(".")),
                    hint: "set the whole value instead".to_string(),
                });
            };
            let index = members.iter().position(|(name, _)| name == part).unwrap_or_else(|| {
                members.push((part.clone(), Value { at: at.clone(), data: Data::Object(Vec::new()) }));
                members.len() - 1
            });
            here = &mut members[index].1;
        }
        *here = self.value;
        Ok(())
    }
}
