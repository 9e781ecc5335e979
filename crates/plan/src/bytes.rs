//! Numbers of bytes.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign};
use std::str::FromStr;

use serde::Serialize;

use crate::quantity::scaled;

/// A number of bytes. Prints as people read it: `812 MiB`, `2.55 GiB`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl Bytes {
    /// The bytes of `numel` elements of `element_bytes` each.
    pub fn of(numel: usize, element_bytes: usize) -> Bytes {
        Bytes(numel as u64 * element_bytes as u64)
    }

    /// In units of 2^20 bytes.
    pub fn mib(self) -> f64 {
        self.0 as f64 / (1u64 << 20) as f64
    }
}

/// Text that is no number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected bytes, such as `80GB` or `512MiB`")]
pub struct NotBytes;

impl FromStr for Bytes {
    type Err = NotBytes;

    /// Bytes as people type them: `80GB`, `512 MiB`, `1e9`.
    fn from_str(text: &str) -> Result<Bytes, NotBytes> {
        match scaled(text.strip_suffix('B').unwrap_or(text)) {
            Some(bytes) if bytes < u64::MAX as f64 => Ok(Bytes(bytes as u64)),
            _ => Err(NotBytes),
        }
    }
}

impl Add for Bytes {
    type Output = Bytes;

    fn add(self, other: Bytes) -> Bytes {
        Bytes(self.0 + other.0)
    }
}

impl AddAssign for Bytes {
    fn add_assign(&mut self, other: Bytes) {
        self.0 += other.0;
    }
}

impl Sum for Bytes {
    fn sum<I: Iterator<Item = Bytes>>(bytes: I) -> Bytes {
        bytes.fold(Bytes(0), Add::add)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        if self.0 < 1024 {
            return f.pad(&format!("{} B", self.0));
        }
        let (mut value, mut unit) = (self.0 as f64 / 1024.0, 0);
        // What would round to 1024 is one of the next unit.
        while value >= 1023.5 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        let digits = if value < 9.995 { 2 } else { usize::from(value < 99.95) };
        f.pad(&format!("{value:.digits$} {}", UNITS[unit]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_type() {
        for (text, bytes) in [
            ("80GB", 80_000_000_000),
            ("16 GB", 16_000_000_000),
            ("1.5GiB", 3 << 29),
            ("16Gi", 16 << 30),
            ("1e9", 1_000_000_000),
            ("300", 300),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
        for bad in ["", "GB", "-1GB", "80XB", "80i", "nan", "1e30"] {
            assert_eq!(bad.parse::<Bytes>(), Err(NotBytes), "{bad}");
        }
    }

    #[test]
    fn prints_three_digits_and_a_unit() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (1536 << 10, "1.50 MiB"),
            (33_554_432, "32.0 MiB"),
            (812 << 20, "812 MiB"),
            ((1 << 30) - 1, "1.00 GiB"),
            (1023 << 20, "1023 MiB"),
            (2_737_418_240, "2.55 GiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
        assert_eq!(format!("{:>9}|{:<9}", Bytes(5), Bytes(5)), "      5 B|5 B      ");
    }
}
