"""The study of the method's claims: the whole plan in small, its page, and how its parts are merged."""

import importlib
import json
import runpy
import shutil
from pathlib import Path

import pytest

import evaluate
from demo import runner
from errors import UserError
from experiments import page, plan, replicate
from experiments.plan import ARMS, MAIN_ARMS
from images import make_tree
from scripts import ROOT
from training import build


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Runs the study on a few pictures, with pages into a folder of their own.

    The scripts run in this process, load the networks of features and LPIPS once, have narrow projectors, and take
    distances in VGG16's features only.
    """
    for split in ("train", "held-out"):
        make_tree(tmp_path / "pictures" / split, per_class=4)
    (tmp_path / "pictures/complete").touch()
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr("diffusion.previews.STEPS", 2)
    monkeypatch.setattr("models.sit.PROJECTOR_WIDTH", 64)
    monkeypatch.setattr(replicate, "SAMPLING_STEPS", 2)
    monkeypatch.setattr(plan, "FEATURES", "vgg16")
    for module in (page, plan):
        monkeypatch.setattr(module, "VAE_ARCH", "f4d4-tiny")
    for module, name in ((evaluate, "load_feature_networks"), (evaluate, "load_lpips"), (build, "load_lpips")):
        monkeypatch.setattr(module, name, called_once(getattr(module, name)))
    started = []

    def run_here(arguments: list[str]) -> int:
        arguments = arguments[arguments[0] == "-m" :]
        module = arguments[0].removesuffix(".py").replace("/", ".")
        started.append(module)
        monkeypatch.setattr("sys.argv", arguments)
        if "." in module:
            runpy.run_module(module, run_name="__main__")
        else:
            importlib.import_module(module).main()
        return 0

    def run_study(output, *flags):
        started.clear()
        places = (
            "--data-dir",
            tmp_path / "pictures",
            "--output-dir",
            tmp_path / output,
            "--page-dir",
            tmp_path / "docs",
        )
        monkeypatch.setattr("sys.argv", ["replicate", *map(str, (*places, *flags))])
        replicate.main()
        return json.loads((tmp_path / "docs/replication.json").read_text()), list(started)

    monkeypatch.setattr(runner, "run_script", run_here)
    return run_study


def called_once(function):
    """`function`, whose first result is the result of every call."""
    results = []

    def call(*args):
        if not results:
            results.append(function(*args))
        return results[0]

    return call


@pytest.mark.slow
def test_the_whole_plan_at_two_steps_an_arm(study, tmp_path):
    sizes = ("--steps", 2, "--batch-size", 2, "--samples", 4)
    found, started = study("exps", "--seeds", 1, *sizes)
    assert found["results"].keys() == {"vae", *ARMS}
    assert all(of_arm.keys() == {"0"} for of_arm in found["results"].values())
    joint, frozen = found["results"]["repae"]["0"], found["results"]["repa"]["0"]
    assert joint.keys() - frozen.keys() >= {"psnr", "lpips", "rfd_vgg16", "bn_std_drift"}
    assert frozen.keys() >= {"fd_vgg16", "kd_vgg16", "proj_loss", "minutes"}
    assert "proj_loss" not in found["results"]["naive"]["0"]
    assert joint["curves"]["step"] == [1, 2]
    text = (tmp_path / "docs/replication.md").read_text()
    assert all(f"| {arm.title} | 1 |" in text for arm in ARMS.values())
    pictures = [tmp_path / "docs" / f"replication{kind}.png" for kind in ("-samples", "-vaes", "")]
    assert all(picture.stat().st_size > 10000 for picture in pictures)
    assert study("exps", "--seeds", 1, *sizes)[1] == []  # nothing is left to do
    # another machine's seed is added to the published ones, for the arms that it ran
    shutil.copytree(tmp_path / "exps/data", tmp_path / "other/data")
    drawn = [picture.read_bytes() for picture in pictures]
    found, started = study("other", "--seeds", 1, "--first-seed", 1, *sizes, "--arms", "diffusion")
    # the curves have another line; pictures need all main arms
    assert [picture.read_bytes() == before for picture, before in zip(pictures, drawn, strict=True)] == [1, 1, 0]
    assert found["results"]["diffusion"].keys() == {"0", "1"}
    assert found["results"]["repae"].keys() == {"0"}
    assert "train_repae" not in started
    with pytest.raises(SystemExit, match="was begun with"):
        study("other", *sizes, "--steps", 3)
    with pytest.raises(UserError, match="is of .*'steps': 2.*; take these, or another --page-dir"):
        study("third", *sizes, "--steps", 3)


def test_an_arm_brings_those_that_tune_its_vae_and_that_it_is_compared_with():
    assert replicate.arm_list("tuned") == ["repae", "tuned"]
    assert replicate.arm_list("depth-1") == ["repae", "depth-1"]
    assert replicate.arm_list("tuned-align-0") == ["repa", "repae", "align-0", "tuned-align-0"]
    assert replicate.arm_list("main") == list(MAIN_ARMS)


@pytest.mark.parametrize(("arm", "vae"), [("repa", "vae"), ("tuned", "repae-vae"), ("tuned-align-0", "align-0-vae")])
def test_a_frozen_arm_trains_on_the_latents_of_its_vae(arm, vae):
    stages = plan.arm_stages(arm, plan.Settings(2, 3, 4, 5, 6), 7, Path("data"), Path("seed-7"))
    lines = {stage.name: stage.line for stage in stages}
    assert f"--vae-ckpt seed-7/{vae}/{vae}.pt" in lines[f"seed-7/{arm}"]
    assert f"--vae-latents-name {vae}-7" in lines[f"seed-7/{arm}"]
    if arm != "repa":
        cached = lines[f"seed-7/{vae}-latents"]
        assert f"--vae-ckpt-path seed-7/{vae}/{vae}.pt --vae-latents-name {vae}-7" in cached


def test_arms_are_compared_with_the_arm_of_their_own_seed():
    results = {
        "repa": {"0": {"fd": 1.0, "machine": "a"}, "2": {"fd": 3.0}},
        "tuned": {"2": {"fd": 5.0, "psnr": 1.0, "machine": "a"}, "3": {"fd": 4.0}},
    }
    assert page.differences(results, "repa") == {"tuned": {"2": {"fd": 2.0}}}
    assert page.differences(results, "naive") == {"repa": {}, "tuned": {}}


def test_the_published_page_is_that_of_its_numbers():
    content = json.loads((ROOT / "docs/replication.json").read_text(encoding="utf8"))
    text = page.page_text(content, ROOT / "docs/replication-findings.md")
    assert (ROOT / "docs/replication.md").read_text(encoding="utf8") == text


def test_a_cell_is_the_mean_and_deviation_over_seeds():
    of_seeds = {"0": {"fd": 1.0}, "1": {"fd": 2.0}, "2": {"fd": 6.0}}
    assert page.spread(of_seeds, "fd", 1) == "3.0 ± 2.6"
    assert page.spread({"0": {"fd": 1.0}}, "fd", 1) == "1.0"
    assert page.spread(of_seeds, "other", 1) == ""
