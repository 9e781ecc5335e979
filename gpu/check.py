"""Checks and measures Shardwise on the GPUs of this machine, and prints one table.

    gpu/check.sh                              everything
    gpu/check.sh --only parity,stages         some sections, in this order
    gpu/check.sh --minutes 14                 leaves out what the time does not allow, and says so
    gpu/check.sh --dry                        the same on the CPU with tiny models: shows that the checks themselves work

OUT gets results.jsonl, a line for each check as it ends, and table.txt. Exit codes: 0 all is well, 1 a check failed, 2 bad usage.
"""
import argparse
import importlib
import shutil
import signal
import sys
import time
from pathlib import Path

from checks import machine
from checks.report import OutOfTime, Report, Skip
from checks.run import Bench

HERE = Path(__file__).resolve().parent
# With the seconds that a section should have left to be begun at all.
SECTIONS = {"doctor": 5, "parity": 20, "stages": 20, "device": 20, "mesh": 20, "faults": 20, "speed": 60, "trace": 20, "launch": 30, "offload": 60,
            "sanitizer": 60}


def arguments():
    parser = argparse.ArgumentParser(prog="gpu/check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"sections, comma-separated: {', '.join(SECTIONS)}")
    parser.add_argument("--minutes", type=float, default=0, help="the time that all may take (default: as long as it does)")
    parser.add_argument("--dry", action="store_true", help="as --device cpu")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--bin", type=Path, help="the folder of the binaries (default: the bundle's, or target/release)")
    parser.add_argument("--out", type=Path, help="(default: gpu-check-DATE)")
    parser.add_argument("--work", type=Path, help="where cases and runs go; removed at the end (default: OUT/work)")
    parser.add_argument("--keep", action="store_true", help="keep the runs")
    parser.add_argument("--layers", type=int, help="layers of the Llama in `speed` (default: as many as fit)")
    parser.add_argument("--host-gb", type=float, help="host memory for `offload` (default: what the system says is available)")
    parser.add_argument("--peak-tflops", type=float, help="of the GPU, dense, in 16 bits (default: from a table by its name)")
    args = parser.parse_args()
    args.device = "cpu" if args.dry else args.device
    args.sections = args.only.split(",") if args.only else list(SECTIONS)
    unknown = [name for name in args.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"no such section: {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    places = [args.bin] if args.bin else [HERE.parent / "bin", HERE.parent / "target/release"]
    args.bin = next((place.resolve() for place in places if (place / "shardwise-worker").is_file()), None)
    if args.bin is None:
        parser.error(f"no binaries in {' or '.join(map(str, places))}: `make build` makes them, --bin names another folder")
    args.out = (args.out or Path(time.strftime("gpu-check-%Y%m%d-%H%M%S"))).resolve()
    if (args.out / "results.jsonl").exists():
        parser.error(f"{args.out} has results already: name another folder with --out")
    return args


def run_section(bench, name):
    bench.section = name
    try:
        bench.need(5 if bench.dry else SECTIONS[name])
        importlib.import_module(f"checks.{name}").run(bench)
    except OutOfTime as reason:
        with bench.check("the rest of the section"):
            raise Skip(f"left out, the time is over: {reason}")
    except Exception as error:
        with bench.check("the rest of the section"):
            raise error


def finish(args, report, gpus, minutes):
    """The table, on the screen and in a file."""
    what = f"{len(gpus)} x {gpus[0].name}" if gpus else "no GPU: tiny models on the CPU, of which no figure means anything"
    version = HERE.parent / "VERSION"
    what += f", {version.read_text().strip()}" if version.is_file() else ""
    text = f"{time.strftime('%Y-%m-%d')}, {what}\n\n{report.table()}\n{report.summary()} in {minutes:.1f} minutes\n"
    (args.out / "table.txt").write_text(text)
    print(f"\n{text}", flush=True)


def main():
    args = arguments()
    work = (args.work or args.out / "work").resolve()
    for folder in (args.out, work):
        folder.mkdir(parents=True, exist_ok=True)
    report, began = Report(args.out / "results.jsonl"), time.monotonic()
    gpus = machine.gpus() if args.device == "cuda" else []
    bench = Bench(report, work, args, gpus)
    # Whoever ends the checks still gets the table of what was done, and no run is left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for name in args.sections:
            run_section(bench, name)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    finally:
        finish(args, report, gpus, (time.monotonic() - began) / 60)
        for folder in () if args.keep else bench.folders():
            shutil.rmtree(folder, ignore_errors=True)
    return 1 if report.count("FAIL") or not report.count("ok") else 0


if __name__ == "__main__":
    sys.exit(main())
