//! TensorBoard event files.
//!
//! An event file is a sequence of TFRecord frames, each around one `tensorflow.Event` protobuf message:
//!
//! ```text
//! frame    length: u64 LE │ masked crc32c of length: u32 LE │ payload │ masked crc32c of payload: u32 LE
//! Event    1 wall_time: double │ 2 step: int64 │ 3 file_version: string  or  5 summary: Summary  or  7 session_log
//! Summary  1 repeated Value { 1 tag: string │ 2 simple_value: float }
//! ```
//!
//! Scalars need no more of either format than this, so both are written by hand here.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::{MonitorError, Outcome, StepMetrics};

/// Writes scalars for TensorBoard, one frame and one `write` for each step.
#[derive(Debug)]
pub struct TensorBoardWriter {
    file: File,
    path: PathBuf,
}

impl TensorBoardWriter {
    /// Starts a new event file in `folder`, named after the time and this host.
    ///
    /// # Errors
    /// [`MonitorError::File`] if the file cannot be made or written.
    pub fn create(folder: &Path) -> Result<Self, MonitorError> {
        let now = unix_time(SystemTime::now());
        let (mut file, path) = new_file(folder, now as u64, &host_name())?;
        let version = Message::new().double(1, now).bytes(3, b"brain.Event:2");
        file.write_all(&frame(&version.0)).map_err(MonitorError::file("write", &path))?;
        Ok(TensorBoardWriter { file, path })
    }

    /// The event file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Says that what earlier files hold of `step` and later is void: the run begins there again.
    ///
    /// # Errors
    /// As [`TensorBoardWriter::write_scalars`].
    pub fn purge_from(&mut self, step: u64) -> Result<(), MonitorError> {
        const SESSION_STARTS: u64 = 1;
        let session = Message::new().varint_field(1, SESSION_STARTS);
        let event =
            Message::new().double(1, unix_time(SystemTime::now())).varint_field(2, step).bytes(7, &session.0);
        self.file.write_all(&frame(&event.0)).map_err(MonitorError::file("write", &self.path))
    }

    /// Writes the scalars of one step.
    ///
    /// # Errors
    /// [`MonitorError::File`] if the frame could not be written whole.
    pub fn write_scalars(
        &mut self,
        step: u64,
        wall_time: SystemTime,
        scalars: &[(&str, f64)],
    ) -> Result<(), MonitorError> {
        let event = scalars_event(step, unix_time(wall_time), scalars);
        self.file.write_all(&frame(&event)).map_err(MonitorError::file("write", &self.path))
    }

    /// Writes what [`StepMetrics`] holds, under `train/`, `throughput/` and `memory/`.
    ///
    /// # Errors
    /// As [`TensorBoardWriter::write_scalars`].
    pub fn write_step(&mut self, metrics: &StepMetrics) -> Result<(), MonitorError> {
        let skipped = if metrics.outcome == Outcome::Skipped { 1.0 } else { 0.0 };
        let mut scalars = vec![
            ("train/loss", metrics.loss),
            ("train/grad_norm", metrics.grad_norm),
            ("train/lr", metrics.lr),
            ("train/skipped", skipped),
            ("train/skipped_steps", metrics.skipped_steps as f64),
            ("throughput/tokens_per_s", metrics.tokens_per_s),
            ("throughput/step_s", metrics.step_s),
            ("throughput/comm_bytes", metrics.comm_bytes as f64),
            ("throughput/exposed_comm_s", metrics.exposed_comm_s),
            ("memory/peak_rss_mb", metrics.peak_rss_mb),
        ];
        scalars.extend(metrics.loss_scale.map(|value| ("train/loss_scale", value)));
        scalars.extend(metrics.host_wait_s.map(|value| ("throughput/host_wait_s", value)));
        scalars.extend(metrics.device_peak_mb.map(|value| ("memory/device_peak_mb", value)));
        scalars.extend(metrics.device_allocated_mb.map(|value| ("memory/device_allocated_mb", value)));
        let groups: Vec<_> = (0..metrics.group_lrs.len()).map(|i| format!("train/lr_group_{i}")).collect();
        scalars.extend(groups.iter().map(String::as_str).zip(metrics.group_lrs.iter().copied()));
        self.write_scalars(metrics.step, SystemTime::now(), &scalars)
    }
}

/// TensorBoard reads the files of a folder in the order of their names; two that start within one second differ
/// by a last number.
fn new_file(folder: &Path, seconds: u64, host: &str) -> Result<(File, PathBuf), MonitorError> {
    let mut path = folder.join(format!("events.out.tfevents.{seconds:010}.{host}"));
    for attempt in 1.. {
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(file) => return Ok((file, path)),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                path = folder.join(format!("events.out.tfevents.{seconds:010}.{host}.{attempt}"));
            }
            Err(error) => return Err(MonitorError::file("open", &path)(error)),
        }
    }
    unreachable!("a folder holds fewer files than there are numbers")
}

/// The host's name as far as it is fit for a file name.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name: String =
        name.trim().chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_')).collect();
    if name.is_empty() { "localhost".to_owned() } else { name }
}

fn unix_time(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

fn scalars_event(step: u64, wall_time: f64, scalars: &[(&str, f64)]) -> Vec<u8> {
    let summary = scalars.iter().fold(Message::new(), |summary, &(tag, value)| {
        summary.bytes(1, &Message::new().bytes(1, tag.as_bytes()).float(2, value as f32).0)
    });
    Message::new().double(1, wall_time).varint_field(2, step).bytes(5, &summary.0).0
}

fn frame(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u64).to_le_bytes();
    let mut out = Vec::with_capacity(payload.len() + 16);
    out.extend_from_slice(&length);
    out.extend_from_slice(&masked_crc(&length).to_le_bytes());
    out.extend_from_slice(payload);
    out.extend_from_slice(&masked_crc(payload).to_le_bytes());
    out
}

/// The TFRecord form of a checksum: rotated and shifted, so that a checksum of data that holds its own checksum
/// stays useful.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// A protobuf message under construction; field numbers are below 16, so every key is one byte.
struct Message(Vec<u8>);

impl Message {
    fn new() -> Self {
        Message(Vec::new())
    }

    fn varint(mut self, mut value: u64) -> Self {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
        self
    }

    fn varint_field(mut self, field: u8, value: u64) -> Self {
        self.0.push(field << 3);
        self.varint(value)
    }

    fn double(mut self, field: u8, value: f64) -> Self {
        self.0.push(field << 3 | 1);
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn bytes(mut self, field: u8, value: &[u8]) -> Self {
        self.0.push(field << 3 | 2);
        self = self.varint(value.len() as u64);
        self.0.extend_from_slice(value);
        self
    }

    fn float(mut self, field: u8, value: f32) -> Self {
        self.0.push(field << 3 | 5);
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::metrics::tests::example;

    /// Splits a file into payloads and checks both checksums of each frame.
    fn frames(mut bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut payloads = Vec::new();
        while !bytes.is_empty() {
            let (length, rest) = bytes.split_first_chunk::<8>().unwrap();
            let (length_crc, rest) = rest.split_first_chunk::<4>().unwrap();
            assert_eq!(u32::from_le_bytes(*length_crc), masked_crc(length));
            let (payload, rest) = rest.split_at(u64::from_le_bytes(*length) as usize);
            let (crc, rest) = rest.split_first_chunk::<4>().unwrap();
            assert_eq!(u32::from_le_bytes(*crc), masked_crc(payload));
            payloads.push(payload.to_vec());
            bytes = rest;
        }
        payloads
    }

    #[test]
    fn checksums_match_the_published_vectors() {
        // RFC 3720 B.4: 32 bytes of zeros, 32 bytes of ones.
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c::crc32c(&[0xff; 32]), 0x62a8_ab43);
        // The first 12 bytes of every event file whose version event is 24 bytes long.
        assert_eq!(frame(&[0; 24])[..12], [0x18, 0, 0, 0, 0, 0, 0, 0, 0xa3, 0x7f, 0x4b, 0x22]);
    }

    #[test]
    fn a_scalar_event_is_these_bytes() {
        let event = scalars_event(300, 1.5, &[("a/b", 0.5), ("c", -2.0)]);
        let golden: &[&[u8]] = &[
            &[0x09, 0, 0, 0, 0, 0, 0, 0xf8, 0x3f], // wall_time = 1.5
            &[0x10, 0xac, 0x02],                   // step = 300
            &[0x2a, 22],                           // summary: 12 + 10 bytes
            &[0x0a, 10, 0x0a, 3, b'a', b'/', b'b', 0x15, 0, 0, 0, 0x3f],
            &[0x0a, 8, 0x0a, 1, b'c', 0x15, 0, 0, 0, 0xc0],
        ];
        assert_eq!(event, golden.concat());
    }

    #[test]
    fn a_run_is_whole_frames_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = TensorBoardWriter::create(folder.path()).unwrap();
        for step in 1..=3 {
            writer.write_step(&example(step)).unwrap();
        }
        let name = writer.path().file_name().unwrap().to_str().unwrap().to_owned();
        assert!(name.starts_with("events.out.tfevents."), "{name}");
        let payloads = frames(&std::fs::read(writer.path()).unwrap());
        assert_eq!(payloads.len(), 4);
        assert_eq!(payloads[0][9..], *b"\x1a\x0dbrain.Event:2");
        for (step, payload) in payloads[1..].iter().enumerate() {
            assert_eq!(payload[9..11], [0x10, step as u8 + 1]);
            let text = String::from_utf8_lossy(payload);
            assert!(text.contains("train/loss") && text.contains("memory/peak_rss_mb"));
            assert!(!text.contains("loss_scale") && !text.contains("device_peak"));
        }
    }

    #[test]
    fn a_resumed_run_voids_what_it_does_again() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = TensorBoardWriter::create(folder.path()).unwrap();
        writer.purge_from(7).unwrap();
        let payloads = frames(&std::fs::read(writer.path()).unwrap());
        // step 7; session_log of 2 bytes: status = START
        assert_eq!(payloads[1][9..], [0x10, 7, 0x3a, 2, 0x08, 1]);
    }

    #[test]
    fn two_files_of_one_second_do_not_collide() {
        let folder = tempfile::tempdir().unwrap();
        let names: Vec<_> = (0..3)
            .map(|_| new_file(folder.path(), 12, "h").unwrap().1.file_name().unwrap().to_owned())
            .collect();
        let stem = "events.out.tfevents.0000000012.h";
        assert_eq!(names, [stem, &format!("{stem}.1"), &format!("{stem}.2")]);
    }

    #[test]
    fn values_beyond_f32_stay_readable() {
        let huge = scalars_event(1, 0.0, &[("x", 1e300)]);
        assert_eq!(huge[huge.len() - 4..], f32::INFINITY.to_le_bytes());
        assert_eq!(unix_time(UNIX_EPOCH + Duration::from_millis(1500)), 1.5);
    }
}
