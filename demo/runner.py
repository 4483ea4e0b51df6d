"""Runs scripts one after the other by their command lines, and records the time of each over interruptions."""

import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from storage.files import replace_text

ROOT = Path(__file__).parent.parent


class Stage(NamedTuple):
    """A script's run by its command line."""

    name: str
    title: str
    line: str


def cpu_description() -> str:
    """The text of /proc/cpuinfo; empty on systems that have none."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.is_file() else ""


class Record:
    """The settings of some stages and the time of those that ran, in a JSON file.

    Raises:
        SystemExit: the file is of other settings.
    """

    def __init__(self, path: Path, settings: dict):
        self.path = path
        name = re.search(r"model name\s*: (.*)", cpu_description())
        machine = f"{os.cpu_count()} cores of {name[1] if name else platform.machine()}"
        self.content = {"settings": settings, "machine": machine, "stages": {}}
        if path.is_file():
            self.content = json.loads(path.read_text(encoding="utf8"))
            before = self.content["settings"]
            if before != settings:
                sys.exit(f"error: {path.parent} was begun with {before}; continue it with these, or delete it")

    def is_done(self, stage: Stage) -> bool:
        """Whether this very command line has run to its end."""
        entry = self.content["stages"].get(stage.name, {"done": False})
        return entry["done"] and entry["command"] == command(stage)

    def add(self, stage: Stage, seconds: float, done: bool) -> None:
        """Add to the time of `stage`, unless it was done before."""
        if not self.is_done(stage):
            entry = self.content["stages"].setdefault(stage.name, {"seconds": 0.0})
            entry.update(title=stage.title, command=command(stage), done=done)
            entry["seconds"] += seconds
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self.path, json.dumps(self.content, indent=1))


def command(stage: Stage) -> str:
    return f"python {shlex.join(shlex.split(stage.line))}"


def run_stage(stage: Stage, record: Record, again: str) -> None:
    """Print and run a script's command line; exit with its code if it fails. `again` is the command that continues."""
    arguments = shlex.split(stage.line)
    print(f"\n== {stage.title}\n$ {command(stage)}", flush=True)
    started = time.monotonic()
    code = run_script(arguments)
    seconds = time.monotonic() - started
    record.add(stage, seconds, done=code == 0)
    if code:
        print(f"stopped: {stage.title!r} failed with exit code {code}; `{again}` continues from here", file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)
    print(f"-- {seconds:.0f} s", flush=True)


def run_script(arguments: list[str]) -> int:
    """Run a script in the project's folder and return its exit code."""
    script = subprocess.Popen([sys.executable, *arguments], cwd=ROOT)
    # the terminal also sends Ctrl-C to the script, which saves its work and exits
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = script.wait()
    signal.signal(signal.SIGINT, previous)
    return code
