"""The alignment loss of REPA (Yu et al., arXiv 2410.06940) and iREPA's normalisation of its targets (2512.10794)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.numerics import float32_or_wider


def alignment_loss(projected: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Negative cosine similarity, averaged over encoders, images and tokens; a scalar in [-1, 1].

    Args:
        projected: projected tokens of the transformer, one (B,T,D_k) per encoder.
        targets: tokens of the frozen encoders, of the same shapes. Half precision is widened to float32.
    """
    similarities = [
        F.cosine_similarity(float32_or_wider(ours), float32_or_wider(theirs), dim=-1).mean()
        for ours, theirs in zip(projected, targets, strict=True)
    ]
    return -torch.stack(similarities).mean()


def spatial_normalise(tokens: Tensor, gamma: float) -> Tensor:
    """Normalisation over space (iREPA, Singh et al., arXiv 2512.10794): (z - gamma·mean) / (std + 1e-6).

    `tokens` are those of an encoder (B,T,D), T > 1, widened to float32; std is the unbiased one over tokens.
    """
    tokens = float32_or_wider(tokens)
    return (tokens - gamma * tokens.mean(1, keepdim=True)) / (tokens.std(1, keepdim=True) + 1e-6)
