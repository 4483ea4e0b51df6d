"""The Fréchet distance between two sets of features (FID, Heusel et al., arXiv 1706.08500), from streamed moments."""

import torch
from torch import Tensor

from models.numerics import sum_over_processes


class Moments:
    """Mean and covariance of features that come in batches, from float64 sums on `device`."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.count, self.sum, self.outer = torch.zeros(3, dtype=torch.float64, device=self.device)

    def update(self, features: Tensor) -> None:
        """Add features (B,D), of any float type; B may be 0."""
        features = features.to(self.device).double()
        self.count += len(features)
        self.sum = self.sum + features.sum(0)
        self.outer = torch.addmm(self.outer, features.T, features)

    def over_processes(self) -> None:
        """Add the sums of all other processes; call once, after the last batch."""
        sum_over_processes(self.count, self.sum, self.outer)

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Mean (D,) and unbiased covariance (D,D) of at least two features, float64 on the CPU."""
        mean = self.sum / self.count
        covariance = (self.outer - self.count * mean.outer(mean)) / (self.count - 1)
        return mean.cpu(), covariance.cpu()


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """|m1 - m2|² + tr(S1 + S2 - 2 (S1^½ S2 S1^½)^½), of means (D,) and covariances (D,D), in float64.

    The trace of the root is the sum of the square roots of the eigenvalues of a symmetric matrix. Eigenvalues that
    rounding made negative count as zero, and singular covariances need no correction.
    """
    mean1, covariance1, mean2, covariance2 = (x.double() for x in (mean1, covariance1, mean2, covariance2))
    values, vectors = torch.linalg.eigh(covariance1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = root @ covariance2 @ root
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2)
    trace = covariance1.trace() + covariance2.trace() - 2 * eigenvalues.clamp(min=0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + trace)
