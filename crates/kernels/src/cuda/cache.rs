//! Compiled kernels on disk, so that a program compiles them once.
//!
//! A file is named after its source, architecture and key. The key is a hash of all that its contents depend on: source, headers,
//! options, NVRTC's version, architecture.
//!
//! ```text
//! magic (16 bytes) | key (32) | SHA-256 of the code (32) | length (8, little endian) | code
//! ```
//!
//! Machine code runs with the user's rights, so it is believed only if it is the user's own: the folder and the file
//! belong to the user and nobody else may write them. A file that is not so, or is damaged, or of another key, is compiled
//! anew and replaced. Files are written aside and renamed, so ranks may fill one folder at the same time.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use sha2::{Digest, Sha256};

use super::nvrtc::OPTIONS;
use super::{Arch, CudaKernelError, Nvrtc, Program, Version};

const MAGIC: &[u8; 16] = b"shardwise cubin1";
const HEADER_BYTES: usize = 16 + 32 + 32 + 8;
/// Whom a file or folder must not be writable for.
const OTHERS_WRITE: u32 = 0o022;

/// A folder of compiled kernels.
#[derive(Debug, Clone)]
pub struct KernelCache {
    folder: PathBuf,
}

/// Machine code for one architecture.
#[derive(Debug)]
pub struct Cubin {
    /// An ELF file, as the driver loads it.
    pub code: Vec<u8>,
    /// Where it comes from.
    pub origin: Origin,
}

/// Where machine code comes from.
#[derive(Debug)]
pub enum Origin {
    /// Compiled before.
    Cached,
    /// Compiled now, and kept.
    Compiled,
    /// Compiled now, but the next program has to do it again: worth a warning.
    NotKept(io::Error),
}

impl KernelCache {
    /// Uses `folder`, which is made if it is missing, for the user alone.
    ///
    /// # Errors
    /// [`CudaKernelError::CacheFolder`]; [`CudaKernelError::ForeignCacheFolder`] if others could write there.
    pub fn open(folder: &Path) -> Result<Self, CudaKernelError> {
        let failed = |source| CudaKernelError::CacheFolder { path: folder.into(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
        if let Some(problem) = distrust(&fs::metadata(folder).map_err(failed)?) {
            return Err(CudaKernelError::ForeignCacheFolder { path: folder.into(), problem });
        }
        Ok(KernelCache { folder: folder.into() })
    }

    /// The machine code of `program`, from the folder if it is there.
    ///
    /// # Errors
    /// As [`Nvrtc::compile`]. A folder that cannot be read or written is no error: see [`Origin::NotKept`].
    pub fn cubin(&self, nvrtc: &Nvrtc, program: &Program<'_>, arch: Arch) -> Result<Cubin, CudaKernelError> {
        let key = key(program, nvrtc.version(), arch);
        let path = self.path(program, arch, &key);
        if let Some(code) = read(&path, &key).filter(|code| program.check(code).is_ok()) {
            return Ok(Cubin { code, origin: Origin::Cached });
        }
        let code = nvrtc.compile(program, arch)?.cubin;
        let origin = match self.write(&path, &key, &code) {
            Ok(()) => Origin::Compiled,
            Err(error) => Origin::NotKept(error),
        };
        Ok(Cubin { code, origin })
    }

    fn path(&self, program: &Program<'_>, arch: Arch, key: &[u8; 32]) -> PathBuf {
        let stem =
            Path::new(program.name).file_stem().map_or_else(Default::default, |stem| stem.to_string_lossy());
        let digits: String = key[..8].iter().map(|byte| format!("{byte:02x}")).collect();
        self.folder.join(format!("{stem}-{arch}-{digits}.cubin"))
    }

    /// No sync: what a crash leaves half written is seen by its checksum.
    fn write(&self, path: &Path, key: &[u8; 32], code: &[u8]) -> io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(&self.folder)?; // mode 0600
        file.write_all(MAGIC)?;
        file.write_all(key)?;
        file.write_all(&Sha256::digest(code))?;
        file.write_all(&(code.len() as u64).to_le_bytes())?;
        file.write_all(code)?;
        file.persist(path).map_err(|error| error.error)?;
        Ok(())
    }
}

/// The hash of all that machine code depends on. Each part is preceded by its length, so no two lists of parts are one text.
fn key(program: &Program<'_>, version: Version, arch: Arch) -> [u8; 32] {
    let mut hash = Sha256::new();
    let mut add = |part: &str| {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    };
    add(&version.to_string());
    add(&arch.to_string());
    add(program.name);
    add(program.text);
    for header in program.headers {
        add(header.name);
        add(header.text);
    }
    add("options");
    OPTIONS.iter().for_each(|option| add(option));
    hash.finalize().into()
}

/// The code in the file, if it is the user's, of this key and whole.
fn read(path: &Path, key: &[u8; 32]) -> Option<Vec<u8>> {
    let no_follow = OFlags::NOFOLLOW.bits().cast_signed();
    let mut file: File = OpenOptions::new().read(true).custom_flags(no_follow).open(path).ok()?;
    let metadata = file.metadata().ok()?;
    if !metadata.is_file() || distrust(&metadata).is_some() {
        return None;
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).ok()?;
    let (header, code) = bytes.split_at_checked(HEADER_BYTES)?;
    let mut expected = Vec::with_capacity(HEADER_BYTES);
    expected.extend_from_slice(MAGIC);
    expected.extend_from_slice(key);
    expected.extend_from_slice(&Sha256::digest(code));
    expected.extend_from_slice(&(code.len() as u64).to_le_bytes());
    (header == expected).then(|| code.to_vec())
}

/// Why what lies here may be another user's doing.
fn distrust(metadata: &fs::Metadata) -> Option<&'static str> {
    if metadata.uid() != rustix::process::geteuid().as_raw() {
        Some("belongs to another user")
    } else if metadata.mode() & OTHERS_WRITE != 0 {
        Some("may be written by other users")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;
    use crate::cuda::Header;

    const KEY: [u8; 32] = [7; 32];

    fn cache() -> (tempfile::TempDir, KernelCache, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let cache = KernelCache::open(&folder.path().join("a/b")).unwrap();
        let path = cache.folder.join("x.cubin");
        (folder, cache, path)
    }

    #[test]
    fn what_is_written_is_read_by_the_user_alone() {
        let (_folder, cache, path) = cache();
        for code in [&b"code"[..], b"", &[1; 100_000]] {
            cache.write(&path, &KEY, code).unwrap();
            assert_eq!(read(&path, &KEY).as_deref(), Some(code));
        }
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(&cache.folder).unwrap().mode() & 0o777, 0o700);
        assert_eq!(fs::read_dir(&cache.folder).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn no_damaged_byte_and_no_missing_end_goes_unseen() {
        let (_folder, cache, path) = cache();
        cache.write(&path, &KEY, b"some machine code").unwrap();
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x10;
            fs::write(&path, damaged).unwrap();
            assert_eq!(read(&path, &KEY), None, "byte {at}");
            fs::write(&path, &whole[..at]).unwrap();
            assert_eq!(read(&path, &KEY), None, "{at} bytes");
        }
        fs::write(&path, [&whole[..], b"x"].concat()).unwrap();
        assert_eq!(read(&path, &KEY), None);
        fs::write(&path, &whole).unwrap();
        assert_eq!(read(&path, &[8; 32]), None, "another key");
        assert!(read(&path, &KEY).is_some());
    }

    #[test]
    fn what_others_may_have_written_is_not_believed() {
        let (_folder, cache, path) = cache();
        cache.write(&path, &KEY, b"code").unwrap();
        let link = cache.folder.join("link.cubin");
        symlink(&path, &link).unwrap();
        assert_eq!(read(&link, &KEY), None, "a link");
        for mode in [0o620, 0o602] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(read(&path, &KEY), None, "{mode:o}");
        }
        fs::set_permissions(&cache.folder, fs::Permissions::from_mode(0o770)).unwrap();
        let error = KernelCache::open(&cache.folder).unwrap_err();
        assert!(matches!(error, CudaKernelError::ForeignCacheFolder { .. }), "{error}");
        assert!(error.to_string().contains("`chmod 700` it"), "{error}");
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let (_folder, cache, path) = cache();
        cache.write(&path, &KEY, b"code").unwrap();
        let error = KernelCache::open(&path.join("below a file")).unwrap_err().to_string();
        assert!(error.contains("x.cubin/below a file"), "{error}");
    }

    #[test]
    fn the_key_depends_on_everything() {
        let headers = [Header { name: "h", text: "1" }];
        let program = Program { name: "a.cu", text: "t", headers: &headers, entries: &[] };
        let (version, arch) = (Version { major: 13, minor: 0 }, Arch::new(8, 6));
        let other_headers = [Header { name: "h", text: "2" }];
        let keys = [
            key(&program, version, arch),
            key(&Program { name: "b.cu", ..program }, version, arch),
            key(&Program { text: "u", ..program }, version, arch),
            key(&Program { headers: &other_headers, ..program }, version, arch),
            key(&Program { headers: &[], ..program }, version, arch),
            key(&program, Version { minor: 1, ..version }, arch),
            key(&program, version, Arch::new(9, 0)),
            // The same letters, cut elsewhere.
            key(&Program { name: "a.cut", text: "", ..program }, version, arch),
        ];
        for (i, a) in keys.iter().enumerate() {
            assert!(keys[..i].iter().all(|b| a != b), "{i}");
        }
    }
}
