//! NCCL's library: where it is, and whether it will do.
//!
//! ```text
//! a file or folder that the user names     nothing else is tried then
//! beside libtorch, as wheels lie           .../site-packages/{torch, nvidia/nccl/lib}
//! the system's                             what the loader finds by name
//! ```
//!
//! Loaded when first needed and never linked. Under the same path as libtorch's it is the same library, loaded once.

use std::error::Error;
use std::ffi::CStr;
use std::fmt;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use libloading::os::unix::{Library as Loaded, RTLD_LOCAL, RTLD_NOW};
use shardwise_kernels::cuda::Attempt;

use super::api::{self, Api, Code};
use crate::CommError;

/// The name that the loader is asked for, and that of the file in a folder.
const LIBRARY: &str = "libnccl.so.2";

/// What is known of where NCCL may be. The caller reads environment variables, if any.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Search {
    /// A library or the folder that holds it: if given, the only place.
    pub given: Option<PathBuf>,
    /// The folder of libtorch, with `include/` and `lib/`.
    pub libtorch: Option<PathBuf>,
}

/// NCCL's version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// As in 2.18.3.
    pub major: u32,
    /// As in 2.18.3.
    pub minor: u32,
    /// As in 2.18.3.
    pub patch: u32,
}

impl Version {
    /// The oldest whose communicators neither block nor lack what is needed to end them.
    pub const OLDEST: Version = Version { major: 2, minor: 18, patch: 0 };

    /// As NCCL writes it: 21803 for 2.18.3; up to 2.8, 2804 for 2.8.4.
    fn from_number(number: i32) -> Self {
        let number = number.unsigned_abs();
        let unit = if number < 10_000 { 1000 } else { 10_000 };
        Version { major: number / unit, minor: number % unit / 100, patch: number % 100 }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// A loaded NCCL.
pub struct Library {
    api: Api,
    version: Version,
    place: String,
    /// Stays loaded for good: NCCL has threads and exit handlers of its own, and libtorch may share it.
    _library: ManuallyDrop<Loaded>,
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Library(NCCL {}, {})", self.version, self.place)
    }
}

impl Search {
    /// Folders and files that are looked at, in order.
    fn places(&self) -> Vec<PathBuf> {
        if let Some(given) = &self.given {
            return vec![given.clone()];
        }
        let packages = self.libtorch.as_deref().and_then(Path::parent);
        packages.map(|packages| packages.join("nvidia/nccl/lib")).into_iter().collect()
    }

    /// What the system's loader may find, if the user has not named a place.
    fn by_name(&self) -> Option<&'static str> {
        self.given.is_none().then_some(LIBRARY)
    }
}

/// The library at `place`, a file or a folder; or what is wrong.
fn candidate(place: &Path) -> Result<PathBuf, String> {
    let library = if place.is_dir() { place.join(LIBRARY) } else { place.to_path_buf() };
    match (library.is_file(), place.is_dir()) {
        (true, _) => Ok(library),
        (false, true) => Err(format!("holds no `{LIBRARY}`")),
        (false, false) => Err("no such file or folder".into()),
    }
}

impl Library {
    /// Loads the first NCCL that is found and usable.
    ///
    /// # Errors
    /// [`CommError::NoNccl`], with all places and their problems.
    pub fn load(search: &Search) -> Result<Arc<Self>, CommError> {
        let mut tried = Vec::new();
        for place in search.places() {
            match candidate(&place).and_then(|library| Library::open(&library)) {
                Ok(library) => return Ok(Arc::new(library)),
                Err(problem) => tried.push(Attempt { place: place.display().to_string(), problem }),
            }
        }
        if let Some(name) = search.by_name() {
            match Library::open(Path::new(name)) {
                Ok(library) => return Ok(Arc::new(library)),
                Err(problem) => tried.push(Attempt { place: name.into(), problem }),
            }
        }
        Err(CommError::NoNccl { tried })
    }

    fn open(path: &Path) -> Result<Self, String> {
        // SAFETY: NVIDIA's library, whose initialisers ask for nothing; a user who names another file means it.
        let library = unsafe { Loaded::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.map_err(|error| {
            let cause = error.source().map_or_else(|| error.to_string(), ToString::to_string);
            format!("is not loaded: {cause}")
        })?;
        // SAFETY: as above.
        let version = Version::from_number(unsafe { api::version(&library) }?);
        if version < Version::OLDEST {
            return Err(format!("is NCCL {version}, older than {}", Version::OLDEST));
        }
        // SAFETY: as above, and new enough.
        let api = unsafe { Api::find(&library) }?;
        Ok(Library { api, version, place: path.display().to_string(), _library: ManuallyDrop::new(library) })
    }

    /// The version of the library.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Where it was found.
    pub fn place(&self) -> &str {
        &self.place
    }

    pub(super) fn api(&self) -> &Api {
        &self.api
    }

    /// NCCL's words for a result.
    pub(super) fn text(&self, code: Code) -> String {
        // SAFETY: takes any number and returns a text that lives as long as the library.
        unsafe { CStr::from_ptr((self.api.error_string)(code)) }.to_string_lossy().into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_given_place_is_the_only_one() {
        let search = Search { given: Some("/a".into()), libtorch: Some("/b/torch".into()) };
        assert_eq!((search.places(), search.by_name()), (vec!["/a".into()], None));
        let search = Search { given: None, ..search };
        assert_eq!(search.places(), [PathBuf::from("/b/nvidia/nccl/lib")]);
        assert_eq!(search.by_name(), Some("libnccl.so.2"));
    }

    #[test]
    fn versions_are_numbers_of_two_kinds() {
        let told = |number| Version::from_number(number).to_string();
        assert_eq!([told(22809), told(21800), told(2804)], ["2.28.9", "2.18.0", "2.8.4"]);
        assert!(
            Version::from_number(21405) < Version::OLDEST && Version::OLDEST < Version::from_number(21801)
        );
    }
}
