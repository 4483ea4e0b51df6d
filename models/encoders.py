"""Frozen image encoders whose tokens the transformer is aligned with (REPA, Yu et al., arXiv 2410.06940).

An encoder is described by an `EncoderSpec`: a row of models/encoder_table.py, or `timm_spec` for any model of timm. It
takes uint8 pixels (B,3,R,R), preprocesses them, and gives tokens (B, grid², embed_dim), row by row. Width and grid are
known from the spec, without weights. Networks are timm's, and so is the conversion of weights: a row's `convert` only
brings a project's own checkpoint into a form that timm's filter of that network takes.
"""

import functools
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError, nearest, one_line
from models.numerics import channels_last

# mean and standard deviation of pixels/255, per channel
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

MEASURED_SIDE = 448  # a multiple of every usual stride
IMAGE_STRIDE = 16  # pixels of the image that a token stands for on a side: 16x16 tokens at 256 px


class Origin(NamedTuple):
    """The publisher of an encoder's weights (a repository of GitHub, or a package), and their licence."""

    source: str
    licence: str


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder: its network, its preprocessing, and its weights.

    Attributes:
        embed_dim: D, the width of a token.
        stride: side in pixels of the part of the network's input that a token covers.
        model: timm's name of the network; with a tag it also names timm's copy of the weights.
        origin: the publisher of the weights.
        file: the usual name of a local copy of the weights.
        pixels: mean and standard deviation that pixels/255 are normalised by.
        options: arguments of timm's `create_model` that differ from `model`'s.
        url: the project's own file, where timm has no copy.
        package: the installed package whose only `.pth` file has the weights.
        inside: the entry of the project's own checkpoint that holds the weights; None if they are at its top level.
        convert: (state dict, keys of the network) -> the input of timm's filter of this network.
        unused: prefixes of keys, after that filter, that the network does not have.
        resize_first: the input is resized before it is normalised, not after.
        final_norm: tokens pass the network's last LayerNorm.
        level: index among timm's feature levels; None for the last one.
        feature_grid: tokens a side where images are compared by their features: inputs of 224 or 256 px by default.
        any_grid: the input is scaled so that the network gives the transformer's grid; otherwise a token stands for
            16x16 pixels of the image.
        sized: timm builds the network for one input size.
        headless: the layers after the features, which timm keeps in this network, are removed.
        input_size: the only input size of the network, whatever the grid; None for stride · grid.
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
    inside: str | None = None
    convert: Callable[[dict, list[str]], dict] = lambda state, keys: state
    unused: tuple[str, ...] = ()
    resize_first: bool = False
    final_norm: bool = True
    level: int | None = None
    feature_grid: int = 16
    any_grid: bool = False
    sized: bool = True
    headless: bool = False
    input_size: int | None = None

    def grid(self, resolution: int) -> int:
        """Tokens a side for images of `resolution` pixels, unless `any_grid`."""
        return max(resolution // IMAGE_STRIDE, 1)


def resize(image: Tensor, size: int) -> Tensor:
    """Bicubic, no antialias, (B,3,R,R) float -> (B,3,size,size); unchanged if R is size."""
    if image.shape[-1] == size:
        return image
    return F.interpolate(image, size=(size, size), mode="bicubic", align_corners=False)


def resample_tokens(tokens: Tensor, grid: int) -> Tensor:
    """Tokens (B,T,D) of a square grid -> (B,grid²,D) float32, bilinear, antialiased; unchanged if T is grid²."""
    side = math.isqrt(tokens.shape[1])
    if side == grid:
        return tokens
    image = tokens.float().transpose(1, 2).unflatten(2, (side, side))
    image = F.interpolate(image, size=(grid, grid), mode="bilinear", align_corners=False, antialias=True)
    return image.flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    """The frozen network of a spec, freshly initialised: always in eval mode and without gradients.

    Args:
        spec: its description.
        grid: tokens a side of the network, which determines its input size and its position embeddings.
        token_grid: tokens a side of the output, resampled if it differs from `grid`; None for no resampling.
    """

    def __init__(self, spec: EncoderSpec, grid: int, token_grid: int | None = None):
        import timm

        super().__init__()
        self.spec, self.size, self.token_grid = spec, spec.input_size or spec.stride * grid, token_grid
        sized = {"img_size": self.size} if spec.sized and spec.input_size is None else {}
        self.network = timm.create_model(spec.model, pretrained=False, num_classes=0, **sized, **spec.options)
        if spec.headless:
            self.network.prune_intermediate_layers([spec.level])
        for name, values in zip(("mean", "std"), spec.pixels, strict=True):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        channels_last(self)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Encoder":
        """Stay in eval mode: a frozen encoder has no dropout and keeps its statistics."""
        return super().train(False)

    def preprocess(self, pixels: Tensor) -> Tensor:
        """uint8 (B,3,R,R) -> float32 (B,3,size,size), the network's input."""
        image = pixels.float() / 255
        if self.spec.resize_first:
            image = resize(image, self.size)
        return resize((image - self.mean) / self.std, self.size)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 pixels (B,3,R,R) -> tokens (B, token_grid², embed_dim), without gradients."""
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

    @torch.no_grad()
    def image_features(self, pixels: Tensor) -> Tensor:
        """uint8 pixels (B,3,R,R) -> one vector per image, (B, embed_dim): the class token, else the mean of tokens."""
        takes = inspect.signature(self.network.forward_intermediates).parameters
        if getattr(self.network, "cls_token", None) is None or "return_prefix_tokens" not in takes:
            return self(pixels).mean(dim=1)
        ((_, prefix),) = self.network.forward_intermediates(
            self.preprocess(pixels),
            indices=1,
            norm=self.spec.final_norm,
            return_prefix_tokens=True,
            intermediates_only=True,
        )
        return prefix[:, 0]

    def convert(self, checkpoint: dict) -> dict[str, Tensor]:
        """The network's state dict, float32, from a checkpoint in the project's own format or in timm's.

        Position tables are resampled to this network's grid, bicubic with antialias. Missing and unexpected keys are
        not checked.

        Raises:
            ValueError: patches of another size, which timm would resample.
        """
        keys = list(self.network.state_dict())
        state = self.spec.convert(unwrapped(checkpoint, self.spec.inside), keys)
        state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
        own = self.network.state_dict().get("patch_embed.proj.weight")
        kernel = state.get("visual.conv1.weight", state.get("patch_embed.proj.weight"))
        if own is not None and kernel is not None and kernel.shape[2:] != own.shape[2:]:
            raise ValueError(f"its patches are {kernel.shape[-1]} px wide, expected {own.shape[-1]}")
        state = timm_filter(self.network)(state, self.network)
        return {key: value for key, value in state.items() if key in keys or not key.startswith(self.spec.unused)}


def unwrapped(checkpoint: dict, inside: str | None) -> dict[str, Tensor]:
    """The tensors of a checkpoint: in its entry `inside`, in timm's `state_dict`, or at its top level."""
    checkpoint = checkpoint.get(inside if inside in checkpoint else "state_dict", checkpoint)
    return {key.removeprefix("module."): value for key, value in checkpoint.items() if isinstance(value, Tensor)}


def timm_filter(network: nn.Module) -> Callable[[dict, nn.Module], dict]:
    """timm's conversion of checkpoints for the model family of `network`, which also resamples position tables."""
    module = sys.modules[type(network).__module__]
    return getattr(module, "checkpoint_filter_fn", lambda state, network: state)


@functools.cache
def timm_spec(name: str) -> EncoderSpec:
    """The spec of `timm:MODEL`, any timm model with a square map of features or patch tokens; its last one is taken.

    Width and stride are measured on a network on the meta device. A network whose weights fit a single input size is
    run at that size.

    Raises:
        UserError: there is no such model, or it has no such map.
    """
    import timm
    from timm.models import get_pretrained_cfg

    model = name.removeprefix("timm:")
    known = timm.list_models() if "." not in model else timm.list_pretrained()
    if model not in known:
        raise UserError(f"timm has no model {model!r}; did you mean {nearest(model, known)!r}?")
    config = get_pretrained_cfg(model)
    spec = EncoderSpec(
        embed_dim=0,
        stride=1,
        model=f"{config.architecture}.{config.tag}" if config.tag else model,
        origin=Origin("timm", config.license or "unknown"),
        file=f"{model}.safetensors",
        pixels=(config.mean, config.std),
        unused=("",),  # any key: heads have many names
        sized=config.fixed_input_size,
    )
    if not resizable(spec):
        spec = replace(spec, input_size=config.input_size[1])
    side = spec.input_size or MEASURED_SIDE
    try:
        shape = token_shape(spec, side)
    except UserError:  # some networks cannot normalise intermediate features
        spec = replace(spec, final_norm=False)
        shape = token_shape(spec, side)
    return replace(spec, embed_dim=shape[2], stride=round(side / math.isqrt(shape[1])))


def resizable(spec: EncoderSpec) -> bool:
    """Whether timm can resample the weights of a network to another input size."""
    import timm

    if not spec.sized:
        return True
    try:
        with torch.device("meta"):
            own = timm.create_model(spec.model, num_classes=0).state_dict()
            other = timm.create_model(spec.model, num_classes=0, img_size=MEASURED_SIDE)
            state = timm_filter(other)(own, other)
    except Exception:  # networks that cannot be built, or weights that cannot be resampled, at another size
        return False
    return all(key in state and state[key].shape == value.shape for key, value in other.state_dict().items())


def token_shape(spec: EncoderSpec, grid: int) -> torch.Size:
    """Shape (1,T,D) of the tokens of a spec's network for an input of stride · grid, found on the meta device."""
    size = spec.input_size or spec.stride * grid
    try:
        with torch.device("meta"):
            shape = Encoder(spec, grid)(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape
    except Exception as error:  # timm's model families raise many kinds of errors
        raise UserError(f"timm's {spec.model} gives no map of features for {size} px ({one_line(error)})") from error
    if math.isqrt(shape[1]) ** 2 != shape[1]:
        raise UserError(f"timm's {spec.model} gives {shape[1]} tokens for {size} px, expected a square of them")
    return shape
