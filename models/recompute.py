"""Gradient checkpointing: what a module computes is computed again in the backward pass, instead of being kept."""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint


def call(module: nn.Module, *inputs: Tensor, recompute: bool) -> Tensor:
    """`module(*inputs)`; with `recompute`, and where gradients are taken, only `inputs` are kept for the backward pass.

    The module is then run twice, so it must draw no random numbers and update no buffer. Gradients are the same.
    """
    if not (recompute and torch.is_grad_enabled()):
        return module(*inputs)
    # by the backward pass, the module's own parameters may be back in place of those it was called with
    parameters = dict(module.named_parameters())

    def run(*inputs: Tensor) -> Tensor:
        return functional_call(module, parameters, inputs)

    return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
