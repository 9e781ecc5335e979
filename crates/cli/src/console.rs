//! What the command prints: errors with their hint, and results.

use std::io::{IsTerminal, Write};

/// Something the user can mend: ends the command with exit code 2.
#[derive(Debug)]
pub struct UsageError {
    pub message: String,
    pub hint: String,
}

impl UsageError {
    pub fn new(message: impl Into<String>, hint: impl Into<String>) -> Self {
        UsageError { message: message.into(), hint: hint.into() }
    }
}

impl std::fmt::Display for UsageError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for UsageError {}

/// Prints `error: ...` and `hint: ...` on standard error.
pub fn print_error(message: &str, hint: Option<&str>) {
    let (bold_red, bold, plain) = if colours() { ("\x1b[1;31m", "\x1b[1m", "\x1b[0m") } else { ("", "", "") };
    let mut text = format!("{bold_red}error:{plain} {message}\n");
    if let Some(hint) = hint {
        text += &format!("{bold}hint:{plain} {hint}\n");
    }
    print_stderr(&text);
}

/// Standard error may be closed; that must not change how the command ends.
pub fn print_stderr(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// Prints a result on standard output. A reader that has seen enough (`| head`) is no error.
///
/// # Errors
/// What the system says, for example of a full disk.
pub fn print_result(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

/// Whether standard error is a screen that a live line can be drawn on.
pub fn is_live() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

fn colours() -> bool {
    is_live() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}
