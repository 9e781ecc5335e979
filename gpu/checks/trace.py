"""A run with its trace on: the share of copies and collectives that lies under computation."""
import json

from checks.report import Problem, Skip

# What a track is about, by the first of these words in its name, or in the event's category.
KINDS = {"copies": ("cop", "activations", "memcpy", "h2d", "d2h"), "collectives": ("coll", "comm", "nccl"), "compute": ("comput", "kernel")}


def run(bench):
    with bench.check("stage 3, offloaded, two ranks that share a GPU") as row:
        case = bench.case("llama-trace", shape="llama-tiny" if bench.dry else "llama-small")
        trained = bench.train(case, 2, steps=6, stage=3, dtype=bench.half, offload=["optimizer", "param"], share=True,
                              collectives="host", trace={"first_step": 3, "num_steps": 2}).ended_well()
        for rank in range(2):
            path = trained.folder / f"trace/rank-{rank}.json"
            if not path.is_file():
                raise Problem(f"{path.name} is not there")
            spans = by_kind(read(path))
            row.add(**{f"rank_{rank}_spans": {kind: len(found) for kind, found in spans.items() if found}})
            row.add(exposed_share=trained.share("exposed_comm_s", 2))
            for kind in ("copies", "collectives"):
                row.add(**{f"rank_{rank}_{kind}_hidden": hidden_share(spans[kind], spans["compute"])})
            if not spans["compute"]:
                if bench.dry:
                    raise Skip("the CPU has no streams: the host's line is there")
                raise Problem("no span of computation in it")


def read(path):
    text = json.loads(path.read_text())
    return text["traceEvents"] if isinstance(text, dict) else text


def by_kind(events):
    """Beginnings and ends of the spans of each kind, by the names of their tracks."""
    tracks = {(event.get("pid"), event.get("tid")): event["args"]["name"] for event in events
              if event.get("ph") == "M" and event.get("name") == "thread_name"}
    spans = {kind: [] for kind in (*KINDS, "other")}
    for event in events:
        if event.get("ph") != "X":
            continue
        names = (tracks.get((event.get("pid"), event.get("tid")), ""), event.get("cat", ""), str(event.get("tid", "")))
        kind = next((kind for name in names for kind, words in KINDS.items() if any(word in name.lower() for word in words)), "other")
        spans[kind].append((event["ts"], event["ts"] + event["dur"]))
    return spans


def union(spans):
    """The same moments without overlaps, in order."""
    joined = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([start, end])
    return joined


def length(spans):
    """How long any of them is under way."""
    return sum(end - start for start, end in union(spans))


def hidden_share(spans, under):
    """How much of `spans` lies within `under`, or nothing if there are none."""
    spans, under = union(spans), union(under)
    total = length(spans)
    common = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in spans for b in under)
    return common / total if total else None
