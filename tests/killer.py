"""Runs scripts and kills them with SIGKILL, all their processes at once, at a chosen operation on files.

`python killer.py` imports what the scripts import, and then forks a process for each request that comes on stdin, so
that a run takes no longer than its work; a request is a JSON line of `run_forked`'s arguments, answered by the exit
code.
"""

import builtins
import contextlib
import ctypes
import importlib
import io
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Operations:
    """Counts operations on files below a folder, and kills its process group at one of them."""

    def __init__(self, folder: str, kill: int, log: str):
        self.folder, self.kill = os.path.abspath(folder), kill
        self.count = multiprocessing.Value(ctypes.c_int64, 0)
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)

    def covers(self, path) -> bool:
        return os.path.abspath(os.fsdecode(path)).startswith(self.folder)

    def begin(self, name: str, path, before_dying=lambda: None) -> None:
        """Count one operation; if it is the one, do a part of it and die."""
        with self.count.get_lock():
            self.count.value += 1
            os.write(self.log, f"{name} {os.path.relpath(os.fsdecode(path), self.folder)}\n".encode())
            if self.count.value == self.kill:
                before_dying()
                os.killpg(0, signal.SIGKILL)


def watch(operations: Operations) -> None:
    """Let `operations` see every write, fsync, rename and removal that this process and its children make."""
    real_open = builtins.open

    class Raw(io.FileIO):
        def write(self, data) -> int:
            half = memoryview(data).cast("B")[: memoryview(data).nbytes // 2]
            operations.begin("write", self.name, lambda: io.FileIO.write(self, half))
            return super().write(data)

    def watched_open(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *rest, **options):
        writes = set(mode) & set("wax") and not isinstance(file, int) and operations.covers(file)
        if not writes:
            return real_open(file, mode, buffering, encoding, errors, newline, *rest, **options)
        buffered = io.BufferedWriter(Raw(file, mode.replace("b", "").replace("t", "")), max(buffering, 8192))
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    builtins.open = io.open = watched_open
    for name in ("replace", "rename", "unlink"):
        setattr(os, name, watched_call(operations, name, getattr(os, name)))
    real_fsync = os.fsync

    def watched_fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if operations.covers(path):
            operations.begin("fsync", path)
        real_fsync(descriptor)

    os.fsync = watched_fsync


def watched_call(operations: Operations, name: str, call):
    def watched(path, *rest, **options):
        if operations.covers(path):
            operations.begin(name, path)
        return call(path, *rest, **options)

    return watched


def run_forked(command: list[str], folder: str, log: str, kill: int, after: float, constants: dict) -> int:
    """Run a script in a forked process group; its exit code, negative if it was killed.

    Operations below `folder` are counted over all its processes and listed in `log`. At the one that `kill` numbers,
    of which a part is done (half of a write), everything is killed; 0 kills at none. It is also killed `after` so many
    seconds, if that is not 0. `constants`, by "module.NAME", are set first.
    """
    process = os.fork()
    if process == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        output = os.open(log + ".out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        null = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, null), (1, output), (2, output)):
            os.dup2(source, target)
        watch(Operations(folder, kill, log))
        for name, value in constants.items():
            module, constant = name.rsplit(".", 1)
            setattr(importlib.import_module(module), constant, value)
        sys.argv = command
        from errors import run_script

        run_script(importlib.import_module(command[0].removesuffix(".py")).main)
    if after:
        deadline = time.monotonic() + after
        while (
            time.monotonic() < deadline and os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        ):
            time.sleep(0.002)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def serve() -> None:
    """Answer requests until stdin ends."""
    for script in ("train_repae", "train_ldm_only", "cache_latents", "generate", "preprocessing"):
        importlib.import_module(script)
    for module in (
        "lpips",
        "timm",
        "accelerate",
        "tqdm",
        "torch.utils.data",
        "torchvision.models",
    ):
        importlib.import_module(module)
    for line in sys.stdin:
        print(run_forked(**json.loads(line)), flush=True)


class Killer:
    """The server's client."""

    def __init__(self, environment: dict):
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            env={**environment, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, command: list, folder: Path, kill: int = 0, after: float = 0, constants: dict | None = None) -> int:
        """As `run_forked`; the log is FOLDER.log, and what the script prints FOLDER.log.out."""
        places = {"folder": str(folder), "log": str(self.log(folder))}
        request = {"command": list(map(str, command)), "kill": kill, "after": after, "constants": constants or {}}
        self.server.stdin.write(json.dumps({**request, **places}) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    @staticmethod
    def log(folder: Path) -> Path:
        """Where the operations of runs that write to `folder` are listed."""
        return folder.with_name(folder.name + ".log")

    def operations(self, folder: Path) -> list[str]:
        """The operations of the last run that wrote to `folder`."""
        return self.log(folder).read_text(encoding="utf8").splitlines()

    def close(self) -> None:
        """End the server."""
        self.server.stdin.close()
        self.server.wait(timeout=30)


if __name__ == "__main__":
    serve()
