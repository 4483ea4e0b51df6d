"""Runs the scripts at tiny settings with real command lines, in this process or in processes of their own."""

import contextlib
import importlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from errors import run_script
from weights.checkpoint_io import read_checkpoint

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline"}
# on CPUs accelerate launches a single process, whatever number it is given
ACCELERATE = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1")
LAST = 12  # steps of the joint run that others are compared to
TINY = (
    *("--report-to", "none", "--mixed-precision", "no", "--num-workers", "1", "--resolution", "32"),
    *("--batch-size", "4", "--vae", "f4d4-tiny"),
)
TINY_SIT = (
    *("--model", "SiT-XXS/2", "--num-classes", "3", "--encoder-depth", "2"),
    *("--enc-type", "efficientnet-lite0", "--cfg-prob", "0.3", "--ema-decay", "0.9"),
)


def torchrun(processes: int) -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")


def command(script: str, *flags: object, launcher: tuple[str, ...] = ()) -> list[str]:
    """The command line of a script, by default in a single process."""
    return [sys.executable, *launcher, script, *map(str, flags)]


def run_in_process(script: str, *flags: object) -> subprocess.CompletedProcess:
    """Run a script's main in this process, without the seconds that a process takes to start."""
    module = importlib.import_module(script.removesuffix(".py"))
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        pytest.raises(SystemExit) as end,
    ):
        patch.setattr("sys.argv", [script, *map(str, flags)])
        patch.setenv("WANDB_MODE", "offline")
        patch.setattr("diffusion.previews.STEPS", 2)  # pictures are quick, and a part of no run's state
        run_script(module.main)
    sys.stdout.write(stdout.getvalue())
    return subprocess.CompletedProcess([script], end.value.code or 0, stdout.getvalue(), stderr.getvalue())


def run_process(script: str, *flags: object, launcher: tuple[str, ...] = (), code: int = 0, **options):
    """Run a script as a user does and check its exit code; returns the CompletedProcess."""
    options = {"capture_output": True, "text": True, "cwd": ROOT, "env": ENVIRONMENT, "timeout": 240, **options}
    return checked(subprocess.run(command(script, *flags, launcher=launcher), **options), code)


def run(script: str, *flags: object, code: int = 0) -> subprocess.CompletedProcess:
    """Run a script in this process and check its exit code."""
    return checked(run_in_process(script, *flags), code)


def checked(done: subprocess.CompletedProcess, code: int) -> subprocess.CompletedProcess:
    """`done`, which must have ended with exit code `code`."""
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def refusal(script: str, *flags: object) -> str:
    """The one line `error: ...`, the last on stderr, by which a script refuses in this process."""
    stderr = run(script, *flags, code=2).stderr
    assert stderr.count("error: ") == 1 and "Traceback" not in stderr, stderr
    line = stderr[stderr.index("error: ") :].rstrip("\n")
    assert "\n" not in line
    return line


@contextlib.contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Within, no file of this process and its children can grow beyond so many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def wait_for_log(log: Path, lines: int, process: subprocess.Popen) -> None:
    """Wait until the log of a run has so many lines."""
    deadline = time.monotonic() + 240
    while len(records(log)) < lines:
        assert process.poll() is None, f"ended with exit code {process.returncode} before it had logged so much"
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.02)


def interrupt(script: str, *flags: object, log: Path, lines: int, kind: signal.Signals) -> int:
    """Run a script, signal it and its workers once its log has so many lines, and return its exit code."""
    process = subprocess.Popen(command(script, *flags), cwd=ROOT, env=ENVIRONMENT, start_new_session=True)
    wait_for_log(log, lines, process)
    os.killpg(process.pid, kind)
    return process.wait(timeout=120)


def records(path: Path) -> list[dict]:
    """The whole lines of a metrics.jsonl, without the one thing that is timing."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def equal(a: object, b: object) -> bool:
    """Whether two nested structures are the same to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def assert_same_run(a: Path, b: Path, last: int = LAST) -> None:
    """Two runs' last checkpoints and logs agree bit for bit."""
    one, two = (read_checkpoint(path / "checkpoints" / f"{last:07d}.pt") for path in (a, b))
    for part in one.keys() - {"args"}:
        assert equal(one[part], two[part]), f"{part} differs"
    assert [record["step"] for record in records(b / "metrics.jsonl")] == list(range(1, last + 1))
    assert records(a / "metrics.jsonl") == records(b / "metrics.jsonl")


def assert_same_beginning(a: Path, b: Path, steps: int, rel: float = 2e-3, abs: float = 2e-4, names=()) -> None:
    """The first steps of two runs' logs agree, up to rounding that training amplifies; all metrics or those named."""
    for one, other in list(zip(records(a / "metrics.jsonl"), records(b / "metrics.jsonl"), strict=False))[:steps]:
        for name in names or one.keys() - {"psnr"}:  # a logarithm of a mean is no mean of logarithms
            assert other[name] == pytest.approx(one[name], rel=rel, abs=abs), f"step {other['step']}: {name}"
