"""What a training step costs, counted on tensors that have shapes but no values: operations and memory.

Multiply and add count as two. Matrix products, convolutions and attention are counted in the forward and in the
backward pass; what is done element by element (norms, activations, optimisers) is not: next to these it costs memory
traffic, not operations.
"""

import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from models.numerics import autocast_factory
from training.distributed import unwrap
from training.loop import Batch
from training.randomness import Draws, Rows

SUSTAINED = 200e12  # operations a second of a GPU, assumed
MOMENTS = 8  # bytes of a parameter in an optimiser: two in float32
CPU = torch.device("cpu")
PARTS = {"opt_vae": "VAE's update", "opt_disc": "discriminator's update", "opt_sit": "transformer's update"}


class Cost(NamedTuple):
    """What a step of some images costs one process."""

    flops: dict[str, float]  # operations an image, by part of the step
    activations: int  # bytes at the moment when they are most, beside parameters and their gradients
    metrics: list[str]  # names of what the step gives


def trained_parameters(module: nn.Module) -> int:
    """How many numbers of a network are trained."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of all tensors together."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def checkpoint_bytes(stored: Iterable[nn.Module], trained: Iterable[nn.Module]) -> int:
    """Bytes of a checkpoint: the networks `stored`, and two moments in float32 of each parameter of those `trained`."""
    weights = sum(bytes_of(network.state_dict().values()) for network in stored)
    return weights + MOMENTS * sum(map(trained_parameters, trained))


def amount(value: float, unit: str = "B") -> str:
    """A number of bytes or operations, to three digits."""
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{float(f'{value / size:.3g}'):g} {prefix}{unit}"
    return f"{value:g} {unit}"


def seconds(value: float) -> str:
    """A duration, to two digits."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if value >= 2 * size or unit == "s" and value >= 1:
            return f"{float(f'{value / size:.2g}'):g} {unit}"
    return f"{float(f'{value * 1e3:.2g}'):g} ms"


class BackwardOnly:
    """Stands in for an optimiser: gradients are computed, and nothing is done with them but to call `then`."""

    def __init__(self, then: Callable[[], object] = lambda: None):
        self.then = then

    def backward_and_step(self, loss: Tensor) -> None:
        """Backward."""
        loss.backward()
        self.then()


class Meter(TorchDispatchMode):
    """Within, counts what tensors are made by.

    PyTorch's FlopCounterMode counts the same operations, but keeps what gradient checkpointing would give back.

    Attributes:
        flops: operations.
        peak: the most bytes that tensors made within held at once.
    """

    def __init__(self):
        super().__init__()
        self.flops = self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (formula := FLOPS.get(func.overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known | given:
                    self.known.add(storage._cdata)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def free(self, key: int, count: int) -> None:
        """A tensor is gone."""
        self.known.discard(key)
        self.live -= count


def attention_flops(query: Tensor, key: Tensor, value: Tensor, *_, **__) -> int:
    """Operations of fused attention."""
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def attention_backward_flops(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_, **__) -> int:
    """Operations of its backward pass: two products for each one forward, as if scores had been kept."""
    return 2 * attention_flops(query, key, value)


# PyTorch has no formula for fused attention on CPUs
FLOPS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def in_float32(normalise: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A normalisation as autocast runs it on GPUs, but not on CPUs."""

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return normalise(x.float())

    return run


def without_values(module: nn.Module) -> nn.Module:
    """A copy of a network, unwrapped, that computes as on a GPU, on CPU tensors without values if in FakeTensorMode."""
    module, copies = unwrap(module), {}
    for tensor in (*module.parameters(), *module.buffers()):
        empty = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=CPU)
        trained = isinstance(tensor, nn.Parameter)
        copies[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if trained else empty
    module = copy.deepcopy(module, copies)
    for part in module.modules():
        if isinstance(part, (nn.GroupNorm, nn.LayerNorm)):
            part.forward = in_float32(part.forward)
    return module


def nets_without_values(nets, noted: Callable[[str], None]):
    """A step's networks without values, with gradients; `noted` is called with the name of each part that is done."""
    found = {}
    for name, value in vars(nets).items():
        if isinstance(value, nn.Module):
            found[name] = without_values(value)
            for parameter in found[name].parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        elif name in PARTS:
            found[name] = BackwardOnly(partial(noted, PARTS[name]))
        elif name == "encoders":
            found[name] = [noting(without_values(encoder), partial(noted, name)) for encoder in value]
        else:
            found[name] = torch.zeros(value.shape)
    return dataclasses.replace(nets, **found)


def noting(encoder: Callable[[Tensor], Tensor], then: Callable[[], None]) -> Callable[[Tensor], Tensor]:
    """`encoder`, after which `then` is called."""

    def call(pixels: Tensor) -> Tensor:
        tokens = encoder(pixels)
        then()
        return tokens

    return call


def inputs_without_values(example: Batch, count: int, latent: tuple[int, int, int]) -> tuple[Batch, Draws]:
    """A batch of `count` images like those of `example`, and draws for latents (C,h,w); all zero."""

    def many(tensor: Tensor) -> Tensor:
        return torch.zeros(count, *tensor.shape[1:], dtype=tensor.dtype)

    noise, t = torch.zeros(2, count, *latent), torch.zeros(count)
    moments = None if example.moments is None else many(example.moments)
    tokens = tuple(map(many, example.tokens))
    batch = Batch(many(example.pixels), many(example.labels), 0, Rows(0, count), moments, tokens)
    return batch, Draws(*noise, t, t > 0)


def count_step(
    step: Callable, nets, cfg, example: Batch, count: int, latent: tuple[int, int, int], mixed_precision: str
) -> Cost:
    """What `step(nets, batch, draws, cfg)` costs on `count` images like those of `example`; `nets` stay as they are.

    As on a GPU in this precision, uncompiled, without the optimiser's and the libraries' own memory.
    """
    meter, flops, seen = Meter(), {}, 0

    def noted(part: str) -> None:
        nonlocal seen
        flops[part] = flops.get(part, 0) + (meter.flops - seen) / count
        seen = meter.flops

    cfg = dataclasses.replace(cfg, autocast=autocast_factory(CPU, mixed_precision))
    with FakeTensorMode():
        nets = nets_without_values(nets, noted)
        with meter:
            metrics = step(nets, *inputs_without_values(example, count, latent), cfg)
    return Cost(flops, meter.peak, list(metrics))
