"""The numerical contract on one card: ranks that share it, collectives through host memory, losses and norms bit for bit.

Without accumulation all ZeRO stages are equal; with it 0 = 1 and 2 = 3. Offloaded runs equal the run of their stage. With NCCL, as many
ranks as there are GPUs.
"""
from checks.parity import FP32_TOLERANCE, HALF_TOLERANCE
from checks.compare import close, same
from checks.report import Skip

OFFLOADS = [(1, ["optimizer"]), (2, ["optimizer"]), (3, ["optimizer"]), (3, ["optimizer", "param"])]


def run(bench):
    steps = 3 if bench.dry else 6
    case = bench.case("llama-stages", shape="llama-tiny" if bench.dry else "llama-small")
    common = dict(steps=steps, deterministic=True, share=True, collectives="host")
    plain = {}
    for ranks, dtype in ((2, bench.half), *([] if bench.dry else [(4, "fp32")])):
        for accum in (1, 2):
            runs = {}
            name = f"{ranks} ranks, {dtype}, {accum} micro-batch{'es' if accum > 1 else ''}"
            with bench.check(f"{name}: {'0 = 1 = 2 = 3' if accum == 1 else '0 = 1 and 2 = 3'}") as row:
                for stage in range(4):
                    runs[stage] = bench.train(case, ranks, stage=stage, dtype=dtype, accum=accum, **common)
                named = {f"stage {stage}": run for stage, run in runs.items()}
                if accum == 1:
                    same(row, named)
                else:
                    same(row, dict(list(named.items())[:2]))
                    same(row, dict(list(named.items())[2:]))
                    tolerance = FP32_TOLERANCE if dtype == "fp32" else HALF_TOLERANCE
                    close(row, runs[2], runs[0], tolerance)
            if ranks == 2 and accum == 1:
                plain = runs
    for stage, what in OFFLOADS:
        with bench.check(f"2 ranks, stage {stage}, {' and '.join(what)} offloaded = not") as row:
            options = dict(stage=stage, dtype=bench.half, **common)
            kept = plain.get(stage) or bench.train(case, 2, **options)
            same(row, {"not offloaded": kept, "offloaded": bench.train(case, 2, offload=what, **options)})
    if not bench.dry:
        nccl(bench, case, steps)


def nccl(bench, case, steps):
    ranks = len(bench.gpus)
    if ranks < 2:
        with bench.check("NCCL against host collectives"):
            raise Skip("one GPU has nobody to exchange with")
        return
    options = dict(steps=steps, dtype="fp32", deterministic=True, share=False)
    for stage in range(4):
        with bench.check(f"NCCL, {ranks} ranks, stage {stage} against host collectives") as row:
            ours = bench.train(case, ranks, stage=stage, collectives="nccl", **options).ended_well()
            host = bench.train(case, ranks, stage=stage, collectives="host", **options).ended_well()
            row.add(same_bits=ours.numbers() == host.numbers())
            close(row, ours, host, FP32_TOLERANCE)
