//! What can go wrong while recording a run.

use std::path::PathBuf;

/// Errors of writers and probes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MonitorError {
    /// A file of the run could not be opened, read or written.
    #[error("could not {action} `{}`", path.display())]
    File {
        /// What was tried: `open`, `read` or `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The kernel's status page of this process lacks a line, or the line is not a number.
    #[error("`{path}` has no readable line `{key}`")]
    NoSuchStatus {
        /// The status page.
        path: &'static str,
        /// The line looked for.
        key: &'static str,
    },
}

impl MonitorError {
    /// For `map_err` on an operation on `path`.
    pub(crate) fn file(action: &'static str, path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| MonitorError::File { action, path, source }
    }
}
