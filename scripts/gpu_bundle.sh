#!/usr/bin/env bash
# Packs what a machine with GPUs needs to check Shardwise: binaries, the tests that run alone there, gpu/. See docs/gpu.md.
#
#   scripts/gpu_bundle.sh [BINARIES]    after `make build`; BINARIES is another folder than target/release
#
# The archive holds no libtorch: gpu/check.sh takes the one of the machine's Python. Its size is limited, so that it can be carried anywhere.
set -euo pipefail
cd "$(dirname "$0")/.."

LIMIT_MIB=64
binaries=${1:-target/release}
# Package and test, whose ignored tests need a GPU.
TESTS=("shardwise-device cuda" "shardwise-kernels processor" "shardwise-comm gpu")

fail() { printf 'error: %s\nhint: %s\n' "$1" "$2" >&2; exit 2; }

cargo=${CARGO:-cargo} python=${PYTHON:-python3}
staging=$(mktemp -d target/gpu-bundle.XXXXXX)
trap 'rm -rf "$staging"' EXIT
bundle=$staging/gpu-bundle
mkdir -p "$bundle/bin/tests"

for name in shardwise shardwise-worker; do
  [ -x "$binaries/$name" ] || fail "\`$binaries/$name\` was not found" "\`make build\` makes it"
  strip -o "$bundle/bin/$name" "$binaries/$name"
done
for test in "${TESTS[@]}"; do
  read -r package name <<<"$test"
  # Cargo says as JSON where it has put the executable, one object a line.
  executable=$("$cargo" test --release --no-run -p "$package" --test "$name" --message-format=json | "$python" -c '
import json, sys
told = [json.loads(line) for line in sys.stdin if line.startswith("{")]
found = [t["executable"] for t in told if t.get("executable") and t["target"]["name"] == sys.argv[1] and "test" in t["target"]["kind"]]
print(found[-1] if found else "")' "$name")
  [ -n "$executable" ] || fail "cargo names no executable for test \`$name\` of \`$package\`" "see TESTS in $0"
  strip -o "$bundle/bin/tests/$package-$name" "$executable"
done
mkdir -p "$bundle/gpu/checks"
cp gpu/check.sh gpu/*.py "$bundle/gpu/"
cp gpu/checks/*.py "$bundle/gpu/checks/"
cp docs/gpu.md LICENSE-APACHE LICENSE-MIT "$bundle/"
commit=$(git describe --always --dirty 2>/dev/null || true)
echo "$("$bundle/bin/shardwise" --version)${commit:+, $commit}" >"$bundle/VERSION"

form=xz
command -v xz >/dev/null || form=gz
rm -f target/gpu-bundle.tar.*
archive=target/gpu-bundle.tar.$form
XZ_OPT=-9 tar --create --auto-compress --sort=name --owner=0 --group=0 --numeric-owner -C "$staging" -f "$archive" gpu-bundle
kib=$(du -k --apparent-size "$archive" | cut -f1)
[ "$kib" -le $((LIMIT_MIB * 1024)) ] || fail "\`$archive\` has $((kib / 1024)) MiB, more than $LIMIT_MIB" "strip or leave out more"
printf '%s: %d.%d MiB, %s\n' "$archive" $((kib / 1024)) $((kib % 1024 * 10 / 1024)) "$(cat "$bundle/VERSION")"
printf 'there: tar xf gpu-bundle.tar.%s && gpu-bundle/gpu/check.sh\n' "$form"
