"""Statistics of a set of images in the features of a network, how they are gathered, and the metrics of two sets."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from errors import UserError
from metrics.features import FeatureNetwork, Features, extract_features
from metrics.frechet import Moments, frechet_distance
from metrics.scores import InceptionScore, kernel_distance, precision_and_recall
from models.numerics import distributed_world_size
from progress import progress_bar
from storage.files import written_whole
from storage.image_sets import map_member, npz_arrays, open_image_set

METRICS = ("fid", "sfid", "is", "precision", "recall", "kid")
OF_FEATURES = {"precision", "recall", "kid"}  # these need the features of every image; the others need sums
ONLY_INCEPTION = {"sfid", "is"}
MOMENTS = ("mu", "sigma", "mu_s", "sigma_s")  # names in ADM's reference files


class SetStatistics:
    """Statistics of `count` images, whose features come in batches, in any order, on any number of processes.

    The sums are on `device`; with `keep_features` the features of every image are kept, for the metrics of OF_FEATURES.
    """

    def __init__(self, count: int, device: torch.device, keep_features: bool):
        self.device, self.keep_features = device, keep_features
        self.pool, self.spatial = Moments(device), Moments(device)
        self.inception_score = InceptionScore(count, device)
        self.rows: list[tuple[Tensor, Tensor]] = []
        self.features: Tensor | None = None

    def update(self, indices: Tensor, features: Features) -> None:
        """Add the features of the images with these indices (B,)."""
        self.pool.update(features.pool)
        if features.spatial is not None:
            self.spatial.update(features.spatial)
        if features.probabilities is not None:
            self.inception_score.update(indices, features.probabilities)
        if self.keep_features:
            self.rows.append((indices.cpu(), features.pool.cpu()))

    def over_processes(self) -> "SetStatistics":
        """Add the statistics of all other processes; call once, after the last image, on every process.

        Every process must have seen an image. `features` (N,D) is complete on rank 0 only.
        """
        for sums in (self.pool, self.spatial, self.inception_score):
            sums.over_processes()
        if self.keep_features:
            share = tuple(map(torch.cat, zip(*self.rows, strict=True)))
            shares = [share] * distributed_world_size()
            if len(shares) > 1:
                dist.gather_object(share, shares if dist.get_rank() == 0 else None)
            indices, features = map(torch.cat, zip(*shares, strict=True))
            self.features, self.rows = features[indices.argsort()], []
        return self

    def moments(self, network: str) -> dict[str, Tensor]:
        """Mean and covariance by the names of ADM's reference files: mu, sigma, and mu_s, sigma_s of Inception."""
        found = dict(zip(("mu", "sigma"), self.pool.mean_and_covariance(), strict=True))
        if self.spatial.count:
            found.update(zip(("mu_s", "sigma_s"), self.spatial.mean_and_covariance(), strict=True))
        if not all(values.isfinite().all() for values in found.values()):
            raise UserError(f"the features of {network} are not finite; its weights are damaged or of another network")
        return found


def metric_name(metric: str, network: str) -> str:
    """The name under which a metric is reported: fid and kid of Inception, fd_NETWORK and kd_NETWORK of another."""
    if network == "inception":
        return {"is": "inception_score"}.get(metric, metric)
    own = "".join(letter if letter.isalnum() else "_" for letter in network)
    prefix = {"fid": "fd", "kid": "kd"}.get(metric, metric)
    return f"{prefix}_{own}"


def compare(
    samples: SetStatistics, reference: dict[str, Tensor], features: Tensor | None, wanted: list[str], network: str
) -> dict[str, float]:
    """The wanted metrics of a set of samples, by `metric_name`, but for those that the network does not have.

    Args:
        samples: after `over_processes`.
        reference: the reference's `moments`.
        features: the reference's features (N,D), for the metrics of `OF_FEATURES`.
        wanted: of METRICS.
        network: the name of the network of the features.
    """
    moments, device = samples.moments(network), samples.device
    values = {}
    if "fid" in wanted:
        values["fid"] = frechet_distance(moments["mu"], moments["sigma"], reference["mu"], reference["sigma"])
    if "sfid" in wanted and "mu_s" in moments:
        values["sfid"] = frechet_distance(moments["mu_s"], moments["sigma_s"], reference["mu_s"], reference["sigma_s"])
    if "is" in wanted and samples.inception_score.marginal is not None:
        values["is"] = samples.inception_score.score()
    if "precision" in wanted or "recall" in wanted:
        both = precision_and_recall(features.to(device), samples.features.to(device))
        values["precision"], values["recall"] = both
    if "kid" in wanted:
        values["kid"] = kernel_distance(features, samples.features)
    return {metric_name(name, network): values[name] for name in wanted if name in values}


class Reference(NamedTuple):
    """What samples are compared to: images, statistics by network that are already known, or both."""

    path: Path
    images: Dataset | None
    moments: dict[str, dict[str, Tensor]]
    features: dict[str, Tensor]  # (N,D) float32 of each image
    weights: dict[str, str]  # SHA-256 of the networks of the moments, where it is known
    count: int | None  # images behind the moments, where it is known

    def check_networks(self, networks: list[FeatureNetwork]) -> None:
        """Raise a UserError if moments are of other weights than the networks', or a network has nothing."""
        for network in networks:
            if self.weights.get(network.name, network.sha256) != network.sha256:
                raise UserError(f"{self.path}: its statistics are of other weights of {network.name}")
            if network.name not in self.moments and self.images is None:
                raise UserError(f"{self.path}: neither images nor statistics of {network.name}")


def open_reference(path: Path, log: Callable[[str], object], what: str = "--reference") -> Reference:
    """The images of a reference, its statistics, or both; `what` names it in messages, `log` takes them.

    Statistics are mu, sigma, mu_s and sigma_s of Inception, as in ADM's files, or NETWORK/mu and so on, and features.
    """
    names = npz_arrays(path) if path.is_file() else []
    about = json.loads(str(map_member(path, "about.npy"))) if "about" in names else {}
    moments: dict[str, dict[str, Tensor]] = {}
    features = {}
    for name in names:
        network, _, key = name.rpartition("/")
        if key == "features":
            features[network or "inception"] = torch.from_numpy(np.array(map_member(path, f"{name}.npy")))
        if key in MOMENTS:
            values = torch.from_numpy(np.array(map_member(path, f"{name}.npy"))).double()
            moments.setdefault(network or "inception", {})[key] = values
            if not values.isfinite().all():
                raise UserError(f"{what} {path}: {name} is not finite")
    images = open_image_set(path, what, log) if not moments or "arr_0" in names else None
    return Reference(path, images, moments, features, about.get("weights", {}), about.get("count"))


def save_statistics(
    path: Path, statistics: dict[str, dict[str, Tensor]], weights: dict[str, str], source: str, count: int | None
) -> None:
    """Write statistics and SHA-256 by network as an npz for `open_reference`; Inception's are named as in ADM's files.

    The statistics of a network are its moments and, for the metrics of OF_FEATURES, its `features` (N,D).
    """
    arrays = {
        key if network == "inception" else f"{network}/{key}": values.numpy()
        for network, of_network in statistics.items()
        for key, values in of_network.items()
    }
    about = {"format": "repae-statistics/1", "source": source, "count": count, "weights": weights}
    with written_whole(path) as file:
        np.savez(file, about=np.array(json.dumps(about)), **arrays)


class ReadOptions(NamedTuple):
    """How a set of images is read."""

    batch_size: int  # per process
    num_workers: int  # per process
    state: object  # accelerate's: device, rank and world size


def batches(images: Dataset, title: str, reading: ReadOptions) -> Iterable[tuple[Tensor, Tensor]]:
    """This process's share of a set, in batches: (indices (B,), pixels (B,3,H,W) on its device)."""
    state = reading.state
    if len(images) < state.num_processes:
        raise UserError(f"{len(images)} images for {state.num_processes} processes; use fewer processes")
    share = torch.arange(state.process_index, len(images), state.num_processes)
    loader = DataLoader(
        Subset(images, range(state.process_index, len(images), state.num_processes)),
        reading.batch_size,
        num_workers=reading.num_workers,
        pin_memory=state.device.type == "cuda",
    )
    with progress_bar(total=len(images), unit="image", desc=title, disable=not state.is_main_process) as bar:
        for indices, batch in zip(share.split(reading.batch_size), loader, strict=True):
            pixels = batch if isinstance(batch, Tensor) else batch[0]  # without the labels of a data set
            yield indices, pixels.to(state.device, non_blocking=True)
            bar.update(min(len(indices) * state.num_processes, bar.total - bar.n))


def statistics_of(
    images: Dataset, title: str, network: FeatureNetwork, keep: bool, reading: ReadOptions
) -> SetStatistics:
    """The statistics of a set of images over all processes; with `keep`, rank 0 has the features of every image."""
    statistics = SetStatistics(len(images), reading.state.device, keep_features=keep)
    for indices, pixels in batches(images, f"{title}, {network.name}", reading):
        statistics.update(indices, extract_features(network.module, pixels))
    return statistics.over_processes()
