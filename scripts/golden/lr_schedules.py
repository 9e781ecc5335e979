"""Writes the learning rates (and momenta) that DeepSpeed and the transformers package set, step by step.

    python lr_schedules.py crates/config/src/tests/lr_schedules.json

The schedulers run as a training loop runs them: the optimizer steps first, so step `s` (from 0) sees what `s` calls of
`scheduler.step()` have left.
"""
import json, logging, sys
import torch, transformers
from deepspeed.runtime import lr_schedules as ds
from deepspeed.utils import logger

logger.setLevel(logging.ERROR)
STEPS = 60
LR = 3e-4

CASES = [
    ("WarmupLR", dict(warmup_min_lr=0, warmup_max_lr=1e-3, warmup_num_steps=10)),
    ("WarmupLR", dict(warmup_min_lr=1e-5, warmup_max_lr=1e-3, warmup_num_steps=10, warmup_type="linear")),
    ("WarmupLR", dict(warmup_num_steps=1)),
    ("WarmupDecayLR", dict(total_num_steps=50, warmup_num_steps=10)),
    ("WarmupDecayLR", dict(total_num_steps=50, warmup_min_lr=1e-5, warmup_max_lr=2e-3, warmup_num_steps=10, warmup_type="linear")),
    ("WarmupDecayLR", dict(total_num_steps=8, warmup_min_lr=1e-5, warmup_num_steps=10)),
    ("WarmupDecayLR", dict(total_num_steps=10, warmup_num_steps=10, warmup_type="linear")),
    ("WarmupCosineLR", dict(total_num_steps=50, warmup_num_steps=10)),
    ("WarmupCosineLR", dict(total_num_steps=50, warmup_min_ratio=0.1, warmup_num_steps=10, warmup_type="linear", cos_min_ratio=0.05)),
    ("WarmupCosineLR", dict(total_num_steps=10, warmup_num_steps=20)),
    ("OneCycle", dict(cycle_min_lr=1e-4, cycle_max_lr=1e-3, cycle_first_step_size=10)),
    ("OneCycle", dict(cycle_min_lr=1e-4, cycle_max_lr=1e-3, cycle_first_step_size=7, cycle_second_step_size=18,
                      decay_lr_rate=0.5, decay_step_size=5, cycle_min_mom=0.85, cycle_max_mom=0.95, decay_mom_rate=0.001)),
    ("OneCycle", dict(cycle_min_lr=1e-4, cycle_max_lr=1e-3, cycle_first_step_size=12, cycle_second_step_size=9,
                      cycle_first_stair_count=4, cycle_second_stair_count=3, decay_lr_rate=0.1, decay_step_size=10)),
    ("OneCycle", dict(cycle_min_lr=1e-4, cycle_max_lr=1e-3, cycle_first_step_size=10, cycle_second_step_size=0,
                      cycle_first_stair_count=3, cycle_momentum=False)),
    ("LRRangeTest", dict()),
    ("LRRangeTest", dict(lr_range_test_min_lr=1e-4, lr_range_test_step_size=7, lr_range_test_step_rate=2.0)),
    ("LRRangeTest", dict(lr_range_test_min_lr=1e-4, lr_range_test_step_size=7, lr_range_test_step_rate=2.0,
                         lr_range_test_staircase=True)),
]

# What the run file's `lr_schedule` says, and the same for transformers.
HF = [
    (dict(type="constant", warmup_steps=7), "constant_with_warmup", dict(num_warmup_steps=7)),
    (dict(type="linear", warmup_steps=7, total_steps=50), "linear", dict(num_warmup_steps=7, num_training_steps=50)),
    (dict(type="linear", total_steps=60), "linear", dict(num_warmup_steps=0, num_training_steps=60)),
    (dict(type="cosine", warmup_steps=7, total_steps=60), "cosine", dict(num_warmup_steps=7, num_training_steps=60)),
    (dict(type="cosine", warmup_steps=1, total_steps=60, min_lr=3e-5), "cosine_with_min_lr",
     dict(num_warmup_steps=1, num_training_steps=60, scheduler_specific_kwargs=dict(min_lr=3e-5))),
]


def optimizer():
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=LR)


def record(opt, schedule, cycles):
    rates, momenta = [], []
    for _ in range(STEPS):
        rates.append(opt.param_groups[0]["lr"])
        momenta.append(opt.param_groups[0]["betas"][0] if cycles else None)
        opt.step()
        schedule.step()
    return dict(lr=rates, momentum=momenta if cycles else None, betas=list(opt.param_groups[0]["betas"]))


out = []
for name, params in CASES:
    opt = optimizer()
    cycles = name == "OneCycle" and params.get("cycle_momentum", True)
    schedule = getattr(ds, name)(opt, **params)
    out.append(dict(set=dict(scheduler=dict(type=name, params=params)), **record(opt, schedule, cycles)))
for ours, name, kwargs in HF:
    opt = optimizer()
    out.append(dict(set=dict(lr_schedule=ours), **record(opt, transformers.get_scheduler(name, opt, **kwargs), False)))
with open(sys.argv[1], "w") as file:
    versions = dict(deepspeed=__import__("deepspeed").__version__, transformers=transformers.__version__)
    file.write(json.dumps(dict(lr=LR, versions=versions), indent=None)[:-1] + ', "cases": [\n')
    file.write(",\n".join(json.dumps(case) for case in out) + "\n]}\n")
