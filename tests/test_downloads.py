"""Where weights come from: flags, ckpts/, packages, the hub, projects' sites; offline; and one download a machine."""

import argparse
import os
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

import hub
from errors import UserError
from hub import REPOSITORY, TIMM, timm_weights
from models.encoder_table import ENCODERS, encoder_spec
from scripts import ENVIRONMENT, ROOT, command, torchrun
from weights.downloads import is_offline, local_or_download
from weights.encoders import load_encoders, weights_file

CPU = torch.device("cpu")


def flags(**changes: object) -> argparse.Namespace:
    """Flags of a run that load_encoders looks at."""
    values = {"enc_type": TIMM, "enc_ckpt": [], "resolution": 256, "resample_tokens": False, "offline": False}
    values["mixed_precision"] = "no"
    return argparse.Namespace(**{**values, **changes})


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """An empty working directory and an empty cache of the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return tmp_path


@pytest.fixture
def no_network(monkeypatch) -> None:

    def refuse(*args: object) -> None:
        pytest.fail("touched the network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def fill_cache(cache: Path, repository: str, weights: dict, revision: str = "main") -> Path:
    """The hub's cache as a download leaves it."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / revision).write_text(hub.COMMIT)
    path = folder / "snapshots" / hub.COMMIT / "model.safetensors"
    path.parent.mkdir(parents=True)
    safetensors.torch.save_file(weights, path)
    return path


def test_offline_every_row_names_the_file_to_put_where(elsewhere, no_network):
    assert len({spec.file for spec in ENCODERS.values()}) == len(ENCODERS)
    (elsewhere / "ckpts").mkdir()
    for name in [*ENCODERS, TIMM]:
        spec = encoder_spec(name)
        if name == "efficientnet-lite0":
            assert weights_file(name, spec, None, offline=True).suffix == ".pth"
            continue
        with pytest.raises(UserError) as error:
            weights_file(name, spec, None, offline=True)
        assert f"at ckpts/{spec.file}, or name a file by --enc-ckpt {name}=PATH" in str(error.value)
        assert "\n" not in str(error.value)
        (elsewhere / "ckpts" / spec.file).touch()
        assert weights_file(name, spec, None, offline=True) == Path("ckpts") / spec.file


def test_order_of_sources(elsewhere, no_network, monkeypatch):
    spec = encoder_spec(TIMM)
    cached = fill_cache(elsewhere / "cache", REPOSITORY, timm_weights())
    assert weights_file(TIMM, spec, None, offline=False) == cached
    assert weights_file(TIMM, spec, f"hf-hub:{REPOSITORY}@{hub.COMMIT}", offline=True) == cached
    (elsewhere / "ckpts").mkdir()
    (elsewhere / "ckpts" / spec.file).touch()
    assert weights_file(TIMM, spec, None, offline=False) == Path("ckpts") / spec.file
    assert weights_file(TIMM, spec, "mine.pth", offline=False) == Path("mine.pth")
    with pytest.raises(UserError, match="timm/other@abc is not on this machine, and offline"):
        weights_file(TIMM, spec, "hf-hub:timm/other@abc", offline=True)
    assert not is_offline(flags()) and is_offline(flags(offline=True))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert is_offline(flags())


def test_grids_that_differ_stop_unless_tokens_are_resampled(elsewhere, no_network):
    fill_cache(elsewhere / "cache", REPOSITORY, timm_weights())
    with pytest.raises(UserError, match=r"gives 16x16 tokens at 256 px, but the transformer has 32x32.*--resample-tok"):
        load_encoders(flags(), 32, CPU)
    pixels = torch.zeros(1, 3, 264, 264, dtype=torch.uint8)
    (encoder,) = load_encoders(flags(resample_tokens=True, resolution=264), 33, CPU)
    assert encoder(pixels).shape == (1, 33**2, 64)
    with pytest.raises(UserError, match="gives 4x4 tokens at 256 px, but the transformer has 16x16"):
        load_encoders(flags(enc_type="timm:levit_128s"), 16, CPU)
    with pytest.raises(UserError, match="--enc-ckpt names mae-vit-l, which no other flag does"):
        load_encoders(flags(enc_ckpt=["mae-vit-l=x"]), 16, CPU)


def test_a_download_from_the_hub_of_a_pinned_revision(elsewhere, monkeypatch):
    content = safetensors.torch.save(timm_weights())
    with hub.serving({"/me/mirror/resolve/v1/model.safetensors": content}) as server:
        hub.use_hub(server, monkeypatch)
        given = "hf-hub:me/mirror@v1"
        path = weights_file(TIMM, encoder_spec(TIMM), given, offline=False)
        assert path.read_bytes() == content
        asked = len(server.requests)
        assert weights_file(TIMM, encoder_spec(TIMM), given, offline=True) == path
        assert len(server.requests) == asked  # a copy on this machine is not asked about again
        with pytest.raises(UserError, match=r"could not download me/mirror@v2 \(RevisionNotFoundError: .*; put"):
            weights_file(TIMM, encoder_spec(TIMM), "hf-hub:me/mirror@v2", offline=False)


def test_a_download_from_the_projects_site_goes_to_ckpts(elsewhere, capsys):
    with hub.serving({"/vit-s.pth.tar": b"weights"}) as server:
        spec = replace(ENCODERS["mocov3-vit-s"], url=f"{server.address}/vit-s.pth.tar")
        for _ in range(2):
            assert weights_file("mocov3-vit-s", spec, None, offline=False) == Path("ckpts/mocov3_vits.pth")
        assert Path("ckpts/mocov3_vits.pth").read_bytes() == b"weights"
        assert server.downloads() == ["/vit-s.pth.tar"]
        assert capsys.readouterr().err == ""  # no bar in a log file
        gone = replace(spec, file="other.pth", url=f"{server.address}/gone")
        with pytest.raises(UserError, match=r"could not download .*/gone \(HTTP Error 404.*put facebookresearch/moco"):
            weights_file("mocov3-vit-s", gone, None, offline=False)
        with pytest.raises(UserError, match=r"could not download .*vit-s.*invalid hash.*; do without"):
            local_or_download("it", Path("ckpts/it"), spec.url, offline=False, advice="do without", sha256="abc")
    assert os.listdir("ckpts") == ["mocov3_vits.pth"]


LOADING = """
import torch
from accelerate import PartialState
from errors import run_script
from test_downloads import flags
from weights.encoders import load_encoders
PartialState(cpu=True)
run_script(lambda: load_encoders(flags(), 16, torch.device("cpu")) and None)
"""


@pytest.mark.slow
def test_only_one_process_downloads_and_all_stop_with_one_line(tmp_path):
    content = safetensors.torch.save(timm_weights())
    path = f"/{REPOSITORY}/resolve/main/model.safetensors"
    (tmp_path / "loading.py").write_text(LOADING)
    line = command(tmp_path / "loading.py", launcher=torchrun(2))
    for files, code in (({path: content}, 0), ({}, 1)):
        with hub.serving(files) as server:
            environment = {
                **{key: value for key, value in ENVIRONMENT.items() if "proxy" not in key.lower()},
                "PYTHONPATH": f"{ROOT}:{ROOT}/tests",
                "HF_HUB_OFFLINE": "0",
                "HF_ENDPOINT": server.address,
                "HF_HUB_CACHE": str(tmp_path / str(code)),
            }
            done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240)
        assert done.returncode == code, done.stderr[-3000:]
        assert server.downloads() == ([path] if files else [])
        if files:
            assert done.stdout.count(f"downloaded {REPOSITORY} at revision {hub.COMMIT}") == 1
        else:
            (error,) = {line for line in done.stderr.splitlines() if line.startswith("error: ")}
            assert f"could not download {REPOSITORY}" in error
