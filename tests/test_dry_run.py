"""--dry-run builds and checks what training would, prints sizes, steps and disk, and writes nothing."""

import re
from types import SimpleNamespace

import pytest

import published
from good import cache_flags
from scripts import LAST, TINY, TINY_SIT, refusal, run

TITLE = "dry run: nothing was written, and no step was taken"


def listing(*folders) -> dict:
    """Every path below folders, with its size and time of change."""
    paths = [path for folder in folders for path in (folder, *folder.rglob("*"))]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def dry(capsys, script: str, *flags) -> dict[str, str]:
    """The lines of a dry run's report by their names, and what else it printed."""
    capsys.readouterr()
    run(script, *flags, "--dry-run")
    before, report = "".join(capsys.readouterr()).split(TITLE)
    return {**dict(re.findall(r"^    (\w+) +(.+)$", report, re.MULTILINE)), "warnings": before + report}


@pytest.mark.slow
def test_a_joint_run(capsys, joint, whole_run, tiny_vae):
    output, flags = joint
    before = listing(output, tiny_vae[0])
    lengths = ("--max-train-steps", LAST, "--checkpointing-steps", 10)
    found = dry(capsys, "train_repae.py", *flags, "--exp-name", "planned", *lengths)
    assert listing(output, tiny_vae[0]) == before
    assert found["data"] == "18 images of 32 px, 3 classes"
    assert found["latents"] == "4x8x8, 16 tokens"
    sizes = "sit 4.89 M, ema 4.89 M, vae 0.293 M, discriminator 2.77 M, lpips 14.7 M; trained 7.95 M"
    assert found["parameters"] == sizes
    assert found["steps"] == f"{LAST}, which are 2.7 epochs and 48 images; {LAST} to do"
    count, size = re.match(r"up to (\d+) checkpoints of ([\d.e-]+) GB each", found["disk"]).groups()
    assert int(count) == 2 + 2  # every 10 steps and the last, and two rolling ones
    assert float(size) * 1e9 == pytest.approx((whole_run / f"checkpoints/{LAST:07d}.pt").stat().st_size, rel=0.02)
    assert "will not fit" not in found["warnings"]


@pytest.mark.slow
def test_a_run_that_continues_says_what_is_left_and_refuses_other_flags(capsys, joint, whole_run):
    output, flags = joint
    before = listing(output)
    found = dry(capsys, "train_repae.py", *flags, "--exp-name", "whole", "--max-train-steps", LAST + 8)
    assert found["steps"].endswith("; 8 to do")
    line = refusal("train_repae.py", *flags, "--exp-name", "whole", "--proj-coeff", "2", "--dry-run")
    assert "was made with other flags (--proj-coeff 0.5 -> 2.0)" in line
    assert listing(output) == before


@pytest.mark.slow
def test_a_disk_that_is_too_small_is_warned_of_and_an_evaluations_images_are_not_read(capsys, joint, monkeypatch):
    monkeypatch.setattr("storage.files.shutil.disk_usage", lambda path: SimpleNamespace(free=10**7))
    monkeypatch.delattr("training.evaluation.statistics_of")
    flags = (*joint[1], "--exp-name", "planned", "--eval-steps", 4, "--eval-features", "efficientnet-lite0")
    assert "warning: the checkpoints will not fit" in dry(capsys, "train_repae.py", *flags)["warnings"]


def test_a_vae_alone_and_a_frozen_vae(capsys, tiny_data, tmp_path, vgg_weights):
    paths = ("--output-dir", tmp_path / "exps", "--data-dir", tiny_data, "--lpips-vgg-ckpt", vgg_weights)
    found = dry(capsys, "train_vae.py", *TINY, *paths, "--exp-name", "vae", "--mixed-precision", "fp16")
    assert found["latents"] == "4x8x8"
    assert list(tmp_path.iterdir()) == []

    vae = published.write_vae(tmp_path / "vae")
    run("cache_latents.py", *cache_flags(tiny_data, vae, tmp_path / "data"))
    (tmp_path / "data/images").symlink_to(tiny_data / "images")
    paths = ("--output-dir", tmp_path / "exps", "--data-dir", tmp_path / "data")
    flags = (*TINY, *TINY_SIT, *paths, "--exp-name", "ldm", "--vae-ckpt", vae, "--vae-latents-name", "latents")
    assert dry(capsys, "train_ldm_only.py", *flags)["parameters"].startswith("sit ")
    assert not (tmp_path / "exps").exists()
