"""Folders of shards: uncompressed safetensors files of rows, written atomically, and an index.json beside them.

A shard holds tensors of equally many rows, their labels, and for each tensor NAME `NAME.crc`, a checksum of every row:
the CRC-32, as int64, of the row's bytes and then of its label's. It carries the `plan` it was made by, a hash of
everything that decides its content, so that work that stopped is continued and shards of something else are never mixed
in. Nothing stays open or in memory but where each shard's tensors begin: a row is read from its file, at a cost that
does not grow with the number of shards, by any number of workers, forked or spawned.
"""

import hashlib
import json
import math
import operator
import os
import reprlib
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from errors import UserError
from storage.files import sync_folder, written_whole

SUFFIX = ".safetensors"
# as numpy and safetensors call them
DTYPES = {"uint8": "U8", "int8": "I8", "int64": "I64", "float16": "F16", "float32": "F32"}
HEADER, LONGEST_HEADER = 4096, 100_000_000  # bytes of most headers, which one read fetches, and of any
THREADS, SHARDS_A_TASK = 8, 64  # that look at headers, for the sake of file systems with a delay
SHARD_LIST = [{"file": str, "images": int}]  # the form of an index's "shards"
ITEM_BYTES = {form: np.dtype(name).itemsize for name, form in DTYPES.items()}
Layout = dict[str, tuple[str, tuple[int, ...]]]  # tensor -> dtype, as safetensors writes it, and shape of a row


def shard_name(number: int) -> str:
    """File name of shard `number`."""
    return f"{number:05d}{SUFFIX}"


def open_shard(path: Path):
    """A whole shard as safetensors opens it, or None where there is none or it is cut short."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        return safe_open(path, "np")
    except SafetensorError:
        return None


def shard_metadata(path: Path) -> dict[str, str]:
    """The metadata of a whole shard, or {} where there is none or it is cut short."""
    shard = open_shard(path)
    return {} if shard is None else shard.metadata() or {}


def checksum(row: np.ndarray, label: int) -> int:
    """CRC-32 of a row's bytes and then of its label's as int64; `row` is contiguous."""
    return zlib.crc32(label.to_bytes(8, "little", signed=True), zlib.crc32(row))


def row_checksums(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The `checksum` of every row, (rows,) int64."""
    return np.array([checksum(row, label) for row, label in zip(rows, labels.tolist(), strict=True)], np.int64)


def rows_digest(arrays: dict[str, np.ndarray]) -> str:
    """Hash of a shard's rows, tensor by tensor in the order of their names, and then of their labels."""
    digest = hashlib.sha256()
    for name in [*sorted(arrays.keys() - {"labels"}), "labels"]:
        digest.update(arrays[name])
    return digest.hexdigest()


def metadata_digest(metadata: dict[str, str]) -> str:
    """Hash of a shard's metadata, but for itself."""
    others = sorted(item for item in metadata.items() if item[0] != "metadata_digest")
    return hashlib.sha256(json.dumps(others).encode()).hexdigest()


def write_shard(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write contiguous arrays of equally many rows, one of them `labels` (rows,) int64, with checksums and hashes.

    `path` holds what it held, if anything, or all of the shard, whose bytes the arguments decide.

    Raises:
        OSError: the file cannot be written, for want of space above all; it names `path`.
    """
    metadata = {**metadata, "digest": rows_digest(arrays)}
    metadata["metadata_digest"] = metadata_digest(metadata)
    checksums = {f"{name}.crc": row_checksums(rows, arrays["labels"]) for name, rows in arrays.items()}
    del checksums["labels.crc"]
    tensors = {**checksums, "labels": arrays["labels"], **arrays}  # those of 8 bytes first, which aligns all
    header, end = {"__metadata__": metadata}, 0
    for name, rows in tensors.items():
        start, end = end, end + rows.nbytes
        header[name] = {"dtype": DTYPES[rows.dtype.name], "shape": rows.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with written_whole(path) as file:  # not by safetensors, which orders metadata at random
        file.write(len(text).to_bytes(8, "little") + text)
        for rows in tensors.values():
            file.write(rows.reshape(-1).view(np.uint8))
    sync_folder(path.parent)


def is_made_by(path: Path, plan: str) -> bool:
    """Whether there is a shard, whole by its size and header, that was made by `plan`."""
    metadata = shard_metadata(path)
    hashed = metadata.get("metadata_digest") in (None, metadata_digest(metadata))
    return metadata.get("plan") == plan and hashed


def refuse_other_shards(directory: Path, plan: str, expected: Collection[str], what: str) -> None:
    """Raise a UserError if `directory` holds shards of another plan, or other files than `expected`."""
    for path in directory.glob(f"*{SUFFIX}"):
        if shard_metadata(path).get("plan", plan) != plan or path.name not in expected:
            raise UserError(f"{directory} holds shards of {what}")


def misfit(value: object, form: object, where: str = "") -> str | None:
    """What in a JSON value is not of a form, in words, or None.

    A form is a type (int: a whole number of at least 0, object: anything), a list of the form of all entries, a tuple
    of the forms of each, or a dict of the keys that have to be there, with their forms.
    """
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return f"{where} is {reprlib.repr(value)}, expected a mapping".lstrip()
        if missing := [key for key in form if key not in value]:
            return f"{where} lacks {missing[0]!r}".lstrip()
        parts = [(f"{where}.{key}".lstrip("."), value[key], part) for key, part in form.items()]
    elif isinstance(form, list | tuple):
        forms = form if isinstance(form, tuple) else form * len(value) if isinstance(value, list) else ()
        if not isinstance(value, list) or len(value) != len(forms):
            count = f" of {len(form)} entries" if isinstance(form, tuple) else ""
            return f"{where} is {reprlib.repr(value)}, expected a list{count}"
        parts = [(f"{where}[{i}]", entry, part) for i, (entry, part) in enumerate(zip(value, forms, strict=True))]
    else:
        kinds = {int: "a whole number of at least 0", float: "a number", str: "text", bool: "true or false"}
        right = isinstance(value, int | float if form is float else form)
        if form in (int, float):
            right = right and not isinstance(value, bool) and (form is float or value >= 0)
        return None if right else f"{where} is {reprlib.repr(value)}, expected {kinds[form]}"
    return next(filter(None, (misfit(entry, part, name) for name, entry, part in parts)), None)


def misnamed_shard(index: dict) -> str | None:
    """What is wrong with the file names in an index, or None: they have to be plain names, each there once.

    A name with a path in it would lead out of the index's folder.
    """
    names = [shard["file"] for shard in index["shards"]]
    for i, name in enumerate(names):
        if name in ("", "..") or Path(name).name != name or not name.isprintable():
            return f"shards[{i}].file is {reprlib.repr(name)}, expected the name of a file beside it"
    if len(set(names)) < len(names):
        return f"{next(name for name in names if names.count(name) > 1)} is listed twice"
    return None


def read_index(directory: Path, form: str, fields: dict, remedy: str) -> dict:
    """The index.json of a folder of shards in format `form`.

    Args:
        directory: where it lies.
        form: what its "format" has to be.
        fields: the form that `misfit` takes of whatever else is read from it but "shards".
        remedy: how to get one.

    Raises:
        UserError: it is missing, damaged or of another format, or names files outside of `directory`.
    """
    path = directory / "index.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; {remedy}")
    try:
        index = json.loads(path.read_text(encoding="utf8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); {remedy}") from None
    if not isinstance(index, dict) or index.get("format") != form:
        raise UserError(f"{path}: not an index of {form}; {remedy}")
    if wrong := misfit(index, {**fields, "shards": SHARD_LIST}) or misnamed_shard(index):
        raise UserError(f"{path}: damaged ({wrong}); {remedy}")
    return index


class Part(NamedTuple):
    """A tensor of a shard, by its header."""

    dtype: str  # as safetensors writes it
    shape: tuple[int, ...]
    offset: int  # bytes from the file's beginning


def read_parts(path: str | Path) -> dict[str, Part] | None:
    """The tensors of a whole shard, or None where there is none or it is cut short; by its header, without data."""
    if not os.path.isfile(path):  # a pipe would wait for somebody to write to it
        return None
    file = os.open(path, os.O_RDONLY)
    try:
        size, text = os.fstat(file).st_size, os.pread(file, HEADER, 0)
        begin = end = 8 + int.from_bytes(text[:8], "little")
        if end > min(size, LONGEST_HEADER):
            return None
        header, parts = json.loads(text[8:end] if end <= HEADER else os.pread(file, end - 8, 8)), {}
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, offset = entry["dtype"], tuple(map(operator.index, entry["shape"])), end
            end += math.prod(shape) * ITEM_BYTES[dtype]
            if entry["data_offsets"] != [offset - begin, end - begin]:
                return None
            parts[name] = Part(dtype, shape, offset)
    except (IsADirectoryError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None  # no header, or one of something else
    finally:
        os.close(file)
    return parts if end == size else None


def other_layout(parts: dict[str, Part], layout: Layout, rows: int) -> str | None:
    """How a shard's tensors differ from what they should be by their headers, in words, or None."""
    checksums = {f"{name}.crc": ("I64", ()) for name in layout if f"{name}.crc" in parts}
    expected = {"labels": ("I64", ()), **layout, **checksums}
    if strangers := sorted(set(parts) - set(expected)):
        return f"holds {strangers[0]!r}, which no such shard has"
    for name, (dtype, shape) in expected.items():
        if name not in parts:
            return f"holds no {name}"
        found = parts[name][:2]
        if found != (dtype, (rows, *shape)):
            return f"holds {name} of {found[0]} {found[1]}, but index.json says {dtype} {(rows, *shape)}"
    return None


def checked_parts(path: str | Path, layout: Layout, rows: int, remedy: str) -> dict[str, Part]:
    """The tensors of a shard that is what it should be by its size and header; data are not read.

    Raises:
        UserError: it is not; saying what is wrong, and what to do.
    """
    parts = read_parts(path)
    if parts is None:
        what = "damaged" if os.path.isfile(path) else "no such file, but index.json lists it"
        raise UserError(f"{path}: {what}; {remedy}")
    if wrong := other_layout(parts, layout, rows):
        raise UserError(f"{path}: {wrong}; delete it and {remedy}")
    return parts


def damage(path: Path, layout: Layout, rows: int, remedy: str) -> str | None:
    """What is wrong with a shard by its size and header, and what to do, or None; data are not read."""
    try:
        checked_parts(path, layout, rows, remedy)
    except UserError as error:
        return str(error)
    return None


def own_layout(shard) -> tuple[Layout, int]:
    """Tensors and rows of an open shard by its own header, for where no index says what they should be."""
    shapes = {
        name: (shard.get_slice(name).get_dtype(), shard.get_slice(name).get_shape()) for name in set(shard.keys())
    }
    rows = next(iter(shapes.get("labels", ("", [0]))[1]), 0)
    tensors = (name for name in shapes if name != "labels" and not name.endswith(".crc"))
    return {name: (shapes[name][0], tuple(shapes[name][1][1:])) for name in tensors}, rows


class ShardFacts(NamedTuple):
    """What reading all of a shard gives."""

    rows: int
    bytes: int
    metadata: dict[str, str]
    digest: str  # of the rows that are there
    labels: list[int]  # the lowest and the highest, if there are rows
    damage: str | None  # in words


def examine(path: Path) -> ShardFacts:
    """Read a shard that is whole by its size and header into memory, and compare it to its checksums and hashes.

    Shards from before there were any have nothing to be compared to.
    """
    shard = open_shard(path)
    metadata = shard.metadata() or {}
    arrays = {name: shard.get_tensor(name) for name in set(shard.keys())}
    checksums = {name: arrays.pop(name) for name in list(arrays) if name.endswith(".crc")}
    labels, digest = arrays["labels"], rows_digest(arrays)
    bad = set()
    for name, stored in checksums.items():
        found = row_checksums(arrays[name.removesuffix(".crc")], labels)
        bad.update(np.flatnonzero(found != stored).tolist())
    wrong = None
    if bad:
        wrong = f"row {min(bad)}{f' and {len(bad) - 1} more' if len(bad) > 1 else ''} damaged (checksum differs)"
    elif digest != metadata.get("digest", digest):
        wrong = "damaged (its hash differs)"
    elif checksums and metadata.get("metadata_digest") != metadata_digest(metadata):
        wrong = "damaged (the hash of its metadata differs)"
    extremes = [int(labels.min()), int(labels.max())] if len(labels) else []
    return ShardFacts(len(labels), path.stat().st_size, metadata, digest, extremes, wrong)


def read_into(path: str, targets: list[tuple[np.ndarray, int]]) -> bool:
    """Fill arrays with what stands at these offsets of a file; False where the file is gone or too short.

    Not from a map of the file: the kernel would fetch a row from a disk in several requests, and end the process where
    the disk fails.
    """
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return all(os.preadv(file, [target], offset) == target.nbytes for target, offset in targets)
    finally:
        os.close(file)


class Shards:
    """The rows of the shards that an index lists, numbered through.

    Args:
        directory: where they lie.
        index: as from `read_index`.
        layout: what tensors they hold beside labels.
        remedy: how to get a shard again.

    Raises:
        UserError: a shard is missing, cut short or not what the index says, or there are no rows.
    """

    def __init__(self, directory: Path, index: dict, layout: Layout, remedy: str):
        self.directory, self.remedy, self.num_classes = directory, remedy, index["num_classes"]
        self.files = [shard["file"] for shard in index["shards"]]
        self.sizes = [shard["images"] for shard in index["shards"]]
        self.ends = array("q", accumulate(self.sizes))
        # where each tensor begins in each shard, and 0 for checksums that it has none of
        names = ["labels", *layout, *(f"{name}.crc" for name in layout)]
        self.offsets = {name: array("q") for name in names}

        def offsets_of(first: int) -> list[list[int]]:
            some = slice(first, first + SHARDS_A_TASK)
            shards = zip(self.files[some], self.sizes[some], strict=True)
            found = [checked_parts(os.path.join(directory, file), layout, rows, remedy) for file, rows in shards]
            return [[parts[name].offset if name in parts else 0 for parts in found] for name in names]

        with ThreadPoolExecutor(THREADS) as pool:
            for columns in pool.map(offsets_of, range(0, len(self.files), SHARDS_A_TASK)):
                for name, column in zip(names, columns, strict=True):
                    self.offsets[name].extend(column)
        if not len(self):
            raise UserError(f"{directory} holds no images")
        numpy_names = {form: name for name, form in DTYPES.items()}
        self.forms = {name: (np.dtype(numpy_names[dtype]), shape) for name, (dtype, shape) in layout.items()}

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def row(self, i: int, *names: str) -> tuple:
        """Row `i` of the tensors called `names`, torch tensors, and its label, an int.

        Raises:
            UserError: they are not what was written (shards from before there were checksums are read unchecked), or
                the index knows of fewer classes.
        """
        import torch  # here, so that preprocessing.py starts without it

        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        number = bisect_right(self.ends, i)
        k = i - (self.ends[number - 1] if number else 0)
        path = os.path.join(self.directory, self.files[number])
        rows = {name: np.empty(shape, dtype) for name, (dtype, shape) in self.forms.items() if name in names}
        checksums = {name: np.empty((), np.int64) for name in rows if self.offsets[f"{name}.crc"][number]}
        label = np.empty((), np.int64)
        targets = {**rows, "labels": label, **{f"{name}.crc": crc for name, crc in checksums.items()}}
        places = [self.offsets[part][number] + k * target.nbytes for part, target in targets.items()]
        if not read_into(path, list(zip(targets.values(), places, strict=True))):
            raise UserError(f"{path}: was changed or removed meanwhile; {self.remedy}")
        label = int(label)
        if any(checksum(rows[name], label) != crc for name, crc in checksums.items()):
            raise UserError(f"{path}: row {k} damaged (checksum differs); delete the file and {self.remedy}")
        if not 0 <= label < self.num_classes:
            raise UserError(
                f"{path}: row {k} has label {label}, but index.json says {self.num_classes} classes; "
                f"delete both and {self.remedy}"
            )
        return *(torch.from_numpy(rows[name]) for name in names), label
