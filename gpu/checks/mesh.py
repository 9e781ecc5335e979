"""Tensor and pipeline parallelism with ranks that share the GPU, against one rank on the same global batch."""
from checks.parity import FP32_TOLERANCE
from checks.compare import close

# Micro-batches, so that a pipeline is filled.
ACCUM = 4
LAYOUTS = [("tensor 2", 2, dict(tensor=2)), ("pipeline 2, 1F1B", 2, dict(pipeline=2)),
           ("pipeline 2, zero-bubble", 2, dict(pipeline=2, parallel={"schedule": "zero-bubble"})),
           ("tensor 2 x pipeline 2", 4, dict(tensor=2, pipeline=2))]


def run(bench):
    steps = 3 if bench.dry else 10
    layouts = LAYOUTS[:3] if bench.dry else LAYOUTS
    for family in ("llama",) if bench.dry else ("llama", "gpt2"):
        case = bench.case(f"{family}-mesh", shape=f"{family}-{'tiny' if bench.dry else 'small'}", micro_batch=2, lr=1e-3)
        options = dict(steps=steps, accum=ACCUM, dtype="fp32")
        one = None
        for name, ranks, mesh in layouts:
            with bench.check(f"{family}, {name} against one rank") as row:
                one = one or bench.train(case, **options).ended_well()
                ours = bench.train(case, ranks, share=True, collectives="host", **options, **mesh).ended_well()
                row.add(steps=len(ours.steps), loss=ours.losses[-1])
                close(row, ours, one, FP32_TOLERANCE)
