"""Loads models that Shardwise has written into the transformers package and compares the logits.

    cargo test --release -p shardwise-models        # leaves trained models in target/tmp/exports
    python check_export.py target/tmp/exports

Each folder holds config.json and weights, and what Shardwise predicts with them: golden.json (input ids) and
logits.safetensors. Exits 1 if a tensor is missing or left over, or if a logit differs by more than the tolerance.
"""
import argparse, json, os, sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

# Two fp32 programs that add the same products in another order, at logits of about 4.
TOLERANCE = 1e-4

ap = argparse.ArgumentParser()
ap.add_argument("dir")
a = ap.parse_args()
failed = False
for name in sorted(os.listdir(a.dir)):
    folder = f"{a.dir}/{name}"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    stray = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    ids = torch.tensor(json.load(open(f"{folder}/golden.json"))["input_ids"])
    expected = load_file(f"{folder}/logits.safetensors")["logits"]
    with torch.no_grad():
        gap = (model.eval()(input_ids=ids).logits - expected).abs().max().item()
    good = not stray and gap < TOLERANCE and model.dtype == torch.float32
    failed |= not good
    print(f"{name}: {'ok' if good else 'FAILED'}, largest logit difference {gap:.2e} of {expected.abs().max():.1f}", stray or "")
sys.exit(failed)
