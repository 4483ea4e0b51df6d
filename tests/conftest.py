"""Every test runs offline and on one thread; the Makefile runs two at a time."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser) -> None:
    """`--device cuda` runs the tests of golden values on a GPU, as `make gpu-check` does."""
    parser.addoption("--device", default="cpu", help="where tests make their tensors (default: cpu)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests last, and among these the two longest first, so that no process ends long before the other."""
    longest = ("test_soak.py", "test_overfit.py")
    items.sort(key=lambda item: (item.get_closest_marker("slow") is not None, item.path.name not in longest))


@pytest.fixture(autouse=True)
def default_device(request):
    """Tensors and networks are made on --device; a GPU computes in float32 throughout, as golden values were made."""
    import torch

    device = torch.device(request.config.getoption("--device"))
    if device.type == "cpu":
        yield
        return
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with device:
        yield


@pytest.fixture(scope="session")
def vgg_weights(tmp_path_factory) -> Path:
    """VGG16's real convolutions in torchvision's keys, converted as the demo does."""
    from demo.convert_lpips import convert, packaged_weights
    from weights.checkpoint_io import write_atomically

    path = tmp_path_factory.mktemp("lpips") / "vgg16.pt"
    write_atomically(convert(packaged_weights()), path)
    return path


@pytest.fixture(scope="session")
def good(tmp_path_factory, vgg_weights) -> dict[str, Path]:
    """Good files for every script, by name, which no test changes."""
    from good import write_good_files

    return {**write_good_files(tmp_path_factory.mktemp("good")), "vgg": vgg_weights}


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


@pytest.fixture(scope="session")
def joint(tmp_path_factory, tiny_data, tiny_vae, vgg_weights):
    """Flags of a tiny joint run into a folder of its own, without its name and length."""
    from scripts import TINY, TINY_SIT
    from weights.checkpoint_io import vae_files

    output = tmp_path_factory.mktemp("joint")
    paths = ("--output-dir", output, "--data-dir", tiny_data, "--lpips-vgg-ckpt", vgg_weights)
    vae = ("--vae-ckpt", tiny_vae[1], "--disc-pretrained-ckpt", vae_files(tiny_vae[1]).discriminator)
    return output, (*TINY, *TINY_SIT, *paths, *vae)


@pytest.fixture(scope="session")
def whole_run(joint):
    """An uninterrupted joint run of LAST steps (three epochs), with pictures on the way."""
    from scripts import LAST, run

    output, flags = joint
    run("train_repae.py", *flags, "--exp-name", "whole", "--max-train-steps", LAST, "--sampling-steps", LAST // 2)
    return output / "whole"
