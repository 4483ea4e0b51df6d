"""Everything random in training, as functions of (seed, step, row of the global batch) and (seed, epoch).

Each rank draws only its own rows, with the same result as any other rank: a run does not depend on the world size, and
resuming needs no random state.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion.sampling import generator_for, hashed
from diffusion.transport import sample_time
from models.numerics import to_device


class Rows(NamedTuple):
    """The rows of a global batch that one rank handles at one micro-batch."""

    start: int
    stop: int


class Draws(NamedTuple):
    """Every random number of a training step, for B rows."""

    posterior: Tensor  # N(0,1), (B,C,h,w): z = mean + std·posterior
    noise: Tensor  # N(0,1), (B,C,h,w): the interpolant's ε
    t: Tensor  # (B,) times in [0, 1]
    drop: Tensor  # (B,) bool: rows whose label is replaced by the null label

    def to(self, device: torch.device) -> "Draws":
        """All tensors on `device`; copies to a GPU do not block the host."""
        return Draws(*to_device(self, device))


def philox(seed: int, stream: str, index: int, row: int = 0) -> np.random.Philox:
    """The random bits of `row` of step `index` of a named stream.

    Philox encrypts a counter under a 128-bit key (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
    2011). The row is the counter's upper word, so rows are independent. torch's CPU generator takes only 32 bits of a
    seed: of 16,384 rows two would be equal in one step of 32.
    """
    key = np.frombuffer(hashed(seed, stream, index), np.uint64, count=2)
    return np.random.Philox(key=key, counter=[0, 0, 0, row])


def step_draws(
    seed: int,
    step: int,
    rows: Rows,
    latent_shape: tuple[int, int, int],
    weighting: str = "uniform",
    path_type: str = "linear",
    cfg_prob: float = 0.0,
) -> Draws:
    """The draws of 1-based `step` for these rows of the global batch, with latents (C,h,w)."""
    count = rows.stop - rows.start
    uniform, normal = np.empty((count, 2)), np.empty((2, count, *latent_shape), np.float32)
    for i, row in enumerate(range(*rows)):
        generator = np.random.Generator(philox(seed, "step", step, row))
        generator.random(out=uniform[i])
        for values in normal:
            generator.standard_normal(out=values[i], dtype=np.float32)
    t, drop = torch.from_numpy(uniform).unbind(1)
    return Draws(*torch.from_numpy(normal), sample_time(weighting, path_type, t), drop < cfg_prob)


def randomly_flipped(pixels: Tensor, seed: int, step: int, rows: Rows) -> Tensor:
    """Pixels (B,3,R,R) of 0-based `step`, each image mirrored left to right with probability 1/2."""
    bits = [philox(seed, "flip", step, row).random_raw() & 1 for row in range(*rows)]
    (flip,) = to_device([torch.tensor(bits, dtype=torch.bool)], pixels.device)
    return torch.where(flip[:, None, None, None], pixels.flip(3), pixels)


@dataclass(frozen=True)
class BatchOrder:
    """Data indices of one rank, micro-batch by micro-batch, from 0-based optimiser step `start` to `stop`.

    Each epoch is a permutation of range(length) from (seed, epoch); its last partial global batch is dropped.
    """

    length: int
    batch: int  # over all ranks
    seed: int
    start: int
    stop: int
    rank: int
    world: int
    accumulation: int

    def micro_batch_rows(self, micro: int) -> Rows:
        """This rank's rows of the global batch at micro-batch `micro`."""
        size = self.batch // (self.accumulation * self.world)
        first = (micro * self.world + self.rank) * size
        return Rows(first, first + size)

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.length // self.batch
        for step in range(self.start, self.stop):
            epoch, number = divmod(step, per_epoch)
            if step == self.start or number == 0:
                order = torch.randperm(self.length, generator=generator_for(self.seed, "epoch", epoch))
            for micro in range(self.accumulation):
                rows = self.micro_batch_rows(micro)
                yield order[number * self.batch :][rows.start : rows.stop].tolist()

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulation
