"""How networks are computed: precision, compilation, batch statistics over all processes, recomputation of activations,
and copies between host and device.
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
    """`x` in float32 if it is in half precision, unchanged if it is in float32 or float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def channels_last(module: nn.Module) -> None:
    """Store the kernels of `module` in channels-last layout, the fastest one on tensor cores. Values stay the same."""
    for parameter in module.parameters():
        if parameter.ndim == 4 and parameter.shape[1] > 1:  # of one channel both layouts are the same
            parameter.data = parameter.contiguous(memory_format=torch.channels_last)


def distributed_world_size() -> int:
    """Number of processes in the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(*totals: Tensor) -> None:
    """Add the totals of all other processes, in place."""
    if distributed_world_size() > 1:
        for total in totals:
            dist.all_reduce(total)


class SumOverProcesses(torch.autograd.Function):
    """All-reduce whose gradient is all-reduced too, as the loss of every process depends on the input of every one."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total


def mean_over_batches(x: Tensor) -> Tensor:
    """Mean over the global batch of `x`, a mean over this process's batch. All processes have equal batch sizes.

    Gradients flow through the reduction, as in `global_moments`.
    """
    world = distributed_world_size()
    return x if world == 1 else SumOverProcesses.apply(x) / world


def global_moments(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Per-channel statistics of the global batch, of which `x` (B,C,H,W) is this process's equal share.

    Returns mean (C,), biased variance (C,) and the number of values in each. Gradients flow through the reductions and
    equal those of one process with the whole batch. The variance is computed around the global mean, not from a sum of
    squares, which would cancel in float32.
    """
    world = distributed_world_size()
    mean = SumOverProcesses.apply(x.mean((0, 2, 3))) / world
    var = SumOverProcesses.apply((x - mean[:, None, None]).square().mean((0, 2, 3))) / world
    return mean, var, world * x.numel() // x.shape[1]


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d with the training statistics of the global batch, on any backend and device.

    Statistics per process would make results depend on the number of processes, and torch's SyncBatchNorm has no CPU
    kernel. State-dict keys are BatchNorm2d's. Half-precision input is normalised in float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` (B,C,H,W): in training mode by batch statistics, with an update of the running ones, which are
        used otherwise."""
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
        """Normalise `x` (B,C,H,W) by the running statistics, which stay unchanged, also in training mode."""
        wide = float32_or_wider(x)
        return F.batch_norm(wide, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def checkpointed_call(module: nn.Module, *inputs: Tensor, recompute: bool) -> Tensor:
    """`module(*inputs)`, with activation checkpointing if `recompute` and gradients are enabled.

    The backward pass then runs the module again from `inputs`, so it must draw no random numbers and update no buffer.
    Gradients are the same.
    """
    if not (recompute and torch.is_grad_enabled()):
        return module(*inputs)
    # the module may be called with other parameters (functional_call), which are gone by the backward pass
    parameters = dict(module.named_parameters())

    def run(*inputs: Tensor) -> Tensor:
        return functional_call(module, parameters, inputs)

    return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)


AUTOCAST_DTYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def autocast_factory(device: torch.device, mixed_precision: str) -> Callable[[], AbstractContextManager]:
    """A function that returns a fresh autocast context for `mixed_precision` (no, fp16, bf16).

    Every pass needs its own: autocast caches casts of weights, and those made without gradients must not be used with.
    """
    dtype = AUTOCAST_DTYPES[mixed_precision]
    return partial(torch.autocast, device.type, dtype=dtype, enabled=dtype is not None)


def cast_weights(network: nn.Module, mixed_precision: str) -> None:
    """Cast once the weights of a frozen network that autocast would cast in every call; results do not change.

    Autocast caches its casts only where gradients are computed.
    """
    if (dtype := AUTOCAST_DTYPES[mixed_precision]) is not None:
        for module in network.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
                module.to(dtype)


def compile_in_place(modules: Iterable[nn.Module], wanted: bool, device: torch.device) -> bool:
    """torch.compile every module in place, so that state-dict keys stay; on GPUs only, and if `wanted`.

    Returns whether they are compiled.
    """
    compiled = wanted and device.type == "cuda"
    if compiled:
        # else DDP splits every graph at the borders of its buckets, also those of single blocks
        torch._dynamo.config.optimize_ddp = False
        for module in modules:
            module.compile(dynamic=False)  # previews and guided batches get graphs of their own
    return compiled


def in_full_batches(function: Callable[[Tensor], Tensor], rows: int) -> Callable[[Tensor], Tensor]:
    """A compiled `function` of (B,...) that sees one shape: batches of fewer than `rows` rows are filled up with their
    last row, and what it gives for these is dropped."""

    def run(x: Tensor) -> Tensor:
        return function(torch.cat([x, x[-1:].expand(rows - len(x), *x.shape[1:])]))[: len(x)]

    return run


def use_tf32(allow: bool) -> None:
    """Let GPUs round float32 matrix products and convolutions to TF32, or not."""
    torch.backends.cuda.matmul.allow_tf32 = allow
    torch.backends.cudnn.allow_tf32 = allow


def to_device(tensors: Iterable[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """Host tensors on `device`; copies to a GPU are asynchronous."""
    pin = device.type == "cuda"
    return tuple((tensor.pin_memory() if pin else tensor).to(device, non_blocking=pin) for tensor in tensors)


def to_host(tensor: Tensor) -> tuple[np.ndarray, Callable[[], None]]:
    """`tensor` as an array on the host, and a function that waits, in any thread, until its values are complete."""
    device = tensor.device
    if device.type != "cuda":
        return tensor.contiguous().numpy(), lambda: None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor.contiguous(), non_blocking=True)
    arrived = torch.cuda.Event(blocking=True)
    arrived.record()

    def wait() -> None:
        torch.cuda.set_device(device)  # of this thread, which would otherwise wake the first GPU
        arrived.synchronize()

    return host.numpy(), wait
