//! The line protocol between a rank and its supervisor.
//!
//! A rank writes one JSON object a line on its standard output. Every rank says where it is (`phase`,
//! `begin_step`) so that a crash can be placed; rank 0 also reports steps, notes and the final sample. A rank
//! that fails says why and whether the fault is its own or came from a peer. Lines that are no event (a library
//! that prints) are not errors: the supervisor keeps them with the rank's log.

use std::io::Write;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::StepMetrics;

/// One line from a rank.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The rank has begun something before, between or after steps.
    Phase {
        /// What, as people read it: `loading model`.
        phase: String,
    },
    /// The rank has begun an optimizer step.
    BeginStep {
        /// The step, from 1.
        step: u64,
    },
    /// An optimizer step is complete (rank 0).
    Step(StepMetrics),
    /// Something people should know (rank 0).
    Note {
        /// One line.
        text: String,
    },
    /// Text the trained model wrote (rank 0).
    Sample {
        /// Prompt and continuation.
        text: String,
    },
    /// The rank fails and is about to exit.
    Error(ErrorEvent),
    /// The rank has done all its work and is about to exit.
    Done,
}

/// Why a rank fails, as it sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorEvent {
    /// The cause.
    pub message: String,
    /// How to mend it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The rank fails only because another one did.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub secondary: bool,
}

impl Event {
    /// Reads one line; `None` if it is no event.
    pub fn parse(line: &[u8]) -> Option<Self> {
        serde_json::from_slice(line).ok()
    }

    /// The line that says this, newline included.
    pub fn to_line(&self) -> String {
        let mut line = serde_json::to_string(self).expect("an event holds only strings and numbers");
        line.push('\n');
        line
    }
}

/// Sends events, each flushed at once; shared by the threads of a rank.
///
/// A reader that went away is no failure of the rank: the writer falls silent. Whoever must not outlive its
/// supervisor asks the kernel for that, not this pipe.
pub struct EventWriter(Mutex<Option<Box<dyn Write + Send>>>);

impl EventWriter {
    /// Events go to `out`.
    pub fn new(out: impl Write + Send + 'static) -> Self {
        EventWriter(Mutex::new(Some(Box::new(out))))
    }

    /// Events go to standard output.
    pub fn stdout() -> Self {
        Self::new(std::io::stdout())
    }

    /// Nobody listens.
    pub fn disabled() -> Self {
        EventWriter(Mutex::new(None))
    }

    /// Sends one event.
    pub fn send(&self, event: &Event) {
        // A thread that panicked while it held the lock left at worst half a line, which the reader skips.
        let mut out = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(writer) = out.as_mut()
            && writer.write_all(event.to_line().as_bytes()).and_then(|()| writer.flush()).is_err()
        {
            *out = None;
        }
    }

    /// Whether events still reach a reader, as far as the last one could tell.
    pub fn is_open(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }
}

impl std::fmt::Debug for EventWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventWriter").field("is_open", &self.is_open()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, pipe};

    use super::*;
    use crate::metrics::tests::example;

    fn every_event() -> Vec<Event> {
        vec![
            Event::Phase { phase: "loading model".into() },
            Event::BeginStep { step: 7 },
            Event::Step(example(7)),
            Event::Note { text: "tokenised 1 MB\nin 2 s".into() },
            Event::Sample { text: "ROMEO:\n\"é\"".into() },
            Event::Error(ErrorEvent { message: "no space".into(), hint: None, secondary: false }),
            Event::Error(ErrorEvent {
                message: "peer".into(),
                hint: Some("look there".into()),
                secondary: true,
            }),
            Event::Done,
        ]
    }

    #[test]
    fn lines_are_the_protocol() {
        let line = |event: &Event| event.to_line();
        assert_eq!(line(&Event::BeginStep { step: 7 }), "{\"event\":\"begin_step\",\"step\":7}\n");
        assert_eq!(
            line(&Event::Phase { phase: "loading model".into() }),
            "{\"event\":\"phase\",\"phase\":\"loading model\"}\n"
        );
        assert_eq!(line(&Event::Done), "{\"event\":\"done\"}\n");
        let error = ErrorEvent { message: "m".into(), hint: Some("h".into()), secondary: true };
        assert_eq!(
            line(&Event::Error(error)),
            "{\"event\":\"error\",\"message\":\"m\",\"hint\":\"h\",\"secondary\":true}\n"
        );
        let step = line(&Event::Step(example(7)));
        assert!(step.starts_with("{\"event\":\"step\",\"step\":7,\"loss\":"), "{step}");
    }

    #[test]
    fn every_event_survives_the_pipe() {
        let (reader, writer) = pipe().unwrap();
        let events = EventWriter::new(writer);
        for event in every_event() {
            events.send(&event);
        }
        drop(events);
        let back: Vec<_> =
            BufReader::new(reader).split(b'\n').map(|l| Event::parse(&l.unwrap()).unwrap()).collect();
        assert_eq!(back, every_event());
    }

    #[test]
    fn what_is_no_event_is_none() {
        for line in
            ["", "loaded", "{}", "{\"event\":\"dance\"}", "{\"event\":\"begin_step\"}", "\u{0}\u{1}", "[1]"]
        {
            assert_eq!(Event::parse(line.as_bytes()), None, "{line}");
        }
        assert_eq!(Event::parse(b"\xff\xfe"), None);
    }

    #[test]
    fn a_closed_pipe_silences_the_writer() {
        let (reader, writer) = pipe().unwrap();
        let events = EventWriter::new(writer);
        assert!(events.is_open());
        drop(reader);
        events.send(&Event::Done);
        assert!(!events.is_open());
        events.send(&Event::Done);
        assert!(!EventWriter::disabled().is_open());
    }
}
