"""What goes on beside a GPU's main stream: copies to and from it, and passes that what comes next does not wait for.

Where there is no such stream, on CPUs, everything is simply done in order.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@lru_cache
def stream_of(index: int) -> torch.cuda.Stream:
    """The stream beside the main one of the GPU with this number."""
    return torch.cuda.Stream(index)


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The device's one stream beside the main one; a device without a number is the current one."""
    return stream_of(torch.cuda.current_device() if device.index is None else device.index)


def to_device(tensors: Iterable[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """Host tensors on `device`; on a GPU the copies wait for no computation, and neither does the host for them."""
    if device.type != "cuda":
        return tuple(tensor.to(device) for tensor in tensors)
    pinned = [tensor.pin_memory() for tensor in tensors]  # those that are pinned stay as they are
    with torch.cuda.stream(side_stream(device)):
        copies = tuple(tensor.to(device, non_blocking=True) for tensor in pinned)
    return awaited(copies, device)


def to_host(tensor: Tensor) -> tuple[np.ndarray, Callable[[], None]]:
    """`tensor` as an array on the host, and what waits, in any thread, until its values have arrived there."""
    if tensor.device.type != "cuda":
        return tensor.contiguous().numpy(), lambda: None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor.contiguous(), non_blocking=True)
    arrived = torch.cuda.Event(blocking=True)
    arrived.record()
    return host.numpy(), arrived.synchronize


def beside(compute: Callable[[], list[Tensor]], device: torch.device) -> Callable[[], list[Tensor]]:
    """Begin `compute` beside what this process does next on `device`.

    Returns a function that gives the tensors computed; what is done after it was called waits for them.
    """
    if device.type != "cuda":
        result = compute()
        return lambda: result
    side = side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        result = compute()
    return lambda: awaited(result, device)


def awaited(tensors, device: torch.device):
    """`tensors` of the side stream, for which the current stream now waits; their memory is kept until it is done."""
    current = torch.cuda.current_stream(device)
    current.wait_stream(side_stream(device))
    for tensor in tensors:
        tensor.record_stream(current)
    return tensors
