"""A trained experiment, ours or published, ready to sample from: averaged transformer, VAE, and their flags."""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from errors import UserError, unknown_name
from models.autoencoder import VAE_CONFIGS, AutoencoderKL, VAEConfig
from models.encoder_table import encoder_specs
from models.sit import SIT_SIZES, SiT, SiT_models
from weights.checkpoint_io import (
    BEST_CHECKPOINT,
    check_weights,
    checkpoint_path,
    ema_latent_statistics,
    fingerprint,
    latest_checkpoint,
    load_weights,
    read_checkpoint,
    same_statistics,
    strip_prefixes,
    training_flags,
    vae_files,
)
from weights.vae import VAESource, latent_shape, load_vae, open_vae, read_latent_statistics

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
        same &= same_statistics(trained, beside)
    if not same:
        raise UserError(f"VAE {path}: the transformer was trained on another one; name that by --vae-ckpt FILE")
    return vae


LABEL_TABLE = "y_embedder.embedding_table.weight"


def start_from_trained(sit: SiT, args: argparse.Namespace, run_folder: Path, log: Callable[[str], None]) -> None:
    """Start a fresh transformer from the average in --sit-ckpt, if that is given; logs what was taken.

    A run that continues restores its own checkpoint, and does not look at the file. The latent normaliser stays as it
    is, that of the run's VAE.

    Raises:
        UserError: the file is no checkpoint of a transformer, or of one that does not fit.
    """
    if args.sit_ckpt is None:
        return
    source = f"--sit-ckpt {args.sit_ckpt}"
    if args.continue_train_exp_dir is not None:
        raise UserError(f"{source}: --continue-train-exp-dir says where to start as well; leave one of them out")
    if latest_checkpoint(run_folder / "checkpoints") is not None:
        return
    checkpoint = read_checkpoint(args.sit_ckpt, "transformer weights")
    if not isinstance(checkpoint.get("ema"), dict):
        raise UserError(f"{source}: no ema inside; expected a checkpoint of train_repae.py or train_ldm_only.py")
    ema = {key: value.float() for key, value in strip_prefixes(checkpoint["ema"]).items()}
    flags = {**REFERENCE_DEFAULTS, **training_flags(checkpoint, Path(args.sit_ckpt))}
    refuse_other_architecture(ema, sit, args, source)
    state, changes = fitted(ema, flags, sit, args)
    load_weights(sit, state, source)
    log("; ".join([f"{source}: starting from the average of step {checkpoint.get('steps', 'unknown')}", *changes]))
    for what in differences(ema, flags, sit, args):
        log(f"warning: {source}: {what}")


def refuse_other_architecture(ema: dict[str, Tensor], sit: SiT, args: argparse.Namespace, source: str) -> None:
    """Raise a UserError unless `ema` is of the channels, depth, width and patch of `sit`, and of its kind of blocks."""
    if missing := [key for key in ("pos_embed", "x_embedder.proj.weight", LABEL_TABLE) if key not in ema]:
        raise UserError(f"{source}: no {missing[0]} in ema; expected the weights of a SiT")
    width, channels, patch, _ = ema["x_embedder.proj.weight"].shape
    if channels != sit.in_channels:
        fitting = ", ".join(name for name, config in VAE_CONFIGS.items() if config.z_channels == channels) or "none"
        raise UserError(
            f"{source}: a transformer of latents of {channels} channels, but --vae {args.vae} has {sit.in_channels}; "
            f"VAEs that fit: {fitting}"
        )
    depth = len({key.split(".")[1] for key in ema if key.startswith("blocks.")})
    if (depth, width, patch) != (len(sit.blocks), sit.pos_embed.shape[2], sit.patch_size):
        names = [f"{name}/{patch}" for name, size in SIT_SIZES.items() if size[:2] == (depth, width)]
        raise UserError(
            f"{source}: a transformer of {depth} blocks of width {width} and patch {patch}, but --model is "
            f"{args.model}; " + (f"use --model {names[0]}" if names else "no --model has this size")
        )
    if (qk_norm := any(".q_norm." in key for key in ema)) != args.qk_norm:
        flag = "--qk-norm" if qk_norm else "--no-qk-norm"
        raise UserError(f"{source}: a transformer that was trained with {flag}; use {flag}")


def fitted(
    ema: dict[str, Tensor], flags: dict, sit: SiT, args: argparse.Namespace
) -> tuple[dict[str, Tensor], list[str]]:
    """`ema`, trained with `flags`, as a state dict of the fresh `sit`; and in words what was resampled or not taken."""
    own = sit.state_dict()
    state = {key: value for key, value in ema.items() if not key.startswith(("bn.", "projectors."))}
    state |= {key: value for key, value in own.items() if key.startswith("bn.")}
    state["pos_embed"] = resample_positions(ema["pos_embed"], sit.grid)
    state[LABEL_TABLE], fresh = fit_labels(ema[LABEL_TABLE], own[LABEL_TABLE], flags["num_classes"], sit.num_classes)
    projectors, fresh_projectors = fit_projectors(ema, own, str(flags.get("enc_type")), args.enc_type)
    changes, fresh = [], fresh + fresh_projectors
    if (before := math.isqrt(ema["pos_embed"].shape[1])) != sit.grid:
        changes.append(f"positions resampled from {before}x{before} to {sit.grid}x{sit.grid} tokens")
    return state | projectors, changes + ([f"fresh: {', '.join(fresh)}"] if fresh else [])


def resample_positions(table: Tensor, grid: int) -> Tensor:
    """Position table (1,T,D) of a square grid -> (1,grid²,D), bicubic with antialias; the same one if T is grid²."""
    from timm.layers import resample_abs_pos_embed

    return resample_abs_pos_embed(table, [grid, grid], num_prefix_tokens=0)


def fit_labels(trained: Tensor, own: Tensor, classes: int, own_classes: int) -> tuple[Tensor, list[str]]:
    """A label table with the rows of `trained` (of so many `classes`) that `own` has a place for, and what stays fresh.

    Classes are taken if there are as many, the null label's row, which is the last of a table that has one, if both
    have one.
    """
    table, fresh = own.cpu().clone(), []
    if classes == own_classes:
        table[:classes] = trained[:classes]
    else:
        fresh.append(f"{own_classes} classes instead of {classes}")
    if len(own) > own_classes:
        if len(trained) > classes:
            table[-1] = trained[-1]
        else:
            fresh.append("null label")
    return table, fresh


def fit_projectors(
    ema: dict[str, Tensor], own: dict[str, Tensor], enc_type: str, own_enc_type: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Projectors of the encoders `own_enc_type`: those of `ema` for the same ones, if of the same kind and shape.

    The second result says which stay fresh.
    """
    before, found, fresh = enc_type.split(","), {}, []
    for number, name in enumerate(encoder_specs(own_enc_type)):
        prefix = f"projectors.{number}."
        mine = {key: value for key, value in own.items() if key.startswith(prefix)}
        theirs = {}
        if name in before:
            old = f"projectors.{before.index(name)}."
            theirs = {prefix + key.removeprefix(old): value for key, value in ema.items() if key.startswith(old)}
        fits = {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}
        found |= theirs if fits else mine
        fresh += [] if fits else [f"projector of {name}"]
    return found, fresh


def differences(ema: dict[str, Tensor], flags: dict, sit: SiT, args: argparse.Namespace) -> list[str]:
    """What fits, but means something else to this run than to the one that `ema` was trained in, in words."""
    found = []
    if not same_statistics(ema_latent_statistics(ema, f"--sit-ckpt {args.sit_ckpt}"), sit.latent_statistics()):
        found.append(
            f"trained on latents of another VAE, or by other statistics, than those of --vae-ckpt {args.vae_ckpt}"
        )
    if flags["path_type"] != args.path_type:
        found.append(f"trained with --path-type {flags['path_type']}, not {args.path_type}")
    return found
