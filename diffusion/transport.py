"""The path between data and noise: interpolant, time sampling, target, and velocity <-> score. Knows no network.

Stochastic interpolants as in SiT (Ma et al., arXiv 2401.08740). **t = 0 is data, t = 1 is noise** (the original SiT
code runs the other way). x_t = α(t)·z_norm + σ(t)·ε and the target is its velocity v = α'(t)·z_norm + σ'(t)·ε.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

PATH_TYPES = ("linear", "cosine")
WEIGHTINGS = ("uniform", "lognormal")
TIME_CONVENTION = "t=0 data, t=1 noise"


class Coefficients(NamedTuple):
    """α, σ and their derivatives by t, each shaped like t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


def coefficients(path_type: str, t: Tensor) -> Coefficients:
    """The interpolant's coefficients at t in [0, 1].

    linear: α = 1 - t, σ = t. cosine: α = cos(πt/2), σ = sin(πt/2).

    Raises:
        ValueError: unknown `path_type`.
    """
    if path_type == "linear":
        return Coefficients(1 - t, t, torch.full_like(t, -1.0), torch.full_like(t, 1.0))
    if path_type == "cosine":
        angle = t * (math.pi / 2)
        cos, sin = angle.cos(), angle.sin()
        return Coefficients(cos, sin, -math.pi / 2 * sin, math.pi / 2 * cos)
    raise ValueError(f"unknown path type {path_type!r}; it must be one of {', '.join(PATH_TYPES)}")


def interpolate(path_type: str, z_norm: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Noised latent x_t and velocity target v, both (B,C,h,w), for t (B,)."""
    c = coefficients(path_type, t[:, None, None, None])
    return c.alpha * z_norm + c.sigma * noise, c.d_alpha * z_norm + c.d_sigma * noise


def sample_time(weighting: str, path_type: str, uniform: Tensor) -> Tensor:
    """(B,) float32 times in [0, 1], from as many draws from U[0, 1) in float64.

    uniform: the draws themselves. lognormal: s = exp(N(0, 1)) is the noise-to-data ratio σ/α, hence t = s/(1 + s) on
    the linear path and (2/π)·atan s on the cosine one; the normal distribution's quantiles make its draws.

    Raises:
        ValueError: unknown `weighting`.
    """
    if weighting == "uniform":
        return uniform.float()
    if weighting == "lognormal":
        ratio = torch.special.ndtri(uniform).exp()
        return (ratio / (1 + ratio) if path_type == "linear" else torch.atan(ratio) * (2 / math.pi)).float()
    raise ValueError(f"unknown weighting {weighting!r}; it must be one of {', '.join(WEIGHTINGS)}")


def score_from_velocity(path_type: str, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Score ∇ log p_t(x) from the velocity, (B,C,h,w), for a scalar or (B,1,1,1) t > 0 (SiT, eq. 9)."""
    c = coefficients(path_type, t)
    ratio = c.alpha / c.d_alpha
    return (ratio * velocity - x) / (c.sigma**2 - ratio * c.d_sigma * c.sigma)


def diffusion_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error of each sample, (B,), averaged over all but the batch dimension."""
    return (prediction - target).square().flatten(1).mean(1)
