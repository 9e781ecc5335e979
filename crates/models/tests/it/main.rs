//! Models against Hugging Face's own: what we load predicts the same, what we write reads back.

// Helpers of tests may unwrap as tests may.
#![allow(clippy::unwrap_used)]

mod dropout;
mod export;
mod fixture;
mod logits;
