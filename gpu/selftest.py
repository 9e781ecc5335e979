"""Tests of the checks' own code, without torch, numpy, GPU or binaries of ours: `python3 gpu/selftest.py`."""
import json
import math
import stat
import sys
import tempfile
import unittest
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

sys.dont_write_bytecode = True

import cases
from checks import compare, machine, offload, report, run, speed, trace
from checks.report import OutOfTime, Problem, Skip

# A command that behaves as ours does: metrics, a stop at SIGINT, and what the run file's `seed` asks for.
FAKE = """#!{python}
import json, os, signal, sys, time
stopped = []
signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
run = json.load(open(sys.argv[2]))
out = sys.argv[sys.argv.index("--out") + 1]
os.makedirs(out + "/model")
if run["data"].get("seed") == 2:
    sys.stderr.write("error: `trace` is not a known key\\n"); sys.exit(2)
if run["data"].get("seed") == 3:
    time.sleep(60)
for step in range(1, run["steps"] + 1):
    with open(out + "/metrics.jsonl", "a") as file:
        file.write(json.dumps({{"step": step, "loss": 1 / step, "grad_norm": 1.0, "step_s": 0.1, "tokens": 8}}) + "\\n")
    time.sleep(0.02)
    if stopped:
        sys.exit(130)
"""


class Cases(unittest.TestCase):
    def test_sizes_are_the_published_ones(self):
        self.assertEqual(cases.num_params(cases.SHAPES["gpt2-124m"]), 124_439_808)
        self.assertEqual(cases.num_params(cases.SHAPES["llama3-8b"]), 8_030_261_248)
        self.assertEqual(cases.num_multiplied(cases.SHAPES["llama3-8b"]), 8_030_261_248 - 128256 * 4096 - 65 * 4096)
        small = cases.with_layers(cases.SHAPES["gpt2-124m"], 0)
        self.assertEqual(cases.num_multiplied(small), 50257 * 768)

    def test_tokens_are_zipf_and_the_seeds(self):
        ids = cases.tokens(1000, 50_000, 1)
        self.assertEqual(ids, cases.tokens(1000, 50_000, 1))
        self.assertNotEqual(ids, cases.tokens(1000, 50_000, 2))
        self.assertTrue(0 <= min(ids) and max(ids) < 1000)
        counts = Counter(ids)
        self.assertGreater(counts[0], 4 * counts[20])
        # Successors: pairs repeat far more than frequencies alone would have them.
        pairs = Counter(zip(ids, ids[1:]))
        expected = sum(count * (count - 1) for count in counts.values()) ** 2 / len(ids) ** 3
        self.assertGreater(sum(count * (count - 1) for count in pairs.values()) / len(ids), 1.5 * expected)

    def test_a_case_is_whole(self):
        with tempfile.TemporaryDirectory() as folder:
            for shape, width in (("llama-tiny", "u16"), ("gpt2-tiny", "u16")):
                case = cases.make(Path(folder) / shape, shape, num_tokens=1001, weights=True)
                told = json.loads((case / "case.json").read_text())
                self.assertEqual((told["tokens_dtype"], (case / "tokens.bin").stat().st_size), (width, 2002))
                data = (case / "model/model.safetensors").read_bytes()
                start = 8 + int.from_bytes(data[:8], "little")
                header = json.loads(data[8:start])
                header.pop("__metadata__")
                self.assertEqual(start % 8, 0)
                ends = [0]
                for (name, shape_), (found, entry) in zip(cases.parameters(cases.SHAPES[shape]), header.items(), strict=True):
                    self.assertEqual((name, shape_, ends[-1]), (found, entry["shape"], entry["data_offsets"][0]))
                    self.assertEqual(entry["data_offsets"][1] - ends[-1], 4 * math.prod(shape_))
                    ends.append(entry["data_offsets"][1])
                self.assertEqual(len(data), start + ends[-1])

    def test_a_large_vocabulary_takes_four_bytes(self):
        self.assertEqual(cases.tokens(128256, 10, 0).itemsize, 4)


class Runs(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        command = self.folder / "shardwise"
        command.write_text(FAKE.format(python=sys.executable))
        command.chmod(command.stat().st_mode | stat.S_IXUSR)
        self.case = cases.make(self.folder / "case", "llama-tiny", num_tokens=100)

    def bench(self, minutes=0, device="cpu", gpus=()):
        work = Path(tempfile.mkdtemp(dir=self.folder))
        options = SimpleNamespace(bin=self.folder, out=work, device=device, minutes=minutes, host_gb=None)
        return run.Bench(report.Report(work / "results.jsonl"), work, options, list(gpus))

    def test_a_run_ends_or_is_stopped(self):
        bench = self.bench()
        done = bench.train(self.case, steps=3).ended_well()
        self.assertEqual(done.numbers(), [(1, 1.0, 1.0), (2, 0.5, 1.0), (3, 1 / 3, 1.0)])
        self.assertFalse((done.folder / "model").exists(), "models take room")
        self.assertEqual(run.processes_of(done.folder.parent), [])
        stopped = bench.train(self.case, until=4).ended_well()
        self.assertTrue(4 <= len(stopped.steps) < 60)
        self.assertEqual((stopped.tokens_per_s(1), stopped.peak("device_peak_mb")), (80.0, None))

    def test_a_run_that_hangs_is_ended(self):
        late = self.bench().train(self.case, steps=1, timeout=0.5, data={"seed": 3})
        self.assertRaises(Problem, late.ended_well)
        self.assertEqual(run.processes_of(late.folder.parent), [])
        bench = self.bench(minutes=5.5 / 60)
        self.assertRaises(OutOfTime, bench.train, self.case, steps=1, data={"seed": 3})
        self.assertRaises(OutOfTime, bench.train, self.case, steps=1)

    def test_a_refusal_is_news_only_on_a_gpu(self):
        self.assertRaises(Skip, self.bench().train, self.case, steps=1, data={"seed": 2})
        bench = self.bench(device="cuda")
        refused = bench.train(self.case, steps=1, data={"seed": 2})
        with self.assertRaisesRegex(Problem, "exit code 2: error: `trace`"):
            refused.ended_well()
        kept = bench.failed.read_text()
        self.assertIn("exit code 2", kept)
        self.assertIn("--- stderr\nerror: `trace`", kept)

    def test_run_files_say_what_is_asked_for(self):
        gpu = machine.Gpu("NVIDIA H200", 1e9, (9, 0))
        bench = self.bench(device="cuda", gpus=[gpu])
        told = bench.run_file(self.case, 5, "bf16", 3, offload=["param"], tensor=2, share=True, memory_limit="16GB")
        self.assertEqual(told["cuda"], {"memory_limit": "16GB", "share": True})
        self.assertEqual(told["parallel"], {"pipeline": 1, "tensor": 2})
        self.assertEqual(told["deepspeed"]["zero_optimization"], {"stage": 3, "offload_param": {"device": "cpu"}})
        self.assertNotIn("cuda", bench.run_file(self.case, 5, device="cpu"))


class Figures(unittest.TestCase):
    def test_every_end_of_a_check_is_a_row(self):
        with tempfile.TemporaryDirectory() as folder:
            told = report.Report(Path(folder) / "results.jsonl")
            for error in (None, Problem("p"), Skip("s"), ValueError("v")):
                with told.check("section", str(error)) as row:
                    row.add(figure=float("nan"), count=12345)
                    if error:
                        raise error
            with self.assertRaises(OutOfTime), told.check("section", "late"):
                raise OutOfTime("late")
            self.assertEqual([row.status for row in told.rows], ["ok", "FAIL", "skip", "FAIL", "skip"])
            lines = [json.loads(line) for line in told.path.read_text().splitlines()]
            self.assertEqual(lines[0]["figures"], {"figure": "nan", "count": 12345})
            table = told.table().splitlines()
            self.assertEqual({line.count("|") for line in table}, {6})
            self.assertIn("12,345", table[2])
            self.assertEqual(told.summary(), "1 ok, 2 failed, 2 skipped")

    def test_the_largest_that_fits_is_found(self):
        for limit in (0, 1, 7, 100, 1000):
            for guess in (1, 5, 100, 3000):
                seen = []
                found = offload.search(lambda n: seen.append(n) or n <= limit, guess, 1200, 20)
                self.assertTrue(found <= limit and limit - found <= max(1, limit // 25), (limit, guess, found))
                self.assertEqual(len(seen), len(set(seen)), "nothing is tried twice")
        self.assertEqual(offload.search(lambda n: True, 3, 8, 20), 8)
        self.assertLessEqual(offload.search(lambda n: n <= 1000, 1, 10_000, 3), 1000)

    def test_hidden_time_is_what_lies_under_compute(self):
        events = [{"ph": "M", "name": "thread_name", "pid": 0, "tid": 1, "args": {"name": "compute"}},
                  {"ph": "M", "name": "thread_name", "pid": 0, "tid": 2, "args": {"name": "copies"}},
                  {"ph": "M", "name": "thread_name", "pid": 0, "tid": 3, "args": {"name": "collectives, up"}}]
        events += [{"ph": "X", "name": "x", "pid": 0, "tid": tid, "ts": start, "dur": 10}
                   for tid, start in ((1, 0), (1, 5), (2, 10), (2, 12), (3, 100))]
        spans = trace.by_kind(events)
        self.assertAlmostEqual(trace.hidden_share(spans["copies"], spans["compute"]), 5 / 12)
        self.assertEqual(trace.hidden_share(spans["collectives"], spans["compute"]), 0)
        self.assertIsNone(trace.hidden_share([], spans["compute"]))

    def test_a_step_is_split_by_lines(self):
        lines = {0: "host", 1: "compute", 2: "copies"}
        events = [{"ph": "M", "name": "thread_name", "pid": 0, "tid": tid, "args": {"name": name}} for tid, name in lines.items()]
        events += [{"ph": "X", "name": name, "pid": 0, "tid": tid, "ts": start, "dur": length} for name, tid, start, length in (
            ("step 4", 0, 0, 9000), ("step", 0, 5000, 3000), ("forward", 0, 0, 5000), ("layer", 1, 0, 2000), ("layer", 1, 1000, 2000), ("up", 2, 8000, 500))]
        self.assertEqual(offload.split(events), {"step_ms": 9.0, "compute_ms": 3.0, "copies_ms": 0.5, "host_step_ms": 3.0})

    def test_gaps_and_bits(self):
        self.assertAlmostEqual(compare.relative_gap([1.0, 2.2], [1.0, 2.0]), 0.1)
        self.assertRaises(Problem, compare.relative_gap, [1.0], [1.0, 2.0])
        self.assertRaises(Problem, compare.relative_gap, [None], [1.0])

    def test_flops_and_peaks(self):
        # 6 x 123.5 M and 6 x 12 layers x 768 wide x 1024 long.
        self.assertEqual(speed.flops_per_token(cases.SHAPES["gpt2-124m"], 1024), 6 * 123_532_032 + 6 * 12 * 768 * 1024)
        peaks = {"NVIDIA H200": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H100 80GB HBM3": 989, "NVIDIA A100-SXM4-80GB": 312,
                 "NVIDIA A10": 125, "Tesla T4": 65, "NVIDIA GeForce RTX 3090": 71, "NVIDIA L40S": 362, "NVIDIA L4": 121, "Unknown": None}
        for name, peak in peaks.items():
            self.assertEqual(machine.Gpu(name, 0, (8, 0)).peak_tflops, peak, name)
        self.assertGreater(speed.layers_that_fit(141e9), 15)
        self.assertEqual(speed.layers_that_fit(16e9), 0)


if __name__ == "__main__":
    unittest.main()
