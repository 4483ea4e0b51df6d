"""A trained experiment, ours or published, ready to sample from: averaged transformer, VAE, and their flags."""

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from errors import UserError, unknown_name
from models.autoencoder import VAE_CONFIGS, AutoencoderKL, build_vae
from models.sit import SiT, SiT_models
from training.checkpoint import (
    BEST_CHECKPOINT,
    check_weights,
    checkpoint_path,
    ema_latent_statistics,
    fingerprint,
    latest_checkpoint,
    load_weights,
    read_checkpoint,
    read_latent_statistics,
    same_statistics,
    strip_prefixes,
    training_flags,
    vae_files,
)
from training.networks import latent_shape, load_vae

# what runs did whose args.json lacks the flag
REFERENCE_DEFAULTS = {"resolution": 256, "num_classes": 1000, "path_type": "linear", "encoder_depth": 8}


class Experiment(NamedTuple):
    """What sampling needs of a run."""

    name: str
    step: int
    flags: dict
    sit: SiT
    vae: AutoencoderKL


def load_experiment(exp_path: Path, step: int | str | None, vae_ckpt: str | None) -> Experiment:
    """The experiment in a run's folder at `step` ("best", or None: its latest checkpoint), in eval mode on the CPU.

    A joint run's checkpoint holds its VAE. A frozen-VAE run's VAE is the one its flags name, or `vae_ckpt`.

    Raises:
        UserError: something is missing, damaged, of another architecture, or the VAE is not the one trained with.
    """
    path = find_checkpoint(exp_path, step)
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint.get("ema"), dict):
        raise UserError(f"{path}: no ema inside; expected a checkpoint of train_repae.py or train_ldm_only.py")
    flags = {**REFERENCE_DEFAULTS, **training_flags(checkpoint, path)}
    for key, table in (("model", SiT_models), ("vae", VAE_CONFIGS)):
        if key not in flags:
            raise UserError(f"{path}: its run's flags do not name --{key}; put the run's args.json into {exp_path}")
        if flags[key] not in table:
            raise UserError(f"{path}: " + unknown_name(key, str(flags[key]), table))
    ema = strip_prefixes(checkpoint["ema"])
    ema = {key: value.float() if value.is_floating_point() else value for key, value in ema.items()}
    sit = load_transformer(ema, flags, f"{path}: ema")
    if isinstance(checkpoint.get("vae"), dict):
        if vae_ckpt is not None:
            raise UserError(f"--vae-ckpt {vae_ckpt}: {path} holds the VAE it was trained with; leave the flag out")
        vae = build_vae(flags["vae"])
        load_weights(vae, checkpoint["vae"], f"{path}: vae")
    else:
        known = (checkpoint.get("identity") or {}).get("vae")
        vae = load_frozen_vae(flags, vae_ckpt, ema_latent_statistics(ema, str(path)), known)
    name = Path(os.path.abspath(exp_path)).name  # of a link, not of what it points to
    return Experiment(name, int(checkpoint.get("steps", path.stem)), flags, sit, vae.eval())


def find_checkpoint(exp_path: Path, step: int | str | None) -> Path:
    """Where the checkpoint of a run's folder lies.

    Raises:
        UserError: no such folder, or no checkpoint in it.
    """
    folder = exp_path / "checkpoints"
    if not exp_path.is_dir():
        raise UserError(f"--exp-path {exp_path}: no such folder")
    if step == "best":
        return folder / BEST_CHECKPOINT
    path = latest_checkpoint(folder) if step is None else checkpoint_path(folder, step)
    if path is None:
        raise UserError(f"--exp-path {exp_path}: no checkpoints like 0400000.pt in {folder}")
    return path


def load_transformer(ema: dict[str, Tensor], flags: dict, source: str) -> SiT:
    """The transformer with the weights `ema`, without projectors; null label and q/k norm are what the weights have."""
    latent = latent_shape(flags["vae"], flags["resolution"])
    ema = {key: value for key, value in ema.items() if not key.startswith("projectors.")}
    table = ema.get("y_embedder.embedding_table.weight")
    has_null = table is not None and len(table) > flags["num_classes"]
    try:
        with torch.device("meta"):
            sit = SiT_models[flags["model"]](
                input_size=latent[1],
                in_channels=latent[0],
                num_classes=flags["num_classes"],
                class_dropout_prob=0.1 if has_null else 0.0,
                z_dims=(),
                encoder_depth=flags["encoder_depth"],
                qk_norm=any(".q_norm." in key for key in ema),
            )
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    sit.load_state_dict(check_weights(sit, ema, source), assign=True)
    return sit.eval().requires_grad_(False)


def load_frozen_vae(
    flags: dict, vae_ckpt: str | None, trained: tuple[Tensor, Tensor], known: str | None
) -> AutoencoderKL:
    """The VAE of a frozen-VAE run: the fingerprint of its weights must be `known`, if that is; its statistics, if they
    are beside it, those that the transformer was `trained` with."""
    path = vae_ckpt or flags.get("vae_ckpt")
    if path is None or not Path(path).is_file():
        raise UserError(
            f"the run was trained on the VAE {path}, which is not there; say where it lies by --vae-ckpt FILE"
        )
    vae = load_vae(flags["vae"], path)
    same = known in (None, fingerprint(vae.state_dict()))
    if vae_files(path).statistics.is_file():
        beside = read_latent_statistics(path, trained[0].numel())
        same &= same_statistics(trained, beside)
    if not same:
        raise UserError(f"VAE {path}: the transformer was trained on another one; name that by --vae-ckpt FILE")
    return vae
