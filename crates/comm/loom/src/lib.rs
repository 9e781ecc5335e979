//! [`word::Word`], whose atomic number and futex are loom's: `tests/` takes it through every interleaving of small worlds.
//!
//! The file is that of `shardwise-comm`. Only what stands under it is another: `sync.rs`.

mod sync;

#[path = "../../src/word.rs"]
pub mod word;
