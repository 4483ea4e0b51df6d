"""Files fetched from the web: whole or not at all, and never when a run is offline."""

import argparse
import hashlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from http.client import HTTPException
from pathlib import Path
from typing import TypeVar
from urllib.error import URLError
from urllib.request import Request, urlopen

import torch.distributed as dist

from errors import UserError
from storage.files import written_whole


def is_offline(args: argparse.Namespace) -> bool:
    """Whether --offline, or HF_HUB_OFFLINE in the environment, keeps a run off the network."""
    from huggingface_hub import constants

    return args.offline or constants.HF_HUB_OFFLINE


def one_line(text: object) -> str:
    """What an error says, on one line, cut at a length that can be read."""
    return " ".join(str(text).split())[:200]


def download(what: str, url: str, path: Path, advice: str, sha256: str = "") -> Path:
    """Download `url` to `path`, with a progress bar.

    Args:
        what: what it is, for messages.
        advice: what else the user can do, for messages.
        sha256: beginning of the content's hash, if it is known.

    Raises:
        UserError: it could not be had, or is not what was expected.
    """
    from tqdm import tqdm

    print(f"{what}: downloading {url} to {path}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    try:
        with (
            urlopen(Request(url, headers={"User-Agent": "repa-e"}), timeout=60) as response,
            written_whole(path) as file,
        ):
            expected = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=expected, unit="B", unit_scale=True, desc=path.name) as bar:
                while block := response.read(2**20):
                    file.write(block)
                    digest.update(block)
                    bar.update(len(block))
            if expected and file.tell() != expected:
                raise HTTPException(f"{file.tell()} of {expected} bytes came")
            if not digest.hexdigest().startswith(sha256):
                raise HTTPException("its hash is another one than expected")
    except (URLError, HTTPException, ConnectionError, TimeoutError) as error:
        raise UserError(f"{what}: could not download {url} ({one_line(error)}); {advice}") from error
    return path


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


T = TypeVar("T")


def first_on_each_machine(action: Callable[[], T]) -> T:
    """`action` on the first process of each machine, and then on its others, which find what the first one fetched.

    What `action` returns on this process. All wait for as long as the first ones need.

    Raises:
        UserError: on every process, if it was raised on one.
    """
    from accelerate import PartialState

    state = PartialState()
    if state.num_processes == 1:
        return action()
    result = failure = None
    if state.is_local_main_process:
        try:
            result = action()
        except UserError as error:
            failure = str(error)
    failures = [None] * state.num_processes
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    dist.all_gather_object(failures, failure, group=patient)
    dist.destroy_process_group(patient)
    for failure in filter(None, failures):
        raise UserError(failure)
    return result if state.is_local_main_process else action()
