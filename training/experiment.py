"""A trained experiment, ours or published, ready to sample from: averaged transformer, VAE, and their flags."""

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from errors import UserError, unknown_name
from models.autoencoder import AutoencoderKL, VAEConfig
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
    strip_prefixes,
    training_flags,
    vae_files,
)
from training.vae_weights import VAESource, latent_shape, load_vae, open_vae, read_latent_statistics

# what runs did whose args.json lacks the flag
REFERENCE_DEFAULTS = {"resolution": 256, "num_classes": 1000, "path_type": "linear", "encoder_depth": 8}


class Experiment(NamedTuple):
    """What sampling needs of a run."""

    name: str
    step: int
    flags: dict
    sit: SiT
    vae: AutoencoderKL


def load_experiment(
    exp_path: Path, step: int | str | None = None, vae_ckpt: str | None = None, offline: bool = False
) -> Experiment:
    """The experiment in a run's folder at `step` ("best", or None: its latest checkpoint), in eval mode on the CPU.

    A joint run's checkpoint holds its VAE. A frozen-VAE run's VAE is the one its flags name, or `vae_ckpt`, whatever
    --vae-ckpt takes.

    Raises:
        UserError: something is missing, damaged, of another architecture, or the VAE is not the one trained with.
    """
    path = find_checkpoint(exp_path, step)
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint.get("ema"), dict):
        raise UserError(f"{path}: no ema inside; expected a checkpoint of train_repae.py or train_ldm_only.py")
    flags = {**REFERENCE_DEFAULTS, **training_flags(checkpoint, path)}
    for key in ("model", "vae"):
        if key not in flags:
            raise UserError(f"{path}: its run's flags do not name --{key}; put the run's args.json into {exp_path}")
    if flags["model"] not in SiT_models:
        raise UserError(f"{path}: " + unknown_name("model", str(flags["model"]), SiT_models))
    source = trained_vae(checkpoint, flags, vae_ckpt, path, offline)
    ema = strip_prefixes(checkpoint["ema"])
    ema = {key: value.float() if value.is_floating_point() else value for key, value in ema.items()}
    sit = load_transformer(ema, flags, latent_shape(source, flags["resolution"]), f"{path}: ema")
    if isinstance(checkpoint.get("vae"), dict):
        vae = AutoencoderKL(source.config)
        load_weights(vae, checkpoint["vae"], f"{path}: vae")
    else:
        known = (checkpoint.get("identity") or {}).get("vae")
        vae = load_frozen_vae(source, ema_latent_statistics(ema, str(path)), known)
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


def trained_vae(checkpoint: dict, flags: dict, vae_ckpt: str | None, path: Path, offline: bool) -> VAESource:
    """The VAE of a run's checkpoint: its architecture, and where its weights lie unless the checkpoint holds them.

    Raises:
        UserError: it is unknown, or not there; or `vae_ckpt` names one though the checkpoint holds it.
    """
    if isinstance(checkpoint.get("vae"), dict) and vae_ckpt is not None:
        raise UserError(f"--vae-ckpt {vae_ckpt}: {path} holds the VAE it was trained with; leave the flag out")
    architecture = (checkpoint.get("identity") or {}).get("architecture")
    known = None if architecture is None else VAEConfig(**architecture)
    weights = None if isinstance(checkpoint.get("vae"), dict) else vae_ckpt or flags.get("vae_ckpt")
    try:
        return open_vae(str(flags["vae"]), weights, offline, known)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def load_transformer(ema: dict[str, Tensor], flags: dict, latent: tuple[int, int, int], source: str) -> SiT:
    """The transformer with the weights `ema` for latents (C,h,w), without projectors.

    Null label and q/k norm are what the weights have.
    """
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


def load_frozen_vae(source: VAESource, trained: tuple[Tensor, Tensor], known: str | None) -> AutoencoderKL:
    """The VAE of a frozen-VAE run: the fingerprint of its weights must be `known`, if that is; its statistics, if they
    are beside it, those that the transformer was `trained` with."""
    path = source.weights
    if path is None or not path.is_file():
        raise UserError(
            f"the run was trained on the VAE {path}, which is not there; say where it lies by --vae-ckpt FILE"
        )
    vae = load_vae(source)
    same = known in (None, fingerprint(vae.state_dict()))
    if vae_files(path).statistics.is_file():
        beside = read_latent_statistics(path, trained[0].numel())
        same &= all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(trained, beside, strict=True))
    if not same:
        raise UserError(f"VAE {path}: the transformer was trained on another one; name that by --vae-ckpt FILE")
    return vae
