"""Small files written atomically, and folders that one process at a time may write to."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from errors import UserError


def replace_text(path: Path, text: str) -> None:
    """Write a small UTF-8 file so that `path` holds either the old text or all of the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf8")
    os.replace(temporary, path)


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that becomes `path`, synced, when the block ends well, and is removed when it does not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def require_space(folder: Path, size: int, what: str) -> None:
    """Raise a UserError if the disk of `folder`, which need not exist yet, has fewer than `size` bytes free."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise UserError(
            f"no space left for {what}: {folder} has {free / 1e9:.1f} GB free, {size / 1e9:.1f} GB are needed; free "
            "some, or write elsewhere"
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within, no other process that asks for it may write to `folder`, which is made if it is not there.

    Raises:
        UserError: another process has it, or there is a file of that name.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder}: a file is in the way of this folder; choose another place") from None
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which workers would inherit and keep
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            os.close(descriptor)
            raise UserError(
                f"{folder}: another process is writing there; wait for it, or choose another name"
            ) from None
        # a file system without locks: go on without
    try:
        yield
    finally:
        os.close(descriptor)
