#!/usr/bin/env bash
# Fetches libtorch 2.11.0 once and tells cargo where it is.
#
#   scripts/setup.sh            the CPU form (1.3 GB) into .venv
#   CUDA=1 scripts/setup.sh     the full wheel with its CUDA libraries (4.7 GB) into .venv
#   LIBTORCH=DIR scripts/setup.sh   an existing libtorch 2.11.0 (a folder with include/ and lib/)
#
# Writes .cargo/config.toml, which is not tracked: it names this machine's libtorch.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH=2.11.0
# What libtorch_cpu.so of the CUDA wheel itself loads; the rest of CUDA is only needed on a GPU.
CPU_WHEELS=("torch==$TORCH" "nvidia-cuda-runtime==13.0.96" "nvidia-cuda-cupti==13.0.85")

fail() { printf 'error: %s\nhint: %s\n' "$1" "$2" >&2; exit 2; }

# What an earlier set-up chose stays, unless this one asks for something else.
known=$(sed -n 's/^LIBTORCH = "\(.*\)"$/\1/p' .cargo/config.toml 2>/dev/null || true)
if [ -z "${LIBTORCH:-}${CUDA:-}" ] && [ -n "$known" ] && [ -e "$known/lib/libtorch_cpu.so" ]; then exit 0; fi

if [ -n "${LIBTORCH:-}" ]; then
  [ -e "$LIBTORCH/lib/libtorch_cpu.so" ] || fail "\`LIBTORCH=$LIBTORCH\` holds no lib/libtorch_cpu.so" \
    "point it at a libtorch $TORCH, for example .../site-packages/torch"
  libtorch=$(cd "$LIBTORCH" && pwd)
else
  python=${PYTHON:-python3}
  command -v "$python" >/dev/null || fail "\`$python\` was not found" "install Python 3 with pip, or set LIBTORCH"
  command -v c++ >/dev/null || fail "no C++ compiler was found" "install g++ or clang++"
  form=cpu; [ -n "${CUDA:-}" ] && form=cuda
  stamp=.venv/.shardwise-$TORCH-$form
  if [ ! -e "$stamp" ]; then
    echo "setup: fetching libtorch $TORCH ($form) into .venv" >&2
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    if [ "$form" = cuda ]; then
      .venv/bin/python -m pip install --quiet --disable-pip-version-check "torch==$TORCH"
    else
      .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "${CPU_WHEELS[@]}"
    fi
    touch "$stamp"
  fi
  libtorch=$(cd .venv/lib/python3*/site-packages/torch && pwd)
fi

mkdir -p .cargo
config=$(printf '# Written by scripts/setup.sh: where libtorch is on this machine.\n[env]\nLIBTORCH = "%s"\n' "$libtorch")
if [ ! -e .cargo/config.toml ] || [ "$config" != "$(cat .cargo/config.toml)" ]; then printf '%s\n' "$config" >.cargo/config.toml; fi
