"""Files from the web and the hub: this machine's copy if there is one, else a download, unless the run is offline."""

import argparse
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from http.client import HTTPException
from pathlib import Path
from typing import TypeVar
from urllib.error import URLError

import torch
import torch.distributed as dist

from errors import UserError, one_line

T = TypeVar("T")


def is_offline(args: argparse.Namespace) -> bool:
    """Whether --offline, or HF_HUB_OFFLINE in the environment, forbids the use of the network."""
    from huggingface_hub import constants

    return args.offline or constants.HF_HUB_OFFLINE


def local_or_download(what: str, path: Path, url: str, offline: bool, advice: str, sha256: str | None = None) -> Path:
    """`path` if that file exists, else after downloading `url` to it, with a progress bar on a terminal.

    `what` (the file) and `advice` (what else the user can do) are for messages; `sha256` begins the content's hash.

    Raises:
        UserError: the file is not on this machine and must not (`offline`) or cannot be downloaded.
    """
    if path.is_file():
        return path
    if offline:
        raise UserError(f"{what}: not on this machine, and offline; {advice} ({url})")
    print(f"{what}: downloading {url} to {path}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), sha256, progress=sys.stderr.isatty())
    except (URLError, HTTPException, ConnectionError, TimeoutError, RuntimeError) as error:
        raise UserError(f"{what}: could not download {url} ({one_line(error)}); {advice}") from error
    return path


def torch_hub_file(what: str, url: str, offline: bool, advice: str) -> Path:
    """As `local_or_download`, for a file in torch.hub's cache whose name ends in its hash: NAME-HASH.pth.

    {path} and {name} in `advice` stand for the file's place and name.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    advice = advice.format(path=path, name=path.name)
    return local_or_download(what, path, url, offline, advice, sha256=path.stem.rsplit("-", 1)[1])


def hub_file(what: str, repository: str, filenames: Sequence[str], offline: bool, advice: str) -> Path:
    """The first of `filenames` that a repository of the hub has: this machine's copy if there is one, else a download.

    The hub is not asked whether a local copy is outdated, so weights stay the same between runs. `repository` may end
    in @REVISION. `what`, `advice` and errors are as in `local_or_download`.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repo, _, revision = repository.partition("@")
    for filename in filenames:
        cached = try_to_load_from_cache(repo, filename, revision=revision or None)
        if isinstance(cached, str):
            return Path(cached)
        if offline or cached is not None:  # the hub has said before that there is no such file
            continue
        try:
            path = Path(hf_hub_download(repo, filename, revision=revision or None))
        except Exception as error:  # the hub's client raises a dozen kinds of errors
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                continue
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise UserError(f"{what}: could not download {repository} ({reason}); {advice}") from error
        print(f"{what}: downloaded {repo} at revision {path.parents[filename.count('/')].name}", flush=True)
        return path
    if offline:
        raise UserError(f"{what}: {repository} is not on this machine, and offline; {advice}")
    raise UserError(f"{what}: {repository} has none of {', '.join(filenames)}; {advice}")


def first_on_each_machine(action: Callable[[], T]) -> T:
    """Run `action` on the first process of each machine, then on its others, which find the files on disk.

    Returns what `action` returns on this process. The others wait as long as the first ones need.

    Raises:
        UserError: on every process, if it was raised on one.
    """
    from accelerate import PartialState

    state = PartialState()
    if state.num_processes == 1:
        return action()
    patient_group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    result = failure = None
    if state.is_local_main_process:
        try:
            result = action()
        except UserError as error:
            failure = str(error)
    failures = [None] * state.num_processes
    dist.all_gather_object(failures, failure, group=patient_group)
    dist.destroy_process_group(patient_group)
    for failure in filter(None, failures):
        raise UserError(failure)
    return result if state.is_local_main_process else action()
