"""Folders of shards: safetensors files of rows, written atomically, with an index.json beside them.

A shard holds `labels` (rows,) int64 and other tensors with as many rows. Its metadata hold the `plan` it was made by (a
hash of everything that decides its content, so that interrupted work continues and shards of other content are refused)
and a `digest` of its tensors. The index lists the rows and digests of 00000.safetensors, 00001.safetensors, ... in this
order. Each row is read from its file by `pread`, as forked workers may on one descriptor. The files of up to KEPT_OPEN
shards stay open.
"""

import hashlib
import json
import os
import resource
from array import array
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from errors import UserError
from storage.files import sync_folder, written_whole

SUFFIX = ".safetensors"
DTYPES = {"uint8": "U8", "int64": "I64", "float16": "F16", "float32": "F32"}  # numpy's names -> those of safetensors
KEPT_OPEN = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4  # a set of shards
THREADS = 8  # that read headers, for file systems with a delay
METADATA_KEY = "shard"  # the only one: safetensors writes several keys in random order
Layout = dict[str, tuple[str, tuple[int, ...]]]  # tensor -> numpy's name of its dtype, and the shape of a row


class Header(NamedTuple):
    """The header of a shard."""

    tensors: dict[str, dict]  # name -> "dtype", "shape" and "data_offsets", as safetensors writes them
    start: int  # the byte of the file that offsets are counted from
    metadata: dict  # as given to write_shard, and "digest"


def shard_name(number: int) -> str:
    """File name of shard `number`."""
    return f"{number:05d}{SUFFIX}"


def content_digest(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 of contiguous arrays and their names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(arrays[name])
    return digest.hexdigest()


def write_shard(path: Path, arrays: dict[str, np.ndarray], metadata: dict) -> None:
    """Write a shard atomically; the arguments decide all of its bytes.

    Args:
        path: the file.
        arrays: contiguous, of equally many rows; one of them is `labels` (rows,) int64.
        metadata: plain data; "plan" is one of the keys.
    """
    metadata = {**metadata, "digest": content_digest(arrays)}
    content = save(arrays, {METADATA_KEY: json.dumps(metadata)})
    with written_whole(path) as file:
        file.write(content)
    sync_folder(path.parent)


def read_header(path: str | Path) -> Header | None:
    """The header of a shard, or None if there is no such file or it is cut short or no shard."""
    try:
        with open(path, "rb") as file:
            start, size = 8 + int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
            tensors = json.loads(file.read(start - 8)) if start <= size else {}
        metadata = json.loads(tensors.pop("__metadata__")[METADATA_KEY])
        end = max(tensor["data_offsets"][1] for tensor in tensors.values())
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return Header(tensors, start, metadata) if start + end == size else None


def is_made_by(path: Path, plan: str) -> bool:
    """Whether there is a whole shard, judged by its size and header, that was made by `plan`."""
    header = read_header(path)
    return header is not None and header.metadata["plan"] == plan


def refuse_other_shards(directory: Path, plan: str, count: int, hint: str) -> None:
    """Raise a UserError if `directory` holds shards of another plan, or more than `count`; `hint` says what to do."""
    expected = {shard_name(number) for number in range(count)}
    for path in directory.glob(f"*{SUFFIX}"):
        header = read_header(path)
        if path.name not in expected or (header is not None and header.metadata["plan"] != plan):
            raise UserError(f"{directory} holds shards of {hint}")


def list_shards(directory: Path, count: int) -> list[dict]:
    """What an index lists as "shards": rows and digest of each."""
    headers = [read_header(directory / shard_name(number)) for number in range(count)]
    return [{"images": header.tensors["labels"]["shape"][0], "digest": header.metadata["digest"]} for header in headers]


def read_index(directory: Path, form: str, remedy: str) -> dict:
    """The index.json of a folder of shards, whose "format" has to be `form`.

    Raises:
        UserError: it is missing, damaged or of another format; it ends in `remedy`, how to get an index.
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


def open_shard(path: str | Path, layout: Layout, rows: int, remedy: str) -> Header:
    """The header of a shard of `rows` rows; a UserError if it is missing, cut short or of another layout."""
    header = read_header(path)
    if header is None:
        what = "damaged" if os.path.isfile(path) else "no such file, but index.json lists it"
        raise UserError(f"{path}: {what}; {remedy}")
    for name, (dtype, shape) in {"labels": ("int64", ()), **layout}.items():
        found = f"{header.tensors[name]['dtype']} {tuple(header.tensors[name]['shape'])}"
        expected = f"{DTYPES[dtype]} {(rows, *shape)}"
        if found != expected:
            raise UserError(f"{path}: holds {name} of {found}, but index.json says {expected}; delete it and {remedy}")
    return header


def verify_shard(path: Path, layout: Layout, rows: int, digest: str, remedy: str) -> None:
    """Read all of a shard; a UserError if its header or its digest is not what the index says."""
    open_shard(path, layout, rows, remedy)
    try:
        found = content_digest(load_file(path))
    except SafetensorError:
        found = None
    if found != digest:
        raise UserError(f"{path}: damaged (its digest is not that of index.json); delete the file and {remedy}")


class Shards:
    """The rows of the shards that an index lists.

    Args:
        directory: where they lie.
        index: as from `read_index`.
        layout: the tensors they hold beside labels.
        remedy: how to get a shard again, for messages.
    """

    def __init__(self, directory: Path, index: dict, layout: Layout, remedy: str):
        self.directory, self.layout, self.remedy = str(directory), layout, remedy
        self.sizes = [shard["images"] for shard in index["shards"]]
        self.ends = array("q", accumulate(self.sizes))
        self.offsets = {name: array("q") for name in layout}  # where the tensor begins in each shard's file
        with ThreadPoolExecutor(THREADS) as pool:
            opened = list(pool.map(self._open, range(len(self.sizes))))
        for header, _ in opened:
            for name, offsets in self.offsets.items():
                offsets.append(header.start + header.tensors[name]["data_offsets"][0])
        if not len(self):
            raise UserError(f"{directory} holds no images")
        self.labels = np.concatenate([labels for _, labels in opened])
        self.files: dict[int, int] = {}  # shard -> descriptor, of those that stay open

    def __getstate__(self) -> dict:
        return {**self.__dict__, "files": {}}  # descriptors are of one process and those that it forks

    def __del__(self):
        for file in getattr(self, "files", {}).values():
            os.close(file)

    def _path(self, number: int) -> str:
        return os.path.join(self.directory, shard_name(number))

    def _open(self, number: int) -> tuple[Header, np.ndarray]:
        path = self._path(number)
        header = open_shard(path, self.layout, self.sizes[number], self.remedy)
        offset = header.start + header.tensors["labels"]["data_offsets"][0]
        return header, np.fromfile(path, np.int64, self.sizes[number], offset=offset)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def row(self, i: int, name: str) -> tuple[np.ndarray, int]:
        """Row `i` of the tensor `name`, and its label."""
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        number = bisect_right(self.ends, i)
        row_in_shard = i - (self.ends[number] - self.sizes[number])
        dtype, shape = self.layout[name]
        row = np.empty(shape, dtype)
        if number not in self.files:
            if len(self.files) == KEPT_OPEN:
                os.close(self.files.pop(next(iter(self.files))))  # the one that was opened first
            self.files[number] = os.open(self._path(number), os.O_RDONLY)
        read = os.preadv(self.files[number], [row], self.offsets[name][number] + row_in_shard * row.nbytes)
        if read != row.nbytes:
            raise UserError(f"{self._path(number)}: was cut short meanwhile; {self.remedy}")
        return row, int(self.labels[i])
