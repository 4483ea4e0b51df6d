"""Samplers from noise to latents, as pure functions of `velocity_fn(x, t, y)`.

The state is float64; `velocity_fn` gets it in float32 and may compute in any precision.
Euler and Heun integrate the probability-flow ODE, Euler-Maruyama the SDE with the same marginals and diffusion
w(t) = 2t (SiT, Ma et al., arXiv 2401.08740). Guidance is restricted to an interval of times (Kynkäänniemi et al.,
2404.07724). `sample_pixels` in diffusion/sampling.py chooses the sampler by `--mode` of generate.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from diffusion.transport import score_from_velocity

VelocityFn = Callable[[Tensor, Tensor, Tensor], Tensor]
LAST_SDE_STEP = 0.04


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance v = v_null + scale·(v_cond - v_null) where low <= t <= high."""

    scale: float
    null_label: int
    low: float = 0.0
    high: float = 1.0


def guidance_at(guidance: Guidance | None, t: float) -> Guidance | None:
    """The guidance, if it acts at time t."""
    acts = guidance is not None and guidance.scale != 1.0 and guidance.low <= t <= guidance.high
    return guidance if acts else None


def guided_velocity(velocity_fn: VelocityFn, x: Tensor, t: float, y: Tensor, guidance: Guidance | None) -> Tensor:
    """Velocity at x (B,C,h,w) and time t, in x's dtype; with guidance, both velocities come from one batch."""
    dtype, x, time = x.dtype, x.float(), x.new_full((len(x),), t, dtype=torch.float32)
    if guidance is None:
        return velocity_fn(x, time, y).to(dtype)
    null = torch.full_like(y, guidance.null_label)
    both = velocity_fn(torch.cat([x, x]), torch.cat([time, time]), torch.cat([y, null]))
    v_conditional, v_null = both.to(dtype).chunk(2)
    return v_null + guidance.scale * (v_conditional - v_null)


def sample_ode(
    velocity_fn: VelocityFn, x: Tensor, y: Tensor, steps: int, guidance: Guidance | None = None, heun: bool = False
) -> Tensor:
    """Euler from t = 1 to 0 on a uniform grid; with `heun`, a trapezoidal correction of all steps but the last.

    `x` is N(0,1) noise (B,C,h,w) and `y` (B,) int64 labels; returns normalised latents (B,C,h,w) in float64.
    """
    x = x.double()
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for i, (t, t_next) in enumerate(pairwise(times)):
        active = guidance_at(guidance, t)
        velocity = guided_velocity(velocity_fn, x, t, y, active)
        if heun and i < steps - 1:
            corrected = guided_velocity(velocity_fn, x + (t_next - t) * velocity, t_next, y, active)
            velocity = 0.5 * (velocity + corrected)
        x = x + (t_next - t) * velocity
    return x


def sample_sde(
    velocity_fn: VelocityFn,
    x: Tensor,
    y: Tensor,
    steps: int,
    path_type: str,
    step_noise: Callable[[int], Tensor],
    guidance: Guidance | None = None,
) -> Tensor:
    """Euler-Maruyama from t = 1 to 0.04 on a uniform grid, then one noiseless step to 0.

    Arguments and result are those of `sample_ode`; `step_noise(i)` gives the N(0,1) draw (B,C,h,w) of step i, for i in
    0..steps-2. The drift v - w/2·score is affine in v, and the weights of guidance sum to one, so that guidance of the
    velocity is guidance of the drift.
    """
    x = x.double()
    times = [*torch.linspace(1, LAST_SDE_STEP, steps, dtype=torch.float64).tolist(), 0.0]
    for i, (t, t_next) in enumerate(pairwise(times)):
        w, dt = 2 * t, t_next - t
        active = guidance_at(guidance, t)
        velocity = guided_velocity(velocity_fn, x, t, y, active)
        score = score_from_velocity(path_type, velocity, x, torch.tensor(t, dtype=x.dtype))
        x = x + dt * (velocity - w / 2 * score)
        if i < steps - 1:
            x = x + math.sqrt(w * -dt) * step_noise(i).to(x)
    return x
