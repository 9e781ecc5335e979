//! How much memory this process has used.

use crate::MonitorError;

const STATUS: &str = "/proc/self/status";
const KEY: &str = "VmHWM";

/// The most resident memory this process ever held, in bytes.
///
/// Pages shared with other ranks count in full, as every tool that reads the same line counts them.
///
/// # Errors
/// [`MonitorError`] if the kernel does not say.
pub fn peak_rss_bytes() -> Result<u64, MonitorError> {
    let status = std::fs::read_to_string(STATUS).map_err(MonitorError::file("read", STATUS.as_ref()))?;
    high_water_mark(&status).ok_or(MonitorError::NoSuchStatus { path: STATUS, key: KEY })
}

/// `VmHWM: 1684 kB` as bytes; the kernel's kB is 1024 bytes.
fn high_water_mark(status: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix(KEY)?.strip_prefix(':'))?;
    value.trim().strip_suffix("kB")?.trim_end().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_line() {
        assert_eq!(high_water_mark("Name:\tx\nVmHWM:\t    1684 kB\nVmRSS:\t 1 kB\n"), Some(1684 * 1024));
        assert_eq!(high_water_mark("VmHWMX:\t 1 kB\n"), None);
        assert_eq!(high_water_mark("VmHWM:\t many kB\n"), None);
        assert_eq!(high_water_mark(""), None);
    }

    #[test]
    fn grows_with_touched_memory() {
        let before = peak_rss_bytes().unwrap();
        let block = vec![1_u8; 64 << 20];
        let after = peak_rss_bytes().unwrap();
        assert!(std::hint::black_box(&block).iter().all(|&b| b == 1));
        assert!(after >= 64 << 20 && after > before, "{before} -> {after}");
    }
}
