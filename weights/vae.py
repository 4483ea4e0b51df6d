"""A VAE from the command line: its architecture, weights in any published form, and the statistics of its latents.

Weights have the keys of CompVis (as ours and the single files of SD-VAE, FLUX and SD 3.5 do, alone or inside a whole
model's checkpoint) or those of an autoencoder of diffusers: a folder, a file in it, or a repository of the hub.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from errors import UserError, unknown_name
from models.autoencoder import VAE_CONFIGS, Autoencoder, VAEConfig
from models.diffusers_vae import Architecture, DiffusersConfig
from models.discriminator import PatchDiscriminator
from weights.checkpoint_io import (
    load_weights,
    neighbours,
    read_checkpoint,
    read_weights,
    strip_prefixes,
    vae_files,
)
from weights.diffusers_layout import (
    from_diffusers_config,
    from_diffusers_state,
    statistics_inside,
    to_diffusers_config,
    to_diffusers_state,
    with_statistics,
)
from weights.downloads import first_on_each_machine, hub_file

DIFFUSERS = "diffusers:"  # prefix of a --vae whose architecture is in diffusers' config.json
CONFIG = "config.json"
STEM = "diffusion_pytorch_model"
DIFFUSERS_FILES = (  # whole, an index of shards, or in half precision
    *(f"{STEM}.safetensors", f"{STEM}.bin", f"{STEM}.safetensors.index.json", f"{STEM}.bin.index.json"),
    *(f"{STEM}.fp16.safetensors", f"{STEM}.fp16.bin", f"{STEM}.safetensors.index.fp16.json"),
)
SUBFOLDERS = ("vae/", "")  # the VAE's place in a repository: of a pipeline, or of a VAE alone
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
WEIGHT_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
WHOLE_MODEL_PREFIXES = ("first_stage_model.", "vae.")  # of the VAE's keys in the checkpoint of a whole model
# of the other keys in the training checkpoint of an autoencoder; VA-VAE's is aligned to a foundation model
TRAINING_PREFIXES = ("loss.", "model_ema.", "discriminator.", "perceptual_loss.", "foundation_model.", "linear_proj.")


class VAESource(NamedTuple):
    """Where a VAE's architecture, weights and statistics come from, for `load_vae` and `known_statistics`."""

    name: str  # row of VAE_CONFIGS, or diffusers:PATH_OR_ID
    config: Architecture
    weights: Path | None = None  # None: freshly initialised
    published: dict | None = None  # the content of diffusers' config.json, if it lies beside the weights


def open_vae(name: str, weights: str | None, offline: bool, known: Architecture | None = None) -> VAESource:
    """Find the VAE `name` (a --vae) with `weights` (a --vae-ckpt), or freshly initialised. All processes call this.

    `known` is the architecture, where a checkpoint states it.

    Raises:
        UserError: there is no such VAE, file, folder or repository, or name and weights have different architectures.
    """
    path, published = (None, None) if weights is None else find_weights(weights, offline)
    if known is not None:
        config = known
    elif name in VAE_CONFIGS:
        config = VAE_CONFIGS[name]
    elif name.startswith(DIFFUSERS):
        own = name.removeprefix(DIFFUSERS)
        found = published if own == weights else find_weights(own, offline)[1]
        if found is None:
            raise UserError(f"--vae {name}: no {CONFIG} of diffusers there; name a folder or a repository that has one")
        config = from_diffusers_config(found, own)
    else:
        raise UserError(unknown_name("vae", name, VAE_CONFIGS))
    if published is not None and name != DIFFUSERS + weights and from_diffusers_config(published, weights) != config:
        what = f"{CONFIG} describes another architecture than {name}"
        raise UserError(f"VAE weights {weights}: {what}; take --vae {DIFFUSERS}{weights}")
    return VAESource(name, config, path, published)


def stated_architecture(checkpoint: dict) -> Architecture | None:
    """The architecture of its run's VAE that a checkpoint of ours states; None for published checkpoints."""
    architecture = (checkpoint.get("identity") or {}).get("architecture")
    if architecture is None:
        return None
    return (DiffusersConfig if "settings" in architecture else VAEConfig)(**architecture)


def find_weights(text: str, offline: bool) -> tuple[Path, dict | None]:
    """The file of the weights named by `text`, and the content of diffusers' config.json if it lies beside them."""
    path = Path(text)
    if path.is_dir():
        for folder in (path / subfolder for subfolder in SUBFOLDERS):
            if (folder / CONFIG).is_file():
                files = [folder / name for name in DIFFUSERS_FILES if (folder / name).is_file()][:1]
                files = files or list(folder.glob("*.safetensors"))
                if len(files) != 1:
                    raise UserError(f"VAE weights {folder}: {len(files)} files of weights beside {CONFIG}; name one")
                return files[0], read_json(folder / CONFIG)
        raise UserError(f"VAE weights {path}: a folder without diffusers' {CONFIG}{neighbours(path / CONFIG)}")
    is_path = path.suffix in WEIGHT_SUFFIXES or Path(path.parts[0]).is_dir() or not REPOSITORY.fullmatch(text)
    if path.is_file() or is_path:
        config = path.with_name(CONFIG)
        is_described = path.name.startswith(STEM) and config.is_file()  # else it may be of anything else in the folder
        return path, read_json(config) if is_described else None
    config, weights = first_on_each_machine(lambda: hub_files(text, offline))
    return weights, read_json(config)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf8"))


def hub_files(repository: str, offline: bool) -> tuple[Path, Path]:
    """config.json and weights of a VAE, or of a pipeline's VAE, in a repository of the hub."""
    what = f"VAE weights {repository}"
    advice = "nor is there such a file or folder; --vae-ckpt takes a file, a folder or ORGANISATION/NAME[@REVISION]"
    config = hub_file(what, repository, [folder + CONFIG for folder in SUBFOLDERS], offline, advice)
    folder = next(folder for folder in SUBFOLDERS if str(config).endswith(f"/{folder}{CONFIG}"))
    weights = hub_file(what, repository, [folder + name for name in DIFFUSERS_FILES], offline, advice)
    for file in weight_files(weights):
        hub_file(what, repository, [folder + file.name], offline, advice)
    return config, weights


def weight_files(path: Path) -> list[Path]:
    """The files beside an index of diffusers that it lists; `path` itself, if that is no index."""
    names = read_json(path)["weight_map"].values() if path.suffix == ".json" else [path.name]
    return [path.with_name(name) for name in sorted(set(names))]


def load_vae(source: VAESource) -> Autoencoder:
    """The autoencoder with its weights, or freshly initialised, in float32 whatever the file's dtype."""
    vae = source.config.build()
    if source.weights is not None:
        state = read_vae_state(source.weights, source.config)
        load_weights(vae, state, f"VAE weights {source.weights} for the architecture {source.name}")
    return vae


def read_vae_state(path: Path, config: Architecture) -> dict[str, Tensor]:
    """The weights of a VAE under our keys, from a file in any published form."""
    state = {key: value for file in weight_files(path) for key, value in read_weights(file, "VAE weights").items()}
    if isinstance(state.get("vae"), dict):
        raise UserError(f"VAE weights {path}: a checkpoint of training; save_vae_weights.py extracts its VAE")
    for wrapper in ("model", "state_dict"):
        state = state[wrapper] if isinstance(state.get(wrapper), dict) else state
    state = strip_prefixes({key: value for key, value in state.items() if isinstance(value, Tensor)})
    for prefix in WHOLE_MODEL_PREFIXES:
        if inside := {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}:
            state = inside
            break
    state = {key: value for key, value in state.items() if not key.startswith(TRAINING_PREFIXES)}
    return from_diffusers_state(state, config)


def diffusers_files(
    folder: Path,
    weights: dict[str, Tensor],
    config: Architecture,
    statistics: dict[str, Tensor],
    resolution: int,
) -> dict[Path, bytes]:
    """A VAE as from_pretrained of its class in diffusers reads it: the files to be written to `folder`.

    `statistics` are latents_scale and latents_bias, (1,C,1,1) each; `resolution` is the side of the training images.
    """
    from safetensors.torch import save

    scale, bias = statistics["latents_scale"], statistics["latents_bias"]
    state = with_statistics(to_diffusers_state(weights, config), scale, bias)
    described = to_diffusers_config(config, scale, bias, resolution)
    return {
        folder / CONFIG: json.dumps(described, indent=2).encode() + b"\n",
        folder / DIFFUSERS_FILES[0]: save(state, metadata={"format": "pt"}),
    }


def latent_shape(source: VAESource, resolution: int) -> tuple[int, int, int]:
    """(C, h, w) of a VAE's latents; a UserError if the VAE's factor does not divide the `resolution` of images."""
    factor = source.config.downsampling
    if resolution % factor:
        what = f"no multiple of {factor}, which the VAE {source.name} needs"
        raise UserError(f"the side of images, {resolution} px, is {what}")
    return source.config.z_channels, resolution // factor, resolution // factor


def known_statistics(source: VAESource, log: Callable[[str], None] = print) -> tuple[Tensor, Tensor]:
    """`find_statistics` of a VAE; a UserError if there are none."""
    if (found := find_statistics(source, log)) is None:
        raise UserError(
            f"latent statistics {vae_files(source.weights).statistics}: no such file; train_vae.py --stats-only "
            "measures them and writes both files"
        )
    return found


def find_statistics(source: VAESource, log: Callable[[str], None] = print) -> tuple[Tensor, Tensor] | None:
    """latents_scale and latents_bias, (1,C,1,1) float32 each, of a VAE with weights; None if they are not known.

    They come from the file beside its weights, else from latents_mean and latents_std in diffusers' config.json, else
    from the weights, else from the published scaling and shift factor. `log` prints which, unless it is the file. What
    an architecture was published with does not hold for `.pt` files, which this project writes: they were trained
    further.
    """
    if vae_files(source.weights).statistics.is_file():
        return read_latent_statistics(source.weights, source.config.z_channels)
    shape, published, config = (1, source.config.z_channels, 1, 1), source.published or {}, source.config
    what = f"latent statistics of {source.weights}"
    if published.get("latents_mean") is not None and published.get("latents_std") is not None:
        log(f"{what}: latents_mean and latents_std in {CONFIG}")
        keys = ("latents_mean", "latents_std")
        mean, std = (torch.tensor(published[key], dtype=torch.float64).reshape(shape) for key in keys)
        return (1 / std).float(), mean.float()
    if source.weights.suffix == ".pt":
        return None
    if isinstance(config, DiffusersConfig):
        state = to_diffusers_state(read_vae_state(source.weights, config), config)
        if (inside := statistics_inside(state, config.z_channels)) is not None:
            log(f"{what}: those in its weights")
            return inside
        scaling, shift = published.get("scaling_factor"), published.get("shift_factor") or 0.0
    else:
        row = from_diffusers_config(published, "") if published else VAE_CONFIGS.get(source.name)
        scaling, shift = (None, 0.0) if row is None else (row.scaling_factor, row.shift_factor)
    if scaling is None:
        return None
    where = f"the published scaling factor {scaling:g} and shift {shift:g}"
    log(f"{what}: {where}; train_vae.py --stats-only measures them on your images")
    return torch.full(shape, scaling), torch.full(shape, shift)


def read_latent_statistics(vae_weights: str | Path, channels: int) -> tuple[Tensor, Tensor]:
    """latents_scale and latents_bias, (1,C,1,1) float32 each, from the file beside `vae_weights`.

    Raises:
        UserError: the file is missing, or C is not `channels`.
    """
    path = vae_files(vae_weights).statistics
    stats = read_checkpoint(path, "latent statistics")
    scale, bias = stats["latents_scale"].float(), stats["latents_bias"].float()
    if scale.numel() != channels:
        raise UserError(f"latent statistics {path}: of {scale.numel()} channels, expected {channels}; of another VAE?")
    return scale.reshape(1, -1, 1, 1), bias.reshape(1, -1, 1, 1)


def load_discriminator(path: str | None) -> PatchDiscriminator:
    """The discriminator with the weights at `path`, or freshly initialised."""
    discriminator = PatchDiscriminator()
    if path is not None:
        state = read_checkpoint(path, "discriminator weights")
        load_weights(discriminator, state, f"discriminator weights {path}")
    return discriminator
