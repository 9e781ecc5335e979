"""Trains a case with plain PyTorch on one device and prints one JSON line: losses, step time, tokens a second, peak memory.

    python gpu/torch_peer.py DIR --device cuda --dtype bf16 --steps 15 --warmup 5 [--accum 1] [--micro-batch 8] [--compile]

GPT-2 and Llama as one writes them in PyTorch: fp32 weights, autocast for bf16 and fp16, `scaled_dot_product_attention`, fused AdamW.
Sample i is tokens[i*T .. i*T + T + 1]; step s, micro-batch a, row b reads sample (s*accum + a)*micro_batch + b, as a run with
`data.order = "sequential"` does. Weights come from the case's file if it has one, else from a seed. Weight decay is for all parameters.
"""
import argparse
import json
import math
import mmap
import resource
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


class Conv1D(nn.Module):
    """A linear map with its matrix as [in, out]: GPT-2's."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


def attend(q, k, v, heads, kv_heads, turn=lambda x: x):
    b, t, _ = q.shape
    split = lambda x, n: x.view(b, t, n, -1).transpose(1, 2)
    q, k, v = turn(split(q, heads)), turn(split(k, kv_heads)), split(v, kv_heads)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
    return out.transpose(1, 2).reshape(b, t, -1)


class Gpt2Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        d, eps = c["n_embd"], c["layer_norm_epsilon"]
        self.heads = c["n_head"]
        self.ln_1, self.ln_2 = nn.LayerNorm(d, eps), nn.LayerNorm(d, eps)
        self.attn = nn.ModuleDict({"c_attn": Conv1D(d, 3 * d), "c_proj": Conv1D(d, d)})
        self.mlp = nn.ModuleDict({"c_fc": Conv1D(d, 4 * d), "c_proj": Conv1D(4 * d, d)})

    def forward(self, x):
        q, k, v = self.attn["c_attn"](self.ln_1(x)).chunk(3, -1)
        x = x + self.attn["c_proj"](attend(q, k, v, self.heads, self.heads))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh"))


class Gpt2(nn.Module):
    def __init__(self, c, seq_len):
        super().__init__()
        d = c["n_embd"]
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(c["vocab_size"], d), "wpe": nn.Embedding(c["n_positions"], d),
            "h": nn.ModuleList(Gpt2Block(c) for _ in range(c["n_layer"])),
            "ln_f": nn.LayerNorm(d, c["layer_norm_epsilon"])})
        self.register_buffer("positions", torch.arange(seq_len), persistent=False)

    def forward(self, tokens, targets):
        parts = self.transformer
        x = parts["wte"](tokens) + parts["wpe"](self.positions)
        for block in parts["h"]:
            x = block(x)
        logits = F.linear(parts["ln_f"](x), parts["wte"].weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class LlamaLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        d, mlp = c["hidden_size"], c["intermediate_size"]
        self.heads, self.kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        kv = d // self.heads * self.kv_heads
        linear = lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False)
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(d, c["rms_norm_eps"]) for _ in range(2))
        self.self_attn = nn.ModuleDict({"q_proj": linear(d, d), "k_proj": linear(d, kv), "v_proj": linear(d, kv),
                                        "o_proj": linear(d, d)})
        self.mlp = nn.ModuleDict({"gate_proj": linear(d, mlp), "up_proj": linear(d, mlp), "down_proj": linear(mlp, d)})

    def forward(self, x, cos, sin):
        def turn(x):
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat([-second, first], -1) * sin

        h, attn, mlp = self.input_layernorm(x), self.self_attn, self.mlp
        q, k, v = attn["q_proj"](h), attn["k_proj"](h), attn["v_proj"](h)
        x = x + attn["o_proj"](attend(q, k, v, self.heads, self.kv_heads, turn))
        h = self.post_attention_layernorm(x)
        return x + mlp["down_proj"](F.silu(mlp["gate_proj"](h)) * mlp["up_proj"](h))


class Llama(nn.Module):
    def __init__(self, c, seq_len):
        super().__init__()
        d = c["hidden_size"]
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(c["vocab_size"], d),
            "layers": nn.ModuleList(LlamaLayer(c) for _ in range(c["num_hidden_layers"])),
            "norm": nn.RMSNorm(d, c["rms_norm_eps"])})
        self.lm_head = nn.Linear(d, c["vocab_size"], bias=False)
        half = d // c["num_attention_heads"] // 2
        rates = c["rope_theta"] ** (-torch.arange(half, device="cpu", dtype=torch.float64) / half)
        angles = torch.outer(torch.arange(seq_len, device="cpu", dtype=torch.float64), rates).repeat(1, 2)
        self.register_buffer("cos", angles.cos().to(self.lm_head.weight), persistent=False)
        self.register_buffer("sin", angles.sin().to(self.lm_head.weight), persistent=False)

    def forward(self, tokens, targets):
        x = self.model["embed_tokens"](tokens)
        kind = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        cos, sin = self.cos.to(kind), self.sin.to(kind)
        for layer in self.model["layers"]:
            x = layer(x, cos, sin)
        logits = self.lm_head(self.model["norm"](x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def load_weights(model, path):
    """Every parameter from a safetensors file of fp32."""
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    with torch.no_grad():
        for name, param in model.named_parameters():
            begin, end = header[name]["data_offsets"]
            values = torch.frombuffer(data, dtype=torch.float32, count=(end - begin) // 4, offset=start + begin)
            param.copy_(values.view(header[name]["shape"]))


def random_weights(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.ndim > 1:
                param.normal_(0.0, 0.02)
            else:
                param.fill_(float(name.endswith("weight")))


def batches(folder, case, args, device):
    """Inputs and targets of each micro-batch, in file order; after the last whole sample comes the first again."""
    kind = {"u16": "<u2", "u32": "<u4"}[case["tokens_dtype"]]
    tokens, t = np.memmap(folder / "tokens.bin", dtype=kind, mode="r"), case["seq_len"]
    num_samples, sample = (len(tokens) - 1) // t, 0
    while True:
        places = [(sample + row) % num_samples * t for row in range(args.micro_batch)]
        rows = torch.from_numpy(np.stack([tokens[place:place + t + 1] for place in places]).astype(np.int64))
        sample += args.micro_batch
        yield rows[:, :-1].to(device), rows[:, 1:].to(device)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="bf16")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=5, help="steps that the median leaves out")
    parser.add_argument("--accum", type=int, default=1)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    case = json.loads((args.dir / "case.json").read_text())
    config = json.loads((args.dir / "model/config.json").read_text())
    args.micro_batch = args.micro_batch or case["micro_batch"]
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"

    with device:
        model = {"gpt2": Gpt2, "llama": Llama}[config["model_type"]](config, case["seq_len"])
    weights = args.dir / "model/model.safetensors"
    load_weights(model, weights) if weights.is_file() else random_weights(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=case["lr"], betas=case["betas"], eps=case["eps"],
                                  weight_decay=case["weight_decay"], fused=True)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=args.dtype == "fp16")
    lower = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.dtype)
    forward = torch.compile(model) if args.compile else model
    data, losses, norms, times = batches(args.dir, case, args, device), [], [], []
    for _ in range(args.steps):
        began, total = time.perf_counter(), 0.0
        for _ in range(args.accum):
            inputs, targets = next(data)
            with torch.autocast(device.type, lower, enabled=lower is not None):
                loss = forward(inputs, targets) / args.accum
            scaler.scale(loss).backward()
            total += loss.detach()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), case["clip"])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(total))
        norms.append(float(norm))
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    step_s = statistics.median(times[args.warmup:] or times)
    num_tokens = args.micro_batch * args.accum * case["seq_len"]
    peak = lambda read: read() / (1 << 20) if on_gpu else None
    print(json.dumps({
        "torch": torch.__version__, "compile": args.compile, "dtype": args.dtype, "losses": losses, "norms": norms,
        "finite": all(map(math.isfinite, losses)), "step_s": step_s, "tokens_per_s": num_tokens / step_s,
        # What it took from the driver, as ours counts, and what it had in use of that.
        "device_peak_mb": peak(torch.cuda.max_memory_reserved), "device_allocated_mb": peak(torch.cuda.max_memory_allocated),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


if __name__ == "__main__":
    main()
