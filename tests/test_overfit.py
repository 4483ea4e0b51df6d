"""A generator trained on few images gives those images: the whole chain of scripts, and the distance that sees it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from demo.cifar10 import SHEETS
from good import cache_flags
from scripts import TINY, run

IMAGES = 16


def photographs(split: str) -> np.ndarray:
    """CIFAR photographs of a split, (IMAGES,32,32,3) uint8: the first two of eight classes."""
    sheets = [np.asarray(Image.open(path))[:32, : 2 * 32] for path in sorted((SHEETS / split).glob("*.png"))[:8]]
    return np.concatenate([sheet.reshape(32, 2, 32, 3).transpose(1, 0, 2, 3) for sheet in sheets])


@pytest.mark.slow
def test_a_generator_trained_on_16_images_gives_those_images(tmp_path, vgg_weights):
    train, others = photographs("train"), photographs("test")
    (tmp_path / "tree/all").mkdir(parents=True)
    for i, image in enumerate(train):
        Image.fromarray(image).save(tmp_path / f"tree/all/{i:03d}.png")
    labels = [[f"all/{i:03d}.png", i] for i in range(IMAGES)]  # a class an image
    (tmp_path / "tree/dataset.json").write_text(json.dumps({"labels": labels}))
    data = ("--data-dir", tmp_path / "data")
    output = ("--output-path", tmp_path / "data", "--resolution", 32)
    run("preprocessing.py", "--imagenet-path", tmp_path / "tree", *output)
    rarely = ("--sampling-steps", 10**6, "--checkpointing-steps", 10**6)
    training = (*TINY, *data, "--output-dir", tmp_path, "--num-workers", 0, *rarely)
    vae = tmp_path / "vae/vae.pt"
    run(
        *("train_vae.py", *training, "--exp-name", "vae", "--batch-size", 8, "--max-train-steps", 150),
        *("--lpips-vgg-ckpt", vgg_weights, "--loss-cfg-path", "demo/loss.yaml", "--vae-learning-rate", 2e-3),
    )
    run("cache_latents.py", *cache_flags(tmp_path / "data", vae))
    run(
        *("train_ldm_only.py", *training, "--exp-name", "ldm", "--vae-ckpt", vae, "--vae-latents-name", "latents"),
        *("--model", "SiT-XXS/2", "--num-classes", IMAGES, "--encoder-depth", 2, "--enc-type", "none", "--cfg-prob", 0),
        *("--batch-size", 16, "--max-train-steps", 400, "--learning-rate", 4e-3, "--ema-decay", 0.98),
    )
    run(
        *("generate.py", "--exp-path", tmp_path / "ldm", "--num-fid-samples", IMAGES, "--cfg-scale", 1.0),
        *("--num-steps", 20, "--labels", "balanced", "--sample-dir", tmp_path / "samples", "--no-png"),
    )
    (samples_path,) = (tmp_path / "samples").glob("*.npz")
    samples = torch.tensor(np.load(samples_path)["arr_0"]).flatten(1).double()
    known = torch.tensor(np.concatenate([train, others])).flatten(1).double()
    neighbours = torch.cdist(samples, known).argmin(dim=1)
    assert (neighbours < IMAGES).double().mean() > 0.95  # of the images it was trained on and as many that it was not
    assert (neighbours == torch.arange(IMAGES)).double().mean() > 0.8  # sample i is asked to be image i

    # and the distance sees that they are closer to those than to other photographs
    distances = []
    for name, images in (("train", train), ("others", others)):
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
        compared = ("--samples", samples_path, "--reference", tmp_path / f"{name}.npz", "--metrics", "fid")
        output = tmp_path / f"to-{name}.json"
        run("evaluate.py", *compared, "--features", "efficientnet-lite0", "--num-workers", 0, "--output", output)
        distances.append(json.loads(output.read_text())["metrics"]["fd_efficientnet_lite0"])
    assert distances[0] < distances[1]
