//! Where NVRTC is.
//!
//! ```text
//! a file or folder that the user names     nothing else is tried then
//! beside libtorch, as wheels lie           .../site-packages/{torch, nvidia/cu13/lib}
//! the system's CUDA                        /usr/local/cuda/lib64, then what the loader finds by name
//! ```

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

/// What is known of where NVRTC may be. The caller reads environment variables, if any.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Search {
    /// A library or the folder that holds it: if given, the only place.
    pub given: Option<PathBuf>,
    /// The folder of libtorch, with `include/` and `lib/`.
    pub libtorch: Option<PathBuf>,
}

/// A library to try, with what it needs.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    pub library: PathBuf,
    /// Loaded first: NVRTC itself would look for it by name only.
    pub builtins: Option<PathBuf>,
}

/// The name that the loader is asked for.
const LIBRARY: &str = "libnvrtc.so.13";

impl Search {
    /// Folders and files that are looked at, in order.
    pub(super) fn places(&self) -> Vec<PathBuf> {
        if let Some(given) = &self.given {
            return vec![given.clone()];
        }
        let mut places = Vec::new();
        if let Some(packages) = self.libtorch.as_deref().and_then(Path::parent) {
            places.extend(["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"].map(|folder| packages.join(folder)));
        }
        places.push("/usr/local/cuda/lib64".into());
        places
    }

    /// What the system's loader may find, if the user has not named a place.
    pub(super) fn by_name(&self) -> Option<&'static str> {
        self.given.is_none().then_some(LIBRARY)
    }
}

/// The library at `place`, a file or a folder; or what is wrong.
pub(super) fn candidate(place: &Path) -> Result<Candidate, String> {
    let (library, folder) = if place.is_dir() {
        let library = newest(place, "libnvrtc.so").ok_or("holds no `libnvrtc.so.13`")?;
        (library, place)
    } else if place.is_file() {
        (place.to_path_buf(), place.parent().unwrap_or(Path::new(".")))
    } else {
        return Err("no such file or folder".into());
    };
    let builtins = newest(folder, "libnvrtc-builtins.so")
        .ok_or_else(|| format!("no `libnvrtc-builtins.so.13.0` in `{}`", folder.display()))?;
    Ok(Candidate { library, builtins: Some(builtins) })
}

/// The file `name`, or the last in order of those that are called so with a version behind.
fn newest(folder: &Path, name: &str) -> Option<PathBuf> {
    let is_called_so = |file: &OsStr| {
        file.to_str()
            .and_then(|file| file.strip_prefix(name))
            .is_some_and(|rest| rest.is_empty() || (rest.starts_with('.') && !rest.ends_with(".sig")))
    };
    let files = fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    files.filter(|path| path.file_name().is_some_and(is_called_so)).max()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_given_place_is_the_only_one() {
        let search = Search { given: Some("/a".into()), libtorch: Some("/b/torch".into()) };
        assert_eq!((search.places(), search.by_name()), (vec!["/a".into()], None));
        let search = Search { given: None, ..search };
        assert_eq!(
            search.places()[..2],
            ["/b/nvidia/cu13/lib", "/b/nvidia/cuda_nvrtc/lib"].map(PathBuf::from)
        );
        assert_eq!(search.by_name(), Some("libnvrtc.so.13"));
    }

    #[test]
    fn a_folder_has_the_library_and_its_builtins() {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name);
        assert_eq!(candidate(folder.path()), Err("holds no `libnvrtc.so.13`".into()));
        for name in
            ["libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.alt.so.13", "libnvrtc-builtins.alt.so.13.0"]
        {
            fs::write(place(name), "").unwrap();
        }
        assert!(candidate(folder.path()).unwrap_err().contains("libnvrtc-builtins.so.13.0"));
        fs::write(place("libnvrtc-builtins.so.13.0"), "").unwrap();
        let both = Candidate {
            library: place("libnvrtc.so.13"),
            builtins: Some(place("libnvrtc-builtins.so.13.0")),
        };
        assert_eq!(candidate(folder.path()).as_ref(), Ok(&both));
        assert_eq!(candidate(&both.library).as_ref(), Ok(&both));
        assert_eq!(candidate(&place("none")), Err("no such file or folder".into()));
    }
}
