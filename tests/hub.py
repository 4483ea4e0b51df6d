"""A model hub on this machine, for tests of downloads: it serves files by the hub's protocol and counts requests.

And a small timm model, with weights as the hub has them.
"""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import torch

TIMM = "timm:test_vit.r160_in1k"  # 0.4 M parameters
REPOSITORY = "timm/test_vit.r160_in1k"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def timm_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """What the hub holds for TIMM, at the size it was trained at, with its classifier."""
    import timm

    torch.manual_seed(seed)
    return timm.create_model("test_vit.r160_in1k").state_dict()


class Hub(NamedTuple):
    """A running hub: its address, its files by path, and the (method, path) of every request so far."""

    address: str
    files: dict[str, bytes]
    requests: list[tuple[str, str]]

    def downloads(self) -> list[str]:
        return [path for method, path in self.requests if method == "GET" and path in self.files]


def missing(path: str, files: dict[str, bytes]) -> str:
    """What the hub says that it has not: the file, its revision, or its repository."""
    repository, _, rest = path.partition("/resolve/")
    revision = rest.split("/")[0]
    if any(known.startswith(f"{repository}/resolve/{revision}/") for known in files):
        return "EntryNotFound"
    return "RevisionNotFound" if any(known.startswith(f"{repository}/resolve/") for known in files) else "RepoNotFound"


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Hub]:
    """A hub that has `files`, by path, and answers 404 to everything else."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self, send: bool) -> None:
            requests.append((self.command, self.path))
            content = files.get(self.path)
            self.send_response(404 if content is None else 200)
            if content is None:
                self.send_header("X-Error-Code", missing(self.path, files))
                self.send_header("Content-Length", "0")
            else:
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if send and content is not None:
                self.wfile.write(content)

        def do_HEAD(self) -> None:  # noqa: N802 http.server's name
            self.answer(send=False)

        def do_GET(self) -> None:  # noqa: N802
            self.answer(send=True)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Hub(f"http://127.0.0.1:{server.server_port}", files, requests)
    finally:
        server.shutdown()


def use_hub(hub: Hub, monkeypatch) -> None:
    """Let the hub's library ask this one."""
    address = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address)
