"""Files fetched from the web: whole or not at all, and never when a run is offline."""

import argparse
import hashlib
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

from errors import UserError
from files import written_whole


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
