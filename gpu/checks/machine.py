"""What the machine has: GPUs, host memory, where Python's torch keeps its libraries."""
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

GB = 1e9
# Dense products in 16 bits with fp32 sums, TFLOP/s, from the makers' data sheets. The first pattern that fits.
PEAKS = [(r"\bH100 PCIe\b", 756), (r"\b(H100|H200)\b", 989), (r"\bA100\b", 312), (r"\bL40S\b", 362), (r"\b4090\b", 165),
         (r"\b3090\b", 71), (r"\bA10\b", 125), (r"\bL4\b", 121), (r"\bT4\b", 65)]


@dataclass
class Gpu:
    name: str
    memory_bytes: float
    capability: tuple

    @property
    def half(self):
        """The 16-bit type to train in: GPUs before sm_80 have no bf16."""
        return "bf16" if self.capability >= (8, 0) else "fp16"

    @property
    def peak_tflops(self):
        return next((peak for pattern, peak in PEAKS if re.search(pattern, self.name)), None)


def smi(fields):
    """What `nvidia-smi` says of each GPU, or nothing if it is not there."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return []
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if "," in line or line.strip()] \
        if done.returncode == 0 else []


def gpus():
    """Those that `CUDA_VISIBLE_DEVICES` leaves, if it is a list of numbers."""
    found = []
    for line in smi("name,memory.total,compute_cap"):
        told = re.fullmatch(r"(.*)\|([\d.]+)\|(\d+)\.?(\d*)", "|".join(line))
        if told:
            found.append(Gpu(told[1], float(told[2]) * (1 << 20), (int(told[3]), int(told[4] or 0))))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and re.fullmatch(r"[\d,\s]*", visible):
        found = [found[int(i)] for i in visible.split(",") if i.strip() and int(i) < len(found)]
    return found


def used_gpu_mb():
    """Memory in use on each GPU, by anyone."""
    return [float(line[0]) for line in smi("memory.used") if re.fullmatch(r"[\d.]+", line[0])]


def available_host_bytes():
    """What the system has left, or this container if that is less."""
    text = Path("/proc/meminfo").read_text()
    left = 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", text).group(1))
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        left = min(left, int(limit) - used)
    except (OSError, ValueError):
        pass  # no limit
    return left


def torch_folder():
    """Where Python's torch is. It is not imported: that takes seconds and memory."""
    spec = importlib.util.find_spec("torch")
    return Path(next(iter(spec.submodule_search_locations))) if spec else None


def library_folders():
    """libtorch and, where wheels keep them, the CUDA libraries that it needs."""
    torch = torch_folder()
    if torch is None:
        return []
    return [torch / "lib", *sorted(path for path in (torch.parent / "nvidia").glob("*/lib") if path.is_dir())]
