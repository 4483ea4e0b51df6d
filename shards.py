"""Folders of shards: uncompressed safetensors files of rows, written atomically, and an index.json beside them.

A shard carries the `plan` it was made by, a hash of everything that decides its content, so that work that stopped is
continued and shards of something else are never mixed in. Opening one maps it into memory: reading a row costs one
copy, and any number of workers, forked or spawned, may read.
"""

import errno
import json
import os
import re
from bisect import bisect_right
from collections.abc import Collection
from itertools import accumulate
from pathlib import Path

from errors import UserError

SUFFIX = ".safetensors"


def shard_name(number: int) -> str:
    """File name of shard `number`."""
    return f"{number:05d}{SUFFIX}"


def shard_metadata(path: Path) -> dict[str, str]:
    """The metadata of a whole shard, or {} where there is none or it is cut short."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return {}
    try:
        with safe_open(path, "np") as shard:
            return shard.metadata() or {}
    except SafetensorError:
        return {}


def write_shard(path: Path, tensors: dict, metadata: dict[str, str]) -> None:
    """Write numpy arrays, contiguous and of equally many rows, so that `path` holds nothing or the whole shard.

    Raises:
        OSError: the file cannot be written, for want of space above all; it names `path`.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(tensors, temporary, metadata)
    except SafetensorError as error:
        temporary.unlink(missing_ok=True)
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code[1]) if code else errno.EIO, str(error), str(path)) from None
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)  # safetensors makes files that only their owner can read
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def refuse_other_shards(directory: Path, plan: str, expected: Collection[str], what: str) -> None:
    """Raise a UserError if `directory` holds shards of another plan, or other files than `expected`."""
    for path in directory.glob(f"*{SUFFIX}"):
        if shard_metadata(path).get("plan", plan) != plan or path.name not in expected:
            raise UserError(f"{directory} holds shards of {what}")


def read_index(directory: Path, form: str, remedy: str) -> dict:
    """The index.json of a folder of shards in format `form`; `remedy` says how to get one.

    Raises:
        UserError: it is missing, damaged or of another format.
    """
    path = directory / "index.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; {remedy}")
    try:
        index = json.loads(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); {remedy}") from None
    if not isinstance(index, dict) or index.get("format") != form:
        raise UserError(f"{path}: not an index of {form}; {remedy}")
    return index


class Shards:
    """The rows of the shards that an index lists, numbered through.

    Args:
        directory: where they lie.
        index: as from `read_index`, with "shards" [{"file", "images"}, ...].
        remedy: how to get a shard again.

    Raises:
        UserError: a shard is missing or cut short, or there are no rows.
    """

    def __init__(self, directory: Path, index: dict, remedy: str):
        self.paths = [directory / shard["file"] for shard in index["shards"]]
        self.sizes = [shard["images"] for shard in index["shards"]]
        self.ends = list(accumulate(self.sizes))
        for path in self.paths:
            if not shard_metadata(path):
                state = "damaged" if path.is_file() else "no such file, but index.json lists it"
                raise UserError(f"{path}: {state}; {remedy}")
        if not len(self):
            raise UserError(f"{directory} holds no images")
        self.opened: dict[int, object] = {}

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def row(self, i: int, names: tuple[str, ...]) -> list:
        """Row `i` of the named tensors."""
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        number = bisect_right(self.ends, i)
        if number not in self.opened:
            from safetensors import safe_open

            self.opened[number] = safe_open(self.paths[number], "pt")
        first = self.ends[number - 1] if number else 0
        return [self.opened[number].get_slice(name)[i - first] for name in names]

    def __getstate__(self) -> dict:
        # memory maps do not travel to spawned workers; each opens its own
        return {**self.__dict__, "opened": {}}
