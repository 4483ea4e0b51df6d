"""Checkpoints and weight files: written atomically, checked on load, never unpickling anything but plain data.

A training checkpoint is one `.pt` dict with the reference's keys (model, ema, vae, discriminator, opt, opt_vae,
opt_disc, args, steps) plus what exact resume needs. A VAE is three files beside each other, see `vae_files`.
"""

import argparse
import hashlib
import json
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from errors import DISK_ERRORS, UserError, first_line
from storage.files import sync_folder, written_whole


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


BEST_CHECKPOINT = "best.pt"  # the one that training's evaluation found best
PREFIXES = ("module.", "_orig_mod.")


def write_atomically(data: object, path: Path) -> None:
    """torch.save under a temporary name, fsync, rename: `path` holds either the old file or all of the new one.

    Raises:
        OSError: it cannot be written, for want of space above all; it names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with written_whole(path) as file:
            torch.save(data, file)
    except Exception as error:
        if (failure := failed_write(error)) is not None:
            raise OSError(failure.errno, failure.strerror, str(path)) from None
        raise
    sync_folder(path.parent)


def failed_write(error: BaseException) -> OSError | None:
    """The OSError in whose handling `error` arose, if any: torch.save reports a full disk as trouble with its zip."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def read_checkpoint(path: str | Path, what: str = "checkpoint", verify: bool = True) -> dict:
    """The plain data of a `.pt` file, on the CPU, mapped into memory: what is not used is not kept there.

    Published files hold `args` as an argparse.Namespace, which is the one class that is let through; a file that would
    execute code is refused. With `verify` the zip's checksums are looked at, which torch.load alone does not do.

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
                damaged = archive.testzip()
            if damaged:
                raise UserError(f"{what} {path}: damaged (checksum of {damaged} differs); take another copy")
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickle protocols: what cannot be read, the error says
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if getattr(error, "errno", None) in DISK_ERRORS:
            raise
        raise UserError(f"{what} {path}: not a readable PyTorch file ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{what} {path}: holds a {type(content).__name__}, expected a dict")
    return content


def neighbours(path: Path) -> str:
    """What there is instead of a missing file, for its message."""
    if not path.parent.is_dir():
        return f"; there is no folder {path.parent} either"
    names = sorted(other.name for other in path.parent.glob("*.pt"))
    return f"; its folder holds {', '.join(names[-5:])}" if names else ""


def strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict without the `module.` and `_orig_mod.` that DDP wrappers and torch.compile put before keys."""
    stripped = {}
    for key, value in state.items():
        while key.startswith(PREFIXES) or "._orig_mod." in key:
            key = key.split(".", 1)[1] if key.startswith(PREFIXES) else key.replace("._orig_mod.", ".")
        stripped[key] = value
    return stripped


def fingerprint(state: dict[str, Tensor]) -> str:
    """Hash of a state dict's keys, shapes and values, whatever prefixes it has and in whatever order its keys come."""
    digest = hashlib.sha256()
    for key, value in sorted(strip_prefixes(state).items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def training_flags(checkpoint: dict, path: Path) -> dict:
    """The flags a checkpoint's run was made with, by underscore name: those inside it, or else those of its args.json.

    Raises:
        UserError: either is no mapping.
    """
    inside = checkpoint.get("args") or {}
    inside = vars(inside) if isinstance(inside, argparse.Namespace) else inside
    beside = path.parent.parent / "args.json"
    if not isinstance(inside, dict):
        raise UserError(f"{path}: its args are a {type(inside).__name__}, expected flags by name")
    if "model" in inside or not beside.is_file():
        return inside
    try:
        return {**json.loads(beside.read_text(encoding="utf8")), **inside}
    except (ValueError, TypeError) as error:
        raise UserError(f"{beside}: damaged ({error}); expected a mapping of flags") from None


def ema_latent_statistics(ema: dict[str, Tensor], source: str) -> tuple[Tensor, Tensor]:
    """Scale 1/sqrt(var), without eps, and bias mean, (1,C,1,1) each, that a transformer's state dict normalises by.

    Raises:
        UserError: the state dict has no such buffers.
    """
    ema = strip_prefixes(ema)
    if missing := [key for key in ("bn.running_mean", "bn.running_var") if key not in ema]:
        raise UserError(f"{source}: no {missing[0]} in ema; expected a checkpoint of REPA-E")
    scale = torch.rsqrt(ema["bn.running_var"].float())
    return scale.reshape(1, -1, 1, 1), ema["bn.running_mean"].float().reshape(1, -1, 1, 1)


def same_statistics(some: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor]) -> bool:
    """Whether two (scale, bias) of latents are the same but for the last digits, which a running average changes."""
    return all(torch.allclose(a.cpu(), b.cpu(), rtol=1e-3, atol=1e-4) for a, b in zip(some, others, strict=True))


def check_weights(module: nn.Module, state: dict, source: str) -> dict[str, Tensor]:
    """`state` without prefixes, if `module` (which may be on the meta device) can load it strictly.

    Raises:
        UserError: naming the first key that is missing, unexpected or of another shape.
    """
    state = strip_prefixes(state)
    expected = module.state_dict()
    if missing := [key for key in expected if key not in state]:
        raise UserError(f"{source}: {len(missing)} weights are missing, first {missing[0]}: another architecture?")
    if extra := [key for key in state if key not in expected]:
        raise UserError(f"{source}: {len(extra)} unexpected weights, first {extra[0]}: another architecture?")
    for key, value in expected.items():
        if state[key].shape != value.shape:
            raise UserError(
                f"{source}: {key} has shape {tuple(state[key].shape)}, expected {tuple(value.shape)}: "
                "another architecture or size?"
            )
    return state


def load_weights(module: nn.Module, state: dict, source: str) -> None:
    """Load a state dict strictly.

    Raises:
        UserError: as `check_weights`.
    """
    module.load_state_dict(check_weights(module, state, source))


class VAEFiles(NamedTuple):
    """The three files of a VAE."""

    weights: Path
    statistics: Path
    discriminator: Path


def vae_files(weights: str | Path) -> VAEFiles:
    """NAME.pt -> itself, NAME-latents-stats.pt and NAME-discriminator-ckpt.pt beside it."""
    weights = Path(weights)
    return VAEFiles(
        weights,
        weights.with_name(f"{weights.stem}-latents-stats.pt"),
        weights.with_name(f"{weights.stem}-discriminator-ckpt.pt"),
    )


def write_new(parts: dict[Path, dict[str, Tensor]]) -> list[Path]:
    """Write state dicts by file, and return the files; what is there with the same content stays.

    Raises:
        UserError: a file is there and holds other values. Nothing is written then.
    """
    for path, part in parts.items():
        if path.exists() and fingerprint(read_checkpoint(path)) != fingerprint(part):
            raise UserError(f"{path} is there and differs; delete it, or choose another name")
    for path, part in parts.items():
        write_atomically(part, path)
    return list(parts)


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies: 0400000.pt for step 400000."""
    return directory / f"{step:07d}.pt"


def numbered_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of steps in `directory`, the highest one last."""
    return sorted((path for path in directory.glob("*.pt") if path.stem.isdigit()), key=lambda path: int(path.stem))


def latest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint of the highest step in `directory`, or None."""
    return next(reversed(numbered_checkpoints(directory)), None)
