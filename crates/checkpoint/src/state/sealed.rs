//! JSON files that carry their own checksum.
//!
//! ```text
//! {"crc32c":"89abcdef",
//! ... the rest of one JSON object; the checksum is over everything from here to the end of the file
//! ```
//!
//! The first line has a fixed form, so every byte of the file is checked, and the file is still plain JSON.

use serde::Serialize;
use serde_json::Value;

use crate::state::problem::SealProblem;

const BEFORE: &str = "{\"crc32c\":\"";
const AFTER: &str = "\",\n";
const FIRST_LINE: usize = BEFORE.len() + 8 + AFTER.len();

/// The bytes of a file that holds these keys, in this order: a line for each, and for each element of a list.
pub(crate) fn seal(entries: &[(&str, Value)]) -> Vec<u8> {
    let lines: Vec<String> =
        entries.iter().map(|(key, value)| format!("\"{key}\":{}", lines(value))).collect();
    let rest = lines.join(",\n") + "}\n";
    let mut bytes = format!("{BEFORE}{:08x}{AFTER}", crc32c::crc32c(rest.as_bytes())).into_bytes();
    bytes.extend(rest.into_bytes());
    bytes
}

fn lines(value: &Value) -> String {
    match value {
        Value::Array(elements) if !elements.is_empty() => {
            let elements: Vec<_> = elements.iter().map(Value::to_string).collect();
            format!("[\n{}]", elements.join(",\n"))
        }
        other => other.to_string(),
    }
}

pub(crate) fn to_value(value: impl Serialize) -> Value {
    serde_json::to_value(value).expect("plain structures with text keys are JSON")
}

/// Checks the seal of a file; what comes back is JSON without the checksum.
pub(crate) fn open(bytes: &mut [u8]) -> Result<&[u8], SealProblem> {
    let expected = bytes
        .get(..FIRST_LINE)
        .and_then(|line| std::str::from_utf8(line).ok())
        .and_then(|line| line.strip_prefix(BEFORE)?.strip_suffix(AFTER))
        .filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)))
        .and_then(|digits| u32::from_str_radix(digits, 16).ok())
        .ok_or(SealProblem::NoChecksum)?;
    let got = crc32c::crc32c(&bytes[FIRST_LINE..]);
    if got != expected {
        return Err(SealProblem::Altered { expected, got });
    }
    // The line's end becomes the brace that the first line began with.
    bytes[FIRST_LINE - 1] = b'{';
    Ok(&bytes[FIRST_LINE - 1..])
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_byte_counts() {
        let sealed = seal(&[("a", json!(1)), ("b", json!([{"c": "d"}, 2])), ("e", json!([]))]);
        let all: Value = serde_json::from_slice(&sealed).unwrap();
        assert_eq!(all["b"][0]["c"], "d");
        let opened: Value = serde_json::from_slice(open(&mut sealed.clone()).unwrap()).unwrap();
        assert_eq!(opened, json!({"a": 1, "b": [{"c": "d"}, 2], "e": []}));
        for place in 0..sealed.len() {
            for bit in 0..8 {
                let mut altered = sealed.clone();
                altered[place] ^= 1 << bit;
                assert!(open(&mut altered).is_err(), "byte {place} bit {bit}");
            }
            assert!(open(&mut sealed[..place].to_vec()).is_err(), "cut at {place}");
        }
    }
}
