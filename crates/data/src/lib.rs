//! Tokenizers, token files and samplers that are pure functions of seed, step and rank.
