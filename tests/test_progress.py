"""Progress bars in a log file: a line each half minute, whatever the script and however quick its items."""

import re
from itertools import count

import pytest

import preprocessing
import published
from images import make_data
from scripts import TINY, call

IMAGES, SECONDS_AN_ITEM = 60, 1


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of 60 images in shards of one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocessing, "SHARD_IMAGES", 1)
        return make_data(tmp_path_factory.mktemp("progress"), IMAGES // 3, resolution=32)


def command(script: str, data, root) -> list:
    """A command line of the script that handles the images one by one."""
    vae = published.write_vae(root / "vae")
    run = published.write_run(root / "run", joint=True).parents[1]
    return {
        "preprocessing.py": [
            "--imagenet-path",
            data.parent / "tree",
            "--output-path",
            root / "again",
            "--num-workers",
            2,
        ],
        "dataset.py": ["--verify", data],
        "train_vae.py": [
            *("--stats-only", *TINY, "--batch-size", 1, "--num-workers", 0, "--vae-ckpt", vae, "--data-dir", data),
            *("--output-dir", root / "exps", "--exp-name", "measured"),
        ],
        "cache_latents.py": [
            *("--vae-arch", published.VAE, "--vae-ckpt-path", vae, "--vae-latents-name", "one-by-one"),
            *("--pproc-batch-size", 1, "--num-workers", 0, "--data-dir", data, "--output-dir", root),
        ],
        "generate.py": [
            *("--exp-path", run, "--num-fid-samples", IMAGES, "--num-steps", 1, "--cfg-scale", 1, "--no-png"),
            *("--pproc-batch-size", 1, "--sample-dir", root / "samples"),
        ],
        "evaluate.py": [
            *("--samples", data.parent / "tree", "--reference", data.parent / "tree", "--metrics", "fid"),
            *("--features", "efficientnet-lite0", "--batch-size", 1, "--num-workers", 0, "--output", root / "m.json"),
        ],
    }[script]


SCRIPTS = ("preprocessing.py", "dataset.py", "train_vae.py", "cache_latents.py", "generate.py", "evaluate.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_bar_in_a_log_file_is_a_line_each_half_minute(data, tmp_path, monkeypatch, script):
    monkeypatch.setattr(preprocessing, "SHARD_IMAGES", 1)
    seconds = count(step=SECONDS_AN_ITEM)
    monkeypatch.setattr("tqdm.std.time", lambda: next(seconds))
    code, stderr = call(script, *command(script, data, tmp_path))
    assert code == 0, stderr
    drawn = [line for line in re.split("[\r\n]+", stderr) if f"/{IMAGES} " in line]
    bars = 2 if script == "evaluate.py" else 1
    # its beginning, its end, and each half minute of a clock that goes on by a second whenever it is looked at
    assert 2 * bars <= len(drawn) <= (2 + 2 * IMAGES // 30) * bars, drawn
    assert f"{IMAGES}/{IMAGES} " in drawn[-1]


def test_a_terminal_shows_more(monkeypatch, capsys):
    from progress import progress_bar

    seconds = count(step=SECONDS_AN_ITEM)
    monkeypatch.setattr("tqdm.std.time", lambda: next(seconds))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    list(progress_bar(range(IMAGES)))
    assert len(capsys.readouterr().err.split("\r")) > IMAGES / 2
