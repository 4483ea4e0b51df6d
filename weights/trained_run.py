"""A trained run, ours or published: to sample from, and to start another run's transformer from."""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from errors import UserError, unknown_name
from models.autoencoder import Autoencoder
from models.encoder_table import encoder_specs
from models.sit import SiT, SiT_models
from weights.checkpoint_io import (
    BEST_CHECKPOINT,
    check_weights,
    checkpoint_path,
    ema_latent_statistics,
    fingerprint,
    latest_checkpoint,
    load_weights,
    read_weights,
    refuse_not_finite,
    same_statistics,
    strip_prefixes,
    training_flags,
    vae_files,
)
from weights.published_sit import OUTPUT, TIME, convert_published, model_of
from weights.vae import (
    VAESource,
    known_statistics,
    latent_shape,
    load_vae,
    open_vae,
    stated_architecture,
)

# the settings of published runs whose flags lack these
REFERENCE_DEFAULTS = {
    "resolution": 256,
    "num_classes": 1000,
    "cfg_prob": 0.1,
    "path_type": "linear",
    "encoder_depth": 8,
}
SD_VAE, SD_VAE_SCALE = "f8d4", 0.18215
SIT_PATHS = {"Linear": "linear", "GVP": "cosine"}  # as SiT's flags name them
LABEL_TABLE = "y_embedder.embedding_table.weight"
SIT_KEYS = ("pos_embed", "x_embedder.proj.weight", LABEL_TABLE, TIME, f"{OUTPUT}weight", f"{OUTPUT}bias")
NORMALISER = "bn.running_var"
UNNORMALISED = (
    "it has no statistics of latents, and those of this run's VAE hold (SiT and REPA multiply SD-VAE's latents by "
    "0.18215, as --vae-ckpt stabilityai/sd-vae-ft-ema does)"
)
Log = Callable[[str], None]


class Experiment(NamedTuple):
    """What sampling needs of a run: EMA transformer and VAE, in eval mode on the CPU, and the run's flags.

    `class_names` and `class_counts`, the numbers of training images, are by label; empty if the checkpoint lacks them.
    `assumed` says what was taken for granted of a transformer that is not in a run's folder.
    """

    name: str
    step: int
    flags: dict
    sit: SiT
    vae: Autoencoder
    class_names: Sequence[str] = ()
    class_counts: Sequence[int] = ()
    assumed: str = ""


def load_experiment(
    exp_path: Path, step: int | str | None = None, vae_ckpt: str | None = None, offline: bool = False, log: Log = print
) -> Experiment:
    """The experiment in a run's folder at `step` ("best", or None for its latest checkpoint).

    The checkpoint of a joint run holds its VAE. A frozen-VAE run's VAE is `vae_ckpt`, any value that --vae-ckpt takes,
    or the one named by the run's flags. A published checkpoint without statistics of latents gets `assumed_statistics`.
    `log` prints where these come from, and which weights are taken where there is no EMA.

    Raises:
        UserError: something is missing, damaged or of another architecture, or the VAE is not the one trained with.
    """
    path = find_checkpoint(exp_path, step)
    checkpoint = read_weights(path, "checkpoint")
    ema, taken, flags = read_transformer(checkpoint, path, str(path))
    if "model" not in flags or "vae" not in flags:
        raise UserError(f"{path}: its flags lack --model or --vae; write model and vae into {exp_path}/args.json")
    if flags["model"] not in SiT_models:
        raise UserError(f"{path}: " + unknown_name("model", str(flags["model"]), SiT_models))
    is_joint = isinstance(checkpoint.get("vae"), dict)
    if is_joint and vae_ckpt is not None:
        raise UserError(f"--vae-ckpt {vae_ckpt}: {path} holds the VAE it was trained with; leave the flag out")
    weights = None if is_joint else vae_ckpt or flags.get("vae_ckpt")
    source = open_vae(str(flags["vae"]), weights, offline, stated_architecture(checkpoint))
    if is_joint:
        vae = source.config.build()
        load_weights(vae, checkpoint["vae"], f"{path}: vae")
        refuse_not_finite(vae, f"{path}: vae")
    elif source.weights is None:
        raise UserError(f"{path}: its flags do not name the weights of its VAE; name them by --vae-ckpt FILE")
    elif not source.weights.is_file():
        missing = f"the run was trained on the VAE {source.weights}, which is not there"
        raise UserError(f"{missing}; say where it lies by --vae-ckpt FILE")
    else:
        vae = load_frozen_vae(source, checkpoint, ema, str(path), log)
    sit = load_transformer(ema, flags, latent_shape(source, flags["resolution"]), f"{path}: {taken}")
    refuse_not_finite(sit, f"{path}: {taken}")
    if taken != "ema":
        log(f"{path}: sampling from {taken}, of {sit.num_classes} classes")
    name = Path(os.path.abspath(exp_path)).name  # the name of a link, not of its target
    step = int(checkpoint.get("steps", path.stem))
    return Experiment(name, step, flags, sit, vae.eval(), *classes_of(checkpoint))


def load_transformer_file(
    path: Path, vae: str, vae_ckpt: str | None, path_type: str | None, offline: bool, log: Log = print
) -> Experiment:
    """A transformer's file and the VAE `vae` (a --vae) with weights `vae_ckpt`, to sample without a run's folder.

    Size, patch, latent and classes are those of the weights, the statistics of latents those of `assumed_statistics`
    where the weights hold none. `path_type` is that of its training, where the file does not say it.

    Raises:
        UserError: the file is not that of a transformer, or not for latents of this VAE, or holds the VAE that it was
            trained with, or the VAE is missing.
    """
    where = f"--sit-ckpt {path}"
    checkpoint = read_weights(path, "transformer weights")
    if isinstance(checkpoint.get("vae"), dict):
        raise UserError(f"{where}: holds the VAE that it was trained with; name the run's folder by --exp-path")
    ema, taken, flags = read_transformer(checkpoint, path, where)
    if path_type is not None and not training_flags(checkpoint, path):
        flags["path_type"] = path_type
    source = open_vae(vae, vae_ckpt, offline)
    if source.weights is None:
        raise UserError(f"{where}: needs the weights of its VAE; give --vae-ckpt")
    channels, patch = ema["x_embedder.proj.weight"].shape[1:3]
    if channels != source.config.z_channels:
        what = f"the transformer is for latents of {channels} channels, but --vae {vae} has {source.config.z_channels}"
        raise UserError(f"{where}: {what}; name the VAE that it was trained on")
    side = math.isqrt(ema["pos_embed"].shape[1]) * patch
    flags |= {"model": model_of(ema, where), "vae": vae, "resolution": side * source.config.downsampling}
    notes = [f"{taken}; path {flags['path_type']}"]
    network = load_frozen_vae(source, checkpoint, ema, where, notes.append)
    sit = load_transformer(ema, flags, (channels, side, side), where)
    refuse_not_finite(sit, where)
    assumed = "; ".join(notes)
    log(f"{where}: {flags['model']} for {flags['resolution']} px, {assumed}")
    step = int(checkpoint.get("steps", 0))
    return Experiment(path.stem, step, flags, sit, network.eval(), *classes_of(checkpoint), assumed)


def classes_of(checkpoint: dict) -> tuple[Sequence[str], Sequence[int]]:
    """Names of the classes and their numbers of training images, by label; empty where a checkpoint lacks them."""
    classes = checkpoint.get("classes") or {}
    return classes.get("names") or (), classes.get("counts") or ()


def assumed_statistics(source: VAESource, log: Log) -> tuple[Tensor, Tensor]:
    """Scale and bias, (1,C,1,1), of the latents of a transformer that has none: SD-VAE's latents are multiplied by its
    factor, as SiT and REPA do, and those of another VAE normalised by its statistics."""
    if source.name != SD_VAE:
        return known_statistics(source, log)
    log(f"latents multiplied by {SD_VAE_SCALE}")
    shape = (1, source.config.z_channels, 1, 1)
    return torch.full(shape, SD_VAE_SCALE), torch.zeros(shape)


def normaliser_weights(scale: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """The normaliser's entries of a transformer's state dict, from a VAE's statistics (1,C,1,1)."""
    zero = torch.tensor(0)
    return {"bn.running_mean": bias.flatten(), NORMALISER: scale.flatten() ** -2, "bn.num_batches_tracked": zero}


def find_checkpoint(exp_path: Path, step: int | str | None) -> Path:
    """The checkpoint of `step`, "best", or None for the latest; a UserError if the run's folder has none."""
    if not exp_path.is_dir():
        raise UserError(f"--exp-path {exp_path}: no such folder")
    folder = exp_path / "checkpoints"
    if step == "best":
        return folder / BEST_CHECKPOINT
    path = latest_checkpoint(folder) if step is None else checkpoint_path(folder, step)
    if path is None:
        raise UserError(f"--exp-path {exp_path}: no checkpoints like 0400000.pt in {folder}")
    return path


def read_transformer(checkpoint: dict, path: Path, source: str) -> tuple[dict[str, Tensor], str, dict]:
    """A transformer's weights in float32 and without wrappers' prefixes; which these are; and its run's flags.

    They are the first of `ema`, `model`, `state_dict` and the checkpoint itself; those of no SiT are a UserError.
    Those that SiT and REPA published are converted. The number of classes is that of the label table, whatever the
    flags say.
    """
    part = next((key for key in ("ema", "model", "state_dict") if isinstance(checkpoint.get(key), dict)), None)
    state = checkpoint if part is None else checkpoint[part]
    state = strip_prefixes({key: value for key, value in state.items() if isinstance(value, Tensor)})
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    if missing := [key for key in SIT_KEYS if key not in state]:
        raise UserError(f"{source}: no {missing[0]} inside; expected the weights of a SiT, alone or as ema")
    state, converted = convert_published(state)
    flags = {**REFERENCE_DEFAULTS, **training_flags(checkpoint, path)}
    flags["path_type"] = SIT_PATHS.get(flags["path_type"], flags["path_type"])
    flags["num_classes"] = len(state[LABEL_TABLE]) - (flags["cfg_prob"] > 0)  # the last row is the null label
    taken = {"ema": "ema", None: "a bare state dict"}.get(part, f"{part} (no ema inside)")
    return state, f"{taken} {converted}".strip(), flags


def load_transformer(ema: dict[str, Tensor], flags: dict, latent: tuple[int, int, int], source: str) -> SiT:
    """The transformer with weights `ema` for latents (C,h,w), without projectors.

    It has a null label and q/k norm if the weights have them.
    """
    ema = {key: value for key, value in ema.items() if not key.startswith("projectors.")}
    has_null = len(ema.get(LABEL_TABLE, ())) > flags["num_classes"]
    with torch.device("meta"):
        sit = SiT_models[flags["model"]](
            input_size=latent[1],
            in_channels=latent[0],
            num_classes=flags["num_classes"],
            class_dropout_prob=0.1 if has_null else 0.0,
            z_dims=(),
            encoder_depth=1,  # of projectors, which sampling does not need
            qk_norm=any(".q_norm." in key for key in ema),
        )
    sit.load_state_dict(check_weights(sit, ema, source), assign=True)
    return sit.eval().requires_grad_(False)


def load_frozen_vae(source: VAESource, checkpoint: dict, ema: dict, where: str, log: Log) -> Autoencoder:
    """The VAE of a transformer that was trained on a frozen one. If the transformer's weights `ema` have no statistics
    of latents, as published ones, `assumed_statistics` are added to them.

    Raises:
        UserError: the VAE's weights, or the statistics beside them, are missing, not finite, or not those that the
            transformer was trained with.
    """
    path, vae = source.weights, load_vae(source)
    refuse_not_finite(vae, f"VAE {path}")
    if NORMALISER not in ema:
        ema |= normaliser_weights(*assumed_statistics(source, log))
        return vae
    same = (checkpoint.get("identity") or {}).get("vae") in (None, fingerprint(vae.state_dict()))
    if vae_files(path).statistics.is_file():
        same &= same_statistics(ema_latent_statistics(ema, where), known_statistics(source))
    if not same:
        raise UserError(f"VAE {path}: the transformer was trained on another one; name that by --vae-ckpt FILE")
    return vae


def start_from_trained(sit: SiT, args: argparse.Namespace, run_folder: Path, log: Log) -> None:
    """Initialise a fresh transformer from the EMA weights in --sit-ckpt, if given; logs which weights stay fresh.

    A run that continues restores its own checkpoint and ignores the file. The latent normaliser keeps the statistics of
    the run's VAE.

    Raises:
        UserError: the file is not a checkpoint of a transformer, or of one that does not fit.
    """
    if args.sit_ckpt is None:
        return
    source = f"--sit-ckpt {args.sit_ckpt}"
    if args.continue_train_exp_dir is not None:
        raise UserError(f"{source}: --continue-train-exp-dir says where to start as well; leave one of them out")
    if latest_checkpoint(run_folder / "checkpoints") is not None:
        return
    checkpoint = read_weights(Path(args.sit_ckpt), "transformer weights")
    ema, taken, flags = read_transformer(checkpoint, Path(args.sit_ckpt), source)
    found, expected = (tuple(part["x_embedder.proj.weight"].shape) for part in (ema, sit.state_dict()))
    if found != expected:
        raise UserError(
            f"{source}: x_embedder.proj.weight has shape {found}, expected {expected}; another --model or --vae?"
        )
    state, changes = fit_weights(ema, flags, sit, args.enc_type)
    load_weights(sit, state, source)
    step = f" of step {checkpoint['steps']}" if "steps" in checkpoint else ""
    changes += [] if NORMALISER in ema else [UNNORMALISED]
    log("; ".join([f"{source}: starting from {'the average' if taken == 'ema' else taken}{step}", *changes]))
    if NORMALISER in ema and not same_statistics(ema_latent_statistics(ema, source), sit.latent_statistics()):
        log(
            f"warning: {source}: trained on latents of another VAE, or by other statistics, than those of "
            f"--vae-ckpt {args.vae_ckpt}"
        )
    if "model" in flags and flags["path_type"] != args.path_type:  # without flags it is unknown
        log(f"warning: {source}: trained with --path-type {flags['path_type']}, not {args.path_type}")


def fit_weights(ema: dict[str, Tensor], flags: dict, sit: SiT, enc_type: str) -> tuple[dict[str, Tensor], list[str]]:
    """`ema`, trained with `flags`, as a state dict of `sit`; and in words what was resampled and what stays fresh.

    Label embeddings are taken if both have as many classes, and that of the null label, the last row, if both have it.
    A projector is taken if it is for the same encoder and of the same kind. `enc_type` is the --enc-type of `sit`.
    """
    from timm.layers import resample_abs_pos_embed

    own, fresh, changes = sit.state_dict(), [], []
    state = {key: value for key, value in ema.items() if not key.startswith(("bn.", "projectors."))}
    state |= {key: value for key, value in own.items() if key.startswith("bn.")}
    state["pos_embed"] = resample_abs_pos_embed(ema["pos_embed"], [sit.grid] * 2, num_prefix_tokens=0)
    if (before := math.isqrt(ema["pos_embed"].shape[1])) != sit.grid:
        changes.append(f"positions resampled from {before}x{before} to {sit.grid}x{sit.grid} tokens")

    labels, trained, classes = own[LABEL_TABLE].cpu().clone(), ema[LABEL_TABLE], flags["num_classes"]
    if classes == sit.num_classes:
        labels[:classes] = trained[:classes]
    else:
        fresh.append(f"{sit.num_classes} classes instead of {classes}")
    if sit.null_label is not None and len(trained) > classes:
        labels[-1] = trained[-1]
    elif sit.null_label is not None:
        fresh.append("null label")
    state[LABEL_TABLE] = labels

    old_names = str(flags.get("enc_type")).split(",")
    for number, name in enumerate(encoder_specs(enc_type)):
        mine = with_prefix(own, f"projectors.{number}.")
        theirs = with_prefix(ema, f"projectors.{old_names.index(name)}.") if name in old_names else {}
        fits = {key: value.shape for key, value in mine.items()} == {key: value.shape for key, value in theirs.items()}
        state |= {f"projectors.{number}.{key}": value for key, value in (theirs if fits else mine).items()}
        fresh += [] if fits else [f"projector of {name}"]
    return state, changes + ([f"fresh: {', '.join(fresh)}"] if fresh else [])


def with_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose keys start with `prefix`, which is removed."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
