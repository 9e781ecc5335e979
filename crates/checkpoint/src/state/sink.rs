//! A file that is written once, from front to back, and made durable.
//!
//! Dirty pages left to themselves are written when the system feels like it, mostly inside of the final sync. Here
//! the system is asked to start with each window as soon as it is complete, so the disk works while the next window
//! is copied, and the cache does not fill with pages that nobody will read.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::num::NonZeroU64;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{Advice, FallocateFlags, fadvise, fallocate};
use rustix::io::Errno;

/// Where the bytes of a shard go; tests put a failing one in its place.
pub(crate) trait Sink: Send {
    /// Appends all of `bytes`.
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Returns when everything written is on the disk.
    fn sync(&mut self) -> io::Result<()>;
}

/// Enough for the disk to work on in one go, little against a host's memory.
const WINDOW_BYTES: u64 = 16 << 20;

/// A new file of this user alone.
#[derive(Debug)]
pub(crate) struct DiskFile {
    file: File,
    written: u64,
    started: u64,
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
        Ok(DiskFile { file, written: 0, started: 0 })
    }
}

impl Sink for DiskFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.written += bytes.len() as u64;
        if let Some(window) = NonZeroU64::new(self.written - self.started)
            && window.get() >= WINDOW_BYTES
        {
            // Linux starts to write dirty pages of the range and forgets clean ones. It is advice: whatever comes
            // of it, `sync` does the rest.
            let _ = fadvise(&self.file, self.started, Some(window), Advice::DontNeed);
            self.started = self.written;
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_all()
    }
}
