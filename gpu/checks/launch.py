"""Whether the host keeps up: what CUDA graphs could save, and from which size of a step on nothing.

A step of few tokens is over before the host has asked for the next layer's work. Then its thread hardly waits for the GPU, and a step of
half as many tokens takes as long. Where it waits for most of the step, asking costs nothing that is seen.
"""
from checks.report import Problem

# Of a step's time: with less than this the host is what the GPU waits for.
KEEPS_UP = 0.1
ROWS = (1, 2, 4, 8, 16)


def run(bench):
    name, shape, seq_len = ("GPT-2 (tiny)", "gpt2-tiny", 32) if bench.dry else ("GPT-2 124M", "gpt2-124m", 1024)
    for rows in ROWS[:2] if bench.dry else ROWS:
        with bench.check(f"{name}, {rows} x {seq_len}") as row:
            case = bench.case(f"launch-{rows}", shape=shape, seq_len=seq_len, micro_batch=rows, num_tokens=seq_len * rows * 16 + 1)
            warmup = 1 if bench.dry else 5
            trained = bench.train(case, until=warmup + (2 if bench.dry else 10), timeout=120, dtype=bench.half).ended_well()
            waits = trained.share("host_wait_s", warmup)
            row.add(step_ms=1e3 * trained.step_s(warmup), tokens_per_s=trained.tokens_per_s(warmup), host_wait_share=waits)
            if waits is None and not bench.dry:
                raise Problem("the run does not tell how long the host waited")
            if waits is not None:
                row.add(host_keeps_up=waits >= KEEPS_UP)
