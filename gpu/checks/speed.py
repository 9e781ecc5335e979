"""Speed and memory beside PyTorch: GPT-2 124M, and as many layers of Llama-3-8B's shape as fit.

Ours, PyTorch eager and `torch.compile` train the same case in the same run, in turn; of each, the median of the steps after warm-up,
and of the rounds. Model FLOP/s utilisation counts

    6 N + 6 L C T    operations a token

N: parameters that are multiplied (the head, but no table of positions, and none of tokens unless it is the head too); L layers, C the width
of all heads together, T the sequence. Attention is causal: the upper half of its scores is not counted. Nor is recomputation.
"""
import json
import statistics
import time

import cases
from checks.report import OutOfTime, Problem, Skip
from checks.compare import relative_gap

CONTENDERS = {"ours": None, "PyTorch eager": [], "PyTorch compiled": ["--compile"]}
OUT_OF_MEMORY = ("out of memory", "out_of_memory", "outofmemory", "memory_limit", "alloc_failed", "not_initialized")


class TooLarge(Exception):
    """A contender ran out of memory."""


def run(bench):
    gpu_gb = bench.gpus[0].memory_bytes / 1e9 if bench.gpus else 0
    if bench.dry:
        compare(bench, "GPT-2 (tiny)", bench.case("gpt2-speed", shape="gpt2-tiny"), warmup=1, measured=2, rounds=1)
        compare(bench, "Llama (tiny)", bench.case("llama-speed", shape="llama-tiny"), warmup=1, measured=2, rounds=1)
        return
    # As many tokens as others train on: 64 x 1024 on a card of 80 GB is llm.c's.
    rows = 64 if gpu_gb >= 79 else 16 if gpu_gb >= 39 else 8 if gpu_gb >= 22 else 4
    num_tokens = 1024 * rows * 20
    case = bench.case("gpt2-124m", shape="gpt2-124m", micro_batch=rows, num_tokens=num_tokens, weights=True)
    try:
        compare(bench, f"GPT-2 124M, {rows} x 1024", case, warmup=5, measured=10, rounds=2)
    except TooLarge as problem:
        with bench.check("GPT-2 124M"):
            raise Problem(str(problem))
    llama(bench, gpu_gb)


def llama(bench, gpu_gb):
    """Fewer layers, until all that can run have room. Of a step of few tokens the optimizer is a large part, so there are four samples where half of
    the layers that fit one still make a model."""
    layers, rows = bench.options.layers or layers_that_fit(gpu_gb * 1e9), 1
    if not bench.options.layers and layers >= 8:
        layers, rows = layers_that_fit(gpu_gb * 1e9, rows=4), 4
    for _ in range(4):
        if layers < 1:
            break
        case = bench.case(f"llama3-8b-{layers}", shape="llama3-8b", layers=layers, seq_len=4096, micro_batch=rows,
                          num_tokens=4096 * rows * 14 + 1)
        try:
            return compare(bench, f"Llama-3-8B's shape, {layers} layers, {rows} x 4096", case, warmup=5, measured=7, rounds=2)
        except TooLarge as problem:
            with bench.check(f"Llama-3-8B's shape, {layers} layers"):
                raise Skip(f"fewer layers are tried: {problem}")
        layers = layers * 3 // 4
    with bench.check("Llama-3-8B's shape"):
        raise Skip("no layer fits this GPU")


def layers_that_fit(memory_bytes, rows=1):
    """By 20 bytes a parameter, the scores of all tokens in 16 bits and twice in fp32, and what a layer keeps for backward."""
    config = cases.SHAPES["llama3-8b"]
    none, one = (cases.num_params(cases.with_layers(config, n)) for n in (0, 1))
    tokens = 4096 * rows
    scores, kept = tokens * config["vocab_size"] * 10, tokens * config["hidden_size"] * 2 * 34
    return max(0, int((0.92 * memory_bytes - 1e9 - 20 * none - scores) / (20 * (one - none) + kept)))


def flops_per_token(config, seq_len):
    return 6 * cases.num_multiplied(config) + 6 * cases.num_layers(config) * cases.width(config) * seq_len


def compare(bench, name, case, warmup, measured, rounds):
    results, problems, over = {contender: [] for contender in CONTENDERS}, {}, None
    spent = dict.fromkeys(CONTENDERS, 0.0)
    for round_ in range(rounds):
        for contender, flags in CONTENDERS.items():
            if contender in problems or over:
                continue
            began = time.monotonic()
            try:
                results[contender].append(once(bench, case, flags, warmup, measured))
            except (Problem, Skip) as problem:
                problems[contender] = problem
                # The first round decides whether the model fits. Compiling may need a compiler that is not here.
                if any(words in str(problem).lower() for words in OUT_OF_MEMORY) and round_ == 0 and not flags:
                    raise TooLarge(f"{contender}: {str(problem)[:300]}") from None
            except OutOfTime as reason:
                over = reason
            spent[contender] += time.monotonic() - began
    tell(bench, name, case, results, problems, over, spent)
    if over:
        raise over


def once(bench, case, flags, warmup, measured):
    """One run: step time, tokens a second, peak memory, losses."""
    steps = warmup + measured
    if flags is None:
        trained = bench.train(case, until=steps, timeout=420, dtype=bench.half).ended_well()
        return {"step_s": trained.step_s(warmup), "tokens_per_s": trained.tokens_per_s(warmup),
                "device_peak_mb": trained.peak("device_peak_mb"), "peak_rss_mb": trained.peak("peak_rss_mb"),
                "device_allocated_mb": trained.peak("device_allocated_mb"), "exposed_share": trained.share("exposed_comm_s", warmup),
                "host_wait_share": trained.share("host_wait_s", warmup), "losses": trained.losses[:steps]}
    told = bench.peer(case, "--dtype", bench.half, "--steps", str(steps), "--warmup", str(warmup), *flags, timeout=420)
    if not told.finite:
        raise Problem("a loss of PyTorch's is not finite")
    return vars(told)


def tell(bench, name, case, results, problems, over, spent):
    """A row for each contender; PyTorch's also say how ours compares."""
    config, seq_len = (json.loads((case / path).read_text()) for path in ("model/config.json", "case.json"))
    flops = flops_per_token(config, seq_len["seq_len"])
    peak = bench.options.peak_tflops or (bench.gpus[0].peak_tflops if bench.gpus else None)
    middle = lambda runs, key: statistics.median(run[key] for run in runs) if runs and runs[0][key] is not None else None
    for contender, runs in results.items():
        with bench.check(f"{name}: {contender}") as row:
            row.seconds = spent[contender]
            if not runs:
                problem = problems.get(contender) or Skip(str(over))
                raise problem if contender == "ours" else Skip(str(problem))
            tokens_per_s = middle(runs, "tokens_per_s")
            row.add(params=cases.num_params(config), rounds=len(runs), tokens_per_s=tokens_per_s, step_ms=1e3 * middle(runs, "step_s"),
                    tflops=tokens_per_s * flops / 1e12, mfu=tokens_per_s * flops / (peak * 1e12) if peak else None,
                    device_peak_mb=middle(runs, "device_peak_mb"), device_allocated_mb=middle(runs, "device_allocated_mb"),
                    host_peak_mb=middle(runs, "peak_rss_mb"))
            if contender == "ours":
                row.add(exposed_share=middle(runs, "exposed_share"), host_wait_share=middle(runs, "host_wait_share"))
                continue
            ours = results["ours"]
            if ours:
                memory, theirs = middle(ours, "device_peak_mb"), middle(runs, "device_peak_mb")
                row.add(ours_is_faster_by=middle(ours, "tokens_per_s") / tokens_per_s,
                        ours_needs_of_its_memory=memory / theirs if memory and theirs else None)
                if (case / "model/model.safetensors").is_file():
                    row.add(loss_gap=relative_gap(ours[0]["losses"], runs[0]["losses"]))
