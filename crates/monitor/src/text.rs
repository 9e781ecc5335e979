//! Numbers as people read them.

use std::time::Duration;

/// `0.4s`, `41s`, `3m 20s`, `2h 05m`, `3d 4h`.
pub fn format_duration(duration: Duration) -> String {
    let s = duration.as_secs();
    match s {
        0..10 => format!("{:.1}s", duration.as_secs_f64()),
        10..60 => format!("{s}s"),
        60..3600 => format!("{}m {:02}s", s / 60, s % 60),
        3600..86_400 => format!("{}h {:02}m", s / 3600, s % 3600 / 60),
        _ => format!("{}d {}h", s / 86_400, s % 86_400 / 3600),
    }
}

/// Digits in groups of three: `12,345`.
pub fn format_count(count: u64) -> String {
    let digits = count.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A number of 2^20 bytes with its unit: `812 MiB`, `2.55 GiB`.
pub fn format_mib(mib: f64) -> String {
    if mib < 1024.0 { format!("{mib:.0} MiB") } else { format!("{:.2} GiB", mib / 1024.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        let text = |s: f64| format_duration(Duration::from_secs_f64(s));
        assert_eq!(text(0.0), "0.0s");
        assert_eq!(text(0.44), "0.4s");
        assert_eq!(text(9.99), "10.0s");
        assert_eq!(text(59.9), "59s");
        assert_eq!(text(200.0), "3m 20s");
        assert_eq!(text(7505.0), "2h 05m");
        assert_eq!(text(3.0 * 86_400.0 + 4.5 * 3600.0), "3d 4h");
    }

    #[test]
    fn counts_and_sizes() {
        assert_eq!(format_count(0), "0");
        assert_eq!(format_count(999), "999");
        assert_eq!(format_count(1000), "1,000");
        assert_eq!(format_count(u64::MAX), "18,446,744,073,709,551,615");
        assert_eq!(format_mib(811.6), "812 MiB");
        assert_eq!(format_mib(2611.2), "2.55 GiB");
    }
}
