"""Writes a small training case and how PyTorch and DeepSpeed train it on two CPU ranks.

    python training.py crates/worker/tests/fixtures/tiny

model/      a Llama of 0.63 M parameters, whose weights are bf16 numbers, so that every precision starts alike
tokens.bin  little-endian u16, from a seeded bigram chain, so that the loss falls
case.json   sizes and hyperparameters
golden.json runs: losses (mean over the global batch) and gradient norms before clipping, of every step

The model is transformers' own, trained by DistributedDataParallel in fp32 and by DeepSpeed ZeRO-2 in bf16. Samples in file
order: step s, micro-batch a, rank r, row b reads sample ((s * accum + a) * world + r) * micro_batch + b.
"""
import argparse, json, os, random
import numpy as np, torch, torch.distributed as dist, torch.multiprocessing as mp
import torch.nn.functional as F

SEED, WORLD = 0, 2
VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, MLP, SEQ_LEN, MICRO_BATCH = 1024, 128, 2, 4, 2, 352, 64, 4
CASE = {"seq_len": SEQ_LEN, "micro_batch": MICRO_BATCH, "lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8,
        "weight_decay": 0.1, "clip": 1.0}
# name, engine, accumulation, steps
RUNS = [("fp32", "ddp", 1, 20), ("fp32-accum3", "ddp", 3, 10), ("bf16", "ds2", 1, 20), ("bf16-accum3", "ds2", 3, 10)]


def write_case(folder):
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM
    os.makedirs(f"{folder}/model", exist_ok=True)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN,
              "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
              "intermediate_size": MLP, "max_position_embeddings": SEQ_LEN, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
              "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
              "torch_dtype": "bfloat16"}
    json.dump(config, open(f"{folder}/model/config.json", "w"), indent=1)
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**config))
    torch.manual_seed(SEED)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0) if p.ndim == 1 else p.normal_(0, 0.02)
    weights = {n: p.detach().to(torch.bfloat16).contiguous() for n, p in model.named_parameters()}
    save_file(weights, f"{folder}/model/model.safetensors", metadata={"format": "pt"})
    samples = max(accum * steps for _, _, accum, steps in RUNS) * WORLD * MICRO_BATCH
    bigram_tokens(samples * SEQ_LEN + 1).astype("<u2").tofile(f"{folder}/tokens.bin")
    json.dump(CASE, open(f"{folder}/case.json", "w"), indent=1)


def bigram_tokens(count):
    rng = np.random.default_rng(SEED)
    successors = rng.integers(0, VOCAB, size=(VOCAB, 8))
    choice, jump, fresh = rng.integers(0, 8, size=count), rng.random(count) < 0.05, rng.integers(0, VOCAB, size=count)
    out, t = np.empty(count, np.uint16), 0
    for i in range(count):
        t = fresh[i] if jump[i] else successors[t, choice[i]]
        out[i] = t
    return out


def load(folder):
    from transformers import LlamaForCausalLM
    return LlamaForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)


def train(rank, folder, engine, accum, steps, port, queue):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_SIZE=str(WORLD),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    tokens = np.fromfile(f"{folder}/tokens.bin", dtype="<u2")
    adam = {k: CASE[k] for k in ("lr", "betas", "eps", "weight_decay")}

    def loss_of(model, x, y):
        return F.cross_entropy(model(input_ids=x).logits.float().view(-1, VOCAB), y.reshape(-1))

    if engine == "ddp":
        dist.init_process_group("gloo", rank=rank, world_size=WORLD)
        model = torch.nn.parallel.DistributedDataParallel(load(folder))
        optimizer = torch.optim.AdamW(model.parameters(), **adam)

        def micro_batch(x, y, last):
            loss = loss_of(model, x, y)
            (loss / accum).backward()
            if not last:
                return loss, None
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CASE["clip"])
            optimizer.step()
            optimizer.zero_grad()
            return loss, norm
    else:
        import deepspeed
        deepspeed.init_distributed("gloo")
        model, *_ = deepspeed.initialize(model=load(folder), config={
            "train_micro_batch_size_per_gpu": MICRO_BATCH, "gradient_accumulation_steps": accum,
            "zero_optimization": {"stage": 2}, "gradient_clipping": CASE["clip"], "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {**adam, "torch_adam": True}}, "steps_per_print": 10**9})

        def micro_batch(x, y, last):
            loss = loss_of(model, x, y)
            model.backward(loss)
            model.step()
            return loss, model.get_global_grad_norm() if last else None

    losses, norms = [], []
    for s in range(steps):
        total = 0.0
        for m in range(accum):
            first = ((s * accum + m) * WORLD + rank) * MICRO_BATCH
            rows = np.stack([tokens[(first + b) * SEQ_LEN:(first + b) * SEQ_LEN + SEQ_LEN + 1] for b in range(MICRO_BATCH)])
            rows = torch.from_numpy(rows.astype(np.int64))
            loss, norm = micro_batch(rows[:, :-1], rows[:, 1:], m == accum - 1)
            total += loss.item() / accum
        mean = torch.tensor([total], dtype=torch.float64)
        dist.all_reduce(mean)
        losses.append(mean.item() / WORLD)
        norms.append(float(norm))
    if rank == 0:
        queue.put((losses, norms))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    ap = argparse.ArgumentParser()
    ap.add_argument("dir")
    a = ap.parse_args()
    write_case(a.dir)
    golden, context = {}, mp.get_context("spawn")
    for name, engine, accum, steps in RUNS:
        queue = context.SimpleQueue()
        mp.spawn(train, (a.dir, engine, accum, steps, random.randint(20000, 40000), queue), nprocs=WORLD)
        losses, norms = queue.get()
        golden[name] = {"engine": engine, "accum": accum, "losses": losses, "grad_norms": norms}
        print(name, [round(loss, 5) for loss in losses], [round(norm, 4) for norm in norms])
    json.dump(golden, open(f"{a.dir}/golden.json", "w"), indent=1)
    from importlib.metadata import version
    used = ", ".join(f"{p} {version(p).split('+')[0]}" for p in ("torch", "transformers", "deepspeed"))
    open(f"{a.dir}/README.md", "w").write(f"A training case and golden losses: `scripts/golden/training.py`, {used}, seed {SEED}.\n")
