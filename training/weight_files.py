"""Weights that come from outside: read in whatever form they are published, and had from the hub."""

import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from downloads import one_line
from errors import UserError
from training.checkpoint import read_checkpoint


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


def hub_file(what: str, repository: str, filenames: Sequence[str], offline: bool, advice: str) -> Path:
    """The first of `filenames` that a repository of the hub has: this machine's copy if there is one, else a download.

    A copy once there is not asked about again, so that weights do not change under a user. `repository` may end in
    @REVISION. `what` names the file in messages, `advice` says what else can be done.

    Raises:
        UserError: it is not on this machine, and cannot or, if `offline`, must not be downloaded.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repo, _, revision = repository.partition("@")
    for filename in filenames:
        cached = try_to_load_from_cache(repo, filename, revision=revision or None)
        if isinstance(cached, str):
            return Path(cached)
    if offline:
        raise UserError(f"{what}: {repository} is not on this machine, and offline; {advice}")
    for filename in filenames:
        try:
            path = Path(hf_hub_download(repo, filename, revision=revision or None))
        except EntryNotFoundError as error:
            if not isinstance(error, LocalEntryNotFoundError):
                continue
            reason = "the hub cannot be reached"
        except Exception as error:  # the hub's client raises a dozen kinds of errors
            reason = f"{type(error).__name__}: {one_line(error)}"
        else:
            print(f"{what}: downloaded {repo} at revision {path.parents[filename.count('/')].name}", flush=True)
            return path
        raise UserError(f"{what}: could not download {repository} ({reason}); {advice}")
    raise UserError(f"{what}: {repository} has none of {', '.join(filenames)}; {advice}")
