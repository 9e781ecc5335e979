//! Quantities as people type them: `80GB`, `25GB/s`, `400T`.

use shardwise_plan::quantity::scaled;
use shardwise_plan::{Bytes, NotBytes};

/// Bytes: `80GB`, `512MiB`, `1e9`.
pub fn bytes(text: &str) -> Result<Bytes, String> {
    text.parse().map_err(|error: NotBytes| error.to_string())
}

/// Bytes in a second: `25GB/s`.
pub fn rate(text: &str) -> Result<f64, String> {
    let bytes = text.strip_suffix("/s").unwrap_or(text);
    let rate = scaled(bytes.strip_suffix('B').unwrap_or(bytes)).filter(|&rate| rate > 0.0);
    rate.ok_or_else(|| "expected bytes in a second, such as `25GB/s`".to_owned())
}

/// Floating-point operations in a second: `400T`.
pub fn flops(text: &str) -> Result<f64, String> {
    let rate = scaled(text).filter(|&rate| rate > 0.0);
    rate.ok_or_else(|| "expected operations in a second, such as `400T`".to_owned())
}

/// A rate as it is typed: `400 T`.
pub fn short(value: f64) -> String {
    const PREFIXES: [&str; 6] = ["", "k", "M", "G", "T", "P"];
    let mut value = value;
    let mut prefix = 0;
    while value >= 1000.0 && prefix + 1 < PREFIXES.len() {
        value /= 1000.0;
        prefix += 1;
    }
    let number = format!("{value:.1}");
    format!("{} {}", number.strip_suffix(".0").unwrap_or(&number), PREFIXES[prefix])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_type() {
        assert_eq!(bytes("80GB"), Ok(Bytes(80_000_000_000)));
        assert_eq!(bytes("1.5GiB"), Ok(Bytes(3 << 29)));
        assert_eq!(bytes("1e9"), Ok(Bytes(1_000_000_000)));
        assert_eq!(
            (rate("25GB/s"), rate("25G"), flops("400T"), flops("1e15")),
            (Ok(2.5e10), Ok(2.5e10), Ok(4e14), Ok(1e15))
        );
        for bad in ["", "GB", "-1GB", "80XB", "80i", "nan", "1e30"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
        assert!(rate("0GB/s").is_err() && flops("inf").is_err());
        assert_eq!(
            (short(4e14), short(2.55e10), short(12.0)),
            ("400 T".into(), "25.5 G".into(), "12 ".into())
        );
    }
}
