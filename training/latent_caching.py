"""What a frozen network makes of every image, in shards that mirror the image shards row for row.

The scripts that cache something bring the network; which shards are missing, which process makes them and how they are
read and written is the same for all. Each shard is written whole by one process, so running the same command again
continues where it stopped, on any number of processes.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset import ShardFormat, cache_directory, cache_fingerprint, images_directory
from errors import Parser, UserError
from models.numerics import to_device, to_host
from storage.files import locked, replace_text, require_space, writing_behind
from storage.shards import DTYPES, is_made_by, refuse_other_shards, shard_name, write_shard

NUMPY_DTYPES = {stored: name for name, stored in DTYPES.items()}
Encode = Callable[[Tensor], tuple[Tensor, ...]]  # pixels -> the tensors of a shard's layout that are not mirrored


class Cache(NamedTuple):
    """What is cached, and where."""

    what: str  # in a word
    directory: Path
    kind: ShardFormat
    index: dict  # but for its shards; its "fingerprint" decides what is in them
    source_key: str  # the entry of the index, a fingerprint of the network, that every shard repeats
    conflict_hint: str  # what shards of another fingerprint are of, and what to do about them
    overflow_hint: str  # what to do where values are not finite, or the stored dtype cannot hold them


def check_name(parser: Parser, flag: str, name: str, output_dir: str, what: str) -> None:
    """Let `parser` complain if the `name` given by `flag` is the images' folder below `output_dir`, or that itself."""
    directory = cache_directory(output_dir, name)
    if directory.resolve() in (images_directory(output_dir).resolve(), Path(output_dir).resolve()):
        parser.error(f"{flag} {name!r}: {directory} is not for {what}; choose another")


def describe_cache(images, args: argparse.Namespace, form: str, shape: list[int], network: dict) -> dict:
    """What an index in format `form` says of a cache, but for its shards; its "fingerprint" decides what is in them.

    `shape` is a row's, `network` what is to be known of what makes it.
    """
    description = {
        "format": form,
        "resolution": images.resolution,
        "shape": shape,
        "dtype": args.dtype,
        "mirrored": args.mirrored,
        **network,
        "image_fingerprint": images.fingerprint,
        "num_classes": images.num_classes,
        "classes": images.classes,
    }
    return {**description, "fingerprint": cache_fingerprint(description)}


def cache_images(cache: Cache, images, encode: Encode, args: argparse.Namespace, state: PartialState) -> None:
    """Write every shard that is not there yet, each by one process, and then the index.

    Args:
        cache: what it is and where it goes.
        images: from dataset.open_images.
        encode: what is cached of uint8 pixels (B,3,R,R) on this process's device, a row an image.
        args: --pproc-batch-size and --num-workers are used.
        state: this process among all.

    Raises:
        UserError: the folder holds something else or is being written to, the disk is too small, a value not finite.
    """
    directory, index = cache.directory, cache.index
    ends = np.cumsum(images.sizes).tolist()
    ranges = [range(end - size, end) for size, end in zip(images.sizes, ends, strict=True)]
    shards = [(shard_name(i), rows) for i, rows in enumerate(ranges)]
    with locked(directory) if state.is_main_process else nullcontext():
        refuse_other_shards(directory, index["fingerprint"], {name for name, _ in shards}, cache.conflict_hint)
        write_shards(cache, images, shards, encode, args, state)
        state.wait_for_everyone()
        if state.is_main_process:
            index["shards"] = [{"file": name, "images": len(rows)} for name, rows in shards]
            replace_text(directory / "index.json", json.dumps(index, indent=1))
            tensor = next(iter(cache.kind.layout(index)))
            what = f"{tensor} of {len(images)} images, {index['dtype']} {tuple(index['shape'])}"
            print(f"{what}, in {directory}, by {state.num_processes} processes")


def write_shards(
    cache: Cache,
    images,
    shards: list[tuple[str, range]],
    encode: Encode,
    args: argparse.Namespace,
    state: PartialState,
) -> None:
    """Write this process's share of the missing shards: every world-th of them."""
    plan, directory = cache.index["fingerprint"], cache.directory
    missing = [(name, rows) for name, rows in shards if not is_made_by(directory / name, plan)]
    row = sum(math.prod(array.shape[1:]) * array.itemsize for array in empty_arrays(cache).values())
    require_space(directory, row * sum(len(rows) for _, rows in missing), f"the {cache.what}")
    state.wait_for_everyone()  # all see the same ones missing before the first is written
    share = missing[state.process_index :: state.num_processes]
    # batches end with their shard, so that rows do not depend on the processes
    size = args.pproc_batch_size
    batches = [rows[first : first + size] for _, rows in share for first in range(0, len(rows), size)]
    pinned = state.device.type == "cuda"
    loader = iter(DataLoader(images, batch_sampler=batches, num_workers=args.num_workers, pin_memory=pinned))
    total = sum(len(rows) for _, rows in share)
    metadata = {"plan": plan, cache.source_key: cache.index[cache.source_key]}
    with (
        tqdm(total=total, unit="image", desc=directory.name, disable=not state.is_main_process) as bar,
        writing_behind(bar.update) as write,
    ):
        for name, rows in share:
            arrays, wait = encode_shard(cache, loader, len(rows), encode, state.device)
            write([partial(write_finite, cache, directory / name, arrays, metadata)], wait, len(rows))


def empty_arrays(cache: Cache) -> dict[str, np.ndarray]:
    """The arrays of no rows but for their labels."""
    layout = cache.kind.layout(cache.index)
    return {name: np.empty((0, *shape), NUMPY_DTYPES[dtype]) for name, (dtype, shape) in layout.items()}


def write_finite(cache: Cache, path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write a shard; a UserError if it holds values that are not finite, as those are that float16 cannot hold."""
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UserError(f"{path}: {name} are not finite, or too large for {array.dtype}; {cache.instead}")
    write_shard(path, arrays, metadata)


def encode_shard(
    cache: Cache, loader: Iterator, rows: int, encode: Encode, device: torch.device
) -> tuple[dict[str, np.ndarray], Callable[[], None]]:
    """The arrays of a shard, from the next `rows` images of `loader`, and what waits for their values."""
    empty = empty_arrays(cache)
    dtypes = [getattr(torch, array.dtype.name) for array in empty.values()]
    parts, labels = [], []
    while sum(map(len, labels)) < rows:
        pixels, their_labels = next(loader)
        (pixels,) = to_device([pixels], device)
        found = (*encode(pixels), *(encode(pixels.flip(-1)) if cache.index["mirrored"] else ()))
        parts.append([tensor.to(dtype) for tensor, dtype in zip(found, dtypes, strict=True)])
        labels.append(their_labels)
    if not rows:  # of a shard whose images could not be read
        return {**empty, "labels": np.empty(0, np.int64)}, lambda: None
    arrays, waits = zip(*(to_host(torch.cat(tensors)) for tensors in zip(*parts, strict=True)), strict=True)
    # the last copy is done when those before it are
    return {**dict(zip(empty, arrays, strict=True)), "labels": torch.cat(labels).numpy()}, waits[-1]
