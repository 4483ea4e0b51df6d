"""Numerics that networks and losses share: precision, batch statistics over every process, recomputation, copies
between host and device.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint


def float32_or_wider(x: Tensor) -> Tensor:
    """`x` in float32 if it came in half precision, unchanged if it is float32 or float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def channels_last(module: nn.Module) -> None:
    """Lay the kernels of `module` out as convolutions are fastest on tensor cores: channels last. Values stay."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.contiguous(memory_format=torch.channels_last)


def distributed_world_size() -> int:
    """Number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class SumOverProcesses(torch.autograd.Function):
    """All-reduce whose gradient is the all-reduced gradient: every process's loss depends on every process's input."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        """Sum of `x` over all processes."""
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        """Sum of the gradients of all processes."""
        total = grad.clone()
        dist.all_reduce(total)
        return total


def mean_over_batches(x: Tensor) -> Tensor:
    """`x`, something averaged over this process's batch, averaged over all processes, whose batches are equally large.

    Autograd passes through the reduction, as in `global_moments`.
    """
    world = distributed_world_size()
    return x if world == 1 else SumOverProcesses.apply(x) / world


def global_moments(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Per-channel batch statistics of `x` (B,C,H,W) over the batches of all processes, which must be equally large.

    Returns mean (C,), biased variance (C,) and the number of values behind each. Autograd passes through the
    reductions, so gradients equal those of one process holding the whole batch. The variance is computed around the
    global mean rather than from a sum of squares, which would cancel in float32.
    """
    world = distributed_world_size()
    mean = SumOverProcesses.apply(x.mean((0, 2, 3))) / world
    var = SumOverProcesses.apply((x - mean[:, None, None]).square().mean((0, 2, 3))) / world
    return mean, var, world * x.numel() // x.shape[1]


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are those of the global batch, on any backend and device.

    torch's SyncBatchNorm has no CPU kernel, and per-process statistics make a result depend on the number of
    processes. State-dict keys are BatchNorm2d's. Half-precision input is normalised in float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` (B,C,H,W): by batch statistics, updating the running ones, in training mode; else by those."""
        wide = float32_or_wider(x)
        if not self.training or distributed_world_size() == 1:
            return super().forward(wide).to(x.dtype)
        mean, var, count = global_moments(wide)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), self.momentum)
        normalised = (wide - mean[:, None, None]) * torch.rsqrt(var + self.eps)[:, None, None]
        if self.affine:
            normalised = normalised * self.weight[:, None, None] + self.bias[:, None, None]
        return normalised.to(x.dtype)

    def by_running_statistics(self, x: Tensor) -> Tensor:
        """Normalise `x` (B,C,H,W) by the running statistics and leave them as they are, whatever the module's mode."""
        wide = float32_or_wider(x)
        return F.batch_norm(wide, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def checkpointed_call(module: nn.Module, *inputs: Tensor, recompute: bool) -> Tensor:
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


AUTOCAST_DTYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def autocast_factory(device: torch.device, mixed_precision: str) -> Callable[[], AbstractContextManager]:
    """A function giving a fresh autocast context for `mixed_precision` (no, fp16, bf16).

    One context a pass: autocast caches the cast weights, and a cast cached without gradients would serve a later pass
    that needs them.
    """
    dtype = AUTOCAST_DTYPES[mixed_precision]
    return partial(torch.autocast, device.type, dtype=dtype, enabled=dtype is not None)


def to_device(tensors: Iterable[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """Host tensors on `device`; the host does not wait for copies to a GPU."""
    pin = device.type == "cuda"
    return tuple((tensor.pin_memory() if pin else tensor).to(device, non_blocking=pin) for tensor in tensors)


def to_host(tensor: Tensor) -> tuple[np.ndarray, Callable[[], None]]:
    """`tensor` as an array on the host, and what waits, in any thread, until its values have arrived there."""
    if tensor.device.type != "cuda":
        return tensor.contiguous().numpy(), lambda: None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor.contiguous(), non_blocking=True)
    arrived = torch.cuda.Event(blocking=True)
    arrived.record()
    return host.numpy(), arrived.synchronize
