"""Writes tiny random models with the transformers package, and what it computes with them.

    python logits.py crates/models/tests/fixtures

One folder a model: config.json and *.safetensors as `save_pretrained` leaves them (fp32), golden.json (input ids, and the
loss of predicting each next token) and logits.safetensors (`logits`, of all positions). All parameters are random, norms
and biases too, so that none of them can be left out unseen.
"""
import argparse, json, os, shutil
import torch, transformers
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

SEED = 0
# Odd sizes on purpose: nothing divides by a number of ranks.
LLAMA = dict(vocab_size=67, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=48, rms_norm_eps=1e-5)
LLAMA3_ROPE = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=16)


def models():
    yield "llama-gqa", LlamaForCausalLM(LlamaConfig(**LLAMA, num_key_value_heads=2, tie_word_embeddings=False)), {}
    # Two files and an index.
    yield "llama-tied", LlamaForCausalLM(LlamaConfig(**LLAMA, num_key_value_heads=4, tie_word_embeddings=True)), \
        {"max_shard_size": "40KB"}
    yield "llama-bias-rope", LlamaForCausalLM(LlamaConfig(
        **LLAMA, num_key_value_heads=1, head_dim=12, attention_bias=True, mlp_bias=True, tie_word_embeddings=False,
        rope_parameters=LLAMA3_ROPE)), {}
    yield "gpt2", GPT2LMHeadModel(GPT2Config(vocab_size=67, n_positions=48, n_embd=32, n_layer=2, n_head=4,
                                             resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)), {}


def write_golden(model, folder):
    ids = torch.randint(0, model.config.vocab_size, (2, 40))
    out = model.eval()(input_ids=ids, labels=ids)
    save_file({"logits": out.logits.detach().contiguous()}, f"{folder}/logits.safetensors")
    json.dump({"input_ids": ids.tolist(), "loss": out.loss.item()}, open(f"{folder}/golden.json", "w"))


def fresh(folder):
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)


if __name__ == "__main__":
    ap = argparse.ArgumentParser()
    ap.add_argument("dir")
    a = ap.parse_args()
    torch.manual_seed(SEED)
    with torch.no_grad():
        for name, model, how in models():
            for key, p in model.named_parameters():
                is_scale = p.ndim == 1 and key.endswith("weight")
                p.normal_(1.0 if is_scale else 0.0, 0.2)
            folder = f"{a.dir}/{name}"
            fresh(folder)
            model.save_pretrained(folder, **how)
            write_golden(model, folder)
            if name == "gpt2":
                # The bare decoder: names without `transformer.`, as in the files that first came with the model.
                fresh(f"{a.dir}/gpt2-bare")
                model.transformer.save_pretrained(f"{a.dir}/gpt2-bare")
                for file in ("golden.json", "logits.safetensors"):
                    shutil.copy(f"{folder}/{file}", f"{a.dir}/gpt2-bare/{file}")
    for folder, _, files in os.walk(a.dir):
        if "generation_config.json" in files:
            os.remove(f"{folder}/generation_config.json")
    open(f"{a.dir}/README.md", "w").write(
        f"Tiny models and their logits: `scripts/golden/logits.py`, torch {torch.__version__.split('+')[0]}, "
        f"transformers {transformers.__version__}, seed {SEED}.\n")
