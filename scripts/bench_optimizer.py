"""Times the whole optimizer step of 100 M parameters, PyTorch's and ours in turn, with the same number of threads.

    python scripts/bench_optimizer.py [--threads 2] [--rounds 15]

The step goes from fp32 gradients to 16-bit parameters. PyTorch: `clip_grad_norm_`, fused AdamW, a cast to bf16. Ours: the norm, then
one pass. Needs torch and cargo; run it from the repository on an idle machine.
"""
import argparse, statistics, subprocess, time
import torch

NUMEL = 100_000_000


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    command = ["cargo", "bench", "-q", "-p", "shardwise-kernels", "--bench", "optimizer", "--", "step", str(args.threads)]
    ours = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    param = torch.nn.Parameter(torch.randn(NUMEL) * 0.02)
    param.grad = torch.randn(NUMEL)
    optimizer = torch.optim.AdamW([param], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    copy = torch.empty(NUMEL, dtype=torch.bfloat16)

    def step_torch():
        times = [time.perf_counter()]
        torch.nn.utils.clip_grad_norm_([param], 1.0)
        times.append(time.perf_counter())
        optimizer.step()
        times.append(time.perf_counter())
        with torch.no_grad():
            copy.copy_(param)
        times.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in zip(times, times[1:])]

    def step_ours():
        time.sleep(0.05)  # PyTorch's threads spin for a while after their work
        ours.stdin.write("step\n")
        return float(ours.stdout.readline())

    step_torch(), step_ours()
    torch_ms, our_ms = zip(*[(step_torch(), step_ours()) for _ in range(args.rounds)])
    ours.stdin.close()
    ours.wait()
    parts = [statistics.median(part) for part in zip(*torch_ms)]
    theirs, mine = statistics.median(map(sum, torch_ms)), statistics.median(our_ms)
    print(f"{NUMEL} parameters, {args.threads} threads, medians of {args.rounds} steps in turn")
    print(f"torch {torch.__version__}: {theirs:.1f} ms (clip {parts[0]:.1f}, fused AdamW {parts[1]:.1f}, cast {parts[2]:.1f})")
    print(f"shardwise: {mine:.1f} ms, {theirs / mine:.2f} times as fast; {34 * NUMEL / mine / 1e6:.1f} GB/s of 34 bytes an element")


if __name__ == "__main__":
    main()
