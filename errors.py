"""Errors that a user can correct, reported in one line: what was found, what was expected and what to do.

With REPAE_DEBUG=1 in the environment their traceback is shown too.
"""

import argparse
import difflib
import errno
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

if sys.platform == "win32":  # every script imports this module before those that need fork, signals or locks of Unix
    print("error: Windows is not supported; run this in WSL 2, Windows' own Linux (wsl --install)", file=sys.stderr)
    sys.exit(2)

# raised by the system wherever a file is written to a full disk, to an impossible path or without permission
FULL_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DISK_ERRORS = {
    *FULL_DISK_ERRORS,
    *(errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
}
SECONDS_TO_END = 5
# in messages of torch, NCCL and the system, also of a data worker -> what it means, and what to do
CAUSES = {
    "Too many open files|items of ancdata": (
        "too many open files; raise the limit, by ulimit -n 65536, or use fewer --num-workers"
    ),
    # torch's shared memory has file names like </torch_1625_493935405_0>
    r"</torch_|shared memory(\(shm\)| object| segment)|Bus error|/dev/shm/nccl|No space left on device.*/dev/shm": (
        "shared memory (/dev/shm) is too small; start the container with --shm-size=16g or --ipc=host, or use "
        "--num-workers 0"
    ),
    "DataLoader worker.*(killed by signal|exited unexpectedly)": (
        "a process that reads data was killed, most likely for want of memory; try fewer --num-workers"
    ),
}
LOST_PROCESS = (
    "Connection (closed by peer|reset by peer|refused|timed out)|Timed out waiting|Broken pipe|No route to host|"
    "Network is unreachable|failed to recv|ncclRemoteError|remote process exited"
)


class UserError(Exception):
    """An error whose message is the one line that the user sees, without a traceback."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserErrors instead of printing its usage, and keeps the description's lines."""

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        for kind in (None, str):  # the types of flags that take paths; no other flag of these takes ~ or $
            self.register("type", kind, expanded)
        self.register("type", Path, lambda text: Path(expanded(text)))

    def error(self, message: str) -> None:
        raise UserError(f"{message}; see {self.prog} --help")


def expanded(text: str) -> str:
    """An argparse type: a path in which ~, ~USER, $NAME and ${NAME} are replaced; one that exists as written may stay.

    Raises:
        argparse.ArgumentTypeError: there is no such user, or no such variable in the environment.
    """
    path = os.path.expanduser(os.path.expandvars(text))
    names = [name for name in re.findall(r"\$\{?([A-Za-z_]\w*)", text) if name not in os.environ]
    if (names or path.startswith("~")) and not os.path.exists(text):
        what = f"the environment has no variable {names[0]}" if names else "there is no such user"
        raise argparse.ArgumentTypeError(f"{text!r}: {what}")
    return path


def nearest(name: str, known: Iterable[str]) -> str:
    """The entry of `known` that is most similar to a mistyped `name`, ignoring case."""
    lowered = {entry.lower(): entry for entry in known}
    return lowered[difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.0)[0]]


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a `name` that is not in `known`, with the nearest name that is."""
    known = list(known)
    return f"unknown {what} {name!r}; did you mean {nearest(name, known)!r}? (known: {', '.join(known)})"


def one_line(error: BaseException) -> str:
    """The message of an error on one line, at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def explain(error: Exception) -> str | None:
    """One line for an error that a user can correct; None for any other."""
    if isinstance(error, UserError):
        message = str(error)
        if message.startswith("Caught UserError in DataLoader worker"):  # the worker's traceback follows
            message = message.strip().splitlines()[-1].removeprefix("errors.UserError: ")
        return message
    if type(error).__name__ == "OutOfMemoryError":
        remedy = "--gradient-checkpointing, more --gradient-accumulation-steps or a smaller --pproc-batch-size"
        return f"the GPU's memory is full ({one_line(error)}); use {remedy}"
    for pattern, message in CAUSES.items():
        if re.search(pattern, str(error)):
            return message
    if isinstance(error, RuntimeError) and re.search(LOST_PROCESS, str(error)):
        return "another process is gone or does not answer; the same command continues from what was saved"
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        is_full = error.errno in FULL_DISK_ERRORS
        return f"{error}; free some space and run the same again" if is_full else str(error)
    return None


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's main and exit with its code; an error that a user can correct is one line and exit code 2."""
    try:
        code = main()
    except (UserError, OSError, RuntimeError) as error:
        if (message := explain(error)) is None:
            raise
        if isinstance(error, UserError) and os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(SECONDS_TO_END)  # rank 0 reports what all ranks found, then the launcher ends the others
        if os.environ.get("REPAE_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        elif not isinstance(error, UserError):
            message += " (REPAE_DEBUG=1 shows where)"
        print(f"error: {message}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
