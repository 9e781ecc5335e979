"""The same case on the GPU and on the CPU, and with plain PyTorch: losses step by step."""
from checks.compare import close

# Sums in another order, in fp32: a loss moves by some 1e-7 a step, and training carries it on.
FP32_TOLERANCE = 2e-4
# Activations rounded to 16 bits in other places.
HALF_TOLERANCE = 2e-2
ACCUM = 2


def run(bench):
    steps = 5 if bench.dry else 20
    for family in ("llama", "gpt2"):
        shape = f"{family}-{'tiny' if bench.dry else 'small'}"
        case = bench.case(f"{family}-parity", shape=shape, weights=True, lr=1e-3)
        for dtype, tolerance in (("fp32", FP32_TOLERANCE), (bench.half, HALF_TOLERANCE)):
            ours, options = None, dict(steps=steps, accum=ACCUM, dtype=dtype)
            with bench.check(f"{family} {dtype}: {bench.device} against cpu") as row:
                reference = bench.train(case, device="cpu", **options).ended_well()
                ours = bench.train(case, **options).ended_well()
                row.add(steps=len(ours.steps), loss=ours.losses[-1])
                close(row, ours, reference, tolerance)
            with bench.check(f"{family} {dtype}: {bench.device} against PyTorch") as row:
                ours = ours or bench.train(case, **options).ended_well()
                peer = bench.peer(case, "--dtype", dtype, "--steps", str(steps), "--accum", str(ACCUM))
                row.add(loss=ours.losses[-1], torch_loss=peer.losses[-1])
                close(row, ours, peer, tolerance)
