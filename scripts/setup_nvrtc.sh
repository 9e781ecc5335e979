#!/usr/bin/env bash
# Fetches NVRTC, which compiles the CUDA kernels, into .venv: for tests on machines without CUDA's libraries.
#
# The wheel that belongs to torch 2.11.0: a download of 90 MB, 228 MB on disk. Nothing to do where it is beside libtorch, as
# after `make setup CUDA=1`, or where SHARDWISE_NVRTC names another.
set -euo pipefail
cd "$(dirname "$0")/.."

NVRTC=13.0.88
library=nvidia/cu13/lib/libnvrtc.so.13

fail() { printf 'error: %s\nhint: %s\n' "$1" "$2" >&2; exit 2; }

if [ -n "${SHARDWISE_NVRTC:-}" ]; then exit 0; fi
libtorch=${LIBTORCH:-$(sed -n 's/^LIBTORCH = "\(.*\)"$/\1/p' .cargo/config.toml 2>/dev/null || true)}
if [ -n "$libtorch" ] && [ -e "$(dirname "$libtorch")/$library" ]; then exit 0; fi
if compgen -G ".venv/lib/python3*/site-packages/$library" >/dev/null; then exit 0; fi

python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "\`$python\` was not found" \
  "install Python 3 with pip, or set SHARDWISE_NVRTC to the folder that holds libnvrtc.so.13"
echo "setup: fetching NVRTC $NVRTC into .venv" >&2
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "nvidia-cuda-nvrtc==$NVRTC"
