//! Typed reads from a `config.json`.

use serde_json::Value;

use super::ModelConfigError;

/// A JSON object and how to read numbers and flags from it.
pub(super) struct Reader<'a>(pub &'a Value);

impl Reader<'_> {
    /// The value, unless it is absent or null.
    pub fn value(&self, key: &'static str) -> Option<&Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    /// A positive whole number.
    pub fn size(&self, key: &'static str) -> Result<usize, ModelConfigError> {
        self.size_or(key, None)
    }

    /// A positive whole number, or `default` when absent.
    pub fn size_or(&self, key: &'static str, default: Option<usize>) -> Result<usize, ModelConfigError> {
        let Some(value) = self.value(key) else { return default.ok_or(ModelConfigError::Missing { key }) };
        match value.as_u64() {
            Some(number) if number > 0 && number <= u32::MAX.into() => Ok(number as usize),
            _ => Err(invalid(key, value, "a positive whole number")),
        }
    }

    /// A finite number, or `default` when absent.
    pub fn number_or(&self, key: &'static str, default: f64) -> Result<f64, ModelConfigError> {
        match self.value(key) {
            None => Ok(default),
            Some(value) => {
                value.as_f64().filter(|x| x.is_finite()).ok_or_else(|| invalid(key, value, "a number"))
            }
        }
    }

    /// A flag, or `default` when absent.
    pub fn flag_or(&self, key: &'static str, default: bool) -> Result<bool, ModelConfigError> {
        match self.value(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| invalid(key, value, "true or false")),
        }
    }

    /// Refuses any value but `supported`; absent is fine.
    pub fn only(
        &self,
        key: &'static str,
        supported: &[Value],
        instead: &'static str,
    ) -> Result<(), ModelConfigError> {
        match self.value(key) {
            Some(value) if !supported.contains(value) => {
                Err(ModelConfigError::Unsupported { key, got: plain(value), instead })
            }
            _ => Ok(()),
        }
    }

    /// A share of elements to drop, or `default` when absent.
    pub fn dropout_or(&self, key: &'static str, default: f64) -> Result<f64, ModelConfigError> {
        match self.number_or(key, default)? {
            rate if (0.0..1.0).contains(&rate) => Ok(rate),
            rate => Err(invalid(key, &rate.into(), "a number from 0 to below 1")),
        }
    }
}

pub(super) fn invalid(key: &'static str, got: &Value, expected: impl Into<String>) -> ModelConfigError {
    ModelConfigError::Invalid { key, got: plain(got), expected: expected.into() }
}

/// The value as a person would write it: strings without quotes.
fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}
