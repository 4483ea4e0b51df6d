"""REPA's alignment loss (Yu et al., arXiv 2410.06940) and iREPA's normalisation of its targets (2512.10794)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.numerics import float32_or_wider


def alignment_loss(projected: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Negative cosine similarity, averaged over encoders, images and tokens; a scalar in [-1, 1].

    Args:
        projected: the transformer's projected tokens, one (B,T,D_k) per encoder.
        targets: the frozen encoders' tokens, the same shapes. Half precision is widened to float32.
    """
    similarities = [
        F.cosine_similarity(float32_or_wider(ours), float32_or_wider(theirs), dim=-1).mean()
        for ours, theirs in zip(projected, targets, strict=True)
    ]
    return -torch.stack(similarities).mean()


def spatial_normalise(tokens: Tensor, gamma: float) -> Tensor:
    """iREPA's contrast between tokens (Singh et al., arXiv 2512.10794): (z - gamma·mean) / (std + 1e-6) over space.

    Args:
        tokens: an encoder's, (B,T,D), T > 1. Half precision is widened to float32.
        gamma: share of the mean over tokens that is taken away.

    Returns:
        (B,T,D) of float32 or wider; std is the unbiased one over tokens.
    """
    tokens = float32_or_wider(tokens)
    return (tokens - gamma * tokens.mean(1, keepdim=True)) / (tokens.std(1, keepdim=True) + 1e-6)
