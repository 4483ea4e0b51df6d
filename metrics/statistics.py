"""What is kept of a set of images as its features stream by, and the metrics of two such sets."""

import torch
import torch.distributed as dist
from torch import Tensor

from errors import UserError
from metrics.features import Features
from metrics.frechet import Moments, frechet_distance
from metrics.scores import InceptionScore, kernel_distance, precision_and_recall
from models.numerics import distributed_world_size

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
