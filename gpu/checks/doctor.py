"""What the machine has, as `shardwise doctor` sees it."""
import subprocess

from checks import machine
from checks.report import Problem


def run(bench):
    with bench.check("shardwise doctor") as row:
        done = subprocess.run([bench.bin / "shardwise", "doctor"], capture_output=True, text=True, env=bench.env, timeout=120)
        print("\n".join(f"      | {line}" for line in done.stdout.splitlines()), flush=True)
        row.add(exit_code=done.returncode)
        if done.returncode:
            raise Problem(f"the worker does not start: {done.stdout.strip()} {done.stderr.strip()}")
        if not bench.dry and "no CUDA driver" in done.stdout:
            raise Problem("it sees no CUDA driver")
        row.note = " / ".join(done.stdout.splitlines()[:12])
    with bench.check("the machine") as row:
        row.add(gpus=len(bench.gpus), host_gb=machine.available_host_bytes() / machine.GB)
        for index, gpu in enumerate(bench.gpus):
            row.add(**{f"gpu_{index}": f"{gpu.name}, {gpu.memory_bytes / machine.GB:.0f} GB, sm_{gpu.capability[0]}{gpu.capability[1]}"})
        row.add(libraries=bench.env["LD_LIBRARY_PATH"].split(":")[0] or "none of Python's")
        if not bench.dry and not bench.gpus:
            raise Problem("nvidia-smi shows no GPU")
