"""REPA's alignment loss (Yu et al., arXiv 2410.06940)."""

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
