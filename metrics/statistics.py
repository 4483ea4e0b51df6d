"""What is kept of a set of images as its features stream by, and the metrics of two such sets."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from errors import UserError
from metrics.features import FeatureNetwork, Features, extract_features
from metrics.frechet import Moments, frechet_distance
from metrics.scores import InceptionScore, kernel_distance, precision_and_recall
from models.numerics import distributed_world_size
from storage.files import written_whole
from storage.image_sets import map_member, npz_arrays, open_image_set

METRICS = ("fid", "sfid", "is", "precision", "recall", "kid")
OF_FEATURES = {"precision", "recall", "kid"}  # the others need only what does not grow with the number of images
ONLY_INCEPTION = {"sfid", "is"}


class SetStatistics:
    """One network's view of `count` images, which come in batches, in any order, on any number of processes.

    Args:
        count: images in all.
        device: where sums are kept.
        keep_features: whether each image's features are kept, for the metrics of `OF_FEATURES`.
    """

    def __init__(self, count: int, device: torch.device, keep_features: bool):
        self.count, self.device, self.keep_features = count, device, keep_features
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
        """These statistics with those of all other processes added; call once, when all images have come.

        Every process must have seen an image. Each image's features are whole on the first process only.
        """
        self.pool.over_processes()
        if self.spatial.sum is not None:
            self.spatial.over_processes()
        if self.inception_score.marginal is not None:
            self.inception_score.over_processes()
        if self.keep_features:
            indices, rows = (torch.cat(parts) for parts in zip(*self.rows, strict=True))
            shares = [(indices, rows)] * distributed_world_size()
            if len(shares) > 1:
                dist.gather_object((indices, rows), shares if dist.get_rank() == 0 else None)
            indices, rows = (torch.cat(parts) for parts in zip(*shares, strict=True))
            self.features, self.rows = rows[indices.argsort()], []
        return self

    def moments(self, network: str) -> dict[str, Tensor]:
        """Mean and covariance by the names of ADM's reference files: mu, sigma, and mu_s, sigma_s where there are.

        Raises:
            UserError: `network` gave values that are not finite.
        """
        found = dict(zip(("mu", "sigma"), self.pool.mean_and_covariance(), strict=True))
        if self.spatial.sum is not None:
            found.update(zip(("mu_s", "sigma_s"), self.spatial.mean_and_covariance(), strict=True))
        if not all(values.isfinite().all() for values in found.values()):
            raise UserError(f"the features of {network} are not finite; its weights are damaged or of another network")
        return found


def metric_name(metric: str, network: str) -> str:
    """What a metric of a network's features is called: FID and its like are Inception's alone."""
    if network == "inception":
        return {"is": "inception_score"}.get(metric, metric)
    own = "".join(letter if letter.isalnum() else "_" for letter in network)
    return f"{ {'fid': 'fd', 'kid': 'kd'}.get(metric, metric) }_{own}"


def compare(
    samples: SetStatistics, reference: dict[str, Tensor], features: Tensor | None, wanted: list[str], network: str
) -> dict[str, float]:
    """The wanted metrics of a set of samples.

    Args:
        samples: after `over_processes`.
        reference: the reference's `moments`.
        features: the reference's features (N,D), for the metrics of `OF_FEATURES`.
        wanted: of METRICS; those that the network does not have are left out.
        network: whose features these are.
    """
    moments, device = samples.moments(network), samples.device
    values = {}
    if "fid" in wanted:
        values["fid"] = frechet_distance(moments["mu"], moments["sigma"], reference["mu"], reference["sigma"])
    if "sfid" in wanted and "mu_s" in moments:
        spatial = (moments["mu_s"], moments["sigma_s"], reference["mu_s"], reference["sigma_s"])
        values["sfid"] = frechet_distance(*spatial)
    if "is" in wanted and samples.inception_score.marginal is not None:
        values["is"] = samples.inception_score.score()
    if {"precision", "recall"} & set(wanted):
        both = precision_and_recall(features.to(device), samples.features.to(device))
        values.update(
            {name: value for name, value in zip(("precision", "recall"), both, strict=True) if name in wanted}
        )
    if "kid" in wanted:
        values["kid"] = kernel_distance(features, samples.features)
    return {metric_name(name, network): values[name] for name in wanted if name in values}


STATISTICS_FORMAT = "repae-statistics/1"
MOMENTS = ("mu", "sigma", "mu_s", "sigma_s")


class Reference(NamedTuple):
    """What samples are compared to: images, or moments by network that are already known, or both."""

    path: Path
    images: Dataset | None
    moments: dict[str, dict[str, Tensor]]
    weights: dict[str, str]  # hashes of the networks that gave the moments, where they are known
    count: int | None  # of the images behind the moments, where it is known

    def check_networks(self, networks: list[FeatureNetwork], device: torch.device) -> None:
        """Raise a UserError if moments are of other weights or widths than the networks', or one has nothing here."""
        for network in networks:
            if self.weights.get(network.name, network.sha256) != network.sha256:
                raise UserError(f"{self.path}: its statistics are of other weights of {network.name}")
            if network.name not in self.moments:
                if self.images is None:
                    raise UserError(f"{self.path}: neither images nor statistics of {network.name}")
                continue
            seen = extract_features(network.module, torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=device))
            for key, features in (("mu", seen.pool), ("mu_s", seen.spatial)):
                stored = self.moments[network.name].get(key)
                if stored is not None and features is not None and stored.shape != features.shape[1:]:
                    raise UserError(
                        f"{self.path}: its statistics of {network.name} are of {len(stored)} features, expected "
                        f"{features.shape[1]}"
                    )


def open_reference(path: Path, what: str = "--reference") -> Reference:
    """The reference's images or statistics; `what` names it in messages.

    Raises:
        UserError: there are neither, or statistics are not finite, of another shape, or lack a part.
    """
    names = npz_arrays(path) if path.is_file() else []
    about = read_about(path) if "about" in names else {}
    moments: dict[str, dict[str, Tensor]] = {}
    for name in names:
        network, _, key = name.rpartition("/")
        if key in MOMENTS:
            array = map_member(path, f"{name}.npy")
            expected = 2 if key.startswith("sigma") else 1
            whole = array.dtype.kind == "f" and array.ndim == expected and len(set(array.shape)) == 1
            if not whole or not np.isfinite(array).all():
                raise UserError(
                    f"{what} {path}: {name} is {array.dtype} {array.shape}, expected finite floats of {expected} "
                    "equal dimensions"
                )
            moments.setdefault(network or "inception", {})[key] = torch.from_numpy(np.array(array)).double()
    for network, found in moments.items():
        for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
            if (mean in found) != (covariance in found) or (
                mean in found and len(found[mean]) != len(found[covariance])
            ):
                raise UserError(f"{what} {path}: {mean} and {covariance} of {network} do not belong together")
        if "mu" not in found:
            raise UserError(f"{what} {path}: mu and sigma of {network} are missing")
    images = None
    if not moments or "arr_0" in names:
        images = open_image_set(path, what)
    return Reference(path, images, moments, about.get("weights", {}), about.get("count"))


def read_about(path: Path) -> dict:
    """What `save_statistics` wrote about statistics; a UserError if it is no such thing."""
    try:
        about = json.loads(str(map_member(path, "about.npy")))
        if about["format"] == STATISTICS_FORMAT:
            return about
        found = about["format"]
    except (ValueError, TypeError, KeyError) as error:
        found = f"damaged ({error})"
    raise UserError(f"{path}: its entry `about` is {found}, expected {STATISTICS_FORMAT}")


def save_statistics(
    path: Path, moments: dict[str, dict[str, Tensor]], weights: dict[str, str], source: str, count: int | None
) -> None:
    """Write moments by network as an npz that `open_reference` takes; Inception's under ADM's names.

    `weights` are the hashes of the networks that gave them, as far as they are known.
    """
    arrays = {
        key if network == "inception" else f"{network}/{key}": values.numpy()
        for network, of_network in moments.items()
        for key, values in of_network.items()
    }
    about = {"format": STATISTICS_FORMAT, "source": source, "count": count, "weights": weights}
    with written_whole(path) as file:
        np.savez(file, about=np.array(json.dumps(about)), **arrays)


class Indexed(Dataset):
    """The images of a set with their indices."""

    def __init__(self, images: Dataset):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        item = self.images[index]
        return index, item[0] if isinstance(item, tuple) else item


class ReadOptions(NamedTuple):
    """How a set of images is read."""

    batch_size: int  # of each process
    num_workers: int  # of each process
    state: object  # accelerate's, with device, process index and number of processes


def batches(images: Dataset, title: str, reading: ReadOptions) -> Iterable[tuple[Tensor, Tensor]]:
    """This process's share of a set, in batches: (indices (B,), pixels (B,3,H,W) on its device).

    Raises:
        UserError: there are fewer images than processes.
    """
    state = reading.state
    if len(images) < state.num_processes:
        raise UserError(f"{len(images)} images for {state.num_processes} processes; use fewer processes")
    share = Subset(Indexed(images), range(state.process_index, len(images), state.num_processes))
    pinned = state.device.type == "cuda"
    loader = DataLoader(share, reading.batch_size, num_workers=reading.num_workers, pin_memory=pinned)
    with tqdm(total=len(images), unit="image", desc=title, disable=not state.is_main_process) as bar:
        for indices, pixels in loader:
            yield indices, pixels.to(state.device, non_blocking=True)
            bar.update(min(len(indices) * state.num_processes, bar.total - bar.n))


def statistics_of(
    images: Dataset, title: str, network: FeatureNetwork, keep: bool, reading: ReadOptions
) -> SetStatistics:
    """What a network sees in a set of images, each read once, on all processes.

    With `keep` the first process has each image's features.
    """
    statistics = SetStatistics(len(images), reading.state.device, keep_features=keep)
    for indices, pixels in batches(images, f"{title}, {network.name}", reading):
        statistics.update(indices, extract_features(network.module, pixels))
    return statistics.over_processes()
