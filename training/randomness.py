"""Everything random in training, as pure functions of (seed, step, row of the global batch) and (seed, epoch, place).

A process draws and orders its own rows only, the same ones whoever draws them: a run does not depend on the number of
processes, no process does work or holds memory for the rows of others, and resuming needs no random state.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from diffusion.sampling import hashed
from diffusion.transport import sample_time
from models.numerics import to_device

DRAWS = "philox, feistel/1"  # what a run's random numbers and order of images are; another where they change
ROUNDS = 6  # of the network that permutes an epoch, each of two halves


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

    def to(self, device: torch.device) -> "Draws":
        """All tensors on `device`; on a GPU the copies do not make the host wait."""
        return Draws(*to_device(self, device))


def philox(seed: int, stream: str, index: int, row: int = 0) -> np.random.Philox:
    """The bits of `row` of step or epoch `index` of a named stream.

    They are a counter, encrypted under a key of 128 bits (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
    SC 2011). The row is the counter's upper word, so that rows have nothing in common. torch's generators would not do:
    they take 32 bits of a seed, and two of 16,384 rows would be the same in one step of 32.
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


def mixed(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """A keyed hash of each uint64 in `x`: the finaliser of SplitMix64 (Steele et al., OOPSLA 2014)."""
    x = x * np.uint64(0x9E3779B97F4A7C15) + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shuffled(places: np.ndarray, length: int, seed: int, epoch: int) -> np.ndarray:
    """What stands at `places` (B,) of an epoch's permutation of range(length), both int64, in memory for B numbers.

    A generalised Feistel network permutes pairs, of which there are hardly more than `length`, and what is not below it
    is permuted again until it is (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).
    """
    rows = math.isqrt(length - 1) + 1
    columns = np.uint64(-(-length // rows))
    rows = np.uint64(rows)
    keys = philox(seed, "epoch", epoch).random_raw(2 * ROUNDS)

    def permute(x: np.ndarray) -> np.ndarray:
        row, column = x % rows, x // rows
        for a, b in keys.reshape(-1, 2):
            row = (row + mixed(column, a) % rows) % rows
            column = (column + mixed(row, b) % columns) % columns
        return column * rows + row

    values = permute(places.astype(np.uint64))
    while (outside := values >= length).any():
        values[outside] = permute(values[outside])
    return values.astype(np.int64)


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
        for step in range(self.start, self.stop):
            epoch, number = divmod(step, per_epoch)
            for micro in range(self.accumulation):
                places = number * self.batch + np.arange(*self.micro_batch_rows(micro))
                yield shuffled(places, self.length, self.seed, epoch).tolist()

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulation
