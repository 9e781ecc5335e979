//! A file that is written once, from front to back, and made durable.
//!
//! Where the file system allows it, bytes go past the page cache (`O_DIRECT`): nobody will read them soon, and copying them into
//! pages of the cache takes the processor away from training. Elsewhere dirty pages left to themselves would be written
//! mostly inside of the final sync, so the system is asked to start with each window as soon as it is complete.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::num::NonZeroU64;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{Advice, FallocateFlags, OFlags, fadvise, fallocate, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

/// Where the bytes of a shard go; tests put a failing one in its place.
pub(crate) trait Sink: Send {
    /// Appends all of `bytes`.
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Returns when everything written is on the disk.
    fn sync(&mut self) -> io::Result<()>;
}

/// Enough for the disk to work on in one go, little against a host's memory.
const WINDOW_BYTES: usize = 8 << 20;
/// What addresses, places and lengths of direct writes are multiples of; more than any disk asks for.
const ALIGNMENT: usize = 4096;

/// A new file of this user alone.
#[derive(Debug)]
pub(crate) struct DiskFile {
    file: File,
    /// Collects a window for direct writes; `None` for writes through the cache.
    window: Option<Window>,
    written: u64,
    started: u64,
}

/// Memory for direct writes.
#[derive(Debug)]
struct Window {
    memory: Vec<u8>,
    /// Where aligned memory begins.
    start: usize,
    len: usize,
}

impl Window {
    fn new() -> Self {
        let memory = vec![0; WINDOW_BYTES + ALIGNMENT];
        let start = memory.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Window { memory, start, len: 0 }
    }

    fn filled(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }

    /// Takes what there is room for, and says how much that was.
    fn take(&mut self, bytes: &[u8]) -> usize {
        let count = bytes.len().min(WINDOW_BYTES - self.len);
        self.memory[self.start + self.len..][..count].copy_from_slice(&bytes[..count]);
        self.len += count;
        count
    }
}

impl DiskFile {
    /// Makes the file and reserves its space, so that a full disk is known before the first byte.
    pub(crate) fn create(path: &Path, num_bytes: u64) -> io::Result<Self> {
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        match fallocate(&file, FallocateFlags::empty(), 0, num_bytes) {
            // A file system that cannot reserve says so when it is full.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {}
            Err(error) => return Err(error.into()),
        }
        let is_long = num_bytes >= WINDOW_BYTES as u64;
        let window = (is_long && set_direct(&file, true).is_ok()).then(Window::new);
        Ok(DiskFile { file, window, written: 0, started: 0 })
    }

    /// Writes what the window holds and goes through the cache from here on.
    fn leave_direct(&mut self) -> io::Result<()> {
        let Some(window) = self.window.take() else { return Ok(()) };
        set_direct(&self.file, false)?;
        self.write_cached(window.filled())
    }

    fn write_cached(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.written += bytes.len() as u64;
        if let Some(window) = NonZeroU64::new(self.written - self.started)
            && window.get() >= WINDOW_BYTES as u64
        {
            // Linux starts to write dirty pages of the range and forgets clean ones. It is advice: whatever comes
            // of it, `sync` does the rest.
            let _ = fadvise(&self.file, self.started, Some(window), Advice::DontNeed);
            self.started = self.written;
        }
        Ok(())
    }
}

/// Whether writes go past the page cache, from now on.
fn set_direct(file: &File, direct: bool) -> io::Result<()> {
    let mut flags = fcntl_getfl(file)?;
    flags.set(OFlags::DIRECT, direct);
    Ok(fcntl_setfl(file, flags)?)
}

impl Sink for DiskFile {
    fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while let Some(window) = &mut self.window {
            let taken = window.take(bytes);
            bytes = &bytes[taken..];
            if window.len < WINDOW_BYTES {
                return Ok(());
            }
            match self.file.write(window.filled()) {
                Ok(WINDOW_BYTES) => {
                    window.len = 0;
                    self.written += WINDOW_BYTES as u64;
                    self.started = self.written;
                }
                // A file system that takes the flag and not the writes, or a part of one: the rest goes through the cache.
                Ok(count) => {
                    let rest = window.filled()[count..].to_vec();
                    self.window = None;
                    set_direct(&self.file, false)?;
                    self.written += count as u64;
                    self.write_cached(&rest)?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => self.leave_direct()?,
                Err(error) => return Err(error),
            }
        }
        self.write_cached(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.leave_direct()?;
        self.file.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On the disk, and in memory where no write can go past the cache.
    #[test]
    fn every_byte_arrives_however_it_is_cut() {
        for folder in [Some("/dev/shm"), None] {
            let folder = folder.filter(|folder| Path::new(folder).is_dir());
            let folder = folder.map_or_else(tempfile::tempdir, tempfile::tempdir_in).unwrap();
            for (num_bytes, step) in [
                (100, 7),
                (WINDOW_BYTES, WINDOW_BYTES),
                (2 * WINDOW_BYTES + 4097, 1 << 20),
                (20_000_001, 999_983),
            ] {
                let bytes: Vec<u8> =
                    (0..num_bytes as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
                let path = folder.path().join(num_bytes.to_string());
                let mut file = DiskFile::create(&path, num_bytes as u64).unwrap();
                bytes.chunks(step).for_each(|piece| file.write(piece).unwrap());
                file.sync().unwrap();
                assert!(std::fs::read(&path).unwrap() == bytes, "{num_bytes} bytes in steps of {step}");
            }
        }
    }
}
