"""Exponential moving average of a network's parameters and buffers."""

import copy

import torch
from torch import nn


def copy_for_ema(model: nn.Module) -> nn.Module:
    """A frozen copy of `model` to average into."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Move `ema` in place to decay·ema + (1 - decay)·model.

    Float buffers are averaged like parameters: SiT's batch-norm statistics are the latent normaliser at sampling time.
    Integer buffers are copied.
    """
    averages, values = ema.state_dict(), model.state_dict()
    floating = [key for key, value in averages.items() if value.is_floating_point()]
    torch._foreach_lerp_([averages[key] for key in floating], [values[key] for key in floating], 1 - decay)
    for key in averages.keys() - set(floating):
        averages[key].copy_(values[key])
