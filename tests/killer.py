"""Runs scripts and kills them with SIGKILL, all their processes at once, at a chosen operation on files.

Processes are forked from a server (multiprocessing's "forkserver") that imported what the scripts import, so that a
run takes no longer than its work.
"""

import builtins
import ctypes
import importlib
import io
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

from errors import run_script
from forked import forkserver


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


def run_watched(command: list[str], folder: str, log: str, kill: int, constants: dict) -> None:
    """Run a script in this process, which becomes a process group; see `Killer.run`."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    output = os.open(log + ".out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for target in (1, 2):
        os.dup2(output, target)
    watch(Operations(folder, kill, log))
    for name, value in constants.items():
        module, constant = name.rsplit(".", 1)
        setattr(importlib.import_module(module), constant, value)
    sys.argv = command
    run_script(importlib.import_module(command[0].removesuffix(".py")).main)


class Killer:
    """Runs scripts in forked processes."""

    def run(
        self, command: list, folder: Path, kill: int = 0, after: float | None = None, constants: dict | None = None
    ) -> int:
        """Run a script; its exit code, -9 if it was killed.

        Operations on files below `folder` are counted over all its processes and listed in FOLDER.log; what it prints
        goes to FOLDER.log.out. At the operation that `kill` numbers, of which a part is done (half of a write), all
        processes are killed; 0 kills at none. `after` so many seconds they are killed as well. `constants`, by
        "module.NAME", are set first.
        """
        arguments = (list(map(str, command)), str(folder), str(self.log(folder)), kill, constants or {})
        process = forkserver().Process(target=run_watched, args=arguments)
        process.start()
        process.join(after)
        if process.exitcode is None:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it is not a group yet
                process.kill()
        process.join()
        return process.exitcode

    @staticmethod
    def log(folder: Path) -> Path:
        """Where the operations of runs that write to `folder` are listed."""
        return folder.with_name(folder.name + ".log")

    def operations(self, folder: Path) -> list[str]:
        """The operations of the last run that wrote to `folder`."""
        return self.log(folder).read_text(encoding="utf8").splitlines()

    def output(self, folder: Path) -> str:
        """What the last run that wrote to `folder` printed."""
        return self.log(folder).with_suffix(".log.out").read_text(encoding="utf8")
