"""The sections of `gpu/check.py`, one file each: `run(bench)` makes its checks with what `run.py` and `report.py` have."""
