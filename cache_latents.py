"""Images -> the moments of their VAE posteriors, in shards that mirror the image shards row for row.

    accelerate launch --num_processes=8 cache_latents.py --vae-arch f16d32 \\
        --vae-ckpt-path pretrained/e2e-vavae/e2e-vavae-400k.pt --vae-latents-name e2e-vavae

writes data/e2e-vavae/: moments (2C,h,w) of every image, mean and then standard deviation, with the VAE's statistics and
a fingerprint of its weights. Each shard is written whole by one process, so running the same command again continues
where it stopped, on any number of processes.
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
from torch import Tensor
from torch.utils.data import DataLoader

from dataset import LATENT_FORMAT, ImageDataset, fingerprint_of, images_directory, open_images, shard_layout
from errors import Parser, UserError, run_script
from flags.config import parse_flags
from flags.groups import add_caching_flags
from models.autoencoder import Autoencoder, pixels_to_image
from models.numerics import compile_in_place, in_full_batches, to_device, to_host, use_tf32
from progress import progress_bar
from storage.files import locked, replace_text, require_space, writing_behind
from storage.shards import is_made_by, list_shards, refuse_other_shards, shard_name, write_shard
from training.distributed import process_state
from weights.checkpoint_io import fingerprint
from weights.downloads import is_offline
from weights.vae import VAESource, known_statistics, latent_shape, load_vae, open_vae


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_caching_flags(parser)
    args = parse_flags(parser, argv, "cache_latents")
    if args.vae_ckpt_path is None:
        parser.error("one of these is required: --vae-ckpt-path, --vae-arch diffusers:PATH_OR_ID")
    directory = Path(args.output_dir, args.vae_latents_name)
    if directory.resolve() in (images_directory(args.output_dir).resolve(), Path(args.output_dir).resolve()):
        parser.error(f"--vae-latents-name {args.vae_latents_name!r}: {directory} is not for latents; choose another")
    return args


@torch.no_grad()
def encode(vae: Autoencoder, pixels: Tensor) -> Tensor:
    """uint8 pixels (B,3,R,R) -> moments (B,2C,h,w) float32: mean, then standard deviation."""
    posterior = vae.encode(pixels_to_image(pixels))
    return torch.cat([posterior.mean, posterior.std], dim=1)


def latent_index(
    images: ImageDataset, source: VAESource, statistics: tuple[Tensor, Tensor], vae: Autoencoder, args
) -> dict:
    """The content of index.json; `statistics` are scale and bias of the VAE's latents, (1,C,1,1) each."""
    scale, bias = statistics
    index = {
        "format": LATENT_FORMAT,
        "resolution": images.resolution,
        "shape": list(latent_shape(source, images.resolution)),
        "dtype": args.dtype,
        "mirrored": args.mirrored,
        "vae": args.vae_arch,
        "vae_fingerprint": fingerprint(vae.state_dict()),
        "statistics": {"latents_scale": scale.flatten().tolist(), "latents_bias": bias.flatten().tolist()},
        "image_fingerprint": images.fingerprint,
        "num_classes": images.num_classes,
        "class_counts": images.class_counts,
        "classes": images.classes,
    }
    return {**index, "fingerprint": fingerprint_of(index)}


def write_shards(
    directory: Path,
    index: dict,
    images: ImageDataset,
    encode: Callable[[Tensor], Tensor],
    args: argparse.Namespace,
    state,
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


def main() -> None:
    args = parse_args()
    use_tf32(args.allow_tf32)
    images = open_images(args.data_dir)
    state = process_state()
    source = open_vae(args.vae_arch, args.vae_ckpt_path, is_offline(args))
    vae = load_vae(source).eval().requires_grad_(False)
    statistics = known_statistics(source, print if state.is_main_process else lambda text: None)
    index = latent_index(images, source, statistics, vae, args)
    vae.to(state.device)
    args.compile = compile_in_place(vae.parts[:1], args.compile, state.device)
    directory = Path(args.output_dir, args.vae_latents_name)
    write_shards(directory, index, images, partial(encode, vae), args, state)


if __name__ == "__main__":
    run_script(main)
