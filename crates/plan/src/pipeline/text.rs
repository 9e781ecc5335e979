//! A schedule as text, and back.
//!
//! ```text
//! stages 2 chunks 1 microbatches 2
//! 0: F0 F0>1 F1 F1>1 B0<1 B0 B1<1 B1 TIED REDUCE STEP
//! 1: F0<0 F0 B0 B0>0 F1<0 F1 B1 B1>0 TIED REDUCE STEP
//! ```

use std::fmt;
use std::str::FromStr;

use super::Schedule;
use super::action::number;

/// Why a text is no schedule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {message}")]
pub struct ParseError {
    /// Counted from 1.
    pub line: usize,
    /// What is wrong there.
    pub message: String,
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (stages, chunks, microbatches) = (self.num_stages(), self.num_chunks, self.num_microbatches);
        writeln!(f, "stages {stages} chunks {chunks} microbatches {microbatches}")?;
        for (stage, actions) in self.stages.iter().enumerate() {
            write!(f, "{stage}:")?;
            actions.iter().try_for_each(|action| write!(f, " {action}"))?;
            writeln!(f)?;
        }
        Ok(())
    }
}

impl FromStr for Schedule {
    type Err = ParseError;

    /// Reads what is printed. Whether it makes sense is for [`Schedule::validate`] to say.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let at = |line: usize| move |message: String| ParseError { line, message };
        let mut lines = text.lines().enumerate().map(|(i, line)| (i + 1, line));
        let first = lines.next().map_or("", |(_, line)| line);
        let words: Vec<_> = first.split_whitespace().collect();
        let numbers = match words[..] {
            ["stages", stages, "chunks", chunks, "microbatches", microbatches] => {
                let [stages, chunks, microbatches] = [stages, chunks, microbatches].map(number);
                stages.zip(chunks).zip(microbatches).filter(|&((stages, chunks), _)| stages > 0 && chunks > 0)
            }
            _ => None,
        };
        let Some(((num_stages, num_chunks), num_microbatches)) = numbers else {
            return Err(at(1)(format!("`{first}`, expected `stages S chunks C microbatches M`")));
        };
        let mut stages = Vec::new();
        for (line, text) in lines {
            let actions = text.strip_prefix(&format!("{}:", stages.len()));
            let actions = actions.ok_or_else(|| at(line)(format!("expected stage `{}:`", stages.len())))?;
            let actions: Result<Vec<_>, _> = actions.split_whitespace().map(str::parse).collect();
            stages.push(actions.map_err(at(line))?);
        }
        if stages.len() != num_stages {
            let message =
                format!("`{}` stages, expected `{num_stages}` as the first line says", stages.len());
            return Err(at(stages.len() + 1)(message));
        }
        Ok(Schedule { num_chunks, num_microbatches, stages })
    }
}
