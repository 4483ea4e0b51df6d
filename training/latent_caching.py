"""The moments of all images' VAE posteriors, in shards that mirror the image shards row for row.

Each shard is written whole by one process, so that running the same command again continues where it stopped, on any
number of processes.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import DataLoader

from dataset import ImageDataset, shard_layout
from errors import UserError
from models.numerics import in_full_batches, to_device, to_host
from progress import progress_bar
from storage.files import locked, replace_text, require_space, writing_behind
from storage.shards import is_made_by, list_shards, refuse_other_shards, shard_name, write_shard


def cache_latents(
    directory: Path,
    index: dict,
    images: ImageDataset,
    encode: Callable[[Tensor], Tensor],
    args: argparse.Namespace,
    state: PartialState,
) -> None:
    """Write every shard that is not there yet, each by one process, and then the index.

    `index` is what index.json says but for its shards; its "fingerprint" decides what is in them. `encode` maps uint8
    pixels (B,3,R,R) on this process's device to moments (B,2C,h,w).

    Raises:
        UserError: the folder holds something else, the disk is too small, or a value is not finite.
    """
    ends, layout, plan = np.cumsum(images.sizes).tolist(), shard_layout(index), index["fingerprint"]
    shards = [(shard_name(i), range(end - images.sizes[i], end)) for i, end in enumerate(ends)]
    with locked(directory) if state.is_main_process else nullcontext():
        hint = "another VAE, other images, --dtype or --mirrored; delete it, or choose another --vae-latents-name"
        refuse_other_shards(directory, plan, len(shards), hint)
        missing = [(name, rows) for name, rows in shards if not is_made_by(directory / name, plan)]
        row_bytes = sum(math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in layout.values())
        require_space(directory, row_bytes * sum(len(rows) for _, rows in missing), "the latents")
        state.wait_for_everyone()  # all see the same ones missing before the first is written
        share = missing[state.process_index :: state.num_processes]
        size, pinned = args.pproc_batch_size, state.device.type == "cuda"
        if args.compile:
            encode = in_full_batches(encode, min(size, max(images.sizes)))
        # each batch ends with its shard, so that rows do not depend on the processes
        parts = [rows[first : first + size] for _, rows in share for first in range(0, len(rows), size)]
        batches = iter(DataLoader(images, batch_sampler=parts, num_workers=args.num_workers, pin_memory=pinned))
        total = sum(len(rows) for _, rows in share)
        with (
            progress_bar(total=total, unit="image", desc=directory.name, disable=not state.is_main_process) as bar,
            writing_behind(bar.update) as write,
        ):
            for name, rows in share:
                arrays, wait = encode_shard(index, batches, len(rows), encode, state.device)
                write([partial(write_finite, directory / name, arrays, {"plan": plan})], wait, len(rows))
        state.wait_for_everyone()
        if state.is_main_process:
            index = {**index, "shards": list_shards(directory, len(shards))}
            replace_text(directory / "index.json", json.dumps(index, indent=1))
            what = f"moments of {len(images)} images, {index['dtype']} {tuple(index['shape'])}"
            print(f"{what}, in {directory}, by {state.num_processes} processes")


def write_finite(path: Path, arrays: dict[str, np.ndarray], metadata: dict) -> None:
    """Write a shard; a UserError if it holds values that are not finite, such as those that float16 cannot hold."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {name} are not finite in {array.dtype}; use --dtype float32, or another VAE")
    write_shard(path, arrays, metadata)


def encode_shard(
    index: dict, batches: Iterator, rows: int, encode: Callable[[Tensor], Tensor], device: torch.device
) -> tuple[dict[str, np.ndarray], Callable[[], None]]:
    """The arrays of a shard, from the next `rows` images of `batches`, and a function that waits for their values."""
    layout = shard_layout(index)
    if not rows:  # a shard whose images could not be read
        arrays = {name: np.empty((0, *shape), dtype) for name, (dtype, shape) in layout.items()}
        return {**arrays, "labels": np.empty(0, np.int64)}, lambda: None
    dtype = getattr(torch, index["dtype"])
    parts, labels = {name: [] for name in layout}, []
    while sum(map(len, labels)) < rows:
        pixels, their_labels = next(batches)
        (pixels,) = to_device([pixels], device)
        parts["moments"].append(encode(pixels).to(dtype))
        if index["mirrored"]:
            parts["mirrored"].append(encode(pixels.flip(-1)).to(dtype))
        labels.append(their_labels)
    arrays, waits = zip(*(to_host(torch.cat(tensors)) for tensors in parts.values()), strict=True)
    # the last copy is done when those before it are
    return {**dict(zip(layout, arrays, strict=True)), "labels": torch.cat(labels).numpy()}, waits[-1]
