"""Where encoders' weights come from: flags, ckpts/, packages, the hub; offline; and files that hold something else."""

import argparse
import os
import re
import socket
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import safetensors.torch
import torch
from torch import nn

import hub
import train_ldm_only
from errors import UserError
from models.encoder_table import ENCODERS, encoder_spec
from models.encoders import Encoder
from originals import original, tiny_encoder
from scripts import ENVIRONMENT, ROOT, TINY, TINY_SIT, call, command, torchrun
from training.build import build_transformer_nets
from training.log import MetricsLog
from weights.checkpoint_io import read_checkpoint
from weights.downloads import is_offline, local_or_download
from weights.encoders import encoder_fingerprints, load_encoder_weights, load_encoders, weights_file

CPU = torch.device("cpu")
TIMM = "timm:test_vit.r160_in1k"  # 0.4 M parameters
REPOSITORY = "timm/test_vit.r160_in1k"


def timm_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """What the hub holds for TIMM, at the size it was trained at, with its classifier."""
    import timm

    torch.manual_seed(seed)
    return timm.create_model("test_vit.r160_in1k").state_dict()


def save(content: object, path: Path) -> Path:
    """torch.save, and where to."""
    torch.save(content, path)
    return path


def flags(**changes: object) -> argparse.Namespace:
    """Flags of a run that load_encoders looks at."""
    values = {"enc_type": TIMM, "enc_ckpt": [], "resolution": 256, "resample_tokens": False, "offline": False}
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
    """Fails the test at the first attempt to connect."""

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


@pytest.mark.parametrize("name", [*ENCODERS, TIMM])
def test_offline_every_row_names_the_file_to_put_where(name, elsewhere, no_network):
    spec = encoder_spec(name)
    if name == "efficientnet-lite0":
        assert weights_file(name, spec, None, offline=True).suffix == ".pth"
        return
    with pytest.raises(UserError) as error:
        weights_file(name, spec, None, offline=True)
    message = str(error.value)
    assert f"at ckpts/{spec.file}, or name a file by --enc-ckpt {name}=PATH" in message
    assert "\n" not in message
    (elsewhere / "ckpts").mkdir()
    (elsewhere / "ckpts" / spec.file).touch()
    assert weights_file(name, spec, None, offline=True) == Path("ckpts") / spec.file


def test_usual_names_of_local_files():
    files = {name: spec.file for name, spec in ENCODERS.items()}
    assert [files[f"mocov3-vit-{size}"] for size in "sbl"] == [f"mocov3_vit{size}.pth" for size in "sbl"]
    assert (files["mae-vit-l"], files["jepa-vit-h"], files["dinov1-vit-b"]) == (
        *("mae_vitl.pth", "ijepa_vith.pth"),
        "dinov1_vitb.pth",
    )
    assert len(set(files.values())) == len(files)


def test_order_of_sources(elsewhere, no_network):
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


def test_the_hubs_weights_are_timms_own(elsewhere, no_network):
    import timm

    weights = timm_weights()
    fill_cache(elsewhere / "cache", REPOSITORY, weights)
    (encoder,) = load_encoders(flags(offline=True), 16, CPU)
    network = timm.create_model(
        "test_vit", pretrained=True, img_size=256, num_classes=0, pretrained_cfg_overlay={"state_dict": weights}
    ).eval()
    pixels = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8)
    with torch.no_grad():
        expected = network.forward_features(encoder.preprocess(pixels))[:, network.num_prefix_tokens :]
    torch.testing.assert_close(encoder(pixels), expected)


def test_grids_that_differ_stop_unless_tokens_are_resampled(elsewhere, no_network):
    fill_cache(elsewhere / "cache", REPOSITORY, timm_weights())
    with pytest.raises(UserError, match=r"gives 16x16 tokens at 256 px, but the transformer has 32x32.*--resample-tok"):
        load_encoders(flags(), 32, CPU)
    pixels = torch.zeros(1, 3, 264, 264, dtype=torch.uint8)
    (encoder,) = load_encoders(flags(resample_tokens=True, resolution=264), 33, CPU)
    assert encoder(pixels).shape == (1, 33**2, 64)
    (encoder,) = load_encoders(flags(resolution=512), 32, CPU)
    assert encoder.size == 512
    with pytest.raises(UserError, match="gives 4x4 tokens at 256 px, but the transformer has 16x16"):
        load_encoders(flags(enc_type="timm:levit_128s"), 16, CPU)


def test_enc_ckpt_must_name_an_encoder_in_use(elsewhere, no_network):
    with pytest.raises(UserError, match="--enc-ckpt names mae-vit-l, which no other flag does"):
        load_encoders(flags(enc_ckpt=["mae-vit-l=x"]), 16, CPU)


def test_environment_keeps_everything_offline(elsewhere, no_network, monkeypatch):
    assert not is_offline(flags()) and is_offline(flags(offline=True))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert is_offline(flags())
    with pytest.raises(UserError, match="not on this machine, and offline"):
        load_encoders(flags(), 16, CPU)


def test_a_download_from_the_hub_of_a_pinned_revision(elsewhere, monkeypatch):
    content = safetensors.torch.save(timm_weights())
    files = {"/me/mirror/resolve/v1/model.safetensors": content, "/me/other/resolve/v1/else": b""}
    with hub.serving(files) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            server.address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        given = "hf-hub:me/mirror@v1"
        path = weights_file(TIMM, encoder_spec(TIMM), given, offline=False)
        assert path.read_bytes() == content
        asked = len(server.requests)
        assert weights_file(TIMM, encoder_spec(TIMM), given, offline=True) == path
        assert len(server.requests) == asked  # a copy on this machine is not asked about again
        for given, message in (
            ("hf-hub:me/nothing", r"could not download me/nothing \(RepositoryNotFoundError: .*; put"),
            ("hf-hub:me/mirror@v2", r"could not download me/mirror@v2 \(RevisionNotFoundError: .*; put"),
            ("hf-hub:me/other@v1", "me/other@v1 has none of model.safetensors, pytorch_model.bin; put"),
        ):
            with pytest.raises(UserError, match=message) as error:
                weights_file(TIMM, encoder_spec(TIMM), given, offline=False)
            assert "\n" not in str(error.value)


def test_a_download_from_the_projects_site_goes_to_ckpts(elsewhere):
    with hub.serving({"/vit-s.pth.tar": b"weights"}) as server:
        spec = replace(ENCODERS["mocov3-vit-s"], url=f"{server.address}/vit-s.pth.tar")
        for _ in range(2):
            assert weights_file("mocov3-vit-s", spec, None, offline=False) == Path("ckpts/mocov3_vits.pth")
        assert Path("ckpts/mocov3_vits.pth").read_bytes() == b"weights"
        assert server.downloads() == ["/vit-s.pth.tar"]
        gone = replace(spec, file="other.pth", url=f"{server.address}/gone")
        with pytest.raises(UserError, match=r"could not download .*/gone \(HTTP Error 404.*put facebookresearch/moco"):
            weights_file("mocov3-vit-s", gone, None, offline=False)
        with pytest.raises(UserError, match=r"could not download .*vit-s.*invalid hash.*; do without"):
            local_or_download("it", Path("ckpts/it"), spec.url, offline=False, advice="do without", sha256="abc")
    assert os.listdir("ckpts") == ["mocov3_vits.pth"]


def test_a_packaged_row_takes_other_weights_too(elsewhere, no_network):
    spec = ENCODERS["efficientnet-lite0"]
    assert weights_file("efficientnet-lite0", spec, "mine.pth", offline=True) == Path("mine.pth")
    with pytest.raises(UserError, match="me/mine@abc is not on this machine, and offline"):
        weights_file("efficientnet-lite0", spec, "hf-hub:me/mine@abc", offline=True)


def test_weights_are_known_by_a_hash_that_other_processors_share(tmp_path):
    encoders = [tiny_encoder("mae-vit-l", 2) for _ in range(3)]
    for encoder in encoders:
        load_encoder_weights(encoder, "mae-vit-l", save(original("mae-vit-l"), tmp_path / "weights.pth"))
    encoders[1].network.pos_embed += 1e-7  # as another processor rounds
    encoders[2].network.blocks[0].norm1.bias[3] += 1e-7
    first, rounded, other = (encoder_fingerprints(flags(enc_type="mae-vit-l"), [encoder]) for encoder in encoders)
    assert first == rounded != other


def test_checkpoints_of_timms_training_are_read(tmp_path):
    import timm

    network = timm.create_model("resnet18")
    path = save({"state_dict": network.state_dict(), "epoch": 3}, tmp_path / "last.pth.tar")
    encoder = Encoder(encoder_spec("timm:resnet18"), 2)
    load_encoder_weights(encoder, "timm:resnet18", path)
    assert torch.equal(encoder.network.conv1.weight, network.conv1.weight)


def test_half_precision_files_are_resampled_in_single(tmp_path):
    half = {"model": {key: value.half() for key, value in original("mae-vit-l")["model"].items()}}
    single = {"model": {key: value.float() for key, value in half["model"].items()}}
    states = []
    for content in (half, single):
        encoder = tiny_encoder("mae-vit-l", 5)
        load_encoder_weights(encoder, "mae-vit-l", save(content, tmp_path / "weights.pth"))
        states.append(encoder.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def refused(name: str, path: Path) -> str:
    """The one line that loading a file as row `name` says."""
    with pytest.raises(UserError) as error:
        load_encoder_weights(tiny_encoder(name, 2), name, path)
    message = str(error.value)
    assert "\n" not in message and str(path) in message
    return message


def test_files_that_hold_no_such_encoder(tmp_path):
    path = tmp_path / "weights.pth"
    assert "no such file" in refused("mae-vit-l", path)
    torch.save(original("mae-vit-l"), path)
    assert "no checkpoint of this encoder" in refused("siglip2-vit-b", path)
    for name in ("dinov2-vit-s", "dinov1-vit-b", "mocov3-vit-s"):
        assert "it holds 'model', as other projects' do; expected" in refused(name, path)
    torch.save(original("mae-vit-l")["model"], path)
    assert "its position table is not MoCo v3's" in refused("mocov3-vit-s", path)
    assert "its patches are 16 px wide, expected 14" in refused("dinov2-vit-s", path)
    torch.save(original("dinov2-vit-s"), path)
    assert "its patches are 14 px wide, expected 16" in refused("dinov1-vit-b", path)
    torch.save(original("dinov2reg-vit-s"), path)
    assert "no checkpoint of this encoder" in refused("dinov2-vit-s", path)
    torch.save({key: value for key, value in original("dinov2-vit-s").items() if "ls1" not in key}, path)
    assert "2 weights are missing, first blocks.0.ls1.gamma: another" in refused("dinov2-vit-s", path)
    torch.save({**original("dinov1-vit-b"), "head.weight": torch.zeros(9, 64)}, path)
    assert "1 unexpected weights, first head.weight" in refused("dinov1-vit-b", path)
    clip = original("clip-vit-L")
    clip["visual.positional_embedding"] = torch.zeros(577, 64)
    torch.save(clip, path)
    assert "its position table is of 24x24 tokens, expected 16x16" in refused("clip-vit-L", path)
    torch.save({"student": original("dinov1-vit-b"), "teacher": original("dinov1-vit-b")}, path)
    assert "it holds 'student', as other projects' do; expected a plain state dict" in refused("dinov1-vit-b", path)
    torch.save({"model": [1, 2]}, path)
    assert "weights are missing" in refused("mae-vit-l", path)
    torch.save([1, 2], path)
    assert "holds a list, expected a dict" in refused("mae-vit-l", path)
    torch.save({}, path)
    assert "weights are missing" in refused("clip-vit-L", path)
    wide = original("dinov1-vit-b")
    wide["cls_token"] = torch.zeros(1, 1, 65)
    torch.save(wide, path)
    assert "cls_token has shape (1, 1, 65), expected (1, 1, 64)" in refused("dinov1-vit-b", path)
    path.write_text("<html>not found</html>")
    assert "not a readable PyTorch file" in refused("mae-vit-l", path)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_files_cut_short_or_flipped(form, tmp_path):
    path = tmp_path / "weights.pth"
    weights = original("dinov1-vit-b")
    if form == "safetensors":
        safetensors.torch.save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=form == "zip")
    load_encoder_weights(tiny_encoder("dinov1-vit-b", 2), "dinov1-vit-b", path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert re.search("not a readable PyTorch file|damaged or cut short", refused("dinov1-vit-b", path))
    if form == "zip":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        assert "damaged (checksum of" in refused("dinov1-vit-b", path)


class Executed:
    """Unpickles to a call."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    path, trace = tmp_path / "weights.pth", tmp_path / "executed"
    torch.save({"model": Executed(trace)}, path)
    assert "not a readable PyTorch file" in refused("mae-vit-l", path)
    assert not trace.exists()


def tree(state: dict[str, torch.Tensor]) -> nn.Module:
    """A module whose state dict is `state`."""
    root = Scripted()
    for key, value in state.items():
        *parents, name = key.split(".")
        module = root
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, Scripted())
            module = module._modules[parent]
        module.register_parameter(name, nn.Parameter(value))
    return root


class Scripted(nn.Module):
    """TorchScript needs a forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Busy(nn.Module):
    """A module of TorchScript that runs code when it is loaded."""

    def __init__(self):
        super().__init__()
        self.training = False

    @torch.jit.export
    def __getstate__(self):
        return torch.zeros(1), self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        self.training = state[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_clip_as_openai_publishes_it(tmp_path):
    # a TorchScript archive of half precision; its visual tower alone; and timm's form are the same weights
    weights = {key: value.half() for key, value in original("clip-vit-L").items()}
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    tokens = []
    for form in ("archive", "tower"):
        path = tmp_path / form
        if form == "archive":
            torch.jit.script(tree(weights)).save(path)
        else:
            prefix = "visual."
            torch.save({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}, path)
        encoder = tiny_encoder("clip-vit-L", 2)
        load_encoder_weights(encoder, "clip-vit-L", path)
        assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
        tokens.append(encoder(pixels))
    assert torch.equal(*tokens)
    content = (tmp_path / "archive").read_bytes()
    (tmp_path / "cut").write_bytes(content[: len(content) // 2])
    refused("clip-vit-L", tmp_path / "cut")
    torch.jit.script(Busy()).save(tmp_path / "busy")
    assert "runs code when loaded" in refused("clip-vit-L", tmp_path / "busy")


def test_encoders_are_never_wrapped_for_several_processes(tmp_path):
    class Recorder:
        device, directory = CPU, tmp_path
        prepared: ClassVar[list[nn.Module]] = []

        def print(self, text: str) -> None:
            pass

        def prepare(self, module: nn.Module) -> nn.Module:
            self.prepared.append(module)
            return module

    args = train_ldm_only.parse_args(
        [*TINY, *TINY_SIT, "--exp-name", "x", "--enc-type", f"{TIMM},efficientnet-lite0", "--resample-tokens"]
        + ["--enc-ckpt", f"{TIMM}={save(timm_weights(), tmp_path / 'weights.pth')}"]
    )
    nets = build_transformer_nets(args, Recorder(), (4, 8, 8), (torch.ones(4), torch.zeros(4)))
    assert Recorder.prepared == [nets.sit]
    assert [encoder.spec.model for encoder in nets.encoders] == ["test_vit.r160_in1k", "tf_efficientnet_lite0"]
    own = {id(parameter) for encoder in nets.encoders for parameter in encoder.parameters()}
    assert own and own.isdisjoint(map(id, [*nets.sit.parameters(), *nets.ema.parameters(), *nets.opt_sit.parameters]))


def test_offline_wandb_keeps_its_files(tmp_path, monkeypatch):
    opened = {}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("wandb.login", lambda **_: True)
    accelerator = SimpleNamespace(
        init_trackers=lambda name, config, init_kwargs: opened.update(init_kwargs["wandb"]),
        is_main_process=True,
        log_with=["wandb"],
    )
    for offline in (False, True):
        args = argparse.Namespace(report_to="wandb", exp_name="x", offline=offline)
        MetricsLog(accelerator, args, tmp_path, log=print).open(step=0)
        assert opened.get("mode") == ("offline" if offline else None)


@pytest.mark.slow
def test_training_from_local_files_and_what_its_checkpoint_holds(joint, tmp_path):
    output, tiny = joint
    weights = timm_weights()
    path, other = tmp_path / "a model=1.pth", tmp_path / "other.safetensors"
    torch.save({"state_dict": weights}, path)
    safetensors.torch.save_file(timm_weights(seed=1), other)
    encoders = ("--enc-type", f"{TIMM},efficientnet-lite0", "--resample-tokens")
    irepa = ("--projector", "conv", "--spatial-norm")
    run_flags = (*tiny, *encoders, *irepa, "--exp-name", "two-encoders", "--sampling-steps", 100)
    code, said = call("train_repae.py", *run_flags, "--max-train-steps", 2, "--enc-ckpt", f"{TIMM}={path}")
    assert (code, said) == (0, said)
    checkpoint = read_checkpoint(output / "two-encoders/checkpoints/0000002.pt")
    projectors = {key: tuple(v.shape) for key, v in checkpoint["model"].items() if key.startswith("projectors")}
    assert projectors == {
        "projectors.0.weight": (64, 64, 3, 3),
        "projectors.0.bias": (64,),
        "projectors.1.weight": (112, 64, 3, 3),
        "projectors.1.bias": (112,),
    }
    assert not any("encoder" in key for key in checkpoint.keys() - {"vae"})
    assert checkpoint["identity"]["encoders"].keys() == {TIMM, "efficientnet-lite0"}
    # other weights would make it another run; the same weights in another file do not
    code, said = call("train_repae.py", *run_flags, "--max-train-steps", 3, "--enc-ckpt", f"{TIMM}={other}")
    assert code == 2 and "was made with other weights of the encoders" in said
    same = tmp_path / "same.safetensors"
    safetensors.torch.save_file(weights, same)
    code, said = call("train_repae.py", *run_flags, "--max-train-steps", 3, "--enc-ckpt", f"{TIMM}={same}")
    assert code == 0, said
    code, said = call("train_repae.py", *run_flags, "--max-train-steps", 4, "--projector", "mlp")
    assert code == 2


@pytest.mark.slow
def test_only_one_process_downloads_and_all_stop_with_one_line(joint, tmp_path):
    _, tiny = joint
    content = safetensors.torch.save(timm_weights())
    path = f"/{REPOSITORY}/resolve/main/model.safetensors"
    line = command(
        *("train_repae.py", *tiny, "--exp-name", "download", "--max-train-steps", 1, "--sampling-steps", 100),
        *("--enc-type", TIMM, "--resample-tokens"),
        launcher=torchrun(2),
    )
    for files, code in (({path: content}, 0), ({}, 1)):
        with hub.serving(files) as server:
            environment = {
                **{key: value for key, value in ENVIRONMENT.items() if "proxy" not in key.lower()},
                "HF_HUB_OFFLINE": "0",
                "HF_ENDPOINT": server.address,
                "HF_HUB_CACHE": str(tmp_path / str(code)),
            }
            done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240)
        assert done.returncode == code, done.stderr[-3000:]
        assert server.downloads() == ([path] if files else [])
        if files:
            assert f"downloaded {REPOSITORY} at revision {hub.COMMIT}" in done.stdout
        else:
            assert done.stderr.count("error: ") == 1
            assert f"could not download {REPOSITORY}" in done.stderr
            assert "Traceback" not in done.stderr.split("error: ")[1].splitlines()[0]
