"""The frozen encoders of a run with their trained weights: from a file, an installed package, or a download.

A file is in its project's own format or in timm's; `Encoder.convert` makes either the network's weights.
"""

import argparse
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import torch

from errors import UserError, one_line
from models.encoder_table import encoder_specs
from models.encoders import Encoder, EncoderSpec, token_shape
from models.numerics import cast_weights
from weights.checkpoint_io import fingerprint, load_weights, read_weights
from weights.downloads import first_on_each_machine, hub_file, is_offline, local_or_download

LOCAL_COPIES = Path("ckpts")
HUB_PREFIX = "hf-hub:"  # as in timm
HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def load_encoders(
    args: argparse.Namespace, grid: int, device: torch.device, log: Callable[[str], None] = print
) -> list[Encoder]:
    """The frozen encoders of --enc-type, each giving grid x grid tokens for images of --resolution pixels.

    Their weights have the precision that they compute in; `fingerprint` is the hash of the float32 ones.

    Raises:
        UserError: an encoder cannot give this token grid, or its weights are missing or another network's.
    """
    specs = encoder_specs(args.enc_type)
    given = given_files(args)
    grids = {name: network_grid(name, spec, args, grid) for name, spec in specs.items()}
    offline = is_offline(args)
    files = first_on_each_machine(
        lambda: {name: weights_file(name, spec, given.get(name), offline) for name, spec in specs.items()}
    )
    encoders = []
    for name, spec in specs.items():
        encoder = Encoder(spec, grids[name], grid)
        load_encoder_weights(encoder, name, files[name])
        log(f"encoder {name}, weights from {files[name]}")
        encoder.fingerprint = weights_fingerprint(encoder)
        cast_weights(encoder, args.mixed_precision)
        encoders.append(encoder.to(device))
    return encoders


def given_files(args: argparse.Namespace) -> dict[str, str]:
    """--enc-ckpt as a table, name -> path; a UserError if it names an encoder that no other flag names."""
    given = dict(text.split("=", 1) for text in args.enc_ckpt)
    lists = [getattr(args, flag, "none") for flag in ("enc_type", "features", "eval_features")]
    for name in given:
        if not any(name in names.split(",") for names in lists):
            raise UserError(f"--enc-ckpt names {name}, which no other flag does")
    return given


def network_grid(name: str, spec: EncoderSpec, args: argparse.Namespace, grid: int) -> int:
    """Tokens a side that row `name` gives for images of --resolution pixels.

    Raises:
        UserError: the transformer's grid differs, and --resample-tokens is not given.
    """
    if spec.any_grid:
        return grid
    asked = spec.grid(args.resolution)
    gives = math.isqrt(token_shape(spec, asked)[1])
    if gives != grid and not args.resample_tokens:
        raise UserError(
            f"{name} gives {gives}x{gives} tokens at {args.resolution} px, but the transformer has {grid}x{grid}; "
            "choose a patch size that makes them equal, or --resample-tokens to interpolate the encoder's"
        )
    return asked


def weights_fingerprint(encoder: Encoder) -> str:
    """Hash of an encoder's weights but for its position tables: they are resampled, and the rounding differs between
    processors."""
    return fingerprint({key: value for key, value in encoder.state_dict().items() if "pos" not in key})


def load_encoder_weights(encoder: Encoder, name: str, path: Path) -> dict:
    """Load a file's weights strictly into the network of row `name`; returns the file's content."""
    what = f"weights of {name}"
    content = read_weights(path, what)
    try:
        state = encoder.convert(content)
    except Exception as error:  # timm's filters rely on what they expect
        raise UserError(f"{what} {path}: no checkpoint of this encoder ({one_line(error)})") from error
    load_weights(encoder.network, state, f"{what} {path}")
    return content


def weights_file(name: str, spec: EncoderSpec, given: str | None, offline: bool) -> Path:
    """The file with the weights of row `name`: the `given` one, the usual local copy, a package's, or a download."""
    what, local = f"weights of {name}", LOCAL_COPIES / spec.file
    if given is not None and not given.startswith(HUB_PREFIX):
        return Path(given)
    if given is None and local.is_file():
        return local
    if given is None and spec.package is not None:
        return packaged_file(name, spec)
    repository, url = published(spec) if given is None else (given.removeprefix(HUB_PREFIX), None)
    whose = f"{HUB_FILES[0]} of {repository}" if local.suffix == ".safetensors" else f"{spec.origin.source}'s weights"
    advice = f"put {whose} at {local}, or name a file by --enc-ckpt {name}=PATH"
    if repository is not None:
        return hub_file(what, repository, HUB_FILES, offline, advice)
    if url is None:
        raise UserError(f"{what}: not on this machine, and not published for download; {advice}")
    return local_or_download(what, local, url, offline, advice)


def published(spec: EncoderSpec) -> tuple[str | None, str | None]:
    """(repository of the hub, URL of a file) with a row's weights; at most one of the two is not None."""
    from timm.models import get_pretrained_cfg

    if spec.url is not None or "." not in spec.model:
        return None, spec.url
    config = get_pretrained_cfg(spec.model)
    return (config.hf_hub_id, None) if config.hf_hub_id else (None, config.url or None)


def packaged_file(name: str, spec: EncoderSpec) -> Path:
    if (found := importlib.util.find_spec(spec.package)) is None:
        raise UserError(f"{name} needs the package {spec.package}: pip install -r requirements-demo.txt")
    return next(Path(found.origin).parent.rglob("*.pth"))
