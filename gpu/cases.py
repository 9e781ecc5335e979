"""Cases to train: a model's `config.json`, a file of tokens and, where two programs are to start alike, weights.

    python gpu/cases.py DIR --shape llama-small [--layers 4] [--seq-len 256] [--num-tokens 200000] [--weights]

A case is a folder:

    model/config.json         as Hugging Face writes it
    model/model.safetensors   fp32, if asked for; without it each program makes weights of its own
    tokens.bin                little-endian ids, u16, or u32 where the vocabulary needs it
    case.json                 sequence length, micro-batch, hyperparameters

Python's standard library is all it needs. Everything follows from the seed.
"""
import argparse
import array
import json
import math
import random
import sys
from pathlib import Path


def gpt2(vocab, hidden, layers, heads, positions):
    return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": vocab, "n_embd": hidden,
            "n_layer": layers, "n_head": heads, "n_positions": positions, "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def llama(vocab, hidden, mlp, layers, heads, kv_heads, positions, theta=10000.0):
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": vocab, "hidden_size": hidden,
            "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "max_position_embeddings": positions, "rope_theta": theta,
            "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False}


SHAPES = {
    "gpt2-124m": gpt2(50257, 768, 12, 12, 1024),
    "gpt2-small": gpt2(1000, 256, 4, 4, 256),
    "gpt2-tiny": gpt2(500, 64, 2, 4, 64),
    "llama3-8b": llama(128256, 4096, 14336, 32, 32, 8, 8192, theta=500000.0),
    "llama-2048": llama(32000, 2048, 5632, 16, 16, 16, 4096),
    "llama-small": llama(1000, 256, 704, 4, 4, 2, 256),
    "llama-tiny": llama(500, 64, 176, 2, 4, 2, 64),
}
HYPERPARAMETERS = {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0}


def parameters(config):
    """Name and shape of each parameter, a tied head left out."""
    if config["model_type"] == "gpt2":
        d, vocab = config["n_embd"], config["vocab_size"]
        yield "transformer.wte.weight", [vocab, d]
        yield "transformer.wpe.weight", [config["n_positions"], d]
        for i in range(config["n_layer"]):
            block = f"transformer.h.{i}"
            for norm in ("ln_1", "ln_2"):
                yield f"{block}.{norm}.weight", [d]
                yield f"{block}.{norm}.bias", [d]
            # GPT-2 keeps its matrices as [in, out].
            for name, inputs, outputs in (("attn.c_attn", d, 3 * d), ("attn.c_proj", d, d),
                                          ("mlp.c_fc", d, 4 * d), ("mlp.c_proj", 4 * d, d)):
                yield f"{block}.{name}.weight", [inputs, outputs]
                yield f"{block}.{name}.bias", [outputs]
        yield "transformer.ln_f.weight", [d]
        yield "transformer.ln_f.bias", [d]
    else:
        d, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
        kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
        yield "model.embed_tokens.weight", [vocab, d]
        for i in range(config["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            yield f"{layer}.input_layernorm.weight", [d]
            yield f"{layer}.post_attention_layernorm.weight", [d]
            for name, outputs, inputs in (("self_attn.q_proj", d, d), ("self_attn.k_proj", kv, d),
                                          ("self_attn.v_proj", kv, d), ("self_attn.o_proj", d, d),
                                          ("mlp.gate_proj", mlp, d), ("mlp.up_proj", mlp, d),
                                          ("mlp.down_proj", d, mlp)):
                yield f"{layer}.{name}.weight", [outputs, inputs]
        yield "model.norm.weight", [d]
        yield "lm_head.weight", [vocab, d]


def num_layers(config):
    return config["n_layer"] if config["model_type"] == "gpt2" else config["num_hidden_layers"]


def with_layers(config, layers):
    key = "n_layer" if config["model_type"] == "gpt2" else "num_hidden_layers"
    return {**config, key: layers}


def width(config):
    """Of all attention heads together."""
    return config["n_embd"] if config["model_type"] == "gpt2" else config["hidden_size"]


def num_params(config):
    return sum(math.prod(shape) for _, shape in parameters(config))


def num_multiplied(config):
    """Parameters that take part in a matrix product: a table of positions or tokens is looked up, unless it is the head too."""
    looked_up = {"transformer.wpe.weight", "model.embed_tokens.weight"}
    matrices = ((name, shape) for name, shape in parameters(config) if len(shape) == 2)
    return sum(math.prod(shape) for name, shape in matrices if name not in looked_up)


def tokens(vocab, count, seed):
    """Ids as frequent as words are: the r-th as often as 1/r. Most follow one of four successors of the id before, so that there is
    something to learn.
    """
    rng = random.Random(f"tokens {seed}")
    draw = lambda: int(vocab ** rng.random()) - 1
    successors = [draw() for _ in range(4 * vocab)]
    ids = array.array("H" if vocab <= 1 << 16 else "I")
    token = draw()
    for _ in range(count):
        chance = rng.random()
        token = draw() if chance < 0.3 else successors[4 * token + int((chance - 0.3) / 0.7 * 3.999)]
        ids.append(token)
    return ids


def write_little_endian(numbers, file):
    if sys.byteorder == "big":
        numbers = numbers[:]
        numbers.byteswap()
    numbers.tofile(file)


def write_weights(config, path, seed):
    """Writes a safetensors file: the length of the header, the header, the bytes. Values are windows of one table of normal numbers at
    random places: as good as fresh ones to start from, and a hundred times as fast.
    """
    rng = random.Random(f"weights {seed}")
    table = array.array("f", (rng.gauss(0.0, 0.02) for _ in range(1 << 18)))
    around_one = array.array("f", (1.0 + value for value in table))
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in parameters(config):
        end = offset + 4 * math.prod(shape)
        header[name], offset = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in parameters(config):
            # Norms multiply by about one. Biases are not zero: a bias that is left out should show.
            source = around_one if len(shape) == 1 and name.endswith("weight") else table
            left = math.prod(shape)
            while left:
                start = rng.randrange(len(source))
                part = source[start:start + left]
                write_little_endian(part, file)
                left -= len(part)


def make(folder, shape, layers=None, seq_len=None, micro_batch=4, num_tokens=200_000, weights=False, seed=0, lr=3e-4):
    """Writes a case and returns its folder."""
    folder = Path(folder)
    config = SHAPES[shape] if layers is None else with_layers(SHAPES[shape], layers)
    positions = config.get("n_positions") or config.get("max_position_embeddings")
    seq_len = seq_len or positions
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model/config.json").write_text(json.dumps(config, indent=1) + "\n")
    ids = tokens(config["vocab_size"], num_tokens, seed)
    with open(folder / "tokens.bin", "wb") as file:
        write_little_endian(ids, file)
    case = {"seq_len": seq_len, "micro_batch": micro_batch, "tokens_dtype": f"u{8 * ids.itemsize}", **HYPERPARAMETERS, "lr": lr}
    (folder / "case.json").write_text(json.dumps(case, indent=1) + "\n")
    if weights:
        write_weights(config, folder / "model/model.safetensors", seed)
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir")
    parser.add_argument("--shape", choices=SHAPES, default="llama-small")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--num-tokens", type=int, default=200_000)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", action="store_true")
    args = vars(parser.parse_args())
    folder = make(args.pop("dir"), **args)
    config = json.loads((folder / "model/config.json").read_text())
    print(f"{folder}: {num_params(config):,} parameters, {num_multiplied(config):,} of them in products")


if __name__ == "__main__":
    main()
