"""The demo: its command lines, its record over interruptions, and its report."""

import importlib
import json
import re
import shlex
import sys

import numpy as np
import pytest
import torch

from demo import run as demo
from demo import runner
from demo.report import write_report
from images import make_tree
from models.autoencoder import VAE_CONFIGS
from preprocessing import preprocess
from weights.checkpoint_io import write_atomically

CLASSES = ("ape", "bee", "cat")


def test_the_scripts_take_the_demos_command_lines_in_the_order_of_the_method():
    order = []
    for stage in demo.stages(demo.make_plan(50)):
        script, *flags = shlex.split(stage.line)
        if "/" not in script:
            args = importlib.import_module(script.removesuffix(".py")).parse_args(flags)
            order += [script] if script not in order else []
        if script.startswith("train_"):
            assert args.max_train_steps == {"vae": 75, "joint": 50, "frozen": 150}[stage.name]
    assert order == [
        *("preprocessing.py", "train_vae.py", "train_repae.py", "save_vae_weights.py", "cache_latents.py"),
        *("train_ldm_only.py", "generate.py", "evaluate.py"),
    ]


@pytest.fixture
def root(tmp_path, monkeypatch):
    for module in (demo, runner):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    return tmp_path


def record_of(root, steps: int) -> runner.Record:
    return runner.Record(root / demo.FOLDER / "stages.json", demo.make_plan(steps)._asdict())


def test_an_interrupted_stage_continues_and_its_time_adds_up(root, capfd):
    (root / "script.py").write_text(
        "import sys, pathlib\np = pathlib.Path('once')\nsys.exit(p.exists() or p.mkdir() or 75)"
    )
    stage = runner.Stage("work", "Work", "script.py --flag 'a b'")
    with pytest.raises(SystemExit) as end:
        runner.run_stage(stage, record_of(root, 50), "make demo")
    assert end.value.code == 75
    assert "`make demo` continues from here" in capfd.readouterr().err
    first = record_of(root, 50).content["stages"]["work"]
    assert not first["done"]
    assert first["command"] == "python script.py --flag 'a b'"
    (root / "script.py").write_text("")
    runner.run_stage(stage, record_of(root, 50), "make demo")
    second = record_of(root, 50).content["stages"]["work"]
    assert second["done"]
    assert second["seconds"] > first["seconds"]
    runner.run_stage(stage, record_of(root, 50), "make demo")
    assert record_of(root, 50).content["stages"]["work"] == second


def make_demo_folder(root) -> tuple:
    """A folder with made-up results of the demo's stages."""
    folder = root / demo.FOLDER
    preprocess(make_tree(root / "tree", per_class=8), root / "data-demo/test", 32, 1, None)
    for seed, name in enumerate(("vae", "e2e-vae")):
        torch.manual_seed(seed)
        write_atomically(VAE_CONFIGS["f4d4-small"].build().state_dict(), folder / name / f"{name}.pt")
    of_vae, frozen = ("reconstruction_loss", "perceptual_loss", "psnr", "d_loss"), ("denoising_loss", "proj_loss")
    joint = (*of_vae, *frozen, "vae_align_loss")
    for run, names in {"vae": of_vae, "joint": joint, "frozen": frozen}.items():
        (folder / run).mkdir(exist_ok=True)
        records = [{"step": step, **dict.fromkeys(names, 1 / step)} for step in range(1, 31)]
        (folder / run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "samples").mkdir()
    for run in ("joint", "frozen"):
        for scale in ("1.0", "2.5"):
            pixels = np.random.RandomState(0).randint(0, 256, (24, 32, 32, 3)).astype(np.uint8)
            np.savez(folder / f"samples/{run}_0000030_cfg{scale}-0.0-1.0.npz", arr_0=pixels)
    (folder / "sets").mkdir()
    for value, name in enumerate(demo.compared_sets(demo.make_plan(30)), start=1):
        result = {"metrics": {"fd_efficientnet_lite0": 10.0**value}, "samples": {"count": 24}}
        (folder / f"sets/{name}.json").write_text(json.dumps(result))
    return folder


@pytest.mark.slow
def test_the_report_is_one_page_that_shows_everything(root, vgg_weights):
    folder = make_demo_folder(root)
    record = record_of(root, 50)
    for stage in demo.stages(demo.make_plan(50)):
        record.add(stage, 65.0, True)
    (root / "pretrained/demo").mkdir(parents=True)
    (root / "pretrained/demo/vgg16-features.pt").symlink_to(vgg_weights)
    write_report(root, folder, record.content)
    page = (folder / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "prefers-color-scheme: dark" in page
    assert "$" not in re.sub(r"data:image/png;base64,[^\"]*", "", page)
    assert page.count("<svg") == 6
    assert page.count("data:image/png") == 2 * 2 * 3 + 4 * 3  # two times two blocks of three rows; four sets of classes
    for text in ("before", "after", *CLASSES, "no guidance", "guidance 2.5", "1 min 05 s", "train_repae.py"):
        assert text in page
    rows = re.findall(r"<tr><td>([^<]*)<div class=.bar. style=.width: ([0-9.]*)%.></div></td>[^>]*>([0-9.]*)<", page)
    assert rows[0] == ("Photographs that no network has seen", "10.0", "10.0")
    assert rows[3] == ("Noise", "100.0", "10000.0")
    assert (folder / "overview.png").stat().st_size > 10000


def test_steps_scale_every_run_and_demos_of_other_lengths_are_not_mixed(root, monkeypatch):
    plan = demo.make_plan(40)
    assert (plan.vae_steps, plan.joint_steps, plan.frozen_steps) == (60, 40, 120)
    record_of(root, 40).add(runner.Stage("a", "A", "a.py"), 1.0, True)
    with pytest.raises(SystemExit, match="was begun with .*'joint_steps': 40.*; continue it with these, or delete it"):
        record_of(root, 60)
    monkeypatch.setattr(sys, "argv", ["run.py", "--steps", "3"])
    with pytest.raises(SystemExit, match="STEPS=3 is too small"):
        demo.main()
