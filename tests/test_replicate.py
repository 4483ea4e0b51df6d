"""The study of the method's claims: the whole plan in small, its page, and how its parts are merged."""

import json
import shutil

import pytest

from demo import runner
from experiments import page
from experiments.plan import ARMS, MAIN_ARMS
from experiments.replicate import arm_list, main
from images import make_tree
from scripts import run


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Runs the study on a few pictures, with pages into a folder of their own; the scripts run in this process."""
    for split in ("train", "held-out"):
        make_tree(tmp_path / "pictures" / split, per_class=4)
    (tmp_path / "pictures/complete").touch()
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(page, "DOCS", tmp_path / "docs")
    started = []

    def run_here(arguments: list[str]) -> int:
        started.append(arguments[0])
        if "/" not in arguments[0] and arguments[0].endswith(".py"):
            return run(*arguments).returncode
        return real(arguments)

    def run_study(output, *flags):
        started.clear()
        places = ("--data-dir", tmp_path / "pictures", "--output-dir", tmp_path / output)
        monkeypatch.setattr("sys.argv", ["replicate", *map(str, (*places, *flags))])
        main()
        return json.loads((tmp_path / "docs/replication.json").read_text()), list(started)

    real = runner.run_script
    monkeypatch.setattr(runner, "run_script", run_here)
    return run_study


@pytest.mark.slow
def test_the_whole_plan_at_two_steps_an_arm(study, tmp_path):
    sizes = ("--steps", 2, "--batch-size", 4, "--samples", 6)
    found, started = study("exps", "--seeds", 1, *sizes)
    assert found["results"].keys() == {"vae", *ARMS}
    assert all(of_arm.keys() == {"0"} for of_arm in found["results"].values())
    joint, frozen = found["results"]["repae"]["0"], found["results"]["repa"]["0"]
    assert joint.keys() - frozen.keys() >= {"psnr", "lpips", "rfd_vgg16", "bn_std_drift"}
    assert frozen.keys() >= {"fd_vgg16", "kd_efficientnet_lite0", "proj_loss", "minutes"}
    assert "proj_loss" not in found["results"]["naive"]["0"]
    assert joint["curves"]["step"] == [1, 2]
    text = (tmp_path / "docs/replication.md").read_text()
    assert all(f"| {arm.title} | 1 |" in text for arm in ARMS.values())
    for picture in ("replication.png", "replication-samples.png", "replication-vaes.png"):
        assert (tmp_path / "docs" / picture).stat().st_size > 10000
    assert study("exps", "--seeds", 1, *sizes)[1] == []  # nothing is left to do
    # another machine's seed is added to the published ones, for the arms that it ran
    shutil.copytree(tmp_path / "exps/data", tmp_path / "other/data")
    found, started = study("other", "--seeds", 1, "--first-seed", 1, *sizes, "--arms", "diffusion")
    assert found["results"]["diffusion"].keys() == {"0", "1"}
    assert found["results"]["repae"].keys() == {"0"}
    assert "train_repae.py" not in started
    with pytest.raises(SystemExit, match="was begun with"):
        study("other", *sizes, "--steps", 3)


def test_an_arm_on_the_tuned_vae_brings_the_joint_one():
    assert arm_list("tuned,depth-1") == ["repae", "tuned", "depth-1"]
    assert arm_list("main") == list(MAIN_ARMS)


def test_a_cell_is_the_mean_and_deviation_over_seeds():
    of_seeds = {"0": {"fd": 1.0}, "1": {"fd": 2.0}, "2": {"fd": 6.0}}
    assert page.spread(of_seeds, "fd", 1) == "3.0 ± 2.6"
    assert page.spread({"0": {"fd": 1.0}}, "fd", 1) == "1.0"
    assert page.spread(of_seeds, "other", 1) == ""
