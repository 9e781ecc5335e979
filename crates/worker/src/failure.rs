//! How a rank fails: a message, a hint, an exit code, and whether another rank failed first.

use std::any::Any;
use std::io::Write;
use std::process::ExitCode;

use shardwise_comm::CommError;
use shardwise_monitor::{ErrorEvent, Event};

use crate::launch::events;

/// Why this rank ends before its work is done.
#[derive(Debug)]
pub struct Failure {
    error: anyhow::Error,
    hint: Option<String>,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Exit code 2.
    Usage,
    /// Exit code 1.
    Training,
}

impl Failure {
    /// Bad usage or configuration.
    pub fn usage(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Failure { error: anyhow::anyhow!(message.into()), hint: Some(hint.into()), kind: Kind::Usage }
    }

    /// Any error, as one of usage or configuration.
    pub fn configuration(error: impl Into<anyhow::Error>) -> Self {
        Failure { error: error.into(), hint: None, kind: Kind::Usage }
    }

    /// A panic that was caught. Where it happened, it has said on standard error.
    pub fn panicked(panic: &(dyn Any + Send)) -> Self {
        let text = panic.downcast_ref::<&str>().copied().map(str::to_owned);
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
        let hint = "a panic is a bug of ours: the rank's log says where";
        Failure { error: anyhow::anyhow!("panicked: {text}"), hint: Some(hint.into()), kind: Kind::Training }
    }

    /// Says what happened, to the supervisor and on standard error.
    pub fn report(self) -> ExitCode {
        let secondary = self.error.chain().any(|cause| {
            matches!(
                cause.downcast_ref::<CommError>(),
                Some(CommError::Died { .. } | CommError::GaveUp { .. } | CommError::Left { .. })
            )
        });
        let message = format!("{:#}", self.error);
        // Configuration errors come with their own prefix and hints.
        let prefix = if message.starts_with("error: ") { "" } else { "error: " };
        let hint = self.hint.iter().map(|hint| format!("hint: {hint}\n")).collect::<String>();
        // The disk that the log is on may be full, which may be the error to report.
        let _ = write!(std::io::stderr(), "{prefix}{message}\n{hint}");
        events().send(&Event::Error(ErrorEvent { message, hint: self.hint, secondary }));
        ExitCode::from(match self.kind {
            Kind::Usage => 2,
            Kind::Training => 1,
        })
    }
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Failure { error: error.into(), hint: None, kind: Kind::Training }
    }
}
