"""Conversion between our autoencoders and diffusers: keys of the weights and config.json.

AutoencoderKL is the same network as ours. diffusers counts decoder levels from the coarsest one, and projects by linear
layers in the attention, where CompVis uses 1x1 convolutions. Networks of other classes are diffusers' own.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from errors import UserError
from models.autoencoder import VAEConfig
from models.diffusers_vae import Architecture, DiffusersConfig
from weights.checkpoint_io import same_statistics

NETWORK = "network."  # prefix of the keys of DiffusersAutoencoder

# patterns of our keys -> diffusers', applied in this order
RENAMES: tuple[tuple[str, str | Callable[[re.Match], str]], ...] = (
    (r"\bdown\.(\d+)\.block\.", r"down_blocks.\1.resnets."),
    (r"\bdown\.(\d+)\.attn\.", r"down_blocks.\1.attentions."),
    (r"\bdown\.(\d+)\.downsample\.", r"down_blocks.\1.downsamplers.0."),
    (r"\bup\.(\d+)\.block\.", r"up_blocks.\1.resnets."),
    (r"\bup\.(\d+)\.attn\.", r"up_blocks.\1.attentions."),
    (r"\bup\.(\d+)\.upsample\.", r"up_blocks.\1.upsamplers.0."),
    (r"\bmid\.attn_1\.", "mid_block.attentions.0."),
    (r"\bmid\.block_(\d)\.", lambda match: f"mid_block.resnets.{int(match[1]) - 1}."),
    (r"(coder\.)norm_out\.", r"\1conv_norm_out."),
    (r"\bnin_shortcut\.", "conv_shortcut."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)
# names of attention layers before diffusers 0.15, with which SD-VAE is still published
EARLIER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def diffusers_key(key: str, levels: int) -> str:
    key = re.sub(r"\bup\.(\d+)\.", lambda match: f"up.{levels - 1 - int(match[1])}.", key)
    for pattern, replacement in RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def is_diffusers_state(state: dict[str, Tensor]) -> bool:
    return any(key.startswith("encoder.down_blocks.") for key in state)


def to_diffusers_state(state: dict[str, Tensor], config: Architecture) -> dict[str, Tensor]:
    """Our weights under diffusers' keys, values unchanged, contiguous as safetensors needs them."""
    if isinstance(config, DiffusersConfig):
        return {key.removeprefix(NETWORK): value.contiguous() for key, value in state.items()}
    renamed = {diffusers_key(key, len(config.widths)): value for key, value in state.items()}
    return {
        key: (value.flatten(1) if ".attentions." in key and value.ndim == 4 else value).contiguous()
        for key, value in renamed.items()
    }


def from_diffusers_state(state: dict[str, Tensor], config: Architecture) -> dict[str, Tensor]:
    """Weights with diffusers' keys, also earlier ones, or ours, under our keys; unknown keys stay."""
    if isinstance(config, DiffusersConfig):
        return {NETWORK + key.removeprefix(NETWORK): value for key, value in state.items()}
    if not is_diffusers_state(state):
        return state
    with torch.device("meta"):
        expected = config.build().state_dict()
    ours = {diffusers_key(key, len(config.widths)): key for key in expected}
    found = {}
    for key, value in state.items():
        *place, part, kind = key.split(".")
        if "attentions" in place and part in EARLIER_NAMES:
            key = ".".join([*place, EARLIER_NAMES[part], kind])
        key = ours.get(key, key)
        is_projection = key in expected and expected[key].ndim == 4 and value.ndim == 2
        found[key] = value[:, :, None, None] if is_projection else value
    return found


def statistics_inside(state: dict[str, Tensor], channels: int) -> tuple[Tensor, Tensor] | None:
    """Scale 1/std and bias mean of each latent channel, (1,C,1,1) float32, if weights with diffusers' keys hold them.

    FLUX.2's are a batch norm over the channels of patches of latents, which are taken together here; LTX-Video's are
    buffers.
    """
    if "latents_std" in state:
        std, mean = (state[f"latents_{name}"].double().reshape(1, -1, 1, 1) for name in ("std", "mean"))
        return (1 / std).float(), mean.float()
    if "bn.running_var" not in state:
        return None
    mean, var = (state[f"bn.running_{name}"].double().reshape(1, channels, 1, -1) for name in ("mean", "var"))
    bias = mean.mean(dim=3, keepdim=True)
    var = (var + (mean - bias).square()).mean(dim=3, keepdim=True)
    return torch.rsqrt(var).float(), bias.float()


def with_statistics(state: dict[str, Tensor], scale: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """`state` with the statistics that it holds replaced by these, if it holds any and they differ."""
    found = statistics_inside(state, scale.numel())
    if found is None or same_statistics(found, (scale, bias)):
        return state
    if "latents_std" in state:
        return {**state, "latents_std": (1 / scale).flatten(), "latents_mean": bias.flatten()}
    patch = state["bn.running_var"].numel() // scale.numel()
    values = {"bn.running_mean": bias, "bn.running_var": scale**-2}
    return {**state, **{key: value.flatten().repeat_interleave(patch) for key, value in values.items()}}


def from_diffusers_config(found: dict, where: str) -> Architecture:
    """The architecture in a config.json of an autoencoder of diffusers, with its scaling and shift factor.

    Raises:
        UserError: it is of no class that works; the message names `where`.
    """
    if (kind := found.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        try:
            return DiffusersConfig.from_json(found)
        except ValueError as error:
            raise UserError(f"VAE {where}: _class_name {kind} in config.json: {error}") from None
    # diffusers' defaults for missing settings
    defaults = {"block_out_channels": [64], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 32}
    config = {**defaults, "scaling_factor": 0.18215, **{k: value for k, value in found.items() if value is not None}}
    blocks = config.get("down_block_types", ())
    return VAEConfig(
        z_channels=int(config["latent_channels"]),
        widths=tuple(int(width) for width in config["block_out_channels"]),
        encoder_blocks=int(config["layers_per_block"]),
        attention_levels=tuple(level for level, block in enumerate(blocks) if block.startswith("Attn")),
        middle_attention=bool(config.get("mid_block_add_attention", True)),
        quant_conv=bool(config.get("use_quant_conv", True)),
        post_quant_conv=bool(config.get("use_post_quant_conv", True)),
        norm_groups=int(config["norm_num_groups"]),
        scaling_factor=float(config["scaling_factor"]),
        shift_factor=float(config.get("shift_factor") or 0.0),
    )


def to_diffusers_config(config: Architecture, scale: Tensor, bias: Tensor, resolution: int) -> dict:
    """config.json of an autoencoder of diffusers, with the latents' statistics: scale 1/std and bias mean, (1,C,1,1).

    diffusers' pipelines normalise by (z - latents_mean)·scaling_factor/latents_std; scaling_factor is therefore 1. Of a
    class that knows only the factor, it is 1 over the standard deviation of all channels; its pipelines do not read the
    other two, but known_statistics of weights/vae.py does. `resolution` is the side in pixels of the training images.
    """
    statistics = {"latents_mean": bias.flatten().tolist(), "latents_std": (1 / scale.double()).flatten().tolist()}
    if isinstance(config, DiffusersConfig):
        if config.takes("batch_norm_eps"):  # its weights hold them
            statistics = {}
        if config.takes("scaling_factor"):
            both = config.takes("latents_mean")
            statistics["scaling_factor"] = 1.0 if both else float(scale.double().pow(-2).mean().rsqrt())
        return {**config.to_json(), **statistics}
    levels = range(len(config.widths))
    prefix = {level: "Attn" if level in config.attention_levels else "" for level in levels}
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "act_fn": "silu",
        "block_out_channels": list(config.widths),
        "down_block_types": [f"{prefix[level]}DownEncoderBlock2D" for level in levels],
        "up_block_types": [f"{prefix[level]}UpDecoderBlock2D" for level in reversed(levels)],
        "layers_per_block": config.encoder_blocks,
        "latent_channels": config.z_channels,
        "norm_num_groups": config.norm_groups,
        "mid_block_add_attention": config.middle_attention,
        "use_quant_conv": config.quant_conv,
        "use_post_quant_conv": config.post_quant_conv,
        "sample_size": resolution,
        "scaling_factor": 1.0,
        **statistics,
    }
