"""Starting a transformer from a trained one, which may have seen images of another size, other encoders or classes.

A transformer of 256 px is tuned to 512 px, or any other square size, by resampling its position table to the other grid
of tokens, as vision transformers are (Dosovitskiy et al., arXiv 2010.11929, section 3.2).
"""

import argparse
import math
from pathlib import Path

from torch import Tensor

from errors import UserError
from models.autoencoder import VAE_CONFIGS
from models.encoders import encoder_specs
from models.sit import SIT_SIZES, SiT
from training.checkpoint import (
    check_weights,
    ema_latent_statistics,
    latest_checkpoint,
    read_checkpoint,
    same_statistics,
    strip_prefixes,
    training_flags,
)
from training.diffusion import TransformerNets
from training.distributed import unwrap
from training.experiment import REFERENCE_DEFAULTS
from training.run import Run

LABEL_TABLE = "y_embedder.embedding_table.weight"


def start_from_trained(nets: TransformerNets, args: argparse.Namespace, run: Run) -> None:
    """Start the transformer and its average from the average in --sit-ckpt, if that is given; says what was taken.

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
    if latest_checkpoint(run.checkpoints.directory) is not None:
        return
    checkpoint = read_checkpoint(args.sit_ckpt, "transformer weights")
    if not isinstance(checkpoint.get("ema"), dict):
        raise UserError(f"{source}: no ema inside; expected a checkpoint of train_repae.py or train_ldm_only.py")
    ema = {key: value.float() for key, value in strip_prefixes(checkpoint["ema"]).items()}
    flags = {**REFERENCE_DEFAULTS, **training_flags(checkpoint, Path(args.sit_ckpt))}
    refuse_other_architecture(ema, nets.ema, args, source)
    state, changes = fitted(ema, flags, nets.ema, args)
    check_weights(nets.ema, state, source)
    for sit in (unwrap(nets.sit), nets.ema):
        sit.load_state_dict(state)
    run.print(
        "; ".join([f"{source}: starting from the average of step {checkpoint.get('steps', 'unknown')}", *changes])
    )
    for what in differences(ema, flags, nets.ema, args):
        run.print(f"warning: {source}: {what}")


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
