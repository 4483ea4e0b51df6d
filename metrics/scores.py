"""Inception Score, precision and recall as the ADM evaluation suite defines them (Dhariwal & Nichol, arXiv 2105.05233),
and the kernel distance. To add a metric, write its function here; its name and its call go to `METRICS` and `compare`
in metrics/statistics.py.
"""

import torch
from torch import Tensor

from models.numerics import sum_over_processes

SPLIT = 5000  # images of one split of the Inception Score
NEIGHBOURS = 3
BLOCK = 2048  # rows of a block of distances
KERNEL_SUBSETS, KERNEL_SUBSET_SIZE = 100, 1000


class InceptionScore:
    """exp of the mean KL divergence of p(y|x) to p(y) (Salimans et al., arXiv 1606.03498), averaged over splits.

    A split is `split` consecutive images of `count`, the last one may be smaller. Images come in batches, in any order.
    """

    def __init__(self, count: int, device: torch.device | str = "cpu", split: int = SPLIT):
        self.count, self.split, self.device = count, split, torch.device(device)
        self.splits = -(-count // split)
        self.negentropy = torch.zeros(self.splits, dtype=torch.float64, device=self.device)
        self.marginal: Tensor | None = None

    def update(self, indices: Tensor, probabilities: Tensor) -> None:
        """Add p(y|x), (B,classes), of the images with these indices (B,)."""
        probabilities = probabilities.to(self.device).double()
        if self.marginal is None:
            shape = (self.splits, probabilities.shape[1])
            self.marginal = torch.zeros(shape, dtype=torch.float64, device=self.device)
        rows = torch.as_tensor(indices, device=self.device) // self.split
        self.negentropy.index_add_(0, rows, torch.special.xlogy(probabilities, probabilities).sum(1))
        self.marginal.index_add_(0, rows, probabilities)

    def over_processes(self) -> None:
        """Add the sums of all other processes; call once, after the last batch."""
        if self.marginal is not None:
            sum_over_processes(self.negentropy, self.marginal)

    def score(self) -> float:
        """The mean over splits."""
        sizes = torch.full_like(self.negentropy, self.split)
        sizes[-1] = self.count - self.split * (self.splits - 1)
        marginal = self.marginal / sizes[:, None]
        divergence = self.negentropy / sizes - torch.special.xlogy(marginal, marginal).sum(1)
        return float(divergence.exp().mean())


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(N,M) float64 squared distances of float64 rows (N,D) and (M,D)."""
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_(min=0)


def neighbour_radii(features: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """(N,) squared distance of each row of (N,D), N > `neighbours`, to its `neighbours`-th nearest other row."""
    radii = []
    for rows in torch.arange(len(features), device=features.device).split(BLOCK):
        nearest = torch.empty(len(rows), 0, dtype=features.dtype, device=features.device)
        for columns in torch.arange(len(features), device=features.device).split(BLOCK):
            distances = squared_distances(features[rows], features[columns])
            distances[rows[:, None] == columns] = torch.inf  # a row is not its own neighbour
            nearest = torch.cat([nearest, distances], dim=1)
            nearest = nearest.topk(min(neighbours, nearest.shape[1]), dim=1, largest=False).values
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def share_inside(features: Tensor, manifold: Tensor, radii: Tensor) -> float:
    """Share of rows (N,D) within squared radius `radii` (M,) of at least one row of `manifold` (M,D)."""
    inside = 0
    for block in features.split(BLOCK):
        hit = torch.zeros(len(block), dtype=torch.bool, device=features.device)
        for centres, squares in zip(manifold.split(BLOCK), radii.split(BLOCK), strict=True):
            hit |= (squared_distances(block, centres) <= squares).any(dim=1)
        inside += int(hit.sum())
    return inside / len(features)


def precision_and_recall(reference: Tensor, samples: Tensor) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991) of features (N,D) and (M,D), k = 3.

    Distances are computed in float64 on the device of `reference`; ADM computes them in float16.
    """
    reference, samples = reference.double(), samples.to(reference.device, torch.float64)
    precision = share_inside(samples, reference, neighbour_radii(reference))
    return precision, share_inside(reference, samples, neighbour_radii(samples))


def kernel_distance(reference: Tensor, samples: Tensor) -> float:
    """Kernel distance (KID, Bińkowski et al., arXiv 1801.01401) of features (N,D) and (M,D): the mean over subsets.

    100 subsets of 1000 rows, or of all rows where there are fewer; torch-fidelity's estimator and its draws.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    size = min(KERNEL_SUBSET_SIZE, len(reference), len(samples))
    options = {"kid_subsets": KERNEL_SUBSETS, "kid_subset_size": size, "verbose": False}
    return float(kid_features_to_metric(samples.double(), reference.double(), **options)[KEY_METRIC_KID_MEAN])
