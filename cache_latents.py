"""Images -> the moments of their VAE posteriors, in shards that mirror the image shards row for row.

    accelerate launch --num_processes=8 cache_latents.py --vae-arch f16d32 \\
        --vae-ckpt-path pretrained/e2e-vavae/e2e-vavae-400k.pt --vae-latents-name e2e-vavae

writes data/e2e-vavae/: moments (2C,h,w) of every image, mean and then standard deviation, with the VAE's statistics and
a fingerprint of its weights. Each shard is written whole by one process, so running the same command again continues
where it stopped, on any number of processes.
"""

import argparse
import json
from argparse import BooleanOptionalAction
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset import LATENT_FORMAT, images_directory, latent_fingerprint, latents_directory, open_images
from errors import Parser, run_script
from files import locked, replace_text, require_space
from models.autoencoder import VAE_CONFIGS, AutoencoderKL, pixels_to_image
from shards import is_made_by, refuse_other_shards, shard_name, write_shard
from training.checkpoint import fingerprint, read_latent_statistics
from training.cli import COUNT, POSITIVE, one_of
from training.distributed import process_state
from training.networks import latent_shape, load_vae, use_tf32

DTYPES = ("float16", "float32")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--vae-arch", default="f16d32", type=one_of("VAE", VAE_CONFIGS), help="architecture (default: %(default)s)"
    )
    parser.add_argument("--vae-ckpt-path", required=True, help="the VAE's weights, with their statistics beside")
    parser.add_argument(
        "--vae-latents-name", default="repae-invae-400k", help="folder below --output-dir (default: %(default)s)"
    )
    parser.add_argument("--data-dir", default="data", help="output of preprocessing.py (default: %(default)s)")
    parser.add_argument("--output-dir", default="data", help="where the folder goes (default: %(default)s)")
    parser.add_argument(
        "--pproc-batch-size", type=POSITIVE, default=128, help="images a process encodes at once (default: 128)"
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=DTYPES,
        help="float16 halves the disk (default: float32)",
    )
    parser.add_argument(
        "--mirrored", action="store_true", help="also cache the mirrored images; an epoch then has both of each"
    )
    parser.add_argument("--num-workers", type=COUNT, default=4, help="reading processes a process (default: 4)")
    parser.add_argument("--allow-tf32", action=BooleanOptionalAction, default=True, help="TF32 convolutions on GPUs")
    args = parser.parse_args(argv)
    directory = latents_directory(args.output_dir, args.vae_latents_name)
    if directory.resolve() in (images_directory(args.output_dir).resolve(), Path(args.output_dir).resolve()):
        parser.error(f"--vae-latents-name {args.vae_latents_name!r}: {directory} is not for latents; choose another")
    return args


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """uint8 pixels (B,3,R,R) -> moments (B,2C,h,w) float32: mean, then standard deviation."""
    posterior = vae.encode(pixels_to_image(pixels))
    return torch.cat([posterior.mean, posterior.std], dim=1)


def describe(images, vae: AutoencoderKL, args: argparse.Namespace) -> dict:
    """What the index says of the cache, but for its shards; its "fingerprint" decides what is in them."""
    shape = latent_shape(args.vae_arch, images.resolution)
    scale, bias = read_latent_statistics(args.vae_ckpt_path, shape[0])
    description = {
        "format": LATENT_FORMAT,
        "resolution": images.resolution,
        "shape": list(shape),
        "dtype": args.dtype,
        "mirrored": args.mirrored,
        "vae": args.vae_arch,
        "vae_fingerprint": fingerprint(vae.state_dict()),
        "statistics": {"latents_scale": scale.flatten().tolist(), "latents_bias": bias.flatten().tolist()},
        "image_fingerprint": images.fingerprint,
        "num_classes": images.num_classes,
        "classes": images.classes,
    }
    return {**description, "fingerprint": latent_fingerprint(description)}


def main() -> None:
    """Encode every shard that is not there yet, then write the index."""
    args = parse_args()
    use_tf32(args.allow_tf32)
    images = open_images(args.data_dir)
    state = process_state()
    vae = load_vae(args.vae_arch, args.vae_ckpt_path).eval().requires_grad_(False)
    index = describe(images, vae, args)
    vae.to(state.device)
    directory = latents_directory(args.output_dir, args.vae_latents_name)
    ends = np.cumsum(images.sizes).tolist()
    ranges = [range(end - size, end) for size, end in zip(images.sizes, ends, strict=True)]
    shards = [(shard_name(i), rows) for i, rows in enumerate(ranges)]
    with locked(directory) if state.is_main_process else nullcontext():
        others = "another VAE, other images, --dtype or --mirrored; delete it, or choose another --vae-latents-name"
        refuse_other_shards(directory, index["fingerprint"], {name for name, _ in shards}, others)
        write_shards(vae, images, shards, index, directory, args, state)
        state.wait_for_everyone()
        if state.is_main_process:
            index["shards"] = [{"file": name, "images": len(rows)} for name, rows in shards]
            replace_text(directory / "index.json", json.dumps(index, indent=1))
            what = f"moments of {len(images)} images, {args.dtype} {tuple(index['shape'])}"
            print(f"{what}, in {directory}, by {state.num_processes} processes")


def write_shards(
    vae: AutoencoderKL,
    images,
    shards: list[tuple[str, range]],
    index: dict,
    directory: Path,
    args: argparse.Namespace,
    state: PartialState,
) -> None:
    """Write this process's share of the missing shards: every world-th of them."""
    plan = index["fingerprint"]
    missing = [(name, rows) for name, rows in shards if not is_made_by(directory / name, plan)]
    numbers = 2 * int(np.prod(index["shape"])) * (1 + args.mirrored) * sum(len(rows) for _, rows in missing)
    require_space(directory, numbers * np.dtype(args.dtype).itemsize, "the latents")
    state.wait_for_everyone()  # all see the same ones missing before the first is written
    share = missing[state.process_index :: state.num_processes]
    # batches end with their shard, so that rows do not depend on the processes
    size = args.pproc_batch_size
    batches = [rows[first : first + size] for _, rows in share for first in range(0, len(rows), size)]
    loader = iter(DataLoader(images, batch_sampler=batches, num_workers=args.num_workers))
    total = sum(len(rows) for _, rows in share)
    with tqdm(total=total, unit="image", desc=args.vae_latents_name, disable=not state.is_main_process) as bar:
        for name, rows in share:
            arrays = encode_shard(vae, loader, len(rows), index, state.device)
            write_shard(directory / name, arrays, {"plan": plan, "vae_fingerprint": index["vae_fingerprint"]})
            bar.update(len(rows))


def encode_shard(vae: AutoencoderKL, loader: Iterator, rows: int, index: dict, device: torch.device) -> dict:
    """The arrays of one shard, from the next `rows` images of `loader`."""
    channels, *sides = index["shape"]
    names = ("moments", "mirrored") if index["mirrored"] else ("moments",)
    arrays = {name: np.empty((rows, 2 * channels, *sides), index["dtype"]) for name in names}
    arrays["labels"] = np.empty(rows, np.int64)
    done = 0
    while done < rows:
        pixels, labels = next(loader)
        part = slice(done, done + len(labels))
        pixels = pixels.to(device)
        arrays["moments"][part] = encode(vae, pixels).cpu().numpy()
        if index["mirrored"]:
            arrays["mirrored"][part] = encode(vae, pixels.flip(-1)).cpu().numpy()
        arrays["labels"][part] = labels.numpy()
        done += len(labels)
    return arrays


if __name__ == "__main__":
    run_script(main)
