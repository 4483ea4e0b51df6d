"""Extract the tuned VAE of a joint run: as the three files of this project, or as a folder of diffusers.

    python save_vae_weights.py --repae-ckpt exps/joint/checkpoints/0400000.pt --vae-name e2e-vae --save-dir exps

writes exps/e2e-vae/e2e-vae.pt, e2e-vae-latents-stats.pt and e2e-vae-discriminator-ckpt.pt. With --format diffusers it
writes config.json and diffusion_pytorch_model.safetensors, which from_pretrained of the VAE's class in diffusers loads.
Either form gets a model card, README.md, with pictures of the run. The statistics are those of the batch normalisation
in the EMA transformer: scale 1/sqrt(running_var), bias running_mean (Leng et al., arXiv 2504.10483).

Instead of a joint run, --vae and --vae-ckpt name any VAE that training takes; the script then converts its format, and
writes no card.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from errors import Parser, UserError, run_script
from flags import groups
from flags.config import parse_flags
from models.autoencoder import VAE_CONFIGS
from models.diffusers_vae import Architecture
from models.discriminator import PatchDiscriminator
from weights.checkpoint_io import (
    check_weights,
    ema_latent_statistics,
    pt_bytes,
    read_checkpoint,
    strip_prefixes,
    training_flags,
    vae_files,
    write_new,
)
from weights.downloads import is_offline
from weights.model_card import write_model_card
from weights.vae import diffusers_files, known_statistics, load_vae, open_vae, stated_architecture


class Extracted(NamedTuple):
    """A VAE and what belongs to it."""

    config: Architecture | None  # None: the architecture named by the run's flags is unknown
    weights: dict[str, Tensor]
    statistics: dict[str, Tensor]
    discriminator: dict[str, Tensor] | None
    resolution: int  # side in pixels of the images that it was trained on


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--repae-ckpt", type=Path, help="a checkpoint of train_repae.py")
    groups.add_vae_flags(parser, vae=None, vae_ckpt=None)
    parser.add_argument("--vae-name", default="e2e-vae", help="name of folder and files (default: %(default)s)")
    parser.add_argument("--save-dir", type=Path, default=Path("exps"), help="where the folder goes (default: exps)")
    parser.add_argument(
        "--format", default="pt", choices=("pt", "diffusers"), help="this project's three files, or diffusers' folder"
    )
    about_metrics = "results of evaluate.py for the model card, of this VAE or of its samples; may be repeated"
    parser.add_argument("--metrics", type=Path, action="append", default=[], metavar="FILE", help=about_metrics)
    groups.add_offline_flag(parser)
    args = parse_flags(parser, argv, "save_vae_weights")
    if (args.repae_ckpt is None) == (args.vae_ckpt is None):
        parser.error("one of these is required: --repae-ckpt, or --vae NAME --vae-ckpt PATH, or --vae diffusers:PATH")
    if args.vae_ckpt is not None and args.vae is None:
        parser.error("--vae-ckpt needs its architecture, --vae NAME")
    return args


def extract(checkpoint: dict, path: Path) -> Extracted:
    """The tuned VAE in the joint checkpoint at `path`, ours or published."""
    if missing := [key for key in ("vae", "discriminator", "ema") if not isinstance(checkpoint.get(key), dict)]:
        raise UserError(f"{path}: no {', '.join(missing)} inside; expected a checkpoint of train_repae.py")
    flags = training_flags(checkpoint, path)
    config = stated_architecture(checkpoint) or VAE_CONFIGS.get(flags.get("vae"))
    with torch.device("meta"):
        networks = {"discriminator": PatchDiscriminator()}
        if config is not None:
            networks["vae"] = config.build()
    for key, network in networks.items():
        check_weights(network, checkpoint[key], f"{path}: {key}")
    scale, bias = ema_latent_statistics(checkpoint["ema"], str(path))
    return Extracted(
        config,
        strip_prefixes(checkpoint["vae"]),
        {"latents_scale": scale, "latents_bias": bias},
        strip_prefixes(checkpoint["discriminator"]),
        flags.get("resolution", 256),
    )


def convert(args: argparse.Namespace) -> Extracted:
    """The VAE named by --vae and --vae-ckpt, unchanged."""
    source = open_vae(args.vae, args.vae_ckpt, is_offline(args))
    scale, bias = known_statistics(source)
    beside = vae_files(source.weights).discriminator
    return Extracted(
        source.config,
        load_vae(source).state_dict(),
        {"latents_scale": scale, "latents_bias": bias},
        read_checkpoint(beside, "discriminator weights") if beside.is_file() else None,
        (source.published or {}).get("sample_size", 256),
    )


def save(found: Extracted, folder: Path, name: str, form: str) -> list[Path]:
    """Write a VAE in the form of --format; returns the files."""
    if form == "diffusers":
        if found.config is None:
            raise UserError("--format diffusers: the --vae of the checkpoint's run is an unknown architecture")
        return write_new(diffusers_files(folder, found.weights, found.config, found.statistics, found.resolution))
    parts = zip(vae_files(folder / f"{name}.pt"), (found.weights, found.statistics, found.discriminator), strict=True)
    return write_new({file: pt_bytes(part) for file, part in parts if part is not None})


def main() -> None:
    args = parse_args()
    folder, name, path = args.save_dir / args.vae_name, args.vae_name, args.repae_ckpt
    if path is None:
        files = save(convert(args), folder, name, args.format)
    else:
        checkpoint = read_checkpoint(path)
        files = save(extract(checkpoint, path), folder, name, args.format)
        files += write_model_card(folder, name, checkpoint, path, args.metrics)
    for file in files:
        print(f"wrote {file}")


if __name__ == "__main__":
    run_script(main)
