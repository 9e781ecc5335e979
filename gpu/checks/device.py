"""The device layer's own tests against the real driver: random programs of copies, fills, kernels and events, large copies."""
import re

from checks.report import Problem, Skip


def run(bench):
    for test in executables(bench):
        with bench.check(test.name) as row:
            if bench.dry:
                raise Skip("needs a GPU")
            folder = bench.work / "tests" / test.name
            folder.mkdir(parents=True)
            command = [test, "--ignored", "--test-threads", "1", "--nocapture"]
            code, stderr, _, timed_out = bench.watch(command, folder, {}, 120)
            if code or timed_out:
                bench.keep_words(command, code, timed_out, folder)
            judge(row, code, (folder / "stdout").read_text(errors="replace") + stderr, timed_out)


def executables(bench):
    """Those that the bundle holds, or nothing."""
    folder = bench.bin / "tests"
    return sorted(folder.iterdir()) if folder.is_dir() else missing(bench)


def missing(bench):
    with bench.check("tests"):
        raise Skip("no test executables beside the binaries; `make gpu-bundle` packs them")
    return []


def judge(row, code, output, timed_out):
    """Figures from what the tests print, and whether all passed."""
    passed = re.search(r"test result: .*?(\d+) passed; (\d+) failed", output)
    if passed:
        row.add(passed=int(passed[1]), failed=int(passed[2]))
    speed = re.search(r"pinned memory to the GPU: ([\d.]+) GB/s", output)
    if speed:
        row.add(pinned_gb_per_s=float(speed[1]))
    if timed_out:
        raise Problem("took too long")
    if code or not passed or not int(passed[1]):
        told = [line for line in output.splitlines() if "panicked" in line or "error" in line.lower()]
        raise Problem(f"exit code {code}: {' / '.join(told[:6]) or output[-500:]}")
