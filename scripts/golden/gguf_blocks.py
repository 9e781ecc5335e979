"""Records what the reference (the Python package gguf) makes of random blocks of each quantised type.

    pip install gguf==0.19.0
    python gguf_blocks.py crates/checkpoint/tests/fixtures/gguf-blocks.json

For each type: `blocks`, the bytes of a few blocks, and `values`, the bytes of the f32 numbers they stand for, both in
hexadecimal. Scales are random halves of moderate size and either sign; everything else is any byte.
"""
import json, sys
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as T
from gguf.quants import dequantize

# Where the half-precision scales are in a block.
SCALES = {
    T.F32: [], T.F16: [0], T.BF16: [],
    T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0],
    T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208],
}

rng = np.random.default_rng(4)
golden = {}
for kind, scales in SCALES.items():
    numel, num_bytes = GGML_QUANT_SIZES[kind]
    num_blocks = 16 if numel == 1 else 3
    blocks = rng.integers(0, 256, (num_blocks, num_bytes), dtype=np.uint8)
    if kind in (T.F32, T.BF16):  # any numbers but NaN
        numbers = rng.normal(size=(num_blocks, 1)).astype("<f4").view(np.uint8)
        blocks = np.ascontiguousarray(numbers[:, 4 - num_bytes:])
    for at in scales:
        blocks[:, at:at + 2] = rng.normal(size=(num_blocks, 1)).astype("<f2").view(np.uint8)
    stored = blocks.view("<f4") if kind == T.F32 else blocks.view("<f2") if kind == T.F16 else blocks
    values = np.ascontiguousarray(dequantize(stored, kind), dtype="<f4")
    assert values.size == num_blocks * numel
    golden[kind.name] = {"blocks": blocks.tobytes().hex(), "values": values.tobytes().hex()}
with open(sys.argv[1], "w") as f:
    json.dump(golden, f, indent=1)
    f.write("\n")
