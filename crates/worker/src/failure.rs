//! How a rank fails: a message, a hint, an exit code, and whether another rank failed first.

use std::any::Any;
use std::error::Error;
use std::io::Write;
use std::process::ExitCode;

use shardwise_comm::{CommError, JoinProblem};
use shardwise_engine::EngineError;
use shardwise_models::ModelError;
use shardwise_monitor::{ErrorEvent, Event};
use shardwise_zero::ZeroError;

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

    /// A panic that was caught, at `place` of the sources.
    pub fn panicked(panic: &(dyn Any + Send), place: &str) -> Self {
        let text = panic.downcast_ref::<&str>().copied().map(str::to_owned);
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
        let hint = "a panic is a bug of ours: please report it with the rank's log";
        Failure {
            error: anyhow::anyhow!("panicked at {place}: {text}"),
            hint: Some(hint.into()),
            kind: Kind::Training,
        }
    }

    /// Says what happened, to the supervisor and on standard error.
    pub fn report(self) -> ExitCode {
        let secondary = self.error.chain().filter_map(comm_error).any(is_secondary);
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

/// The failure between ranks that `error` is, if it is one. Transparent errors leave themselves out of the chain of causes, and a boxed
/// one is not of its own type there, so what they hold is taken out by type.
fn comm_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a CommError> {
    if let Some(ModelError::Engine(inner)) = error.downcast_ref() {
        comm_error(inner)
    } else if let Some(EngineError::Layer { source, .. }) = error.downcast_ref() {
        comm_error(&**source)
    } else if let Some(EngineError::Zero(inner)) = error.downcast_ref() {
        comm_error(inner)
    } else if let Some(EngineError::Comm(inner)) = error.downcast_ref() {
        Some(inner)
    } else if let Some(ZeroError::Comm(inner)) = error.downcast_ref() {
        Some(inner)
    } else {
        error.downcast_ref()
    }
}

/// Whether a rank that sees this error is one that another rank has let down.
fn is_secondary(error: &CommError) -> bool {
    use CommError::{Died, GaveUp, Join, Left, Stalled};
    match error {
        Died { .. } | GaveUp { .. } | Left { .. } | Stalled { .. } => true,
        Join { problem, .. } => {
            matches!(problem, JoinProblem::Missing { .. } | JoinProblem::BrokeOff { .. })
        }
        _ => false,
    }
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Failure { error: error.into(), hint: None, kind: Kind::Training }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_blamed_on_another(error: impl Into<anyhow::Error>) -> bool {
        error.into().chain().filter_map(comm_error).any(is_secondary)
    }

    #[test]
    fn a_peers_failure_is_known_through_every_wrapper() {
        let died = || CommError::Died { rank: 1, detail: "its process ended".into() };
        assert!(is_blamed_on_another(died()));
        assert!(is_blamed_on_another(ZeroError::from(died())));
        assert!(is_blamed_on_another(EngineError::from(ZeroError::from(died()))));
        assert!(is_blamed_on_another(EngineError::from(died())));
        let in_layer =
            |error| EngineError::Layer { layer: "l".into(), pass: "backward", source: Box::new(error) };
        assert!(is_blamed_on_another(in_layer(EngineError::from(died()))));
        assert!(is_blamed_on_another(ModelError::from(EngineError::from(ZeroError::from(died())))));
        assert!(is_blamed_on_another(anyhow::Error::from(died()).context("while saving")));
    }

    #[test]
    fn an_own_failure_is_not() {
        let refused = |problem| CommError::Join { rank: 0, rendezvous: "here".into(), problem };
        assert!(!is_blamed_on_another(refused(JoinProblem::Duplicate { rank: 0 })));
        assert!(is_blamed_on_another(refused(JoinProblem::BrokeOff { rank: 1 })));
        assert!(!is_blamed_on_another(EngineError::NoLayers));
        assert!(!is_blamed_on_another(std::io::Error::other("disk full")));
    }
}
