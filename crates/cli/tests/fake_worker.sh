#!/bin/sh
# Stands in for `shardwise-worker` in tests of the supervisor: speaks its protocol and does what FAKE_BODY says.
rank=${RANK:-none}
mark() { : >"$FAKE_DIR/$1-$rank"; }
phase() { printf '{"event":"phase","phase":"%s"}\n' "$1"; }
begin() { printf '{"event":"begin_step","step":%s}\n' "$1"; }
step() {
  printf '{"event":"step","step":%s,"loss":%s,"grad_norm":1.0,"lr":0.001,"loss_scale":null,"outcome":"applied",' "$1" "$2"
  printf '"tokens":64,"tokens_per_s":640.0,"step_s":0.1,"comm_bytes":0,"peak_rss_mb":100.0,"device_peak_mb":null}\n'
}
fail() { printf '{"event":"error","message":"%s"}\n' "$1"; exit "${2:-1}"; }
fail_after_peer() { printf '{"event":"error","message":"%s","secondary":true}\n' "$1"; exit 1; }
finish() { echo '{"event":"done"}'; exit 0; }
# The same process, so that its death is the rank's; a signal ignored here stays ignored.
hang() { mark hanging; exec sleep 1000; }

echo $$ >"$FAKE_DIR/pid-$rank.part" && mv "$FAKE_DIR/pid-$rank.part" "$FAKE_DIR/pid-$rank"
eval "$FAKE_BODY"
