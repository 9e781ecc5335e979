//! `metrics.jsonl`: one JSON object for each optimizer step.
//!
//! JSON has no NaN and no infinity, and a run that diverges has both. Such a value is written as `null`, and the
//! extra key `non_finite` says which it was: `"non_finite": {"loss": "nan"}`. Reading the line gives the value back.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::MonitorError;

/// What became of a step, the same on all ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Parameters were updated.
    Applied,
    /// Parameters were left as they were, as gradients were not finite.
    Skipped,
}

/// One optimizer step, over the whole world.
///
/// # Units
/// Names that end in `_mb` count 2^20 bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(into = "Line", from = "Line")]
pub struct StepMetrics {
    /// From 1.
    pub step: u64,
    /// Mean over the global batch.
    pub loss: f64,
    /// Global norm, before clipping.
    pub grad_norm: f64,
    /// Learning rate of this step.
    pub lr: f64,
    /// Only with fp16.
    pub loss_scale: Option<f64>,
    /// Whether parameters were updated.
    pub outcome: Outcome,
    /// Tokens in the global batch.
    pub tokens: u64,
    /// Over the whole world.
    pub tokens_per_s: f64,
    /// Wall time of the step.
    pub step_s: f64,
    /// Steps skipped so far, this one included.
    pub skipped_steps: u64,
    /// Learning rate of each parameter group, in their order; empty if there is but one.
    pub group_lrs: Vec<f64>,
    /// Time of this step in which the busiest rank was in collectives, or waited for them, and computed nothing. On GPUs the time that
    /// its computation stood still for collectives, copies and offloaded steps.
    pub exposed_comm_s: f64,
    /// Time of this step in which the busiest thread waited for its GPU; `None` on CPU. Where it is hardly any, the host is late with work and
    /// the GPU waits for it.
    pub host_wait_s: Option<f64>,
    /// Sent by the busiest rank in this step.
    pub comm_bytes: u64,
    /// Peak resident memory so far, of the worst rank.
    pub peak_rss_mb: f64,
    /// The most device memory so far that was taken from the driver, of the worst rank; `None` on CPU.
    pub device_peak_mb: Option<f64>,
    /// The most of it that tensors and buffers were in, of the worst rank; `None` on CPU.
    pub device_allocated_mb: Option<f64>,
}

/// The object as it stands in the file.
#[derive(Serialize, Deserialize)]
struct Line {
    step: u64,
    loss: Option<f64>,
    grad_norm: Option<f64>,
    lr: Option<f64>,
    loss_scale: Option<f64>,
    outcome: Outcome,
    tokens: u64,
    tokens_per_s: Option<f64>,
    step_s: Option<f64>,
    comm_bytes: u64,
    #[serde(default)]
    skipped_steps: u64,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    group_lrs: Vec<f64>,
    #[serde(default)]
    exposed_comm_s: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    host_wait_s: Option<f64>,
    peak_rss_mb: Option<f64>,
    device_peak_mb: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    device_allocated_mb: Option<f64>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    non_finite: BTreeMap<String, NonFinite>,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
enum NonFinite {
    #[serde(rename = "nan")]
    Nan,
    #[serde(rename = "inf")]
    Infinity,
    #[serde(rename = "-inf")]
    NegInfinity,
}

impl From<StepMetrics> for Line {
    fn from(m: StepMetrics) -> Self {
        let mut non_finite = BTreeMap::new();
        let mut number = |key: &str, value: f64| {
            if value.is_finite() {
                return Some(value);
            }
            let kind = match value {
                v if v.is_nan() => NonFinite::Nan,
                f64::INFINITY => NonFinite::Infinity,
                _ => NonFinite::NegInfinity,
            };
            non_finite.insert(key.to_owned(), kind);
            None
        };
        Line {
            step: m.step,
            loss: number("loss", m.loss),
            grad_norm: number("grad_norm", m.grad_norm),
            lr: number("lr", m.lr),
            loss_scale: m.loss_scale.and_then(|v| number("loss_scale", v)),
            outcome: m.outcome,
            tokens: m.tokens,
            tokens_per_s: number("tokens_per_s", m.tokens_per_s),
            step_s: number("step_s", m.step_s),
            comm_bytes: m.comm_bytes,
            skipped_steps: m.skipped_steps,
            group_lrs: m.group_lrs,
            exposed_comm_s: number("exposed_comm_s", m.exposed_comm_s),
            host_wait_s: m.host_wait_s.and_then(|v| number("host_wait_s", v)),
            peak_rss_mb: number("peak_rss_mb", m.peak_rss_mb),
            device_peak_mb: m.device_peak_mb.and_then(|v| number("device_peak_mb", v)),
            device_allocated_mb: m.device_allocated_mb.and_then(|v| number("device_allocated_mb", v)),
            non_finite,
        }
    }
}

impl From<Line> for StepMetrics {
    fn from(line: Line) -> Self {
        let restored = |key: &str| {
            line.non_finite.get(key).map(|kind| match kind {
                NonFinite::Nan => f64::NAN,
                NonFinite::Infinity => f64::INFINITY,
                NonFinite::NegInfinity => f64::NEG_INFINITY,
            })
        };
        let number = |key: &str, value: Option<f64>| value.or_else(|| restored(key)).unwrap_or(f64::NAN);
        StepMetrics {
            group_lrs: line.group_lrs.clone(),
            step: line.step,
            loss: number("loss", line.loss),
            grad_norm: number("grad_norm", line.grad_norm),
            lr: number("lr", line.lr),
            loss_scale: line.loss_scale.or_else(|| restored("loss_scale")),
            outcome: line.outcome,
            tokens: line.tokens,
            tokens_per_s: number("tokens_per_s", line.tokens_per_s),
            step_s: number("step_s", line.step_s),
            comm_bytes: line.comm_bytes,
            skipped_steps: line.skipped_steps,
            exposed_comm_s: number("exposed_comm_s", line.exposed_comm_s),
            host_wait_s: line.host_wait_s.or_else(|| restored("host_wait_s")),
            peak_rss_mb: number("peak_rss_mb", line.peak_rss_mb),
            device_peak_mb: line.device_peak_mb.or_else(|| restored("device_peak_mb")),
            device_allocated_mb: line.device_allocated_mb.or_else(|| restored("device_allocated_mb")),
        }
    }
}

/// Appends steps to a JSON-lines file, one `write` a line, so that a reader never sees half a step for long and
/// a killed run leaves whole lines.
#[derive(Debug)]
pub struct MetricsWriter {
    file: File,
    path: PathBuf,
}

impl MetricsWriter {
    /// Opens `path` for appending, or makes it. A torn last line, left by a full disk, is cut off first.
    ///
    /// # Errors
    /// [`MonitorError::File`] if the file cannot be opened or mended.
    pub fn append(path: &Path) -> Result<Self, MonitorError> {
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(path)
            .map_err(MonitorError::file("open", path))?;
        let whole = whole_lines_bytes(&mut file).map_err(MonitorError::file("read", path))?;
        file.set_len(whole).map_err(MonitorError::file("write", path))?;
        Ok(MetricsWriter { file, path: path.to_path_buf() })
    }

    /// As [`MetricsWriter::append`], for a run that goes on after `last_step`: later steps, which a run that was cut
    /// off after its checkpoint has left, make way.
    ///
    /// # Errors
    /// As [`MetricsWriter::append`].
    pub fn resume(path: &Path, last_step: u64) -> Result<Self, MonitorError> {
        let writer = Self::append(path)?;
        let text = std::fs::read_to_string(path).map_err(MonitorError::file("read", path))?;
        let is_kept = |line: &&str| {
            serde_json::from_str::<StepMetrics>(line).is_ok_and(|metrics| metrics.step <= last_step)
        };
        let kept: usize = text.split_inclusive('\n').take_while(is_kept).map(str::len).sum();
        writer.file.set_len(kept as u64).map_err(MonitorError::file("write", path))?;
        Ok(writer)
    }

    /// Appends one step.
    ///
    /// # Errors
    /// [`MonitorError::File`] if the line could not be written whole.
    pub fn write(&mut self, metrics: &StepMetrics) -> Result<(), MonitorError> {
        let mut line = serde_json::to_string(metrics).expect("metrics hold only numbers and fixed words");
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(MonitorError::file("write", &self.path))
    }
}

/// How long the file is up to its last newline.
fn whole_lines_bytes(file: &mut File) -> std::io::Result<u64> {
    let mut end = file.seek(SeekFrom::End(0))?;
    let mut block = [0_u8; 4096];
    while end > 0 {
        let start = end.saturating_sub(block.len() as u64);
        let part = &mut block[..(end - start) as usize];
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(part)?;
        if let Some(newline) = part.iter().rposition(|&b| b == b'\n') {
            return Ok(start + newline as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn example(step: u64) -> StepMetrics {
        StepMetrics {
            step,
            loss: 5.5,
            grad_norm: 1.25,
            lr: 3e-4,
            loss_scale: None,
            outcome: Outcome::Applied,
            tokens: 4096,
            tokens_per_s: 8192.0,
            step_s: 0.5,
            comm_bytes: 1_000_000,
            skipped_steps: 2,
            group_lrs: Vec::new(),
            exposed_comm_s: 0.125,
            host_wait_s: None,
            peak_rss_mb: 812.5,
            device_peak_mb: None,
            device_allocated_mb: None,
        }
    }

    fn round_trip(m: &StepMetrics) -> StepMetrics {
        serde_json::from_str(&serde_json::to_string(m).unwrap()).unwrap()
    }

    #[test]
    fn the_keys_are_the_contract() {
        assert_eq!(
            serde_json::to_string(&example(1)).unwrap(),
            "{\"step\":1,\"loss\":5.5,\"grad_norm\":1.25,\"lr\":0.0003,\"loss_scale\":null,\"outcome\":\"applied\",\
             \"tokens\":4096,\"tokens_per_s\":8192.0,\"step_s\":0.5,\"comm_bytes\":1000000,\"skipped_steps\":2,\
             \"exposed_comm_s\":0.125,\"peak_rss_mb\":812.5,\"device_peak_mb\":null}"
        );
    }

    #[test]
    fn a_gpu_has_keys_of_its_own() {
        let m = StepMetrics {
            host_wait_s: Some(0.25),
            device_peak_mb: Some(2048.0),
            device_allocated_mb: Some(1024.5),
            ..example(1)
        };
        let text = serde_json::to_string(&m).unwrap();
        let memory = "\"device_peak_mb\":2048.0,\"device_allocated_mb\":1024.5}";
        assert!(text.contains("\"host_wait_s\":0.25,") && text.ends_with(memory), "{text}");
        assert_eq!(round_trip(&m), m);
    }

    #[test]
    fn values_that_json_lacks_are_null_and_named() {
        let m = StepMetrics {
            loss: f64::NAN,
            grad_norm: f64::INFINITY,
            loss_scale: Some(f64::NEG_INFINITY),
            outcome: Outcome::Skipped,
            ..example(3)
        };
        let json: serde_json::Value = serde_json::from_str(&serde_json::to_string(&m).unwrap()).unwrap();
        assert!(json["loss"].is_null() && json["grad_norm"].is_null() && json["loss_scale"].is_null());
        assert_eq!(
            json["non_finite"],
            serde_json::json!({"loss": "nan", "grad_norm": "inf", "loss_scale": "-inf"})
        );
        assert_eq!(json["outcome"], "skipped");
        let back = round_trip(&m);
        assert!(back.loss.is_nan());
        assert_eq!((back.grad_norm, back.loss_scale), (f64::INFINITY, Some(f64::NEG_INFINITY)));
    }

    proptest! {
        #[test]
        fn every_line_reads_back(step: u64, bits: [u64; 5], scale: Option<u64>, skipped: bool) {
            let float = f64::from_bits;
            let m = StepMetrics {
                step,
                loss: float(bits[0]),
                grad_norm: float(bits[1]),
                lr: float(bits[2]),
                loss_scale: scale.map(float),
                outcome: if skipped { Outcome::Skipped } else { Outcome::Applied },
                tokens_per_s: float(bits[3]),
                step_s: float(bits[4]),
                ..example(step)
            };
            let back = round_trip(&m);
            // NaN differs from itself, and all NaNs are one here.
            let same = |a: f64, b: f64| a == b || (a.is_nan() && b.is_nan());
            prop_assert!(same(m.loss, back.loss) && same(m.grad_norm, back.grad_norm) && same(m.lr, back.lr));
            prop_assert!(same(m.tokens_per_s, back.tokens_per_s) && same(m.step_s, back.step_s));
            prop_assert_eq!(m.loss_scale.is_some(), back.loss_scale.is_some());
            prop_assert!(same(m.loss_scale.unwrap_or(0.0), back.loss_scale.unwrap_or(0.0)));
            prop_assert_eq!((m.step, m.outcome), (back.step, back.outcome));
        }
    }

    #[test]
    fn appends_after_the_last_whole_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        MetricsWriter::append(&path).unwrap().write(&example(1)).unwrap();
        // A second writer goes on, and one that follows a torn line cuts it off, however long it is.
        MetricsWriter::append(&path).unwrap().write(&example(2)).unwrap();
        for torn in [10, 4095, 4096, 9000] {
            let mut file = OpenOptions::new().append(true).open(&path).unwrap();
            file.write_all("x".repeat(torn).as_bytes()).unwrap();
            MetricsWriter::append(&path).unwrap();
        }
        MetricsWriter::append(&path).unwrap().write(&example(3)).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let steps: Vec<_> =
            text.lines().map(|line| serde_json::from_str::<StepMetrics>(line).unwrap().step).collect();
        assert_eq!(steps, [1, 2, 3]);
        // A file of nothing but a torn line becomes empty.
        std::fs::write(&path, "torn").unwrap();
        MetricsWriter::append(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"");
    }

    #[test]
    fn a_resumed_run_replaces_the_steps_it_does_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::append(&path).unwrap();
        (1..=5).for_each(|step| writer.write(&example(step)).unwrap());
        MetricsWriter::resume(&path, 3).unwrap().write(&example(4)).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let steps: Vec<_> =
            text.lines().map(|line| serde_json::from_str::<StepMetrics>(line).unwrap().step).collect();
        assert_eq!(steps, [1, 2, 3, 4]);
        // A checkpoint of another run: nothing here comes before it.
        MetricsWriter::resume(&folder.path().join("new.jsonl"), 3).unwrap();
    }

    #[test]
    fn a_file_that_cannot_be_opened_is_named() {
        let error = MetricsWriter::append(Path::new("/dev/null/metrics.jsonl")).unwrap_err();
        assert_eq!(error.to_string(), "could not open `/dev/null/metrics.jsonl`");
    }
}
