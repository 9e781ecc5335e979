"""Failures on purpose: who is named, how soon the run ends, what is left; too little memory; going on from a checkpoint."""
import time

from checks import machine
from checks.report import Problem, Skip
from checks.run import processes_of

# From the death of a rank to the end of the command.
LIMIT_S = 15
# Other programs may use a GPU meanwhile; a rank's context alone takes more than this.
SLACK_MB = 64


def run(bench):
    case = bench.case("llama-faults", shape="llama-tiny" if bench.dry else "llama-small")
    common = dict(stage=2, share=True, collectives="host")
    with bench.check("a rank is killed in backward") as row:
        fails_by_name(bench, row, case, "kill:rank=1,step=3,phase=backward", "rank 1 was killed by signal 9", common)
    with bench.check("a rank is killed in reduce, stage 3") as row:
        fails_by_name(bench, row, case, "kill:rank=0,step=3,phase=reduce", "rank 0 was killed by signal 9", {**common, "stage": 3})
    with bench.check("a rank stops without a word") as row:
        common = {**common, "parallel": {"deadline_s": 5}}
        fails_by_name(bench, row, case, "stop:rank=1,step=3,phase=backward", "rank `1` stalled", common)
    with bench.check("more ranks than GPUs, not shared") as row:
        refuses(bench, row, case, "GPU", ranks=len(bench.gpus) + 1, share=False)
    with bench.check("a limit of device memory below what a context takes") as row:
        refuses(bench, row, case, "memory", memory_limit="20MB")
    with bench.check("a model that does not fit the limit of device memory") as row:
        # 2.2 GB of state, and the activations of 16,384 tokens.
        large = case if bench.dry else bench.case("gpt2-faults", shape="gpt2-124m", micro_batch=16)
        refuses(bench, row, large, "memory", memory_limit="3GB")
    with bench.check("a run goes on after a checkpoint with the same bits") as row:
        resumes(bench, row, case)


def fails_by_name(bench, row, case, fault, says, options):
    before = machine.used_gpu_mb()
    trained = bench.train(case, 2, steps=200, env={"SHARDWISE_FAULT": fault}, timeout=120, **options)
    if trained.timed_out:
        raise Problem("the run went on")
    victim = int(fault.split("rank=")[1].split(",")[0])
    log = trained.folder / f"ranks/rank-{victim}.log"
    if trained.code != 1:
        raise Problem(f"exit code {trained.code}, expected 1: {trained.last_words()}")
    if says not in trained.stderr:
        raise Problem(f"`{says}` is not what it says: {trained.last_words()}")
    # The rank's last words come just before its death.
    ended = (trained.folder.parent / "stderr").stat().st_mtime
    row.add(steps=len(trained.steps), seconds_to_end=max(0.0, ended - log.stat().st_mtime), limit_s=LIMIT_S)
    if row.figures["seconds_to_end"] > LIMIT_S:
        raise Problem("it took too long to end")
    nothing_left(row, trained, before)


def nothing_left(row, trained, before):
    left = processes_of(trained.folder.parent)
    if left:
        raise Problem(f"these processes are left: {left}")
    if not before:
        return
    for _ in range(20):
        more = max(now - then for now, then in zip(machine.used_gpu_mb(), before))
        if more <= SLACK_MB:
            break
        time.sleep(0.5)
    row.add(gpu_mb_left=more)
    if more > SLACK_MB:
        raise Problem(f"{more:.0f} MiB of GPU memory are still in use")


def refuses(bench, row, case, word, ranks=1, **options):
    """The run ends with an error that has the word in it, and with no panic."""
    if bench.dry:
        raise Skip("needs a GPU")
    trained = bench.train(case, ranks, steps=5, timeout=90, **options)
    row.add(exit_code=trained.code)
    row.note = trained.last_words()
    if trained.timed_out or trained.code not in (1, 2):
        raise Problem(f"exit code {trained.code}, expected an error: {trained.last_words()}")
    error = next((line for line in trained.stderr.splitlines() if line.startswith("error:")), "")
    if word.lower() not in error.lower() or "panicked" in trained.stderr:
        raise Problem(f"not a clear error about `{word}`: {trained.last_words()}")


def resumes(bench, row, case):
    common = dict(steps=6, stage=3, dtype=bench.half, deterministic=True, share=True, collectives="host",
                  checkpoint={"every": 3})
    whole = bench.train(case, 2, **common).ended_well()
    later = bench.train(case, 2, resume=whole.folder / "checkpoints/step-000003", **common).ended_well()
    row.add(steps=len(later.steps), loss=later.losses[-1])
    if later.numbers() != whole.numbers()[3:]:
        raise Problem(f"{later.numbers()} after the checkpoint, {whole.numbers()[3:]} without a stop")
