"""Runs of ours, for every section: the run file, the command, what it left."""
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cases
from checks import machine
from checks.report import OutOfTime, Problem, Skip

GPU_FOLDER = Path(__file__).resolve().parent.parent
# All processes of a run inherit it, so that one that is left can be found.
MARK = "SHARDWISE_GPU_CHECK"
# Messages of a build that lacks what is asked for: a failure on a GPU, no news in a dry run.
REFUSALS = ("is not a known key", "is not supported yet")
# A run that is stopped after some steps writes no model: one of many gigabytes would be of no use here.
WITHOUT_END = 1_000_000


class Trained:
    """A run that has ended."""

    def __init__(self, folder, code, stderr, seconds, timed_out):
        self.folder, self.code, self.stderr, self.seconds, self.timed_out = folder, code, stderr, seconds, timed_out
        metrics = folder / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.is_file() else []
        self.steps = [json.loads(line) for line in lines if line.endswith("}")]

    @property
    def losses(self):
        return [step["loss"] for step in self.steps]

    @property
    def norms(self):
        return [step["grad_norm"] for step in self.steps]

    def numbers(self):
        """What runs with the same bits have in common."""
        return [(step["step"], step["loss"], step["grad_norm"]) for step in self.steps]

    def step_s(self, warmup):
        return statistics.median(step["step_s"] for step in self.steps[warmup:] or self.steps)

    def tokens_per_s(self, warmup):
        return self.steps[-1]["tokens"] / self.step_s(warmup)

    def share(self, key, warmup):
        """Of a step's time, or nothing if a run does not tell."""
        shares = [step[key] / step["step_s"] for step in self.steps[warmup:] or self.steps if step.get(key) is not None]
        return statistics.median(shares) if shares else None

    def peak(self, key):
        values = [step[key] for step in self.steps if step.get(key) is not None]
        return max(values, default=None)

    def ended_well(self):
        if self.timed_out:
            raise Problem(f"not done after {self.seconds:.0f} s, at step {len(self.steps)}: {self.last_words()}")
        if self.code not in (0, 128 + signal.SIGINT):
            raise Problem(f"exit code {self.code}: {self.last_words()}")
        if not self.steps:
            raise Problem("no step in metrics.jsonl")
        return self

    def last_words(self):
        """The error and what follows, or else the end of what was said."""
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        first = next((i for i, line in enumerate(lines) if line.startswith("error")), max(0, len(lines) - 6))
        return " / ".join(lines[first:first + 12])


class Bench:
    """Where things are, how much time is left, and how to run them."""

    def __init__(self, report, work, options, gpus):
        self.report, self.work, self.options, self.gpus = report, work, options, gpus
        self.bin, self.device = options.bin, options.device
        self.deadline = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
        self.section, self.num_runs = "", 0
        self.failed = options.out / "failed.txt"
        self.env = {key: value for key, value in os.environ.items() if key not in (
            "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SHARDWISE_FAULT")}
        folders = [*map(str, machine.library_folders()), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        self.env["LD_LIBRARY_PATH"] = ":".join(folders)
        compiler = next((path for path in machine.library_folders() if any(path.glob("libnvrtc.so.*"))), None)
        if compiler:
            self.env.setdefault("SHARDWISE_NVRTC", str(compiler))
        self.env.setdefault("RUST_BACKTRACE", "1")

    @property
    def dry(self):
        return self.device == "cpu"

    @property
    def half(self):
        return self.gpus[0].half if self.gpus else "bf16"

    @contextlib.contextmanager
    def check(self, name):
        with self.report.check(self.section, name) as row:
            yield row

    def folders(self):
        """What is made in `work`: a folder of the user's own is not removed as a whole."""
        return [self.work / name for name in ("cases", "runs", "peers", "tests")]

    def left(self):
        return self.deadline - time.monotonic()

    def host_bytes(self):
        """Host memory that runs may take. A virtual machine may have more than it shows before it is asked."""
        return 1e9 * self.options.host_gb if self.options.host_gb else machine.available_host_bytes()

    def need(self, seconds):
        if self.left() < seconds:
            raise OutOfTime(f"needs about {seconds:.0f} s, {max(0.0, self.left()):.0f} s are left")

    def case(self, name, **options):
        """A case, made once."""
        folder = self.work / "cases" / name
        return folder if (folder / "case.json").is_file() else cases.make(folder, **options)

    def run_file(self, case, steps, dtype="fp32", stage=0, accum=1, micro_batch=None, offload=(), pipeline=1, tensor=1,
                 device=None, memory_limit=None, collectives=None, deterministic=False, share=False, **rest):
        """A run file; `offload` names any of `optimizer` and `param`, `rest` any other of its blocks."""
        settings = json.loads((case / "case.json").read_text())
        zero = {"stage": stage, **{f"offload_{what}": {"device": "cpu"} for what in offload}}
        deepspeed = {"train_micro_batch_size_per_gpu": micro_batch or settings["micro_batch"],
                     "gradient_accumulation_steps": accum, "gradient_clipping": settings["clip"], "zero_optimization": zero,
                     "optimizer": {"type": "AdamW", "params": {k: settings[k] for k in ("lr", "betas", "eps", "weight_decay")}}}
        if dtype != "fp32":
            deepspeed[dtype] = {"enabled": True, **({"initial_scale_power": 10} if dtype == "fp16" else {})}
        run = {"model": {"path": str(case / "model")}, "steps": steps, "seed": 0, "device": device or self.device,
               "data": {"tokens": str(case / "tokens.bin"), "dtype": settings["tokens_dtype"],
                        "seq_len": settings["seq_len"], "order": "sequential"}, "deepspeed": deepspeed, **rest}
        if pipeline * tensor > 1:
            run["parallel"] = {"pipeline": pipeline, "tensor": tensor, **rest.get("parallel", {})}
        if run["device"] == "cuda":
            cuda = {"memory_limit": memory_limit, "collectives": collectives, "deterministic": deterministic, "share": share}
            run["cuda"] = {key: value for key, value in cuda.items() if value}
        return run

    def train(self, case, ranks=1, until=None, env=(), timeout=300, resume=None, share=None, **options):
        """Trains and waits. With `until` the run is stopped after so many steps. Ranks share a GPU where there are too few."""
        share = ranks > max(1, len(self.gpus)) if share is None else share
        run = self.run_file(case, options.pop("steps", until and WITHOUT_END), share=share, **options)
        self.num_runs += 1
        folder = self.work / "runs" / f"{self.num_runs:03}"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(run, indent=1))
        command = [self.bin / "shardwise", "train", folder / "run.json", "-n", str(ranks), "--out", folder / "out"]
        command += ["--resume", resume] if resume else []
        code, stderr, seconds, timed_out = self.watch(command, folder, dict(env), timeout, until)
        shutil.rmtree(folder / "out/model", ignore_errors=True)
        trained = Trained(folder / "out", code, stderr, seconds, timed_out)
        if code not in (0, 128 + signal.SIGINT) or timed_out:
            self.keep_words(command, code, timed_out, folder)
        if timed_out and self.left() <= 1:
            raise OutOfTime("the time is over")
        if self.dry and code == 2 and any(words in stderr for words in REFUSALS):
            raise Skip(f"this build refuses it: {trained.last_words()}")
        return trained

    def watch(self, command, folder, env, timeout, until=None):
        """Runs a command of ours, and ends all of it if it takes too long."""
        self.need(5)
        began, timed_out, asked = time.monotonic(), False, False
        limit = min(timeout, self.left())
        environment = {**self.env, **env, MARK: str(folder)}
        with open(folder / "stdout", "wb") as out, open(folder / "stderr", "wb") as err:
            process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=err, env=environment, start_new_session=True)
            try:
                while process.poll() is None:
                    time.sleep(0.05)
                    if until and not asked and count_lines(folder / "out/metrics.jsonl") >= until:
                        process.send_signal(signal.SIGINT)
                        asked = True
                    if time.monotonic() - began > limit:
                        timed_out = True
                        break
            finally:
                self.end(process)
        stderr = (folder / "stderr").read_text(errors="replace")
        return process.returncode, stderr, time.monotonic() - began, timed_out

    def keep_words(self, command, code, timed_out, folder, most=200):
        """What a command that failed has said, and its ranks, in one file that stays: some failures are what a check looks for, others are
        all that is left of a machine."""
        logs = [folder / "stdout", folder / "stderr", *sorted(folder.glob("out/ranks/*.log"))]
        with open(self.failed, "a", encoding="utf-8") as file:
            print(f"=== {self.section}: {' '.join(map(str, command))}: exit code {code}{', took too long' if timed_out else ''}", file=file)
            for log in (log for log in logs if log.is_file()):
                lines = log.read_text(errors="replace").splitlines()
                print(f"--- {log.name}", *lines[-most:], sep="\n", file=file)

    def end(self, process):
        """Ends a command's processes: kindly, so that the supervisor ends its ranks, then not."""
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if process.poll() is not None:
                return
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)

    def peer(self, case, *args, timeout=300):
        """What PyTorch's JSON line for the same case says, or why there is none."""
        if machine.torch_folder() is None:
            raise Skip("this Python has no torch")
        folder = self.work / "peers"
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, GPU_FOLDER / "torch_peer.py", case, "--device", self.device, *args]
        code, stderr, _, timed_out = self.watch(command, folder, {}, timeout)
        if timed_out and self.left() <= 1:
            raise OutOfTime("the time is over")
        told = [line for line in (folder / "stdout").read_text().splitlines() if line.startswith("{")]
        if code or not told:
            self.keep_words(command, code, timed_out, folder)
            last = [line for line in stderr.splitlines() if line.strip()][-3:]
            raise Problem(f"PyTorch {'took too long' if timed_out else f'ended with {code}'}: {' / '.join(last)}")
        return SimpleNamespace(**json.loads(told[-1]))


def count_lines(path):
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


def processes_of(folder):
    """Processes that are left of a run."""
    mark, left = f"{MARK}={folder}\0".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes():
                left.append(int(path.parent.name))
    return left
