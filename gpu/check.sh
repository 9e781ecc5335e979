#!/usr/bin/env bash
# Checks Shardwise on this machine's GPUs: see check.py. PYTHON names the Python that has torch 2.11.0, if `python3` does not.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
command -v "$python" >/dev/null || { printf 'error: `%s` was not found\nhint: set PYTHON to the Python that has torch 2.11.0\n' "$python" >&2; exit 2; }
PYTHONDONTWRITEBYTECODE=1 exec "$python" -u "$here/check.py" "$@"
