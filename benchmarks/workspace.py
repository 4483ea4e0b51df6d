"""A folder with all that training needs: random photographs, their shards, and random weights of every network.

Nothing is downloaded; the benchmarks' numbers do not depend on the values of weights.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from loss.lpips import LPIPS
from models.autoencoder import VAE_CONFIGS
from models.encoder_table import ENCODERS
from preprocessing import preprocess
from weights.checkpoint_io import vae_files, write_atomically

PHOTO = (500, 375)  # pixels, the commonest size in ImageNet
CLASSES = 10


@dataclass(frozen=True)
class Setting:
    """The networks that are measured, their precision and the size of their inputs.

    `batch` is that of one process. `photos` are preprocessed. Losses fall within a few steps at `learning_rate`.
    """

    vae: str
    model: str
    encoder: str
    encoder_depth: int
    resolution: int
    batch: int
    precision: str
    sampling_steps: int
    photos: int
    learning_rate: float = 1e-4


CPU = Setting("f8d4", "SiT-B/2", "dinov2-vit-b", 4, 256, 1, "no", 2, 128)
GPU = Setting("f8d4", "SiT-XL/2", "dinov2-vit-b", 8, 256, 16, "bf16", 25, 1024)
TINY = Setting("f4d4-tiny", "SiT-XXS/2", "efficientnet-lite0", 2, 32, 4, "no", 2, 40, 1e-3)


def photograph(seed: int, size: tuple[int, int]) -> Image.Image:
    """A smooth random picture with some noise, which JPEG compresses about as well as photographs."""
    random = np.random.RandomState(seed)
    coarse = Image.fromarray(random.randint(0, 256, (12, 16, 3)).astype(np.uint8))
    smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.int16)
    grain = random.normal(0, 6, smooth.shape).astype(np.int16)
    return Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))


def write_photographs(folder: Path, count: int) -> None:
    for i in range(count):
        path = folder / f"class{i % CLASSES}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(i, PHOTO).save(path, quality=92)


def write_weights(folder: Path, setting: Setting) -> None:
    """Random weights of the VAE, with statistics, of VGG16 for LPIPS and of the encoder."""
    import timm

    torch.manual_seed(0)
    vae = VAE_CONFIGS[setting.vae].build()
    ones = torch.ones(1, vae.config.z_channels, 1, 1)
    write_atomically(vae.state_dict(), folder / "vae.pt")
    statistics = {"latents_scale": ones, "latents_bias": torch.zeros_like(ones)}
    write_atomically(statistics, vae_files(folder / "vae.pt").statistics)
    vgg = {"features." + key.split(".", 1)[1]: value for key, value in LPIPS().net.state_dict().items()}
    write_atomically(vgg, folder / "vgg16.pt")
    spec = ENCODERS[setting.encoder]
    encoder = timm.create_model(spec.model, pretrained=False, num_classes=0, **spec.options)
    write_atomically(encoder.state_dict(), folder / "encoder.pth")


def make_workspace(folder: Path, setting: Setting, workers: int) -> None:
    """Write the photographs, shards and weights that `folder` lacks."""
    if not (folder / "photographs").is_dir():
        write_photographs(folder / "photographs", setting.photos)
    if not (folder / "data" / "images" / "index.json").is_file():
        preprocess(folder / "photographs", folder / "data", setting.resolution, workers, None)
    if not (folder / "encoder.pth").is_file():
        write_weights(folder, setting)


def training_flags(folder: Path, setting: Setting, name: str) -> list[str]:
    """train_repae.py's flags for a run `name` on that workspace."""
    flags = {
        "exp-name": name,
        "output-dir": folder / "exps",
        "data-dir": folder / "data",
        "resolution": setting.resolution,
        "batch-size": setting.batch,
        "vae": setting.vae,
        "vae-ckpt": folder / "vae.pt",
        "lpips-vgg-ckpt": folder / "vgg16.pt",
        "model": setting.model,
        "num-classes": CLASSES,
        "enc-type": setting.encoder,
        "enc-ckpt": f"{setting.encoder}={folder / 'encoder.pth'}",
        "encoder-depth": setting.encoder_depth,
        "mixed-precision": setting.precision,
        "report-to": "none",
    }
    return [f"--{key}={value}" for key, value in flags.items()] + ["--offline"]
