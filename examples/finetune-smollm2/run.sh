#!/bin/sh
# Fine-tunes SmolLM2-135M on Shakespeare and measures it before and after: run.sh [shardwise train options]
# `make finetune` builds first. Everything it makes is in out/smollm2 and out/finetune-smollm2.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
shardwise=${SHARDWISE:-target/release/shardwise}

sh "$here/fetch.sh" "$shardwise" out/smollm2
# The last of the ten plays is held out.
awk '/^THE WINTER.S TALE$/ { held_out = 1 } { print > (held_out ? "out/smollm2/heldout.txt" : "out/smollm2/train.txt") }' \
    examples/demo/shakespeare.txt

measure() {
    printf '%s: ' "$1"
    "$shardwise" eval "$2" --text out/smollm2/heldout.txt --seq-len 256 --max-tokens 8192
}
measure before out/smollm2/model
"$shardwise" train "$here/run.toml" -n 2 --out out/finetune-smollm2 --overwrite "$@"
measure after out/finetune-smollm2/model
"$shardwise" generate out/finetune-smollm2/model --prompt 'LEONTES. ' --max-tokens 60 --top-k 40
