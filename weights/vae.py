"""A VAE by what a command line calls it: architecture, weights in any published form, statistics of its latents.

Weights are ours or CompVis's (SD-VAE's, FLUX's and SD 3.5's single files among them, alone or inside a whole model's
checkpoint), or those of a diffusers AutoencoderKL: a folder, a file of it, or a repository of the hub.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from errors import UserError, unknown_name
from models.autoencoder import VAE_CONFIGS, AutoencoderKL, VAEConfig
from models.discriminator import PatchDiscriminator
from storage.files import written_whole
from weights.checkpoint_io import load_weights, neighbours, read_checkpoint, read_weights, strip_prefixes, vae_files
from weights.diffusers_layout import (
    from_diffusers_config,
    from_diffusers_state,
    is_diffusers_state,
    to_diffusers_config,
    to_diffusers_state,
)
from weights.downloads import first_on_each_machine, hub_file

DIFFUSERS = "diffusers:"  # before what has its architecture with it
CONFIG = "config.json"
DIFFUSERS_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
SUBFOLDERS = ("vae/", "")  # in the repository of a pipeline, whose own config.json is another, or of a VAE alone
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
WEIGHT_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
# before the VAE's weights in the checkpoints of whole models, and before what an autoencoder's own has beside them
INSIDE = ("first_stage_model.", "vae.")
BESIDE = ("loss.", "model_ema.")


class VAESource(NamedTuple):
    """A VAE that has been found: what `load_vae` and `known_statistics` need."""

    name: str  # row of VAE_CONFIGS, or diffusers:PATH_OR_ID
    config: VAEConfig
    weights: Path | None = None  # None: fresh
    published: dict | None = None  # diffusers' config.json that came with the weights


def open_vae(name: str, weights: str | None, offline: bool, known: VAEConfig | None = None) -> VAESource:
    """Find the VAE that is called `name`, with `weights` as --vae-ckpt takes them, or fresh.

    `known` is the architecture where a checkpoint has it. On several processes, all call.

    Raises:
        UserError: there is no such VAE, file, folder or repository, or weights and name are of other architectures.
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
        config = read_architecture(found, own)
    else:
        raise UserError(unknown_name("vae", name, VAE_CONFIGS))
    if published is not None and read_architecture(published, str(weights)) != config:
        raise UserError(
            f"VAE weights {weights}: {CONFIG} describes another architecture than {name}; take --vae "
            f"{DIFFUSERS}{weights}"
        )
    return VAESource(name, config, path, published)


def find_weights(text: str, offline: bool) -> tuple[Path, dict | None]:
    """Where the weights that `text` names lie, and diffusers' config.json if it is beside them.

    Raises:
        UserError: nothing is there.
    """
    path = Path(text)
    if path.is_dir():
        for folder in (path / subfolder for subfolder in SUBFOLDERS):
            if (folder / CONFIG).is_file():
                files = [folder / name for name in DIFFUSERS_FILES if (folder / name).is_file()]
                if not files:
                    raise UserError(f"VAE weights {folder}: none of {', '.join(DIFFUSERS_FILES)} beside {CONFIG}")
                return files[0], read_config(folder / CONFIG)
        raise UserError(f"VAE weights {path}: a folder without diffusers' {CONFIG}{neighbours(path / CONFIG)}")
    is_path = path.suffix in WEIGHT_SUFFIXES or Path(path.parts[0]).is_dir() or not REPOSITORY.fullmatch(text)
    if path.is_file() or is_path:
        config = path.with_name(CONFIG)
        return path, read_config(config) if path.name in DIFFUSERS_FILES and config.is_file() else None
    config, weights = first_on_each_machine(lambda: hub_files(text, offline))
    return weights, read_config(config)


def hub_files(repository: str, offline: bool) -> tuple[Path, Path]:
    """config.json and weights of a VAE in a repository of the hub, or of the VAE of a pipeline there."""
    what = f"VAE weights {repository}"
    advice = "nor is there such a file or folder; --vae-ckpt takes a file, a folder or ORGANISATION/NAME[@REVISION]"
    config = hub_file(what, repository, [folder + CONFIG for folder in SUBFOLDERS], offline, advice)
    folder = next(folder for folder in SUBFOLDERS if str(config).endswith(f"/{folder}{CONFIG}"))
    return config, hub_file(what, repository, [folder + name for name in DIFFUSERS_FILES], offline, advice)


def read_config(path: Path) -> dict:
    """A config.json.

    Raises:
        UserError: it is damaged.
    """
    try:
        config = json.loads(path.read_text(encoding="utf8"))
        if isinstance(config, dict):
            return config
        reason = f"holds a {type(config).__name__}"
    except ValueError as error:
        reason = str(error)
    raise UserError(f"{path}: damaged ({reason}), expected diffusers' description of an AutoencoderKL")


def read_architecture(config: dict, where: str) -> VAEConfig:
    """The architecture of a config.json; `where` names it in messages.

    Raises:
        UserError: it is of a network that this autoencoder cannot be.
    """
    try:
        return from_diffusers_config(config)
    except (ValueError, TypeError) as error:
        raise UserError(f"VAE {where}: {CONFIG} {error}") from None


def load_vae(source: VAESource) -> AutoencoderKL:
    """The autoencoder, fresh or with its weights, in float32 whatever the file has.

    Raises:
        UserError: weights are missing, damaged or of another architecture.
    """
    vae = AutoencoderKL(source.config)
    if source.weights is not None:
        state = read_vae_state(source.weights, source.config)
        load_weights(vae, state, f"VAE weights {source.weights} for the architecture {source.name}")
    return vae


def read_vae_state(path: Path, config: VAEConfig) -> dict[str, Tensor]:
    """The weights of a VAE under our names, in whatever form the file has them.

    Raises:
        UserError: the file is missing, damaged, or a checkpoint of training.
    """
    state = read_weights(path, "VAE weights")
    if isinstance(state.get("vae"), dict):
        raise UserError(f"VAE weights {path}: a checkpoint of training; save_vae_weights.py extracts its VAE")
    if isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    state = strip_prefixes({key: value for key, value in state.items() if isinstance(value, Tensor)})
    for prefix in INSIDE:
        if inside := {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}:
            state = inside
            break
    state = {key: value for key, value in state.items() if not key.startswith(BESIDE)}
    return from_diffusers_state(state, config) if is_diffusers_state(state) else state


def write_diffusers(
    folder: Path, weights: dict[str, Tensor], config: VAEConfig, statistics: dict[str, Tensor], resolution: int
) -> list[Path]:
    """Write a VAE as diffusers' AutoencoderKL.from_pretrained takes it, and return the files.

    Args:
        folder: where they go.
        weights: under our names.
        config: their architecture.
        statistics: latents_scale and latents_bias, (1,C,1,1) each.
        resolution: pixels a side of the images that it was trained on.

    Raises:
        UserError: another VAE is there. Nothing is written then.
    """
    from safetensors.torch import save

    scale, bias = statistics["latents_scale"], statistics["latents_bias"]
    described = to_diffusers_config(config, scale, bias, resolution)
    contents = {
        folder / CONFIG: json.dumps(described, indent=2).encode() + b"\n",
        folder / DIFFUSERS_FILES[0]: save(to_diffusers_state(weights, config), metadata={"format": "pt"}),
    }
    for path, content in contents.items():
        if path.exists() and path.read_bytes() != content:
            raise UserError(f"{path} is there and differs; delete it, or choose another name")
    for path, content in contents.items():
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            file.write(content)
    return list(contents)


def latent_shape(source: VAESource, resolution: int) -> tuple[int, int, int]:
    """(C, h, w) of a VAE's latents of images of `resolution` pixels.

    Raises:
        UserError: the VAE's factor does not divide the resolution.
    """
    factor = source.config.downsampling
    if resolution % factor:
        raise UserError(f"--resolution {resolution} is no multiple of {factor}, which --vae {source.name} needs")
    return source.config.z_channels, resolution // factor, resolution // factor


def has_statistics(source: VAESource) -> bool:
    """Whether anything is known of the latents of a VAE with weights."""
    return vae_files(source.weights).statistics.is_file() or published_factors(source) is not None


def published_factors(source: VAESource) -> VAEConfig | None:
    """What has the published scaling and shift factor of a VAE's weights, if those are known.

    That is the config.json that came with the weights; or the row of the architecture, unless the weights are a .pt
    file, as this project writes them: those were trained since.
    """
    if source.published is not None:
        return read_architecture(source.published, str(source.weights))
    row = VAE_CONFIGS.get(source.name)
    is_own = source.weights.suffix == ".pt"
    return None if row is None or row.scaling_factor is None or is_own else row


def known_statistics(source: VAESource, log: Callable[[str], None] = print) -> tuple[Tensor, Tensor]:
    """latents_scale and latents_bias, (1,C,1,1) float32 each, as far as they are known of a VAE.

    That is the file beside its weights; else latents_mean and latents_std of diffusers' config.json; else the published
    scaling and shift factor. `log` is told if it is not the first.

    Raises:
        UserError: none is known, or one does not fit the latents.
    """
    channels = source.config.z_channels
    beside = vae_files(source.weights).statistics
    if beside.is_file():
        return read_latent_statistics(source.weights, channels)
    published = source.published or {}
    if published.get("latents_mean") is not None and published.get("latents_std") is not None:
        log(f"latent statistics of {source.weights}: latents_mean and latents_std in {CONFIG}")
        try:
            mean, std = (torch.tensor(published[key], dtype=torch.float64) for key in ("latents_mean", "latents_std"))
        except (TypeError, ValueError):
            mean = std = torch.empty(0)
        if mean.numel() != channels or std.numel() != channels or not (std > 0).all():
            raise UserError(f"{source.weights}: latents_mean and latents_std in {CONFIG} are not {channels} numbers")
        return (1 / std).float().reshape(1, channels, 1, 1), mean.float().reshape(1, channels, 1, 1)
    if (factors := published_factors(source)) is None:
        raise UserError(
            f"latent statistics {beside}: no such file; train_vae.py --stats-only measures them and writes both files"
        )
    log(
        f"latent statistics of {source.weights}: the published scaling factor {factors.scaling_factor:g} and shift "
        f"{factors.shift_factor:g}; train_vae.py --stats-only measures them on your images"
    )
    ones = torch.ones(1, channels, 1, 1)
    return ones * factors.scaling_factor, ones * factors.shift_factor


def read_latent_statistics(vae_weights: str | Path, channels: int) -> tuple[Tensor, Tensor]:
    """latents_scale and latents_bias, (1,C,1,1) float32 each, from the file beside `vae_weights`.

    Raises:
        UserError: the file is missing or does not fit a latent of `channels` channels.
    """
    path = vae_files(vae_weights).statistics
    stats = read_checkpoint(path, "latent statistics")
    values = []
    for key in ("latents_scale", "latents_bias"):
        value = stats.get(key)
        if not isinstance(value, Tensor) or value.numel() != channels:
            found = tuple(value.shape) if isinstance(value, Tensor) else "nothing"
            raise UserError(f"latent statistics {path}: {key} is {found}, expected a tensor of {channels} values")
        values.append(value.float().reshape(1, channels, 1, 1))
    return values[0], values[1]


def load_discriminator(path: str | None) -> PatchDiscriminator:
    """The discriminator, fresh or with the weights at `path`."""
    discriminator = PatchDiscriminator()
    if path is not None:
        load_weights(discriminator, read_checkpoint(path, "discriminator weights"), f"discriminator weights {path}")
    return discriminator
