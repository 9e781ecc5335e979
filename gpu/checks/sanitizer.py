"""`compute-sanitizer`, where it is installed, on the device layer's tests and on two small steps of training."""
import json
import re
import shutil
from pathlib import Path

from checks.device import executables
from checks.report import Problem, Skip


def run(bench):
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if bench.dry or not Path(tool).is_file():
        with bench.check("memcheck"):
            raise Skip("needs a GPU" if bench.dry else "compute-sanitizer was not found")
        return
    for test in executables(bench):
        with bench.check(f"memcheck, {test.name}") as row:
            # Random programs take long here; the others do not.
            # The last question for a kernel's parameters is one too many, as the driver does not say how many there are.
            memcheck(bench, row, tool, [test, "--ignored", "--test-threads", "1", "large_copies", "kernels_give"], ["--report-api-errors", "no"])
    with bench.check("memcheck, two steps of training") as row:
        case = bench.case("llama-sanitizer", shape="llama-tiny")
        run_file = case / "run.json"
        run_file.write_text(json.dumps(bench.run_file(case, 2, stage=3, dtype=bench.half)))
        command = [bench.bin / "shardwise-worker", run_file, "--out", case / "out"]
        # Calls that libtorch makes and expects to fail are not ours to count.
        memcheck(bench, row, tool, command, ["--report-api-errors", "no"])


def memcheck(bench, row, tool, command, options):
    folder = bench.work / "tests" / f"memcheck-{len(bench.report.rows)}"
    folder.mkdir(parents=True)
    code, stderr, _, timed_out = bench.watch([tool, "--tool", "memcheck", *options, *command], folder, {}, 420)
    output = (folder / "stdout").read_text(errors="replace") + stderr
    errors = re.findall(r"ERROR SUMMARY: (\d+) error", output)
    row.add(exit_code=code, errors=sum(map(int, errors)) if errors else None)
    if timed_out:
        raise Problem("took too long")
    if re.search(r"Device not supported|not supported on this", output):
        raise Skip("compute-sanitizer does not support this device or system")
    if re.search(r"test result: ok\. 0 passed", output):
        raise Skip("none of its tests is for the sanitizer")
    if code or not errors or any(map(int, errors)):
        told = [line for line in output.splitlines() if "=========" in line][1:8]
        raise Problem(" / ".join(told) or output[-500:])
