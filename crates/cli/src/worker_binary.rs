//! Where the binary of a rank is.

use std::path::PathBuf;

use anyhow::Context;

use crate::console::UsageError;

const NAME: &str = "shardwise-worker";
const OVERRIDE: &str = "SHARDWISE_WORKER";

/// `SHARDWISE_WORKER`, or the `shardwise-worker` beside this executable.
pub fn locate() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os(OVERRIDE) {
        let path = PathBuf::from(path);
        return if path.is_file() {
            Ok(path)
        } else {
            Err(UsageError::new(
                format!("`{OVERRIDE}={}` is no file", path.display()),
                format!("point it at a `{NAME}` binary, or unset it"),
            )
            .into())
        };
    }
    let own = std::env::current_exe().context("could not find this executable's own path")?;
    let path = own.with_file_name(NAME);
    if path.is_file() {
        return Ok(path);
    }
    Err(UsageError::new(
        format!("`{}` was not found", path.display()),
        format!("`make build` leaves both binaries in one folder; `{OVERRIDE}` names another place"),
    )
    .into())
}
