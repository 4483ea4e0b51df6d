"""Samples of a trained transformer and its VAE: sample i is a function of the seed and of i."""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from diffusion.samplers import Guidance, sample_ode, sample_sde
from errors import UserError
from models.autoencoder import Autoencoder, image_to_pixels
from models.numerics import to_device
from models.sit import SiT

DECODE_BATCH = 16
LISTED = 20  # samples that a message lists at most


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Everything but the networks that determines sample i; by default 50 Euler steps without guidance.

    `class_counts` are the training images by label; empty: unknown, and taken as equal for all labels of the model.
    """

    seed: int = 0
    mode: str = "ode"
    num_steps: int = 50
    heun: bool = False
    path_type: str = "linear"
    cfg_scale: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    labels: str = "random"
    classes: tuple[int, ...] = ()
    class_counts: Sequence[int] = ()
    autocast: Callable[[], AbstractContextManager] = nullcontext


def hashed(seed: int, stream: str, index: int) -> bytes:
    """32 bytes for step, epoch or sample `index` of a named stream of random numbers."""
    return hashlib.sha256(f"{seed}/{stream}/{index}".encode()).digest()


def generator_for(seed: int, stream: str, index: int) -> torch.Generator:
    """A CPU generator for sample `index` of a named stream: equal arguments give equal numbers."""
    return torch.Generator().manual_seed(int.from_bytes(hashed(seed, stream, index)[:8], "little", signed=True))


def labels_with_images(class_counts: Sequence[int], num_classes: int) -> list[int]:
    """The labels that a model was trained on: all of its classes if `class_counts` is empty."""
    return [label for label, count in enumerate(class_counts or [1] * num_classes) if count]


def sample_labels(sampling: Sampling, num_classes: int, indices: Sequence[int]) -> list[int]:
    """The labels of these samples: from `classes` in turn if there are any, else from labels with training images.

    Those are drawn in turn (balanced), with equal probabilities (random), or as that of a random training image (data).
    """
    if sampling.classes:
        return [sampling.classes[index % len(sampling.classes)] for index in indices]
    counts = sampling.class_counts or [1] * num_classes
    ends = list(accumulate(counts if sampling.labels == "data" else (min(count, 1) for count in counts)))
    if sampling.labels == "balanced":
        return [bisect_right(ends, index % ends[-1]) for index in indices]
    generators = (generator_for(sampling.seed, "label", index) for index in indices)
    return [bisect_right(ends, int(torch.randint(ends[-1], (), generator=generator))) for generator in generators]


def sampling_noise(seed: int, indices: list[int], shape: tuple[int, int, int]) -> Iterator[Tensor]:
    """Endless N(0,1) draws (B,C,h,w) for samples `indices`: first the starting noise, then that of every SDE step."""
    generators = [generator_for(seed, "sample", index) for index in indices]
    while True:
        noise = torch.empty(len(indices), *shape)
        for row, generator in zip(noise, generators, strict=True):
            row.normal_(generator=generator)
        yield noise


@torch.no_grad()
def sample_pixels(
    sit: SiT, vae: Autoencoder, indices: list[int], sampling: Sampling, rows: int = 0
) -> tuple[Tensor, Tensor]:
    """The samples with these indices, (B,3,R,R) uint8 on the device of the networks; does not wait for a GPU.

    Compiled networks see one shape if a smaller batch is filled up to `rows`; what fills it is thrown away.
    The second tensor is for `check_finite`, (2,B) bool: whether each one's latents, and its decoded image, are finite.
    """
    device, count = next(sit.parameters()).device, len(indices)
    indices = indices + indices[-1:] * (rows - count)
    noise = sampling_noise(sampling.seed, indices, (sit.in_channels, sit.input_size, sit.input_size))
    labels = torch.tensor(sample_labels(sampling, sit.num_classes, indices))
    (labels,) = to_device([labels], device)
    guidance = None
    if sampling.cfg_scale > 1:
        guidance = Guidance(sampling.cfg_scale, sit.null_label, sampling.guidance_low, sampling.guidance_high)

    def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with sampling.autocast():
            return sit(x, t, y, project=False)[0]

    def draw() -> Tensor:
        return to_device([next(noise)], device)[0]

    if sampling.mode == "ode":
        z_norm = sample_ode(velocity, draw(), labels, sampling.num_steps, guidance, sampling.heun)
    else:
        z_norm = sample_sde(
            velocity, draw(), labels, sampling.num_steps, sampling.path_type, lambda _: draw(), guidance
        )
    z = sit.denormalise(z_norm).float()
    with sampling.autocast():
        pixels, finite = decode_pixels(vae, z)
    return pixels[:count], torch.stack([rows_finite(z), finite])[:, :count]


@torch.no_grad()
def decode_pixels(vae: Autoencoder, z: Tensor) -> tuple[Tensor, Tensor]:
    """Latents (N,C,h,w), not normalised, -> uint8 pixels (N,3,R,R); decoded in parts to bound the memory.

    Part sizes differ by at most one, so that compiled code sees at most two shapes. The second tensor, (N,) bool, says
    which images were finite before they were rounded.
    """
    images = map(vae.decode, z.tensor_split(-(-len(z) // DECODE_BATCH)))
    pixels, finite = zip(*((image_to_pixels(image), rows_finite(image)) for image in images), strict=True)
    return torch.cat(pixels), torch.cat(finite)


def rows_finite(values: Tensor) -> Tensor:
    """(B,) bool: whether all values of a row are finite."""
    return values.isfinite().flatten(1).all(dim=1)


def check_finite(finite: np.ndarray, indices: Sequence[int], sampling: Sampling, num_classes: int) -> None:
    """Raise a UserError that names network and samples, unless `finite` of `sample_pixels` says that all are."""
    for network, good in zip(("transformer", "VAE's decoder"), finite, strict=True):
        if bad := [index for index, is_good in zip(indices, good, strict=True) if not is_good]:
            which = zip(bad, sample_labels(sampling, num_classes, bad[:LISTED]), strict=False)
            raise UserError(
                f"the {network} gives values that are not finite for {len(bad)} of the {len(good)} samples of a batch ("
                + ", ".join(f"sample {index} of label {label}" for index, label in which)
                + "), which is not written; use another checkpoint or, instead of --mixed-precision fp16, bf16"
            )
