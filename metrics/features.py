"""Networks whose features are compared: Inception-2015, which defines FID, and any encoder of models/encoders.py.

Each takes uint8 pixels (B,3,H,W) of any size and returns `Features`.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoders import Encoder

SPATIAL_CHANNELS = 7
CPU_PART = 16  # images in one pass on a CPU, whose activations fit its caches


class Features(NamedTuple):
    """Features of a batch of images, float32."""

    pool: Tensor  # (B,D)
    spatial: Tensor | None = None  # (B,2023): Inception's, for sFID
    probabilities: Tensor | None = None  # (B,1008): Inception's, for the Inception Score


def extract_features(network: nn.Module, pixels: Tensor) -> Features:
    """The features of uint8 pixels (B,3,H,W), B > 0, from a network of this module; on CPUs in parts."""
    if pixels.device.type != "cpu":
        return network(pixels)
    parts = [network(part) for part in pixels.split(CPU_PART)]
    return Features(*(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)))


class Inception(nn.Module):
    """Inception-v3 of 2015 (Szegedy et al., arXiv 1512.00567) as torch-fidelity ported it from the graph of ADM.

    Features are pool3 (2048), the first seven channels of mixed_6/conv, flattened channel-last as in ADM's reference
    files, and the softmax of the bias-free logits. Images are resized to 299 px as in TensorFlow 1.

    Args:
        weights: torch-fidelity's file; it must hold plain data, because torch-fidelity unpickles it.
    """

    def __init__(self, weights: Path):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        super().__init__()
        self.network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
        )
        self.network.Mixed_6d.branch1x1.register_forward_hook(self.keep)
        self.spatial: Tensor | None = None
        self.requires_grad_(False).eval()

    def keep(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        """Forward hook that keeps the spatial features of `output` (B,192,17,17), after ReLU."""
        self.spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Features:
        """uint8 pixels (B,3,H,W) -> pool (B,2048), spatial (B,2023), probabilities (B,1008)."""
        pool, logits = self.network(pixels)
        spatial, self.spatial = self.spatial, None
        return Features(pool, spatial.float(), logits.softmax(dim=1))


class EncoderFeatures(nn.Module):
    """One vector per image from a frozen encoder: its class token, or the mean of its tokens where it has none.

    With dinov2-vit-l this is FD-DINOv2 (Stein et al., arXiv 2306.04675): images are resized to the input of the network
    by `resize_as_pillow`, positions by `dinov2_positions`.
    """

    def __init__(self, encoder: Encoder, autocast: Callable[[], AbstractContextManager] = nullcontext):
        super().__init__()
        self.encoder, self.autocast = encoder, autocast

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Features:
        """uint8 pixels (B,3,H,W) -> pool (B,D)."""
        with self.autocast():
            features = self.encoder.image_features(resize_as_pillow(pixels, self.encoder.size))
        return Features(features.float())


def dinov2_positions(table: Tensor, grid: int) -> Tensor:
    """Position table (1,1+S²,D) of DINOv2 -> (1,1+grid²,D), resampled as in DINOv2's code.

    Bicubic without antialias, by a scale that is a tenth of a token too large; alignment resamples as REPA does.
    """
    side = math.isqrt(table.shape[1] - 1)
    image = table[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    scale = (grid + 0.1) / side
    image = F.interpolate(image, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    return torch.cat([table[:, :1].float(), image.flatten(2).transpose(1, 2)], dim=1)


def resize_as_pillow(pixels: Tensor, size: int) -> Tensor:
    """uint8 (B,3,H,W) -> uint8 (B,3,size,size) as Pillow: bicubic with antialias, rounded after each axis."""
    for shape in ((pixels.shape[-2], size), (size, size)):
        if pixels.shape[-2:] != shape:
            resized = F.interpolate(pixels.float(), shape, mode="bicubic", align_corners=False, antialias=True)
            pixels = resized.round().clamp(0, 255).to(torch.uint8)
    return pixels


class FeatureNetwork(NamedTuple):
    """A network of this module, its name in --features, and the file of its weights."""

    name: str
    module: nn.Module
    weights: Path
    sha256: str
