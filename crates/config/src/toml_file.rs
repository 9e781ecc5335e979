//! Reads a TOML run file into the same tree as JSON, with lines.

use std::sync::Arc;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::error::ConfigError;
use crate::value::{Data, Origin, SourceFile, Value};

/// Reads a whole file; every syntax error and duplicate key of it lands in `errors`.
pub(crate) fn read_file(text: &str, file: &Arc<SourceFile>, errors: &mut Vec<ConfigError>) -> Option<Value> {
    let (table, mut problems) = DeTable::parse_recoverable(text);
    problems.sort_by_key(|problem| problem.span().map(|span| span.start));
    let reader = Reader { text, file };
    for problem in &problems {
        let start = problem.span().map_or(0, |span| span.start);
        let message = problem.message().to_lowercase();
        errors.push(ConfigError::Syntax {
            at: reader.origin(start),
            column: reader.column(start),
            message,
            hint: None,
        });
    }
    if !problems.is_empty() {
        return None;
    }
    let found = errors.len();
    let data = reader.table(table.get_ref(), errors);
    (errors.len() == found).then(|| Value { at: reader.origin(0), data })
}

struct Reader<'a> {
    text: &'a str,
    file: &'a Arc<SourceFile>,
}

impl Reader<'_> {
    fn table(&self, table: &DeTable<'_>, errors: &mut Vec<ConfigError>) -> Data {
        // The map is sorted by key; the order of the file is the order people expect to read back.
        let mut members: Vec<_> = table.iter().collect();
        members.sort_by_key(|(key, _)| key.span().start);
        let mut read = Vec::with_capacity(members.len());
        for (key, value) in members {
            read.push((key.get_ref().to_string(), self.value(key.span().start, value, errors)));
        }
        Data::Object(read)
    }

    fn value(&self, start: usize, value: &Spanned<DeValue<'_>>, errors: &mut Vec<ConfigError>) -> Value {
        let at = self.origin(start);
        let mut unreadable = |message: String| {
            let (at, column) = (self.origin(value.span().start), self.column(value.span().start));
            errors.push(ConfigError::Syntax { at, column, message, hint: None });
            Data::Null
        };
        let data = match value.get_ref() {
            DeValue::String(text) => Data::Text(text.to_string()),
            DeValue::Boolean(value) => Data::Bool(*value),
            DeValue::Integer(number) => match i64::from_str_radix(number.as_str(), number.radix()) {
                Ok(number) => Data::Int(number.into()),
                Err(_) => unreadable(format!("`{number}` is not a number that can be stored")),
            },
            DeValue::Float(number) => match number.as_str().parse::<f64>() {
                Ok(number) if number.is_finite() => Data::Float(number),
                _ => unreadable(format!("`{}` is not a number that can be stored", number.as_str())),
            },
            DeValue::Datetime(date) => unreadable(format!("`{date}` is a date, and no key takes one")),
            DeValue::Array(items) => {
                Data::List(items.iter().map(|item| self.value(item.span().start, item, errors)).collect())
            }
            DeValue::Table(table) => self.table(table, errors),
        };
        Value { at, data }
    }

    fn origin(&self, offset: usize) -> Origin {
        let line = self.text[..offset].matches('\n').count() as u32 + 1;
        Origin::Line { file: Arc::clone(self.file), line }
    }

    fn column(&self, offset: usize) -> usize {
        let before = &self.text[..offset];
        before[before.rfind('\n').map_or(0, |newline| newline + 1)..].chars().count() + 1
    }
}
