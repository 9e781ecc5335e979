"""Whether two runs trained alike: within a tolerance, or bit for bit."""
from checks.report import Problem


def relative_gap(ours, theirs):
    """The largest difference of two lists of losses or norms, step by step, relative to the second."""
    if len(ours) != len(theirs) or not ours:
        raise Problem(f"{len(ours)} steps against {len(theirs)}")
    if any(x is None for x in [*ours, *theirs]):
        raise Problem("a number is not finite")
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs))


def close(row, ours, reference, tolerance):
    """Losses agree within the tolerance, and norms within ten times as much: they show what a loss near its start hides."""
    within(row, relative_gap(ours.losses, reference.losses), tolerance)
    norms = relative_gap(ours.norms, reference.norms)
    row.add(norm_gap=norms)
    if not norms <= 10 * tolerance:
        raise Problem(f"norms are off by {norms:.2e}, more than {10 * tolerance:.0e}")


def within(row, gap, tolerance):
    row.add(loss_gap=gap, tolerance=tolerance)
    if not gap <= tolerance:
        raise Problem(f"losses are off by {gap:.2e}, more than {tolerance:.0e}")


def same(row, runs):
    """All runs have the same losses and norms, bit for bit; `runs` maps names to them."""
    (name, first), *others = [(name, run.ended_well()) for name, run in runs.items()]
    row.add(steps=len(first.steps), loss=first.losses[-1])
    for other, run in others:
        if run.numbers() != first.numbers():
            pairs = zip(first.numbers(), run.numbers())
            where = next((f"step {a[0]}: {a[1:]} and {b[1:]}" for a, b in pairs if a != b), "their number of steps")
            raise Problem(f"{name} and {other} differ at {where}")
