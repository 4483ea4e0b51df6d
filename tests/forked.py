"""Processes that start at once, because they are forked from a server that has imported what the scripts import.

The server is multiprocessing's "forkserver". The killer of test_kill.py, and tests on several processes whose launcher
is not the point, use it.
"""

import contextlib
import functools
import importlib
import io
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from errors import run_script
from scripts import ENVIRONMENT, ROOT, checked

IMPORTED = (
    *("forked", "killer", "train_repae", "train_ldm_only", "train_vae", "cache_latents", "generate", "evaluate"),
    *("preprocessing", "lpips", "timm", "accelerate", "tqdm", "torch.utils.data", "torchvision.models"),
    *("test_distributed", "torch._dynamo"),
)
SECONDS = 240


@functools.cache
def forkserver():
    """The context whose processes are forked from the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}.items():
            patch.setenv(name, value)
        patch.chdir(ROOT)
        multiprocessing.forkserver.ensure_running()
    return context


def free_port() -> int:
    """A port of the loopback address that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def be_rank(rank: int, world: int, port: int, command: list[str], said) -> None:
    """One process of a job in the environment that torchrun gives it; what it prints goes through the pipe `said`."""
    job = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in job.items()}}
    sys.argv, output = command, io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            run_script(importlib.import_module(command[0].removesuffix(".py")).main)
        finally:
            said.send(output.getvalue())


def run_ranks(world: int, script: str, *flags: object) -> str:
    """Run a script to its end on `world` processes, as torchrun does; what they printed."""
    port, command = free_port(), [script, *map(str, flags)]
    pipes, ranks = [forkserver().Pipe(duplex=False) for _ in range(world)], []
    for rank, (_, end) in enumerate(pipes):
        ranks.append(forkserver().Process(target=be_rank, args=(rank, world, port, command, end)))
        ranks[-1].start()
        end.close()
    said = ""
    for receiver, _ in pipes:
        with contextlib.suppress(EOFError):
            said += receiver.recv() if receiver.poll(SECONDS) else ""
    for process in ranks:
        process.join(10)
        process.kill()
    code = max(abs(process.exitcode or 0) for process in ranks)
    checked(subprocess.CompletedProcess(command, code, said, ""), 0)
    return said
