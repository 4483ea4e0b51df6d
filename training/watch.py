"""Watching the numbers of a run, so that one that is lost stops instead of training on for days.

Runs in float16 have been seen to die quietly near 90k steps: losses or gradients that are not finite, a loss scale that
falls to nothing, a discriminator or gradient norms that go to exactly 0.
"""

import math
from collections import Counter

import torch
from torch import Tensor, nn

# consecutive steps after which a gradient that is exactly 0 counts as vanished
VANISHED = {"grad_norm_vae": 10, "grad_norm_sit": 10}
# the discriminator may win for a while, but not for ever: its hinge loss then is 0, and it learns nothing any more
COLLAPSED = {"grad_norm_disc": 1000}
SKIPPED = 20  # consecutive steps that float16 skips; from the scale it starts with, 17 take it below the floor
LOWEST_LOSS_SCALE = 1.0


class Watch:
    """Finds the first step of a run after which going on is pointless.

    Args:
        scaled: whether losses are scaled (float16): now and then a gradient then overflows, and its step is skipped.

    Attributes:
        gan_start: 1-based step from which on a discriminator learns.
    """

    def __init__(self, scaled: bool):
        self.scaled, self.gan_start = scaled, math.inf
        self.zero, self.skipped = Counter(), Counter()

    def reason_to_stop(self, records: list[dict[str, float]]) -> str | None:
        """What is wrong, naming step and term, with the metrics of consecutive steps that come next; None: nothing."""
        for record in records:
            for name, value in record.items():
                if (wrong := self._wrong(record["step"], name, value)) is not None:
                    return f"step {record['step']}: {name} {wrong}"
        return None

    def _wrong(self, step: int, name: str, value: float) -> str | None:
        if name.startswith("loss_scale") and value < LOWEST_LOSS_SCALE:
            return f"is {value:g}, so low that float16 cannot hold the gradients"
        is_gradient = name.startswith("grad_norm")
        if not math.isfinite(value) and not (self.scaled and is_gradient):
            return f"is {value}"
        if is_gradient:
            self.skipped[name] = 0 if math.isfinite(value) else self.skipped[name] + 1
            if self.skipped[name] >= SKIPPED:
                return f"has not been finite for {SKIPPED} steps, which were all skipped"
        if name in VANISHED or (name in COLLAPSED and step >= self.gan_start):
            limit = {**VANISHED, **COLLAPSED}[name]
            self.zero[name] = self.zero[name] + 1 if value == 0 else 0
            if self.zero[name] >= limit:
                return f"has been 0 for {limit} steps" + (": the GAN has collapsed" if name in COLLAPSED else "")
        return None


@torch.no_grad()
def normaliser_drift(bn: nn.BatchNorm2d, start: Tensor) -> dict[str, Tensor]:
    """How far a normaliser's running statistics are from those it started with, as scalars on its device.

    Args:
        bn: the normaliser of C channels.
        start: (2,C), the running means and variances at the start.

    Returns:
        bn_mean_drift, the mean over channels of |mean - start|/(standard deviation at the start); and bn_std_drift,
        that of |log(standard deviation/the one at the start)|.
    """
    mean, var = start
    return {
        "bn_mean_drift": ((bn.running_mean - mean).abs() * torch.rsqrt(var)).mean(),
        "bn_std_drift": (0.5 * torch.log(bn.running_var / var)).abs().mean(),
    }
