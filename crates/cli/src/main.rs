//! The `shardwise` command.
fn main() {}
