//! How a rank fails: a message, a hint, an exit code, and whether another rank failed first.

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
        if message.starts_with("error: ") {
            eprintln!("{message}");
        } else {
            eprintln!("error: {message}");
        }
        if let Some(hint) = &self.hint {
            eprintln!("hint: {hint}");
        }
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
