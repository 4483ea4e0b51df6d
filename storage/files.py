"""Files written whole or not at all, by threads where that saves time, and folders locked for one writing process."""

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from errors import UserError

BUFFER = 1 << 22  # bytes: a checkpoint's many small tensors take few writes
WRITERS = 4  # threads: Pillow releases the GIL while it encodes, and every file waits for the disk
WAITING = 2  # batches that may be made and not yet written, which bounds the memory they take
Action = Callable[[], None]


def replace_text(path: Path, text: str) -> None:
    """Write a small UTF-8 file so that `path` holds either the old text or all of the new one."""
    with written_whole(path) as file:
        file.write(text.encode())
    sync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove the half-written files of killed processes from `folder`, which no other process may be writing to."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Sync the names in `folder` to disk, so that they survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that becomes `path`, synced, when the block succeeds, and is removed when it fails.

    An OSError, most often of a full disk, names a path.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb", buffering=BUFFER) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def nearest_existing(folder: Path) -> Path:
    """`folder`, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def require_writable(folder: Path) -> None:
    """Raise a UserError if there is a file where `folder` should be or be made, or it cannot be written to."""
    existing = nearest_existing(folder)
    if not existing.is_dir():
        raise UserError(f"{folder}: a file is in the way of this folder; choose another place")
    if not os.access(existing, os.W_OK, effective_ids=True):
        raise UserError(f"{folder}: cannot be written to; change its permissions, or choose another place")


def free_space(folder: Path) -> int:
    """Free bytes on the disk of `folder`, which need not exist yet."""
    return shutil.disk_usage(nearest_existing(folder)).free


def require_space(folder: Path, size: int, what: str) -> None:
    """Raise a UserError if the disk of `folder`, which need not exist yet, has fewer than `size` bytes free."""
    free = free_space(folder)
    if free < size:
        needed = f"{free / 1e9:.1f} GB free, {size / 1e9:.1f} GB are needed"
        raise UserError(f"no space left for {what}: {folder} has {needed}; free some, or write elsewhere")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock `folder`, which is made if needed, for the time of the block, and remove half-written files from it."""
    require_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            remove_leftovers(folder)
            yield
    except Timeout:
        raise UserError(f"{folder}: another process is writing there; wait for it, or choose another name") from None


@contextmanager
def writing_behind(written: Callable[[int], object]) -> Iterator[Callable[[list[Action], Action, int], None]]:
    """Yield a function that lets threads write a batch while the caller makes the next one.

    Its arguments are the writes, a function that waits until they may begin, and a number that is passed to `written`
    when they are done. It blocks only while WAITING batches are unwritten, and raises what a write raised. At the end
    of the block all are written; if it raises, writes that have not begun are dropped.
    """
    pool, batches = ThreadPoolExecutor(WRITERS), deque()

    def settle(at_most: int) -> None:
        while len(batches) > at_most or (batches and all(write.done() for write in batches[0][0])):
            writes, number = batches.popleft()
            for write in writes:
                write.result()
            written(number)

    def begin(writes: list[Action], wait: Action, number: int) -> None:
        def run(write: Action) -> None:
            wait()
            write()

        settle(WAITING - 1)
        batches.append(([pool.submit(run, write) for write in writes], number))

    try:
        yield begin
        settle(0)
    finally:
        pool.shutdown(cancel_futures=True)
