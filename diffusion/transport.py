"""The path between data and noise: interpolant, target, sampling of times, and the score from the velocity.

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
    """α, σ and their derivatives with respect to t, each of the shape of t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


def coefficients(path_type: str, t: Tensor) -> Coefficients:
    """The interpolant's coefficients at t in [0, 1].

    linear: α = 1 - t, σ = t. cosine: α = cos(πt/2), σ = sin(πt/2).
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
    """Times in [0, 1], (B,) float32, from float64 draws `uniform` (B,) of U[0, 1).

    uniform: the draws themselves. lognormal: the noise-to-data ratio σ/α is s = exp(N(0, 1)), hence t = s/(1 + s) on
    the linear path and (2/π)·atan s on the cosine path; normal draws are the normal quantiles of the uniform ones.
    """
    if weighting == "uniform":
        return uniform.float()
    if weighting == "lognormal":
        ratio = torch.special.ndtri(uniform).exp()
        return (ratio / (1 + ratio) if path_type == "linear" else torch.atan(ratio) * (2 / math.pi)).float()
    raise ValueError(f"unknown weighting {weighting!r}; it must be one of {', '.join(WEIGHTINGS)}")


def score_from_velocity(path_type: str, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Score ∇ log p_t(x), (B,C,h,w), from the velocity at t > 0, a scalar or (B,1,1,1) (SiT, eq. 9)."""
    c = coefficients(path_type, t)
    ratio = c.alpha / c.d_alpha
    return (ratio * velocity - x) / (c.sigma**2 - ratio * c.d_sigma * c.sigma)


def diffusion_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, (B,)."""
    return (prediction - target).square().flatten(1).mean(1)
