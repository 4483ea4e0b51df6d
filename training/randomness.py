"""Everything random in training, as pure functions of (seed, step) and (seed, epoch).

The draws of the *global* batch are equal on every process, which takes its rows; so a run does not depend on the number
of processes, and resuming needs no random state.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from training.overlap import to_device
from transport import sample_time


class Rows(NamedTuple):
    """The rows of a global batch that one process handles at one micro-batch."""

    start: int
    stop: int


class Draws(NamedTuple):
    """Every random number of a training step, for B rows."""

    posterior: Tensor  # N(0,1), (B,C,h,w): z = mean + std·posterior
    noise: Tensor  # N(0,1), (B,C,h,w): the interpolant's ε
    t: Tensor  # (B,) times in [0, 1]
    drop: Tensor  # (B,) bool: rows whose label is replaced by the null label

    def rows(self, rows: Rows) -> "Draws":
        """The draws of these rows of the global batch."""
        return Draws(*(tensor[rows.start : rows.stop] for tensor in self))

    def to(self, device: torch.device) -> "Draws":
        """All tensors on `device`; on a GPU the copies do not make the host wait."""
        return Draws(*to_device(self, device))


def generator_for(seed: int, stream: str, index: int) -> torch.Generator:
    """A CPU generator for step or epoch `index` of a named stream: equal arguments give equal numbers."""
    import hashlib

    digest = hashlib.sha256(f"{seed}/{stream}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


@lru_cache(maxsize=1)  # the micro-batches of a step ask for the same
def step_draws(
    seed: int,
    step: int,
    batch: int,
    latent_shape: tuple[int, int, int],
    weighting: str = "uniform",
    path_type: str = "linear",
    cfg_prob: float = 0.0,
) -> Draws:
    """The draws of 1-based `step` for a global batch of `batch` images with latents (C,h,w)."""
    generator = generator_for(seed, "step", step)
    posterior = torch.randn(batch, *latent_shape, generator=generator)
    noise = torch.randn(batch, *latent_shape, generator=generator)
    t = sample_time(weighting, path_type, batch, generator)
    drop = torch.rand(batch, generator=generator) < cfg_prob
    return Draws(posterior, noise, t, drop)


class BatchOrder(Sampler[list[int]]):
    """Data indices of one process, micro-batch by micro-batch, from 0-based optimiser step `start` to `stop`.

    Each epoch is a permutation from (seed, epoch); its last partial global batch is dropped.
    """

    def __init__(
        self, length: int, batch: int, seed: int, start: int, stop: int, rank: int, world: int, accumulation: int
    ):
        self.length, self.batch, self.seed = length, batch, seed
        self.start, self.stop = start, stop
        self.rank, self.world, self.accumulation = rank, world, accumulation

    def micro_batch_rows(self, micro: int) -> Rows:
        """This process's rows of the global batch at micro-batch `micro`."""
        size = self.batch // (self.accumulation * self.world)
        first = (micro * self.world + self.rank) * size
        return Rows(first, first + size)

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.length // self.batch
        epoch, order = -1, None
        for step in range(self.start, self.stop):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = torch.randperm(self.length, generator=generator_for(self.seed, "epoch", epoch))
            first = (step % per_epoch) * self.batch
            for micro in range(self.accumulation):
                rows = self.micro_batch_rows(micro)
                yield order[first + rows.start : first + rows.stop].tolist()

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulation
