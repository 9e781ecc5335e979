"""What offloading to host memory makes room for, and what it costs in time.

On a GPU cut down to 16 GB: the most layers of a Llama that train, kept on the GPU and with optimizer and parameters in host memory. Uncut: the
largest model of Llama-3-8B's layers that host memory has room for, at 16 bytes a parameter. Layers are recomputed in
all of these runs, so that it is the model's state that is compared.
"""
import cases
from checks.report import OutOfTime, Problem, Skip
from checks.speed import OUT_OF_MEMORY, flops_per_token
from checks.trace import by_kind, length, read

LIMIT, LIMIT_BYTES = "16GB", 16e9
HOST_BYTES_PER_PARAM = 16
# Of the host's memory: the rest is for the system and what is not the model's state.
HOST_SHARE = 0.85
TRIES = 4
OFFLOAD = dict(stage=3, offload=["optimizer", "param"])
COMMON = dict(activations={"policy": "recompute"})


def run(bench):
    shape = "llama-tiny" if bench.dry else "llama-2048"
    size = Sizes(cases.SHAPES[shape])
    kept = most_layers(bench, shape, size, "kept on the GPU", {}, guess=size.layers(LIMIT_BYTES - 1.5e9, 18))
    room = size.layers(HOST_SHARE * bench.host_bytes(), HOST_BYTES_PER_PARAM)
    offloaded = most_layers(bench, shape, size, "offloaded", OFFLOAD, guess=min(room, 8 * max(kept, 1)), upper=room)
    with bench.check(f"largest model in {LIMIT}, offloaded against not") as row:
        if not kept or not offloaded:
            raise Skip("one of the two is not known")
        row.add(params_kept=size.params(kept), params_offloaded=size.params(offloaded),
                times=size.params(offloaded) / size.params(kept))
    if kept:
        with bench.check(f"step time at {kept} layers, which both train") as row:
            plain, moved = (case_run(bench, shape, kept, options, until=6) for options in ({}, OFFLOAD))
            row.add(step_s=plain.step_s(2), offloaded_step_s=moved.step_s(2), times=moved.step_s(2) / plain.step_s(2),
                    exposed_share=moved.share("exposed_comm_s", 2))
        with bench.check(f"where a step's time goes at {kept} layers, offloaded") as row:
            traced = case_run(bench, shape, kept, {**OFFLOAD, "trace": {"first_step": 4, "num_steps": 1}}, until=6)
            told = split(read(traced.folder / "trace/rank-0.json"))
            row.add(**told)
            # The CPU has no streams, and so no such lines.
            lacking = [name for name in ("step_ms", "host_step_ms") + (() if bench.dry else ("compute_ms", "copies_ms")) if not told[name]]
            if lacking:
                raise Problem(f"the timeline has no {' and no '.join(lacking)}")
    largest(bench)


class Sizes:
    """Parameters by number of layers."""

    def __init__(self, config):
        self.params = lambda layers: cases.num_params(cases.with_layers(config, layers))

    def layers(self, num_bytes, bytes_per_param):
        none, one = self.params(0), self.params(1)
        return max(0, int((num_bytes / bytes_per_param - none) / (one - none)))


def case_run(bench, shape, layers, options, until, seq_len=1024, timeout=300, memory_limit=LIMIT):
    if bench.dry:
        seq_len = 64
    case = bench.case(f"{shape}-{layers}", shape=shape, layers=layers, seq_len=seq_len, micro_batch=1, num_tokens=40_000)
    trained = bench.train(case, until=until, timeout=timeout, dtype=bench.half, memory_limit=memory_limit, **options, **COMMON)
    if trained.code in (1, 2) and any(words in trained.stderr.lower() for words in OUT_OF_MEMORY):
        raise MemoryError(trained.last_words())
    return trained.ended_well()


def most_layers(bench, shape, size, name, options, guess, upper=10_000):
    """Tries, between two runs that fit and do not; 0 if that cannot be said."""
    if bench.dry:
        guess, upper = 2, 3
    layers, seen = 0, {}
    with bench.check(f"most layers in {LIMIT}, {name}") as row:
        def fits(count):
            # A second try of an earlier size tells nothing new.
            if count not in seen:
                try:
                    seen[count] = case_run(bench, shape, count, options, until=2)
                except MemoryError:
                    seen[count] = None
                except Problem as problem:
                    if not any(seen.values()):
                        raise
                    seen[count], row.note = None, f"{count} layers: {problem}"
            return seen[count] is not None

        try:
            layers = search(fits, guess, upper, TRIES)
        except OutOfTime:
            row.add(at_least=max((count for count, run in seen.items() if run), default=0))
            raise
        row.add(layers=layers, params=size.params(layers), tries=len(seen), tried={count: bool(run) for count, run in seen.items()})
        if not layers:
            raise Problem("not one layer fits")
        row.add(device_peak_mb=seen[layers].peak("device_peak_mb"), host_peak_mb=seen[layers].peak("peak_rss_mb"))
        if layers == upper:
            row.note = "host memory has no room for more" if not bench.dry else "no more are tried"
    return layers


def search(fits, guess, upper, tries):
    """The largest count that was seen to fit, after at most `tries` of `fits`; close to the largest that does."""
    low, high, count = 0, upper + 1, max(1, min(guess, upper))
    while tries and high - low > max(1, low // 32):
        tries -= 1
        if fits(count):
            low = count
        else:
            high = count
        # Nothing too large is known yet: half as many more.
        count = min(upper, low + max(1, low // 2)) if high > upper else (low + high) // 2
        if not low < count < high:
            break
    return low


def split(events):
    """Milliseconds of one step: the GPU computes, copies, and the host steps; these may run beside each other."""
    spans = by_kind(events)
    whole = [event["dur"] for event in events if event.get("name", "").startswith("step ")]
    host = [(event["ts"], event["ts"] + event["dur"]) for event in events if event.get("name") == "step"]
    told = {"step": sum(whole), "compute": length(spans["compute"]), "copies": length(spans["copies"]), "host_step": length(host)}
    return {f"{name}_ms": microseconds / 1e3 for name, microseconds in told.items()}


def largest(bench):
    shape = "llama-tiny" if bench.dry else "llama3-8b"
    size = Sizes(cases.SHAPES[shape])
    layers = 3 if bench.dry else size.layers(HOST_SHARE * bench.host_bytes(), HOST_BYTES_PER_PARAM)
    with bench.check("the largest model of Llama-3-8B's layers, offloaded") as row:
        bench.need(0 if bench.dry else 240)
        if layers < 1:
            raise Skip("host memory has no room for one layer")
        row.add(layers=layers, params=size.params(layers))
        trained = case_run(bench, shape, layers, OFFLOAD, until=2, seq_len=4096, timeout=1200, memory_limit=None)
        flops = flops_per_token(cases.with_layers(cases.SHAPES[shape], layers), 4096)
        row.add(step_s=trained.step_s(1), tflops=trained.tokens_per_s(1) * flops / 1e12, loss=trained.losses[-1],
                device_peak_mb=trained.peak("device_peak_mb"), host_peak_mb=trained.peak("peak_rss_mb"))
