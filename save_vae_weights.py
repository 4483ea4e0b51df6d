"""The tuned VAE of a joint run -> three files that every other script takes.

    python save_vae_weights.py --repae-ckpt exps/joint/checkpoints/0400000.pt --vae-name e2e-vae --save-dir exps

writes exps/e2e-vae/e2e-vae.pt, e2e-vae-latents-stats.pt and e2e-vae-discriminator-ckpt.pt. The statistics are those of
the averaged transformer's batch normalisation: scale 1/sqrt(running_var), bias running_mean (Leng et al., arXiv
2504.10483).
"""

import argparse
from pathlib import Path

import torch

from errors import Parser, UserError, run_script
from models.autoencoder import VAE_CONFIGS, build_vae
from models.discriminator import PatchDiscriminator
from training.checkpoint import (
    check_weights,
    ema_latent_statistics,
    fingerprint,
    read_checkpoint,
    strip_prefixes,
    training_flags,
    vae_files,
    write_atomically,
)
from training.config import parse_flags


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("--repae-ckpt", type=Path, required=True, help="a checkpoint of train_repae.py")
    parser.add_argument("--vae-name", default="e2e-vae", help="name of folder and files (default: %(default)s)")
    parser.add_argument("--save-dir", type=Path, default=Path("exps"), help="where the folder goes (default: exps)")
    return parse_flags(parser, argv, "save_vae_weights")


def extract(path: Path) -> list[dict]:
    """What goes into a VAE's three files, in the order of `vae_files`, from a joint checkpoint, ours or published.

    Raises:
        UserError: the checkpoint is missing, damaged, of a run without a VAE, or its weights do not fit its `--vae`.
    """
    checkpoint = read_checkpoint(path)
    if missing := [key for key in ("vae", "discriminator", "ema") if not isinstance(checkpoint.get(key), dict)]:
        raise UserError(f"{path}: no {', '.join(missing)} inside; expected a checkpoint of train_repae.py")
    check_architecture(checkpoint, path)
    scale, bias = ema_latent_statistics(checkpoint["ema"], str(path))
    statistics = {"latents_scale": scale, "latents_bias": bias}
    return [strip_prefixes(checkpoint["vae"]), statistics, strip_prefixes(checkpoint["discriminator"])]


def check_architecture(checkpoint: dict, path: Path) -> None:
    """Raise a UserError if VAE or discriminator are not the networks that the checkpoint's flags name."""
    name = training_flags(checkpoint, path).get("vae")
    with torch.device("meta"):
        networks = {"discriminator": PatchDiscriminator()}
        if name in VAE_CONFIGS:
            networks["vae"] = build_vae(name)
    for key, network in networks.items():
        check_weights(network, checkpoint[key], f"{path}: {key}")


def main() -> None:
    """Extract and write."""
    args = parse_args()
    parts = extract(args.repae_ckpt)
    files = vae_files(args.save_dir / args.vae_name / f"{args.vae_name}.pt")
    for part, file in zip(parts, files, strict=True):
        if file.exists() and fingerprint(read_checkpoint(file)) != fingerprint(part):
            raise UserError(f"{file} is there and differs; delete it, or choose another --vae-name")
    for part, file in zip(parts, files, strict=True):
        write_atomically(part, file)
        print(f"wrote {file}")


if __name__ == "__main__":
    run_script(main)
