"""Encoder checkpoints as their projects publish them, two blocks deep and 64 wide, with golden weights."""

from dataclasses import replace

import torch
from torch import Tensor

from golden_weights import filled, golden
from models.encoder_table import ENCODERS
from models.encoders import Encoder, EncoderSpec

TINY = {"embed_dim": 64, "depth": 2, "num_heads": 4}
VIT = {
    "cls_token": (1, 1, 64),
    "attn.qkv.weight": (192, 64),
    "attn.qkv.bias": (192,),
    "attn.proj.weight": (64, 64),
    "mlp.fc1.weight": (256, 64),
    "mlp.fc1.bias": (256,),
    "mlp.fc2.weight": (64, 256),
}
PATCH14, PATCH16 = {"patch_embed.proj.weight": (64, 3, 14, 14)}, {"patch_embed.proj.weight": (64, 3, 16, 16)}
DINOV2 = {**VIT, **PATCH14, "mask_token": (1, 64), "pos_embed": (1, 1370, 64), "register_tokens": (1, 4, 64)}
CLIP = {
    "conv1.weight": (64, 3, 14, 14),
    "positional_embedding": (257, 64),
    "proj": (64, 32),
    "in_proj_weight": (192, 64),
    "in_proj_bias": (192,),
    "out_proj.weight": (64, 64),
    "c_fc.weight": (256, 64),
    "c_fc.bias": (256,),
    "c_proj.weight": (64, 256),
}


def sincos(grid: int, row_first: bool) -> Tensor:
    """(1, grid², 64): [sin, cos] of one axis, then of the other, written out entry by entry."""
    omega = 10000.0 ** (-torch.arange(16, dtype=torch.float64) / 16)
    table = torch.empty(grid, grid, 64, dtype=torch.float64)
    for row in range(grid):
        for column in range(grid):
            first, second = (row, column) if row_first else (column, row)
            table[row, column] = torch.cat(
                [f(omega * position) for position in (first, second) for f in (torch.sin, torch.cos)]
            )
    return table.reshape(1, grid**2, 64).float()


def state(keys: list[str], prefix: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A state dict of golden weights; shapes go by the end of a key, (64,) where none is given."""
    shape_of = {key: next((shape for end, shape in shapes.items() if key.endswith(end)), (64,)) for key in keys}
    return {key: filled(key, shape, prefix) for key, shape in shape_of.items()}


def original(name: str, native: bool = False) -> dict:
    """A row's checkpoint, nested and prefixed as its project does; most are those of golden/encoders_tiny.npz.

    The golden position tables of MoCo v3 and MAE are of 16x16 tokens; `native` are of 14x14, as published.
    """
    grid = 14 if native else 16
    arrays = golden("encoders_tiny")
    if name.startswith("dinov2"):
        registers = 4 if "reg" in name else 0
        return state(list(map(str, arrays[f"dinov2_reg{registers}_keys"])), f"dinov2reg{registers}:", DINOV2)
    if name.startswith("mocov3"):
        vit = state(list(map(str, arrays["mocov3_keys"])), "mocov3:", {**VIT, **PATCH16})
        vit["pos_embed"] = torch.cat([torch.zeros(1, 1, 64), sincos(grid, row_first=True)], dim=1)
        encoder = {f"module.base_encoder.{key}": value for key, value in vit.items()}
        head = {"module.base_encoder.head.0.weight": torch.zeros(8, 64)}
        momentum = {f"module.momentum_encoder.{key}": value + 1 for key, value in vit.items()}
        return {"epoch": 300, "arch": "vit_small", "state_dict": {**encoder, **head, **momentum}, "optimizer": {}}
    if name == "mae-vit-l":
        shapes = {**VIT, **PATCH16, "pos_embed": (1, grid**2 + 1, 64)}
        return {"model": state(list(map(str, arrays["mae_keys"])), "mae:", shapes)}
    if name == "dinov1-vit-b":
        return state(list(map(str, arrays["mae_keys"])), "dino:", {**VIT, **PATCH16, "pos_embed": (1, 197, 64)})
    if name == "jepa-vit-h":
        vit = state(list(map(str, arrays["jepa_keys"])), "jepa:", {**VIT, **PATCH14})
        vit["pos_embed"] = sincos(16, row_first=False)
        return {
            "encoder": {f"module.{key}": value for key, value in vit.items()},
            "target_encoder": {f"module.{key}": value + 1 for key, value in vit.items()},
            "predictor": {"module.predictor_embed.weight": torch.zeros(8, 64)},
            "epoch": 300,
        }
    if name == "clip-vit-L":
        visual = state(list(map(str, arrays["clip_keys"])), "clip:", CLIP)
        text = {"token_embedding.weight": torch.zeros(9, 8), "logit_scale": torch.zeros(())}
        return {**{f"visual.{key}": value for key, value in visual.items()}, **text}
    if name.startswith("dinov3"):
        return dinov3()
    raise KeyError(name)


def dinov3() -> dict[str, Tensor]:
    """DINOv3's has DINOv2's keys, but registers, masked biases and a rotary embedding of its own."""
    keys = [key for key in original("dinov2-vit-s") if key != "pos_embed"]
    vit = state(keys, "dinov3:", {**VIT, **PATCH16, "mask_token": (1, 64)})
    vit["storage_tokens"] = filled("storage_tokens", (1, 4, 64), "dinov3:")
    vit["rope_embed.periods"] = torch.ones(4)
    for block in range(2):
        bias = vit[f"blocks.{block}.attn.qkv.bias"]
        bias[64:128] = 0  # of the keys, which it masks
        vit[f"blocks.{block}.attn.qkv.bias_mask"] = (bias != 0).float()
    return vit


def tiny_spec(name: str, **options: object) -> EncoderSpec:
    """A row of the registry at width 64, two blocks deep, with four heads (CLIP: one)."""
    spec = ENCODERS[name]
    heads = {"num_heads": 1} if name == "clip-vit-L" else {}
    return replace(spec, embed_dim=64, options={**spec.options, **TINY, **heads, **options})


def tiny_encoder(name: str, grid: int = 16) -> Encoder:
    return Encoder(tiny_spec(name), grid)
