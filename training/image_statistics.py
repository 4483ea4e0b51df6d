"""Sets of images through feature networks, on any number of processes; and references that are statistics already."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from errors import UserError
from image_sets import map_member, npz_arrays, open_image_set
from metrics.features import see
from metrics.statistics import SetStatistics
from training.feature_networks import FeatureNetwork

MOMENTS = ("mu", "sigma", "mu_s", "sigma_s")


class Reference(NamedTuple):
    """What samples are compared to: images, or moments by network that are already known, or both."""

    path: Path
    images: Dataset | None
    moments: dict[str, dict[str, Tensor]]
    weights: dict[str, str]  # hashes of the networks that gave the moments, where they are known
    count: int | None  # of the images behind the moments, where it is known

    def check_networks(self, networks: list[FeatureNetwork]) -> None:
        """Raise a UserError if moments are of other weights than the networks', or one has neither them nor images."""
        for network in networks:
            if self.weights.get(network.name, network.sha256) != network.sha256:
                raise UserError(f"{self.path}: its statistics are of other weights of {network.name}")
            if self.images is None and network.name not in self.moments:
                raise UserError(f"{self.path}: neither images nor statistics of {network.name}")


def open_reference(path: Path, what: str = "--reference") -> Reference:
    """The reference's images or statistics; `what` names it in messages.

    Raises:
        UserError: there are neither, or statistics are not finite or of another shape.
    """
    names = npz_arrays(path) if path.is_file() else []
    about = json.loads(str(map_member(path, "about.npy"))) if "about" in names else {}
    moments: dict[str, dict[str, Tensor]] = {}
    for name in names:
        network, _, key = name.rpartition("/")
        if key in MOMENTS:
            values = torch.from_numpy(np.array(map_member(path, f"{name}.npy"))).double()
            expected = 2 if key.startswith("sigma") else 1
            if not values.isfinite().all() or values.ndim != expected or len(set(values.shape)) > 1:
                raise UserError(f"{what} {path}: {name} has values that are not finite, or shape {values.shape}")
            moments.setdefault(network or "inception", {})[key] = values
    images = None
    if not moments or "arr_0" in names:
        images = open_image_set(path, what)
    return Reference(path, images, moments, about.get("weights", {}), about.get("count"))


class Indexed(Dataset):
    """The images of a set with their indices."""

    def __init__(self, images: Dataset):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        item = self.images[index]
        return index, item[0] if isinstance(item, tuple) else item


def batches(images: Dataset, title: str, batch_size: int, num_workers: int, state) -> Iterable[tuple[Tensor, Tensor]]:
    """This process's share of a set: (indices (B,), pixels (B,3,H,W) on its device)."""
    if len(images) < state.num_processes:
        raise UserError(f"{len(images)} images for {state.num_processes} processes; use fewer processes")
    share = Subset(Indexed(images), range(state.process_index, len(images), state.num_processes))
    loader = DataLoader(share, batch_size, num_workers=num_workers, pin_memory=state.device.type == "cuda")
    with tqdm(total=len(images), unit="image", desc=title, disable=not state.is_main_process) as bar:
        for indices, pixels in loader:
            yield indices, pixels.to(state.device, non_blocking=True)
            bar.update(min(len(indices) * state.num_processes, bar.total - bar.n))


def statistics_of(
    images: Dataset,
    title: str,
    network: FeatureNetwork,
    keep: bool,
    batch_size: int,
    num_workers: int,
    state,
) -> SetStatistics:
    """What a network sees in a set of images, each read once, on all processes; `keep` keeps each image's features."""
    statistics = SetStatistics(len(images), state.device, keep_features=keep)
    for indices, pixels in batches(images, f"{title}, {network.name}", batch_size, num_workers, state):
        statistics.update(indices, see(network.module, pixels))
    return statistics.over_processes()
