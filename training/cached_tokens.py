"""Tokens of frozen encoders that are cached instead of computed at every step: how they are stored, and whose they are.

float16 keeps 11 bits of each number. int8 halves that: a token's numbers are whole multiples of its scale, which is
1/127 of the largest of them.
"""

import argparse

import torch
from torch import Tensor

from dataset import TokenDataset, open_tokens
from errors import UserError
from models.encoders import encoder_specs
from models.sit import SiT_models

INT8_MAX = 127


def pack_tokens(tokens: Tensor, dtype: str) -> tuple[Tensor, ...]:
    """Tokens (B,T,D) of any float -> what is stored of them in `dtype`, float16 or int8.

    Returns:
        (tokens (B,T,D) float16,), infinite where that cannot hold them; or (tokens (B,T,D) int8, scales (B,T) float32),
        where the scale of a token of zeros is 0, and that of one which is not finite is not finite either.
    """
    if dtype == "float16":
        return (tokens.half(),)
    tokens = tokens.float()
    scales = tokens.abs().amax(-1) / INT8_MAX
    steps = tokens / scales.where(scales > 0, 1)[..., None]
    return steps.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scales


def unpack_tokens(tokens: Tensor, scales: Tensor | None = None) -> Tensor:
    """What `pack_tokens` gave -> tokens (B,T,D), float16 as they are, int8 in float32."""
    return tokens if scales is None else tokens.float() * scales[..., None]


def open_cached_tokens(args: argparse.Namespace, latents) -> list[TokenDataset]:
    """The tokens that --cached-tokens names, one folder for each encoder of --enc-type; none without the flag.

    `latents`, from dataset.open_latents, are those they are trained with.

    Raises:
        UserError: they are missing, of other encoders or images, not of the transformer's grid or the encoder's width,
            or not mirrored although the latents are.
    """
    if args.cached_tokens is None:
        return []
    specs, names = encoder_specs(args.enc_type), args.cached_tokens.split(",")
    if len(names) != len(specs):
        raise UserError(
            f"--cached-tokens names {len(names)} folders, but --enc-type {len(specs)} encoders; name one for each"
        )
    opened = [open_tokens(args.data_dir, name, latents) for name in names]
    grid = latents.shape[1] // SiT_models[args.model].keywords["patch_size"]
    for tokens, (encoder, spec) in zip(opened, specs.items(), strict=True):
        if tokens.encoder != encoder:
            raise UserError(
                f"{tokens.source} holds tokens of {tokens.encoder}, but --enc-type has {encoder} in its place; "
                "name folders in the order of --enc-type"
            )
        if tokens.shape != (grid**2, spec.embed_dim):
            raise UserError(
                f"{tokens.source} holds {tokens.shape[0]} tokens of width {tokens.shape[1]}, but the transformer has "
                f"{grid}x{grid} and {encoder} {spec.embed_dim}; cache them again with --token-grid {grid}"
            )
        if latents.mirrored and not tokens.mirrored:
            raise UserError(
                f"{latents.source} has mirrored images too, but {tokens.source} has not; cache tokens with --mirrored"
            )
    return opened
