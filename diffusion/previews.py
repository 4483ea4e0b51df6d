"""The pictures that training writes: samples of the averaged transformer, and reconstructions."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from diffusion.sampling import Sampling, labels_with_images, sample_pixels
from models.autoencoder import Autoencoder, image_to_pixels, pixels_to_image
from models.sit import SiT

Autocast = Callable[[], AbstractContextManager]
SAMPLES, STEPS, GUIDANCE_SCALE = 64, 50, 4.0
COLUMNS = 8
PADDING = 2  # pixels between tiles


def evenly_spaced(data, count: int) -> Tensor:
    """uint8 pixels (count,3,R,R), evenly spaced over `data`, which is sorted by class: always the same images."""
    count = min(count, len(data))
    return torch.stack([data[i * len(data) // count][0] for i in range(count)])


def grid(pixels: Tensor, columns: int = COLUMNS) -> Tensor:
    """Tile uint8 pixels (N,3,R,R) into one picture (3,H,W), `columns` to a row."""
    from torchvision.utils import make_grid

    return make_grid(pixels.cpu(), nrow=columns, padding=PADDING, pad_value=255)


@torch.no_grad()
def reconstruction_grid(vae: Autoencoder, pixels: Tensor, autocast: Autocast = nullcontext) -> Tensor:
    """Rows of originals, each above its row of reconstructions from the posterior mean; (3,H,W) uint8."""
    device = next(vae.parameters()).device
    rows = []
    for originals in pixels.split(COLUMNS):
        with autocast():
            recon = vae.decode(vae.encode(pixels_to_image(originals.to(device))).mean)
        rows += [originals, image_to_pixels(recon).cpu()]
    return grid(torch.cat(rows))


@torch.no_grad()
def sample_grid(
    ema: SiT, vae: Autoencoder, seed: int, autocast: Autocast = nullcontext, class_counts: Sequence[int] = ()
) -> Tensor:
    """64 samples over all labels with images: Euler, 50 steps, guidance 4, always the same noise; (3,H,W) uint8."""
    known = labels_with_images(class_counts, ema.num_classes)
    labels = tuple(known[i * len(known) // SAMPLES] for i in range(SAMPLES))
    scale = 1.0 if ema.null_label is None else GUIDANCE_SCALE
    sampling = Sampling(seed=seed, num_steps=STEPS, cfg_scale=scale, classes=labels, autocast=autocast)
    return grid(sample_pixels(ema, vae, list(range(SAMPLES)), sampling)[0])
