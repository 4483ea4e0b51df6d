"""Images -> the moments of their VAE posteriors, in shards that mirror the image shards row for row.

    accelerate launch --num_processes=8 cache_latents.py --vae-arch f16d32 \\
        --vae-ckpt-path pretrained/e2e-vavae/e2e-vavae-400k.pt --vae-latents-name e2e-vavae

writes data/e2e-vavae/: moments (2C,h,w) of every image, mean and then standard deviation, with the VAE's statistics and
a fingerprint of its weights. Each shard is written whole by one process, so running the same command again continues
where it stopped, on any number of processes.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from dataset import LATENT_FORMAT, ImageDataset, fingerprint_of, images_directory, open_images
from errors import Parser, run_script
from flags.config import parse_flags
from flags.groups import add_caching_flags
from models.autoencoder import AutoencoderKL, pixels_to_image
from models.numerics import compile_in_place, use_tf32
from training.distributed import process_state
from training.latent_caching import cache_latents
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
def encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """uint8 pixels (B,3,R,R) -> moments (B,2C,h,w) float32: mean, then standard deviation."""
    posterior = vae.encode(pixels_to_image(pixels))
    return torch.cat([posterior.mean, posterior.std], dim=1)


def describe(images: ImageDataset, source: VAESource, vae: AutoencoderKL, args: argparse.Namespace) -> dict:
    scale, bias = known_statistics(source)
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


def main() -> None:
    args = parse_args()
    use_tf32(args.allow_tf32)
    images = open_images(args.data_dir)
    state = process_state()
    source = open_vae(args.vae_arch, args.vae_ckpt_path, is_offline(args))
    vae = load_vae(source).eval().requires_grad_(False)
    index = describe(images, source, vae, args)
    vae.to(state.device)
    compile_in_place([vae.encoder], args.compile, state.device)
    directory = Path(args.output_dir, args.vae_latents_name)
    cache_latents(directory, index, images, lambda pixels: encode(vae, pixels), args, state)


if __name__ == "__main__":
    run_script(main)
