"""Nothing from outside is executed: files that would run code when they are read, given to whatever reads files."""

import ast
import collections
import datetime
import functools
import importlib
import os
import pickle
import shutil
import subprocess
import sys
import types
import typing
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import published
from errors import UserError
from good import good_flags, write_good_files
from scripts import ROOT, equal, refusal, run
from weights.checkpoint_io import read_checkpoint, vae_files
from weights.vae import load_vae, open_vae


class Executed:
    """Unpickles to a call, if no other one is given of one that makes a folder."""

    def __init__(self, path: Path, function=os.mkdir):
        self.path, self.function = path, function

    def __reduce__(self):
        return self.function, (str(self.path),)


@pytest.fixture(scope="module")
def places(tmp_path_factory, vgg_weights) -> dict[str, Path]:
    """Good files, by name, and the latents of their images."""
    good = {**write_good_files(tmp_path_factory.mktemp("trust")), "vgg": vgg_weights}
    run("cache_latents.py", *good_flags("cache_latents.py", good, good["data"]))
    return good


# script, and what makes it read a crafted file: flags after good ones, with the places of `crafted`
READERS = [
    ("train_repae.py", "--vae-ckpt {bad}"),
    ("train_repae.py", "--disc-pretrained-ckpt {bad}"),
    ("train_repae.py", "--lpips-vgg-ckpt {bad}"),
    ("train_repae.py", "--enc-ckpt efficientnet-lite0={bad}"),
    ("train_repae.py", "--vae-ckpt {beside}/sdvae.pt"),
    ("train_repae.py", "--output-dir {resumed}"),
    ("train_repae.py", "--output-dir {out} --continue-train-exp-dir {resumed}/run"),
    ("train_vae.py", "--vae-ckpt {bad}"),
    ("train_ldm_only.py", "--vae-ckpt {bad}"),
    ("generate.py", "--exp-path {resumed}/run"),
    ("generate.py", "--exp-path {frozen} --vae-ckpt {bad}"),
    ("save_vae_weights.py", "--repae-ckpt {bad}"),
    ("save_vae_weights.py", "--save-dir {taken}"),
    ("cache_latents.py", "--vae-ckpt-path {bad}"),
    ("evaluate.py", "--features inception --inception-weights {bad}"),
    ("evaluate.py", "--enc-ckpt efficientnet-lite0={bad}"),
    ("evaluate.py", "--samples {bad}"),
    ("evaluate.py", "--reference {bad}"),
    ("reconstruction", "--vae {bad}"),
]


FORMS = ("pickle", "legacy", "zip")  # a bare pickle, or PyTorch's file before and since version 1.6


def craft(path: Path, form: str, canary: Path) -> None:
    """A file that makes a folder `canary` when it is unpickled, in one of FORMS."""
    content = {"model": Executed(canary)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")


def crafted(places: dict[str, Path], root: Path, form: str) -> dict[str, Path]:
    """Crafted files wherever one is read without being named: beside a VAE, in a run, where a VAE is to go."""
    found = {**places, "bad": root / "bad.pt", "canary": root / "canary", "out": root / "out"}
    craft(found["bad"], form, found["canary"])
    found["beside"] = shutil.copytree(places["vae"].parent, root / "beside")
    craft(vae_files(found["beside"] / "sdvae.pt").statistics, form, found["canary"])
    found["resumed"], found["taken"] = root / "resumed", root / "taken"
    for path in (found["resumed"] / "run/checkpoints/0000005.pt", found["taken"] / "e2e/e2e.pt"):
        path.parent.mkdir(parents=True)
        shutil.copyfile(found["bad"], path)
    found["out"].mkdir()
    return found


def refused(script: str, flags: list, canary: Path) -> str:
    """The one line that a script ends with, without having executed anything."""
    line = refusal("evaluate.py" if script == "reconstruction" else script, *flags)
    assert not canary.exists(), "executed"
    return line


@pytest.mark.parametrize("form", FORMS)
def test_the_crafted_files_would_execute(tmp_path, form):
    craft(tmp_path / "bad.pt", form, tmp_path / "canary")
    with open(tmp_path / "bad.pt", "rb") as file:
        pickle.load(file) if form == "pickle" else torch.load(file, weights_only=False)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize(("script", "flags", "form"), [(*reader, FORMS[i % 3]) for i, reader in enumerate(READERS)])
def test_a_file_that_would_execute_is_refused_wherever_it_is_read(places, tmp_path, script, flags, form):
    bad = crafted(places, tmp_path, form)
    words = flags.format(**bad).split()
    line = refused(script, [*good_flags(script, places, bad["out"]), *words], bad["canary"])
    assert str(tmp_path) in line


FUNCTIONS = [eval, subprocess.Popen, functools.partial, torch.load]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_function_is_named_on_one_line(tmp_path, function):
    path = tmp_path / "bad.pt"
    for zipped in (True, False):
        torch.save({"w": torch.ones(1), "x": Executed("x", function)}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match=rf"holds '[\w.]*{function.__name__}', which could run code") as error:
            read_checkpoint(path)
        assert str(error.value).isprintable()


class ModelCheckpoint:
    """Of what trainers save: it must not be made again when it is read."""

    def __init__(self):
        self.best, self.period, self.folder = torch.ones(1), datetime.timedelta(1), Path("logs")

    def __setstate__(self, state):
        raise AssertionError("executed")


class Munch(dict):
    pass


class Size(typing.NamedTuple):
    width: int = 3


@pytest.mark.parametrize("gone", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_what_a_trainer_saved_beside_the_weights_is_inert(tmp_path, monkeypatch, zipped, gone):
    """As in CompVis's kl-f8.ckpt, whose callbacks are of Lightning, installed or not."""
    module = types.ModuleType("pytorch_lightning")
    monkeypatch.setitem(sys.modules, "pytorch_lightning", module)
    for kind in (ModelCheckpoint, Munch, Size):
        monkeypatch.setattr(kind, "__module__", "pytorch_lightning")
        setattr(module, kind.__name__, kind)
    numbers = {"best": np.float64(0.5), "rng": np.random.get_state(), "kinds": [int, dict, typing.Any]}
    cache = collections.defaultdict(dict, {"a": {"b": 1}})
    content = {
        "callbacks": {ModelCheckpoint: {"best_model_score": np.float32(1)}, "all": [ModelCheckpoint()]},
        "hyper_parameters": Munch(when=datetime.datetime(2022, 1, 1), cache=cache, size=Size(), **numbers),
        "state_dict": published.fresh_vae().state_dict(),
    }
    path = tmp_path / "kl.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    if gone:
        monkeypatch.delitem(sys.modules, "pytorch_lightning")
    vae = load_vae(open_vae(published.VAE, str(path), offline=True))
    assert equal(dict(vae.state_dict()), dict(published.fresh_vae().state_dict()))
    read = read_checkpoint(path)["hyper_parameters"]
    assert read["cache"] == {"a": {"b": 1}}
    assert not isinstance(read["when"], datetime.datetime)


def make_folder(path: str) -> None:
    """A function of neither Python nor PyTorch."""
    os.mkdir(path)


def test_what_another_library_unpickles_has_no_unknown_name(places, tmp_path):
    """torch-fidelity unpickles Inception's weights, so that nothing in them may be replaced."""
    canary, path = tmp_path / "canary", tmp_path / "bad.pt"
    torch.save(collections.OrderedDict(weight=Executed(canary, make_folder)), path)
    assert set(read_checkpoint(path)) == {"weight"} and not canary.exists()
    flags = ("--features", "inception", "--inception-weights", path)
    line = refused("evaluate.py", [*good_flags("evaluate.py", places, tmp_path), *flags], canary)
    assert "holds 'test_trust.make_folder', which could run code" in line
    torch.load(path, weights_only=False)
    assert canary.exists()


@pytest.mark.parametrize(("name", "flag"), [("arr_0", "--samples"), ("mu", "--reference"), ("about", "--reference")])
def test_objects_in_an_npz_are_refused(places, tmp_path, name, flag):
    canary, path = tmp_path / "canary", tmp_path / "bad.npz"
    np.savez(path, **{name: np.array([Executed(canary), None], dtype=object)})
    line = refused("evaluate.py", [*good_flags("evaluate.py", places, tmp_path), flag, path], canary)
    assert str(path) in line
    with pytest.raises(FileExistsError):  # it would have been: once by each of the two
        canary.mkdir()
        np.load(path, allow_pickle=True)[name]


def test_a_yaml_that_would_execute_is_refused(places, tmp_path):
    path, canary = tmp_path / "loss.yaml", tmp_path / "canary"
    path.write_text(f"losses: !!python/object/apply:os.mkdir [{canary}]\n")
    flags = [*good_flags("train_repae.py", places, tmp_path), "--loss-cfg-path", path]
    assert "loss.yaml: not a readable YAML file" in refused("train_repae.py", flags, canary)


class Busy(nn.Module):
    """A module of TorchScript that writes a file when it is loaded."""

    @torch.jit.export
    def __getstate__(self):
        return torch.zeros(1), self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        torch.save(state[0], "CANARY")
        self.training = state[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("suffix", [".py", ".PY"])  # PyTorch's own reader finds names whatever their case
def test_torchscript_that_would_execute_is_refused(places, tmp_path, suffix):
    canary, path = tmp_path / "c", tmp_path / "bad.pt"
    torch.jit.script(Busy()).save(tmp_path / "busy.pt")
    with zipfile.ZipFile(tmp_path / "busy.pt") as busy, zipfile.ZipFile(path, "w") as archive:
        for name in busy.namelist():
            content = busy.read(name)
            if name.endswith(".py"):
                name = name.removesuffix(".py") + suffix
                content = content.replace(b'"CANARY"', f'"{canary}"'.encode())
            archive.writestr(name, content)
    flags = [*good_flags("train_repae.py", places, tmp_path), "--enc-ckpt", f"efficientnet-lite0={path}"]
    assert "runs code when loaded" in refused("train_repae.py", flags, canary)
    torch.jit.load(path)
    assert canary.exists()


# what runs code that a file brings along; torch.jit.load is for archives whose code was looked at before
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy"}
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.jit.load", "torch.hub.load"),
    *("torch.hub.load_state_dict_from_url", "torch.serialization.add_safe_globals"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.unsafe_load_all"),
    "importlib.import_module",
}
TRUSTED = ("[argparse.Namespace]", "[argparse.Namespace, *stubs]")  # a stub does nothing, see what is inert above
ALLOWED = {
    "demo/convert_lpips.py": {"import pickle"},  # for an Unpickler that knows numpy's arrays alone
    "weights/checkpoint_io.py": {"torch.jit.load"},
}


def violations(source: str) -> set[str]:
    """What a source does that could execute what a file brings along."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found |= {f"import {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES}
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        flags = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in FORBIDDEN_CALLS or name.split(".")[0] == "pickle" and name.split(".")[-1] in ("load", "loads"):
            found.add(name)
        if name == "torch.load" and flags.get("weights_only") != "True":
            found.add("torch.load of more than weights")
        if name.endswith(".get_state_dict"):  # torchvision's, which unpickles what it downloaded before
            found.add("get_state_dict")
        if flags.get("allow_pickle", "False") != "False":
            found.add(f"{name} with pickles")
        if name.endswith("safe_globals") and ast.unparse(node.args[0]) not in TRUSTED:
            found.add(f"{name} of more than a Namespace")
    return found


def test_the_search_finds_what_executes_and_nothing_else():
    for source in (
        *("import pickle", "from dill import load", "pickle.loads(x)", "torch.load(x)", "eval('1')", "exec(x)"),
        *("torch.load(x, weights_only=False)", "np.load(x, allow_pickle=True)", "read_array(f, allow_pickle=a)"),
        *("yaml.load(x, Loader)", "torch.jit.load(x)", "torch.serialization.safe_globals([A])"),
        "W.V.get_state_dict()",
    ):
        assert violations(source), source
    for source in ("model.eval()", "torch.load(x, weights_only=True)", "np.load(x)", "json.loads(x)"):
        assert not violations(source), source


def test_no_source_executes_what_a_file_brings_along():
    paths = [path for path in ROOT.rglob("*.py") if not path.relative_to(ROOT).parts[0].startswith((".", "tests"))]
    assert len(paths) > 40
    found = {str(path.relative_to(ROOT)): violations(path.read_text(encoding="utf8")) for path in paths}
    assert {path: names for path, names in found.items() if names} == ALLOWED
    unpickler = importlib.import_module("demo.convert_lpips").NumpyUnpickler
    assert unpickler.find_class is not pickle.Unpickler.find_class
