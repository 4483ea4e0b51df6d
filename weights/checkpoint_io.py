"""Checkpoints and weight files: written atomically, verified when read, and read without executing what they contain.

A training checkpoint is one `.pt` dict with the reference's keys (model, ema, vae, discriminator, opt, opt_vae,
opt_disc, args, steps) and what exact resume needs; training/checkpoints.py decides what it holds and which are kept,
training/loop.py when. A VAE consists of three files beside each other, see `vae_files`.
"""

import argparse
import hashlib
import io
import json
import re
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from errors import DISK_ERRORS, UserError
from storage.files import sync_folder, written_whole

BEST_CHECKPOINT = "best.pt"  # the checkpoint with the lowest distance in the evaluations during training
WRAPPER_PREFIXES = re.compile(r"^((module|_orig_mod)\.)+|(?<=\.)_orig_mod\.")
# classes that hold values; other names in Python's modules and torch may be functions that act, or make tensors
VALUE_CLASSES = re.compile(
    r"(collections|datetime|decimal|enum|fractions|pathlib(\._local)?|typing|uuid)\.\w+|types\.SimpleNamespace|torch\.([a-z]\w*\.)+[A-Z]\w*|"
    r"builtins\.(bool|bytes|dict|float|frozenset|int|list|object|range|set|slice|str|tuple|type)"
)
LATENT_NORM = "network.bn."  # of AutoencoderKLFlux2 in models/diffusers_vae.py
INERT = {"__init__": lambda *args: None, "__setstate__": lambda *args: None, "__hash__": object.__hash__}


def read_weights(path: Path, what: str) -> dict:
    """The content of a safetensors file or of a `.pt` file of plain data, or the weights in a TorchScript archive.

    Raises:
        UserError: the file is missing, damaged, none of these, or would execute code.
    """
    if not path.is_file():
        return read_checkpoint(path, what)
    with open(path, "rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"  # the length of a JSON object, and the object
    if is_safetensors:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{what} {path}: damaged or cut short ({error}); take another copy") from None
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return read_torchscript(path, what, archive)
    return read_checkpoint(path, what)


def read_torchscript(path: Path, what: str, archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """The weights of a TorchScript archive, in which OpenAI publishes CLIP; one that would run code is refused."""
    check_zip(archive, f"{what} {path}")
    reader = torch._C.PyTorchFileReader(str(path))  # ignores the case of names, as torch.jit.load does
    sources = (name for name in reader.get_all_records() if name.lower().endswith(".py"))
    if any(b"__setstate__" in reader.get_record(name) for name in sources):
        raise UserError(f"{what} {path}: a TorchScript archive that runs code when loaded; expected one of weights")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the format is deprecated, but CLIP is published in it
        return torch.jit.load(path, map_location="cpu").state_dict()


def check_zip(archive: zipfile.ZipFile, what: str) -> None:
    """Raise a UserError if a checksum is wrong; torch.load does not verify them."""
    if damaged := archive.testzip():
        raise UserError(f"{what}: damaged (checksum of {damaged} differs); take another copy")


def write_atomically(data: object, path: Path) -> None:
    """torch.save under a temporary name, fsync, rename: `path` holds either the old file or all of the new one.

    Raises:
        OSError: it cannot be written, most often because the disk is full; it names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with written_whole(path) as file:
            torch.save(data, file)
    except Exception as error:
        cause: BaseException | None = error  # torch.save reports a full disk as a RuntimeError of its zip writer
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from None
    sync_folder(path.parent)


def read_checkpoint(
    path: str | Path, what: str = "checkpoint", verify: bool = True, refuse_unknown: bool = False
) -> dict:
    """The plain data of a `.pt` file, on the CPU, memory-mapped: only the parts that are used take memory.

    Nothing is executed: argparse.Namespace, in which published files hold `args`, is the only class that is built.
    Objects of other classes lose their content, or are refused with `refuse_unknown`. With `verify`, the checksums of
    the zip archive are checked.

    Raises:
        UserError: the file is missing, damaged or not a checkpoint.
        OSError: the disk fails, or the file may not be read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{what} {path}: no such file{neighbours(path)}")
    try:
        is_zip = zipfile.is_zipfile(path)  # files of PyTorch before 1.6 are not
        if is_zip and verify:
            with zipfile.ZipFile(path) as archive:
                check_zip(archive, f"{what} {path}")
        content = read_inertly(path, is_zip, f"{what} {path}", refuse_unknown)
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if getattr(error, "errno", None) in DISK_ERRORS:
            raise
        # torch's own advice, over several lines, stands before its reason
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
        raise UserError(f"{what} {path}: not a readable PyTorch file ({reason.splitlines()[0][:160]})") from error
    if not isinstance(content, dict):
        raise UserError(f"{what} {path}: holds a {type(content).__name__}, expected a dict")
    return content


def read_inertly(path: Path, mmap: bool, source: str, refuse_unknown: bool) -> object:
    """torch.load of weights, with classes that accept all and do nothing in place of those that it does not know.

    A function of Python or PyTorch is a UserError, and with `refuse_unknown` so is a class that it does not know.
    """
    inert: dict[str, type] = {}  # stand-ins by the name of the class
    while True:
        stubs = [(stub, name) for name, stub in inert.items()]
        try:
            with torch.serialization.safe_globals([argparse.Namespace, *stubs]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about old pickle protocols
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:
            if mapping := re.search(r"Can only SETITEM.*checkpoint_io\.(\S+)'", str(error)):
                inert[mapping[1]] = type(mapping[1], (), {"__new__": lambda *args: OrderedDict()})
                continue  # torch.load fills no subclass of dict
            unknown = re.search(r"GLOBAL (\S+)", str(error))
            name = unknown and (unknown[1] if "." in unknown[1] else f"builtins.{unknown[1]}")
            if name is None or name in inert:
                raise
        is_known = name.split(".")[0] in {*sys.stdlib_module_names, "commands", "torch"}
        if refuse_unknown or is_known and not VALUE_CLASSES.fullmatch(name):
            raise UserError(f"{source}: holds {name!r}, which could run code; expected tensors and plain data")
        inert[name] = type(name, (list,), INERT)


def neighbours(path: Path) -> str:
    """For the message about a missing file: the `.pt` files beside it."""
    if not path.parent.is_dir():
        return f"; there is no folder {path.parent} either"
    names = sorted(other.name for other in path.parent.glob("*.pt"))
    return f"; its folder holds {', '.join(names[-5:])}" if names else ""


def strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict without the `module.` and `_orig_mod.` that DDP wrappers and torch.compile add to keys."""
    return {WRAPPER_PREFIXES.sub("", key): value for key, value in state.items()}


def fingerprint(state: dict[str, Tensor]) -> str:
    """Hash of a state dict's keys, dtypes, shapes and values, whatever wrappers' prefixes and order of keys it has.

    The statistics of latents that FLUX.2's VAE holds are left out: they are no weights, and change when it is exported.
    """
    digest = hashlib.sha256()
    for key, value in sorted(strip_prefixes(state).items()):
        if key.startswith(LATENT_NORM):
            continue
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def training_flags(checkpoint: dict, path: Path) -> dict:
    """The flags of a checkpoint's run, by underscore name: those inside it, completed by the run's args.json."""
    inside = checkpoint.get("args") or {}
    inside = vars(inside) if isinstance(inside, argparse.Namespace) else inside
    beside = path.parent.parent / "args.json"
    if {"model", "vae"} <= inside.keys() or not beside.is_file():
        return inside
    return {**json.loads(beside.read_text(encoding="utf8")), **inside}


def ema_latent_statistics(ema: dict[str, Tensor], source: str) -> tuple[Tensor, Tensor]:
    """Scale 1/sqrt(running_var), without eps, and bias running_mean, (1,C,1,1) each, of a transformer's normaliser.

    Raises:
        UserError: the state dict `ema` lacks these buffers.
    """
    ema = strip_prefixes(ema)
    if missing := [key for key in ("bn.running_mean", "bn.running_var") if key not in ema]:
        raise UserError(f"{source}: no {missing[0]} in ema; expected a checkpoint of REPA-E")
    scale = torch.rsqrt(ema["bn.running_var"].float())
    return scale.reshape(1, -1, 1, 1), ema["bn.running_mean"].float().reshape(1, -1, 1, 1)


def same_statistics(some: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor]) -> bool:
    """Whether two (scale, bias) of latents are equal up to the drift of a running average."""
    return all(torch.allclose(a.cpu(), b.cpu(), rtol=1e-3, atol=1e-4) for a, b in zip(some, others, strict=True))


def check_weights(module: nn.Module, state: dict, source: str) -> dict[str, Tensor]:
    """`state` without prefixes, if `module` (which may be on the meta device) can load it strictly.

    Raises:
        UserError: a weight is missing, unexpected or of another shape; the message names the first one.
    """
    state = strip_prefixes(state)
    expected = module.state_dict()
    if missing := [key for key in expected if key not in state]:
        raise UserError(f"{source}: {len(missing)} weights are missing, first {missing[0]}: another architecture?")
    if extra := [key for key in state if key not in expected]:
        raise UserError(f"{source}: {len(extra)} unexpected weights, first {extra[0]}: another architecture?")
    for key, value in expected.items():
        found, wanted = tuple(state[key].shape), tuple(value.shape)
        if found != wanted:
            raise UserError(f"{source}: {key} has shape {found}, expected {wanted}: another architecture or size?")
    return state


def load_weights(module: nn.Module, state: dict, source: str) -> None:
    """Load a state dict strictly; raises the errors of `check_weights`."""
    module.load_state_dict(check_weights(module, state, source))


def refuse_not_finite(module: nn.Module, source: str) -> None:
    """Raise a UserError that names the first weight that is not finite.

    A row of a label table spoils the samples of its label alone, which sampling names.
    """
    for key, value in module.state_dict().items():
        if not (key.endswith("embedding_table.weight") or value.isfinite().all()):
            raise UserError(f"{source}: {key} holds values that are not finite; take another checkpoint or file")


class VAEFiles(NamedTuple):
    """The three files of a VAE."""

    weights: Path
    statistics: Path
    discriminator: Path


def vae_files(weights: str | Path) -> VAEFiles:
    """NAME.pt -> itself, NAME-latents-stats.pt and NAME-discriminator-ckpt.pt beside it."""
    weights = Path(weights)
    beside = (weights.with_name(f"{weights.stem}-{what}.pt") for what in ("latents-stats", "discriminator-ckpt"))
    return VAEFiles(weights, *beside)


def pt_bytes(state: dict[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def write_new(contents: dict[Path, bytes]) -> list[Path]:
    """Write files that are not there yet, and return all paths; existing files with the same content stay.

    Raises:
        UserError: a file exists with other content. Nothing is written then.
    """
    for path, content in contents.items():
        if path.exists() and path.read_bytes() != content:
            raise UserError(f"{path} is there and differs; delete it, or choose another name")
    for path, content in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            file.write(content)
        sync_folder(path.parent)
    return list(contents)


def checkpoint_path(directory: Path, step: int) -> Path:
    """The path of the checkpoint after `step` steps: 0400000.pt for step 400000."""
    return directory / f"{step:07d}.pt"


def numbered_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in `directory` that are named by their step, in ascending order."""
    return sorted((path for path in directory.glob("*.pt") if path.stem.isdigit()), key=lambda path: int(path.stem))


def latest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint of the highest step in `directory`, or None."""
    return next(reversed(numbered_checkpoints(directory)), None)
