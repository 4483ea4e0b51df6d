"""Every test runs offline and on two threads."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")


@pytest.fixture(scope="session")
def vgg_weights(tmp_path_factory) -> Path:
    """VGG16's real convolutions in torchvision's keys, converted as the demo does."""
    from demo.convert_lpips import convert, packaged_weights
    from training.checkpoint import write_atomically

    path = tmp_path_factory.mktemp("lpips") / "vgg16.pt"
    write_atomically(convert(packaged_weights()), path)
    return path


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A data directory of 18 images of three classes at 32 px."""
    from images import make_data

    return make_data(tmp_path_factory.mktemp("images"), per_class=6)


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory, tiny_data, vgg_weights) -> tuple[Path, Path]:
    """The output folder and VAE weights of a train_vae.py run of five steps."""
    from scripts import TINY, run

    output = tmp_path_factory.mktemp("exps")
    flags = ("--exp-name", "vae", "--output-dir", output, "--data-dir", tiny_data, "--lpips-vgg-ckpt", vgg_weights)
    run("train_vae.py", *TINY, *flags, "--max-train-steps", 5, "--sampling-steps", 5)
    return output, output / "vae" / "vae.pt"
