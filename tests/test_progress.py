"""Progress bars in a log file: a line each half minute, whatever the script and however quick its items."""

import re
from itertools import count

import pytest

import preprocessing
from good import good_flags
from images import make_data
from progress import progress_bar
from scripts import run

IMAGES, SECONDS_AN_ITEM = 60, 1


@pytest.fixture(scope="module")
def images(tmp_path_factory, good):
    root = tmp_path_factory.mktemp("progress")
    return {**good, "data": make_data(root, IMAGES // 3, shard_images=1), "tree": root / "tree"}


# script -> flags with which it handles the images one by one
SCRIPTS = {
    "preprocessing.py": "--resolution 32",
    "dataset.py": "",
    "train_vae.py": "--stats-only --batch-size 1 --num-workers 0 --vae-ckpt {vae}",
    "cache_latents.py": "--pproc-batch-size 1",
    "generate.py": f"--num-fid-samples {IMAGES} --cfg-scale 1 --no-png --pproc-batch-size 1",
    "evaluate.py": "--samples {tree} --reference {tree} --metrics fid --batch-size 1",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_bar_in_a_log_file_is_a_line_each_half_minute(images, tmp_path, monkeypatch, script):
    monkeypatch.setattr(preprocessing, "SHARD_IMAGES", 1)
    seconds = count(step=SECONDS_AN_ITEM)
    monkeypatch.setattr("tqdm.std.time", lambda: next(seconds))
    stderr = run(script, *good_flags(script, images, tmp_path), *SCRIPTS[script].format(**images).split()).stderr
    drawn = [line for line in re.split("[\r\n]+", stderr) if f"/{IMAGES} " in line]
    bars = 2 if script == "evaluate.py" else 1
    # its beginning, its end, and each half minute of a clock that goes on by a second whenever it is looked at
    assert 2 * bars <= len(drawn) <= (2 + 2 * IMAGES // 30) * bars, drawn
    assert f"{IMAGES}/{IMAGES} " in drawn[-1]


def test_a_terminal_shows_more(monkeypatch, capsys):

    seconds = count(step=SECONDS_AN_ITEM)
    monkeypatch.setattr("tqdm.std.time", lambda: next(seconds))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    list(progress_bar(range(IMAGES)))
    assert len(capsys.readouterr().err.split("\r")) > IMAGES / 2
