"""What training over several processes needs beyond DistributedDataParallel."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from errors import UserError
from models.numerics import distributed_world_size

PR_SET_PDEATHSIG = 1  # of Linux's prctl
COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # others wait while rank 0 samples pictures and writes checkpoints
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def process_state():
    """accelerate's PartialState of a script without training: device, process index, barriers."""
    from accelerate import PartialState

    # cpu: else several processes would not find each other on CPUs; ranks wait for each other until all shares are done
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))


def follow_launcher() -> None:
    """Send SIGTERM to this process when `accelerate launch`, which does not forward signals, is killed; on Linux."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ and sys.platform == "linux":  # accelerate sets it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def unwrap(module: nn.Module) -> nn.Module:
    """The network inside a DistributedDataParallel wrapper, or `module` itself."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def frozen_call(module: nn.Module, *args, **kwargs):
    """Call the unwrapped `module` with constant parameters: gradients reach the inputs only."""
    module = unwrap(module)
    constants = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return functional_call(module, constants, args, kwargs)


def on_first_process(action: Callable[[], object], group: dist.ProcessGroup | None):
    """Broadcast what `action` returns on rank 0 (plain data).

    Raises:
        UserError: on every rank, if it was raised on rank 0.
    """
    if distributed_world_size() == 1:
        return action()
    outcome = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except UserError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, group=group)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def host_group() -> dist.ProcessGroup | None:
    """A gloo group, which does not wait for devices and notices a lost process at once; None for a single process."""
    return dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT) if distributed_world_size() > 1 else None


def all_reduce_max(values: list[int], group: dist.ProcessGroup | None) -> list[int]:
    """The maximum of each value over the ranks of a `host_group`."""
    if group is None:
        return values
    tensor = torch.tensor(values)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group)
    return tensor.tolist()


@torch.no_grad()
def differing_tensor(tensors: dict[str, Tensor], device: torch.device) -> str | None:
    """The name of the first tensor whose `sum_of_bits` differs between ranks, or None."""
    sums = torch.stack([sum_of_bits(tensor).to(device) for tensor in tensors.values()])
    extremes = torch.stack([sums, ~sums])
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    differs = (extremes[0] != ~extremes[1]).tolist()
    return next((name for name, different in zip(tensors, differs, strict=True) if different), None)


def sum_of_bits(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bit patterns, read as integers and weighted by position; int64, modulo 2**64."""
    bits = tensor.detach().reshape(-1).view(INTEGERS[tensor.element_size()])
    weights = torch.arange(len(bits), device=bits.device) % 65521 + 1
    return (bits * weights).sum()


@torch.no_grad()
def tensor_not_finite(tensors: dict[str, Tensor], device: torch.device) -> str | None:
    """The name of the first tensor with a value that is not finite, or None."""
    finite = torch.stack([tensor.isfinite().all().to(device) for tensor in tensors.values()]).tolist()
    return next((name for name, good in zip(tensors, finite, strict=True) if not good), None)


@contextmanager
def gradient_sync(modules: Iterable[nn.Module], sync: bool) -> Iterator[None]:
    """Within, backward passes of DDP-wrapped `modules` average gradients over ranks only if `sync`."""
    with ExitStack() as stack:
        if not sync:
            for module in modules:
                if isinstance(module, DistributedDataParallel):
                    stack.enter_context(module.no_sync())
        yield
