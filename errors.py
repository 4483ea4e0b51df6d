"""Errors that a user caused and can mend: one line that says what was found, what was expected and what to do."""

import argparse
import difflib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterable

# what a full disk, a path that cannot be, or missing permissions raise wherever a file is written
FULL_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DISK_ERRORS = {
    *FULL_DISK_ERRORS,
    *(errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
}
# what torch says when another process of the job died or does not answer
LOST_PROCESS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Timed out waiting",
    "Connection timed out",
    "Broken pipe",
    "No route to host",
    "Network is unreachable",
    "failed to recv",
    "ncclRemoteError",
    "remote process exited",
)
EXIT_USER_ERROR = 2
EXIT_KEYBOARD = 130
SECONDS_TO_END = 5


class UserError(Exception):
    """Its message is the one line that the user sees; no traceback follows."""


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose complaints are UserErrors: one line, not the whole usage. The description is kept as is."""

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> None:
        """Raise a UserError instead of printing the usage."""
        raise UserError(f"{message}; see {self.prog} --help")


def nearest(name: str, known: Iterable[str]) -> str:
    """The entry of a table that a mistyped `name` comes closest to, whatever its case."""
    lowered = {entry.lower(): entry for entry in known}
    return lowered[difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.0)[0]]


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a `name` that is no entry of a table, with the nearest one that is."""
    known = list(known)
    return f"unknown {what} {name!r}; did you mean {nearest(name, known)!r}? (known: {', '.join(known)})"


def first_line(error: BaseException) -> str:
    """The beginning of what an error says, short enough to be part of a line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]


def lost_process(error: BaseException) -> str | None:
    """How torch found that another process is gone or does not answer, in words; None for any other trouble."""
    return next((words.lower() for words in LOST_PROCESS if words in str(error)), None)


def explain_runtime_error(error: RuntimeError) -> str | None:
    """One line for what torch reports when a process is gone or memory is full; None for any other trouble."""
    text = str(error)
    if "DataLoader worker" in text and ("killed by signal" in text or "exited unexpectedly" in text):
        return "a process that reads data was killed, most likely for want of memory; try fewer --num-workers"
    if type(error).__name__ == "OutOfMemoryError":
        return (
            f"the GPU's memory is full ({first_line(error)}); train with --gradient-checkpointing or more "
            "--gradient-accumulation-steps, sample and cache with a smaller --pproc-batch-size"
        )
    if (how := lost_process(error)) is not None:
        return f"another process is gone or does not answer ({how}); the same command continues from what was saved"
    return None


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's main; a UserError, or a file or disk that fails, ends it with one line a machine and code 2."""
    try:
        code = main()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(SECONDS_TO_END)  # what all found, the first one says, and the launcher ends the others
        message = str(error)
        if message.startswith("Caught UserError in DataLoader worker"):  # and that one's traceback
            message = message.strip().splitlines()[-1].removeprefix("errors.UserError: ")
        print(f"error: {message}", file=sys.stderr)
        code = EXIT_USER_ERROR
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        advice = "; free some space and run the same again" if error.errno in FULL_DISK_ERRORS else ""
        print(f"error: {error}{advice}", file=sys.stderr)
        code = EXIT_USER_ERROR
    except RuntimeError as error:
        if (explanation := explain_runtime_error(error)) is None:
            raise
        print(f"error: {explanation}", file=sys.stderr)
        code = EXIT_USER_ERROR
    except KeyboardInterrupt:
        code = EXIT_KEYBOARD
    sys.exit(code)
