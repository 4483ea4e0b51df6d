"""Several processes that train together: what one does, all do, and when one dies, no other waits for ever."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from errors import UserError, explain
from forked import run_ranks
from scripts import (
    ACCELERATE,
    ENVIRONMENT,
    LAST,
    ROOT,
    assert_same_beginning,
    assert_same_run,
    command,
    equal,
    records,
    run,
    torchrun,
    wait_for_log,
)
from test_distributed import in_two_processes
from training import distributed
from training.distributed import all_reduce_max, differing_tensor, host_group, on_first_process
from training.resume_checks import refuse_other_processes
from weights.checkpoint_io import read_checkpoint

STEPS = 6
PER_STEP = ("--checkpointing-minutes", 1e-6, "--keep-last", 2, "--max-train-steps", STEPS)
# how far apart a joint run of STEPS steps may end on one and on two processes, in float32: Adam turns the rounding of
# gradients near 0 into steps of the learning rate, so losses and norms are compared, and weights to a few such steps
LOSSES, WEIGHTS = 2e-3, 5e-4


def refusals(rank: int, world: int) -> list:
    """What two processes agree on, and by which messages they stop."""

    def refuse() -> None:
        raise UserError(f"said by {rank}")

    group = host_group()
    said = [*all_reduce_max([rank, 5 - rank], group), on_first_process(lambda: f"rank {rank}", group)]
    flags = {"seed": rank, "data_dir": str(rank)}
    for action in (
        lambda: on_first_process(refuse, group),
        lambda: refuse_other_processes(flags, {}, group),
        lambda: refuse_other_processes({}, {"data": str(rank)}, group),
    ):
        with pytest.raises(UserError) as error:
            action()
        said.append(str(error.value))
    refuse_other_processes({"data_dir": str(rank)}, {"data": "a"}, group)
    return said


def test_processes_that_were_started_differently_all_stop(tmp_path):
    said = [1, 5, "rank 0", "said by 0"]
    said.append("process 1 was started with other flags than process 0 (--seed 0 -> 1); use the same")
    said.append("process 1 has other images than --data-dir holds on process 0; use the same everywhere")
    assert in_two_processes(refusals, tmp_path) == [said] * 2
    assert all_reduce_max([3, 4], None) == [3, 4]


def flip(rank: int, world: int) -> list:
    """Names that are found to differ: none, then with one bit flipped on the second process only."""
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.tensor([1.0, float("nan")], dtype=torch.bfloat16),
        "c": torch.tensor(7),
    }
    found = [differing_tensor(tensors, torch.device("cpu"))]
    for name, integers in (("a", torch.int32), ("b", torch.int16), ("c", torch.int64)):
        changed = {key: value.clone() for key, value in tensors.items()}
        if rank == 1:
            changed[name].reshape(-1).view(integers)[-1] ^= 1
        found.append(differing_tensor(changed, torch.device("cpu")))
    return found


def test_a_single_bit_that_differs_is_found(tmp_path):
    assert in_two_processes(flip, tmp_path) == [[None, "a", "b", "c"]] * 2


def wait_for_the_dead(rank: int, world: int, hang: bool) -> str | None:
    distributed.COLLECTIVE_TIMEOUT = timedelta(seconds=4)  # also to form the group, on a busy machine
    group = host_group()
    if rank == 1:
        if not hang:
            os._exit(0)
        time.sleep(9)
        return None
    try:
        all_reduce_max([0], group)
    except RuntimeError as error:
        said = explain(error)
    # the other one is not there to take part, and gloo's threads, which wait for it, would abort an ordinary exit
    dist.destroy_process_group = lambda: os._exit(0)
    return said


@pytest.mark.parametrize("hang", [False, True])
def test_a_process_that_dies_or_hangs_is_noticed(tmp_path, hang):
    with contextlib.suppress(FileNotFoundError):  # one that died has no result
        in_two_processes(wait_for_the_dead, tmp_path, hang)
    said = torch.load(tmp_path / "0.pt", weights_only=True)
    assert "another process is gone or does not answer" in said


@pytest.fixture(scope="module")
def two(joint) -> tuple[Path, tuple]:
    """An uninterrupted run on two processes, and its flags without a name."""
    output, flags = joint
    flags = (*flags, *PER_STEP)
    run_ranks(2, "train_repae.py", *flags, "--exp-name", "two-whole")
    return output / "two-whole", flags


def started(name: str, flags: tuple, log: Path, lines: int):
    """A run on two processes that has logged so many lines, and its two processes by rank."""
    line = command("train_repae.py", *flags, "--exp-name", name, launcher=torchrun(2))
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    launcher = subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, **options)
    wait_for_log(log, lines, launcher)
    return launcher, {int(p.environ()["RANK"]): p for p in psutil.Process(launcher.pid).children()}


@pytest.mark.slow
def test_two_processes_equal_one(two, whole_run):
    # float32 rounding, amplified by Adam; test_distributed.py has float64 to 1e-10
    assert_same_beginning(whole_run, two[0], steps=2)


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_job_with_a_message_and_the_same_command_completes_it(two):
    whole, flags = two
    folder = whole.with_name("killed")
    launcher, processes = started("killed", flags, folder / "metrics.jsonl", 3)
    processes[0].kill()
    said = launcher.communicate(timeout=60)[0]
    assert launcher.returncode != 0
    assert "another process is gone or does not answer" in said
    assert not any(process.is_running() for process in processes.values())
    run_ranks(2, "train_repae.py", *flags, "--exp-name", "killed")
    assert_same_run(whole, folder, STEPS)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(two):
    whole, flags = two
    folder = whole.with_name("asked")
    launcher, processes = started("asked", flags, folder / "metrics.jsonl", 3)
    processes[1].send_signal(signal.SIGTERM)
    said = launcher.communicate(timeout=60)[0]
    saved = len(records(folder / "metrics.jsonl"))
    assert f"stopped by signal {signal.SIGTERM.value} after step {saved}. The same command continues" in said
    assert said.count("exitcode  : 75") == 2
    assert (folder / f"checkpoints/{saved:07d}.pt").is_file()
    run_ranks(2, "train_repae.py", *flags, "--checkpointing-minutes", 0, "--exp-name", "asked")
    assert_same_run(whole, folder, STEPS)


@pytest.mark.slow
def test_a_signal_to_accelerate_launch_reaches_training(joint, whole_run):
    output, flags = joint
    flags = (*flags, "--exp-name", "launched", "--max-train-steps", LAST)
    line = command("train_repae.py", *flags, launcher=ACCELERATE)
    launcher = subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = output / "launched"
    wait_for_log(folder / "metrics.jsonl", 1, launcher)
    (training,) = psutil.Process(launcher.pid).children()
    launcher.terminate()
    launcher.wait(timeout=30)
    with contextlib.suppress(psutil.NoSuchProcess):
        training.wait(timeout=60)
    saved = len(records(folder / "metrics.jsonl"))
    assert saved < LAST
    assert (folder / f"checkpoints/{saved:07d}.pt").is_file()
    run("train_repae.py", *flags)
    assert_same_run(whole_run, folder)


@pytest.mark.slow
def test_one_process_then_two_then_one(joint, whole_run):
    output, flags = joint
    for steps, processes in ((2, 1), (4, 2), (STEPS, 1)):
        names = ("--exp-name", "one-two-one", "--max-train-steps", steps)
        run_ranks(processes, "train_repae.py", *flags, *names)
    run("train_repae.py", *flags, "--exp-name", "one", "--max-train-steps", STEPS)
    log = records(output / "one-two-one/metrics.jsonl")
    assert [record["step"] for record in log] == list(range(1, STEPS + 1))
    assert log[:2] == records(whole_run / "metrics.jsonl")[:2]
    assert_same_beginning(whole_run, output / "one-two-one", steps=STEPS, rel=LOSSES, abs=1e-3)
    ends = [read_checkpoint(output / name / f"checkpoints/{STEPS:07d}.pt") for name in ("one", "one-two-one")]
    for network in ("model", "ema", "vae", "discriminator"):
        for key, value in ends[0][network].items():
            torch.testing.assert_close(ends[1][network][key], value, atol=WEIGHTS, rtol=LOSSES, msg=f"{network} {key}")
    assert not equal(ends[0]["model"], ends[1]["model"])  # else nothing was compared


WRAPPER = """
import os, sys
sys.path.insert(0, {root!r})
import torch, train_repae
from errors import run_script

step_of = train_repae.repae_step

def broken_step(nets, batch, draws, cfg):
    metrics = step_of(nets, batch, draws, cfg)
    if batch.step == 4 and os.environ["RANK"] == "1":  # a bit flips in the memory of one process
        nets.ema.bn.running_mean.view(torch.int32)[0] ^= 1
    return metrics

train_repae.repae_step = broken_step
run_script(train_repae.main)
"""


@pytest.mark.slow
def test_processes_that_drift_apart_are_stopped(two, tmp_path):
    whole, flags = two
    script = tmp_path / "broken.py"
    script.write_text(WRAPPER.format(root=str(ROOT)))
    line = [sys.executable, *torchrun(2), str(script), *map(str, flags), "--exp-name", "drift", "--check-ranks", "2"]
    done = subprocess.run(line, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    good = whole.with_name("drift") / "checkpoints/0000004.pt"
    assert (
        f"step 5: processes differ in ema.bn.running_mean; training stopped. Last good checkpoint: {good}"
        in done.stderr
    )
    assert not (good.parent / "0000005.pt").exists()


@pytest.mark.slow
def test_a_killed_data_worker_ends_training_with_one_line(joint):
    output, flags = joint
    line = command("train_repae.py", *flags, "--exp-name", "worker", "--max-train-steps", 500)
    process = subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    wait_for_log(output / "worker/metrics.jsonl", 1, process)
    for worker in psutil.Process(process.pid).children(recursive=True):
        worker.kill()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert "error: a process that reads data was killed, most likely for want of memory" in said
    assert "Traceback" not in said
