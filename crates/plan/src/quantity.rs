//! Numbers with a prefix, as people type them.

/// A number with a prefix: `k` to `P` by thousands, `Ki` to `Pi` by 1024. `None` if it is none, or below 0.
pub fn scaled(text: &str) -> Option<f64> {
    const PREFIXES: [(&str, i32); 6] = [("k", 1), ("K", 1), ("M", 2), ("G", 3), ("T", 4), ("P", 5)];
    let (text, base) = text.strip_suffix('i').map_or((text, 1000.0), |text| (text, 1024.0));
    let prefix = PREFIXES.into_iter().find_map(|(prefix, power)| Some((text.strip_suffix(prefix)?, power)));
    let (number, power) = match prefix {
        Some(found) => found,
        None if base == 1000.0 => (text, 0),
        None => return None,
    };
    let number: f64 = number.trim_end().parse().ok()?;
    (number.is_finite() && number >= 0.0).then(|| number * f64::powi(base, power))
}
