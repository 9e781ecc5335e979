//! Reads JSON as people write it: comments (`//`, `/* */`, `#`), trailing commas, single quotes and bare keys.
//!
//! That is the part of hjson that DeepSpeed configurations use. Text values need quotes: a bare word is more
//! often a slip than a string. The reader is our own because it has to keep lines for messages, see duplicate keys
//! (which most readers merge) and keep whole numbers exact. It stops at the first syntax error of a file, but
//! goes on after a duplicate key.

use std::sync::Arc;

use crate::error::ConfigError;
use crate::value::{Data, Origin, SourceFile, Value, join};

/// Nesting beyond this is refused, so that a hostile file cannot exhaust the stack.
const MAX_DEPTH: usize = 64;

/// Reads a whole file. `None` after a syntax error, which is then among `errors`.
pub(crate) fn read_file(text: &str, file: &Arc<SourceFile>, errors: &mut Vec<ConfigError>) -> Option<Value> {
    read(text, Place::File(file), file.root, errors)
}

/// Reads the value of a `--set` of the key `path`. `Err` holds what is wrong with it as JSON.
pub(crate) fn read_override(text: &str, origin: &Arc<str>, path: &str) -> Result<Value, Vec<ConfigError>> {
    let mut errors = Vec::new();
    match read(text, Place::Override(origin), path, &mut errors) {
        Some(value) if errors.is_empty() => Ok(value),
        _ => Err(errors),
    }
}

fn read(text: &str, place: Place<'_>, path: &str, errors: &mut Vec<ConfigError>) -> Option<Value> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut reader = Reader { text, pos: 0, line: 1, line_start: 0, place, path: path.to_string(), errors };
    match reader.document() {
        Ok(value) => Some(value),
        Err(Syntax { message, hint }) => {
            let (at, column) = (reader.origin(), reader.column());
            reader.errors.push(ConfigError::Syntax { at, column, message, hint });
            None
        }
    }
}

#[derive(Clone, Copy)]
enum Place<'a> {
    File(&'a Arc<SourceFile>),
    Override(&'a Arc<str>),
}

/// A syntax error at the reader's position.
struct Syntax {
    message: String,
    hint: Option<String>,
}

fn syntax<T>(message: impl Into<String>, hint: Option<&str>) -> Result<T, Syntax> {
    Err(Syntax { message: message.into(), hint: hint.map(str::to_string) })
}

struct Reader<'a> {
    text: &'a str,
    pos: usize,
    line: u32,
    line_start: usize,
    place: Place<'a>,
    /// The key path of the object being read, for messages about duplicates.
    path: String,
    errors: &'a mut Vec<ConfigError>,
}

impl<'a> Reader<'a> {
    fn document(&mut self) -> Result<Value, Syntax> {
        let value = self.value(0)?;
        self.skip_space()?;
        match self.rest().chars().next() {
            None => Ok(value),
            Some(found) => syntax(
                format!("`{found}` after the end of the configuration"),
                Some("one closing bracket too many, or two configurations in one file?"),
            ),
        }
    }

    fn value(&mut self, depth: usize) -> Result<Value, Syntax> {
        self.skip_space()?;
        if depth > MAX_DEPTH {
            return syntax(format!("nested more than {MAX_DEPTH} deep"), None);
        }
        let at = self.origin();
        let data = match self.rest().chars().next() {
            None => return syntax("the file ends where a value should be", None),
            Some('{') => self.object(depth)?,
            Some('[') => self.list(depth)?,
            Some('"' | '\'') => Data::Text(self.string()?),
            Some('0'..='9' | '-' | '+' | '.') => self.number()?,
            Some(_) => self.word()?,
        };
        Ok(Value { at, data })
    }

    fn object(&mut self, depth: usize) -> Result<Data, Syntax> {
        let mut members: Vec<(String, Value)> = Vec::new();
        self.pos += 1;
        loop {
            self.skip_space()?;
            let at = self.origin();
            let key = match self.rest().chars().next() {
                None => return syntax("the file ends inside an object", Some("a `}` is missing")),
                Some('}') => break,
                Some('"' | '\'') => self.string()?,
                Some(first) if is_bare(first) => self.take_while(is_bare).to_string(),
                Some(found) => return syntax(format!("`{found}` where a key or `}}` should be"), None),
            };
            self.skip_space()?;
            if !self.take(":") {
                return syntax(format!("a `:` is missing after the key `{key}`"), None);
            }
            let outer = self.path.len();
            self.path = join(&self.path, &key);
            let mut value = self.value(depth + 1)?;
            value.at = at;
            match members.iter().find(|(earlier, _)| *earlier == key) {
                Some((_, earlier)) => self.errors.push(ConfigError::DuplicateKey {
                    key: value.at.key(&self.path),
                    first: earlier.at.clone(),
                    at: value.at,
                }),
                None => members.push((key, value)),
            }
            self.path.truncate(outer);
            self.end_of_item('}')?;
        }
        self.pos += 1;
        Ok(Data::Object(members))
    }

    fn list(&mut self, depth: usize) -> Result<Data, Syntax> {
        let mut items = Vec::new();
        self.pos += 1;
        loop {
            self.skip_space()?;
            match self.rest().chars().next() {
                None => return syntax("the file ends inside a list", Some("a `]` is missing")),
                Some(']') => break,
                Some(_) => items.push(self.value(depth + 1)?),
            }
            self.end_of_item(']')?;
        }
        self.pos += 1;
        Ok(Data::List(items))
    }

    /// After an item: a comma, or the closing bracket, which is left for the caller.
    fn end_of_item(&mut self, close: char) -> Result<(), Syntax> {
        self.skip_space()?;
        if self.take(",") || self.rest().starts_with(close) {
            return Ok(());
        }
        match self.rest().chars().next() {
            None => syntax(format!("the file ends before a `{close}`"), None),
            Some(found) => {
                syntax(format!("`{found}` where `,` or `{close}` should be"), Some("is a comma missing?"))
            }
        }
    }

    fn string(&mut self) -> Result<String, Syntax> {
        const NOT_CLOSED: &str = "a string is not closed on the line it starts on";
        let quote = self.rest().chars().next().expect("the caller saw a quote");
        self.pos += 1;
        let mut text = String::new();
        loop {
            let Some(next) = self.rest().chars().next() else { return syntax(NOT_CLOSED, None) };
            match next {
                '\n' | '\r' => return syntax(NOT_CLOSED, None),
                '\\' => text.push(self.escape()?),
                _ => {
                    self.pos += next.len_utf8();
                    if next == quote {
                        return Ok(text);
                    }
                    text.push(next);
                }
            }
        }
    }

    fn escape(&mut self) -> Result<char, Syntax> {
        let Some(kind) = self.rest().chars().nth(1) else { return syntax("the file ends in a string", None) };
        let plain = match kind {
            '"' | '\'' | '\\' | '/' => kind,
            'b' => '\u{8}',
            'f' => '\u{c}',
            'n' => '\n',
            'r' => '\r',
            't' => '\t',
            'u' => return self.unicode_escape(),
            _ => return syntax(format!("`\\{kind}` is not an escape"), Some("write a backslash as `\\\\`")),
        };
        self.pos += 2;
        Ok(plain)
    }

    /// `\uXXXX`, or a surrogate pair of two.
    fn unicode_escape(&mut self) -> Result<char, Syntax> {
        let high = self.hex4()?;
        let code = if (0xD800..0xDC00).contains(&high) && self.rest().starts_with("\\u") {
            let low = self.hex4()?;
            match low {
                0xDC00..0xE000 => 0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00),
                _ => high,
            }
        } else {
            high
        };
        char::from_u32(code).map_or_else(|| syntax("half of a surrogate pair", None), Ok)
    }

    fn hex4(&mut self) -> Result<u32, Syntax> {
        let digits = self.rest().get(2..6).filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()));
        let Some(digits) = digits else { return syntax("`\\u` needs four hexadecimal digits", None) };
        let code = u32::from_str_radix(digits, 16).expect("four hexadecimal digits");
        self.pos += 6;
        Ok(code)
    }

    fn number(&mut self) -> Result<Data, Syntax> {
        let end = self.rest().find(|c: char| !c.is_ascii_alphanumeric() && !"+-._".contains(c));
        let text = &self.rest()[..end.unwrap_or(self.rest().len())];
        let data = if !text.contains(['.', 'e', 'E']) {
            // Outside the range of any integer we could store, a number is refused rather than rounded.
            let whole = text.parse::<i128>().ok();
            whole.filter(|n| (i128::from(i64::MIN)..=i128::from(u64::MAX)).contains(n)).map(Data::Int)
        } else if text.contains(|c: char| c.is_ascii_alphabetic() && !"eE".contains(c)) {
            None
        } else {
            text.parse::<f64>().ok().filter(|n| n.is_finite()).map(Data::Float)
        };
        let Some(data) = data else {
            return syntax(format!("`{text}` is not a number that can be stored"), None);
        };
        self.pos += text.len();
        Ok(data)
    }

    fn word(&mut self) -> Result<Data, Syntax> {
        let end = self.rest().find(|c: char| c.is_whitespace() || ",]}:#".contains(c));
        let word = &self.rest()[..end.unwrap_or(self.rest().len())];
        let data = match word {
            "true" => Data::Bool(true),
            "false" => Data::Bool(false),
            "null" => Data::Null,
            "True" => return syntax("`True` is not JSON", Some("write `true`")),
            "False" => return syntax("`False` is not JSON", Some("write `false`")),
            "None" => return syntax("`None` is not JSON", Some("write `null`, or leave the key out")),
            "" => {
                let found = self.rest().chars().next().unwrap_or(' ');
                return syntax(format!("`{found}` where a value should be"), None);
            }
            _ => return syntax(format!("`{word}` is not a value"), Some("text needs quotes")),
        };
        self.pos += word.len();
        Ok(data)
    }

    /// Skips white space and comments.
    fn skip_space(&mut self) -> Result<(), Syntax> {
        loop {
            let rest = self.rest();
            if rest.starts_with('\n') {
                self.pos += 1;
                self.line += 1;
                self.line_start = self.pos;
            } else if rest.starts_with(char::is_whitespace) {
                self.pos += rest.chars().next().map_or(0, char::len_utf8);
            } else if rest.starts_with('#') || rest.starts_with("//") {
                self.pos += rest.find('\n').unwrap_or(rest.len());
            } else if rest.starts_with("/*") {
                let Some(end) = rest.find("*/") else { return syntax("a comment is not closed", None) };
                let comment = &rest[..end + 2];
                self.line += comment.matches('\n').count() as u32;
                if let Some(newline) = comment.rfind('\n') {
                    self.line_start = self.pos + newline + 1;
                }
                self.pos += comment.len();
            } else {
                return Ok(());
            }
        }
    }

    fn take(&mut self, token: &str) -> bool {
        let found = self.rest().starts_with(token);
        if found {
            self.pos += token.len();
        }
        found
    }

    fn take_while(&mut self, keep: fn(char) -> bool) -> &'a str {
        let start = self.pos;
        let rest = self.rest();
        self.pos += rest.find(|c| !keep(c)).unwrap_or(rest.len());
        &self.text[start..self.pos]
    }

    fn rest(&self) -> &'a str {
        &self.text[self.pos..]
    }

    fn origin(&self) -> Origin {
        match self.place {
            Place::File(file) => Origin::Line { file: Arc::clone(file), line: self.line },
            Place::Override(text) => Origin::Override(Arc::clone(text)),
        }
    }

    fn column(&self) -> usize {
        self.text[self.line_start..self.pos].chars().count() + 1
    }
}

fn is_bare(c: char) -> bool {
    c.is_alphanumeric() || c == '_' || c == '-' || c == '$'
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Result<Value, String> {
        let file = Arc::new(SourceFile { name: "run.json".into(), root: "" });
        let mut errors = Vec::new();
        let value = read_file(text, &file, &mut errors);
        match errors.is_empty() {
            true => Ok(value.expect("a value or an error")),
            false => Err(errors.iter().map(|e| e.to_string()).collect::<Vec<_>>().join("; ")),
        }
    }

    #[test]
    fn people_write_comments_commas_and_quotes() {
        let value = parse(
            "\u{feff}// one\n{ # two\n  \"a\": [1, 2.5, 5e8,], /* three\n four */ b_1: 'it\\'s', \"c\": {},\n}\n// end",
        )
        .unwrap();
        assert_eq!(value.to_json().to_string(), r#"{"a":[1,2.5,500000000.0],"b_1":"it's","c":{}}"#);
        assert_eq!(value.member("a").unwrap().at.to_string(), "run.json:3");
        assert_eq!(value.member("b_1").unwrap().at.to_string(), "run.json:4");
    }

    #[test]
    fn numbers_stay_exact() {
        let whole = |text: &str| parse(text).unwrap().whole();
        assert_eq!(whole("9223372036854775807"), Some(9223372036854775807));
        assert_eq!(whole("18446744073709551615"), Some(18446744073709551615));
        assert_eq!(whole("5e8"), Some(500_000_000));
        assert_eq!(whole("3.0"), Some(3));
        assert_eq!(whole("15099494.4"), None);
        assert_eq!(whole("1e300"), None);
        assert_eq!(parse("1e-5").unwrap().number(), Some(1e-5));
        for bad in ["1e999", "18446744073709551616", "1.2.3", "0x10", "1_000", "-", "--1"] {
            assert!(parse(bad).unwrap_err().contains("is not a number that can be stored"), "{bad}");
        }
    }

    #[test]
    fn syntax_errors_say_where_and_what() {
        let cases = [
            ("", "run.json:1:1: the file ends where a value should be"),
            ("{\"a\": 1", "run.json:1:8: the file ends before a `}`"),
            ("{\n\"a\": 1\n\"b\": 2}", "run.json:3:1: `\"` where `,` or `}` should be"),
            ("{\"a\" 1}", "run.json:1:6: a `:` is missing after the key `a`"),
            ("{\"a\": True}", "run.json:1:7: `True` is not JSON"),
            ("{\"a\": cpu}", "run.json:1:7: `cpu` is not a value"),
            ("{\"a\": }", "run.json:1:7: `}` where a value should be"),
            ("{\"a\": 1}}", "run.json:1:9: `}` after the end of the configuration"),
            ("{\"a\": \"x\n\"}", "run.json:1:9: a string is not closed on the line it starts on"),
            ("{\"a\": \"\\q\"}", "run.json:1:8: `\\q` is not an escape"),
            ("{\"a\": \"\\ud800\"}", "run.json:1:14: half of a surrogate pair"),
            ("/* x", "run.json:1:1: a comment is not closed"),
            ("{,}", "run.json:1:2: `,` where a key or `}` should be"),
        ];
        for (text, expected) in cases {
            assert_eq!(parse(text).unwrap_err(), expected, "{text:?}");
        }
        assert!(parse(&"[".repeat(100_000)).unwrap_err().ends_with("nested more than 64 deep"));
    }

    #[test]
    fn every_duplicate_key_is_named() {
        let text = "{\n\"a\": {\"b\": 1,\n\"b\": 2},\n\"c\": 1,\n\"c\": 2}";
        assert_eq!(
            parse(text).unwrap_err(),
            "run.json:3: `a.b` is set twice, first at run.json:2; run.json:5: `c` is set twice, first at run.json:4"
        );
    }

    proptest! {
        #[test]
        fn reads_what_serde_json_writes(value in any_json()) {
            let text = serde_json::to_string_pretty(&value).unwrap();
            prop_assert_eq!(parse(&text).unwrap().to_json(), value);
        }

        #[test]
        fn never_panics(text in "[\\[\\]{},:'\"\\\\a-u0-9 \n/*#.e-]{0,40}") {
            let _ = parse(&text);
        }
    }

    fn any_json() -> impl Strategy<Value = serde_json::Value> {
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<i64>().prop_map(Into::into),
            any::<u64>().prop_map(Into::into),
            (-1e300..1e300f64).prop_map(Into::into),
            any::<String>().prop_map(Into::into),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Into::into),
                prop::collection::btree_map(any::<String>(), inner, 0..4)
                    .prop_map(|map| map.into_iter().collect::<serde_json::Value>()),
            ]
        })
    }
}
