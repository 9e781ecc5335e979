//! GGUF files: damaged ones are refused, good ones become Hugging Face folders.
#![allow(clippy::unwrap_used)] // a failed test may panic anywhere

mod file;
mod hostile;
mod imports;
