"""Metrics against golden values, and against versions written out in numpy."""

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
from PIL import Image

from golden_weights import assert_close, golden
from images import photos
from metrics.features import resize_as_pillow
from metrics.frechet import Moments, frechet_distance
from metrics.images import batch_psnr, psnr, ssim
from metrics.scores import InceptionScore, kernel_distance, precision_and_recall

GOLDEN = golden("metrics")


def moments(features: np.ndarray, batch: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    streamed = Moments()
    for part in torch.tensor(features).split(batch):
        streamed.update(part)
    return streamed.mean_and_covariance()


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return frechet_distance(*moments(a), *moments(b))


def score(probabilities: np.ndarray, split: int, batch: int = 37) -> float:
    """The Inception Score, of rows that come in a random order."""
    running = InceptionScore(len(probabilities), split=split)
    order = torch.randperm(len(probabilities), generator=torch.Generator().manual_seed(0))
    for indices in order.split(batch):
        running.update(indices, torch.tensor(probabilities)[indices])
    return running.score()


def test_golden_values():
    ref, sample = GOLDEN["ref"], GOLDEN["sample"]
    assert_close(np.array(distance(ref, sample)), GOLDEN["fid"])
    assert distance(ref, ref) == pytest.approx(float(GOLDEN["fid_self"]), abs=1e-6)
    assert_close(np.array(distance(sample, GOLDEN["singular"])), GOLDEN["fid_singular"])
    precision, recall = precision_and_recall(torch.tensor(ref), torch.tensor(sample))
    assert (precision, recall) == (float(GOLDEN["precision"]), float(GOLDEN["recall"]))
    for split in (500, 5000):
        assert_close(np.array(score(GOLDEN["probabilities"], split)), GOLDEN[f"inception_score_split_{split}"])


def test_moments_are_numpys_whatever_the_batches():
    features = np.random.RandomState(0).randn(257, 12).astype(np.float32) * 3 + 50
    for batch in (1, 64, 257):
        mean, covariance = moments(features, batch)
        np.testing.assert_allclose(mean, features.astype(np.float64).mean(0), rtol=1e-12)
        np.testing.assert_allclose(covariance, np.cov(features.astype(np.float64), rowvar=False), atol=1e-9)
    shuffled = moments(np.random.RandomState(1).permutation(features))
    torch.testing.assert_close(shuffled, moments(features), rtol=1e-10, atol=1e-10)
    assert mean.dtype == covariance.dtype == torch.float64


def test_distances_come_in_blocks(monkeypatch):
    reference, samples = (torch.tensor(GOLDEN[name]) for name in ("ref", "sample"))
    whole = precision_and_recall(reference, samples)
    monkeypatch.setattr("metrics.scores.BLOCK", 33)
    assert precision_and_recall(reference, samples) == whole


def test_kernel_distance_against_numpy():
    # with fewer rows than a subset each one holds them all: the unbiased estimator itself
    x, y = np.random.RandomState(0).randn(60, 8), np.random.RandomState(1).randn(60, 8) + 0.5

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / 8 + 1) ** 3

    def off_diagonal_mean(k: np.ndarray) -> float:
        return (k.sum() - np.trace(k)) / (60 * 59)

    expected = off_diagonal_mean(kernel(x, x)) + off_diagonal_mean(kernel(y, y)) - 2 * kernel(x, y).mean()
    assert kernel_distance(torch.tensor(x), torch.tensor(y)) == pytest.approx(expected, rel=1e-6)
    assert kernel_distance(torch.tensor(x), torch.tensor(x)) < 0.05 < expected


def test_psnr_and_ssim_against_numpy():
    a = torch.tensor(photos(3, 40)).permute(0, 3, 1, 2)
    noise = torch.randint(-20, 21, a.shape, generator=torch.Generator().manual_seed(0))
    b = (a.int() + noise).clamp(0, 255).to(torch.uint8)
    for i in range(3):
        x, y = a[i].numpy().astype(float), b[i].numpy().astype(float)
        assert float(psnr(a, b)[i]) == pytest.approx(10 * np.log10(255**2 / ((x - y) ** 2).mean()), rel=1e-9)
        values = []
        for c in range(3):

            def blur(image: np.ndarray) -> np.ndarray:
                return scipy.ndimage.gaussian_filter(image, 1.5, truncate=5 / 1.5)[5:-5, 5:-5]

            mx, my = blur(x[c]), blur(y[c])
            vx, vy, vxy = blur(x[c] ** 2) - mx**2, blur(y[c] ** 2) - my**2, blur(x[c] * y[c]) - mx * my
            c1, c2 = 2.55**2, 7.65**2
            ratio = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
            values.append(ratio.mean())
        assert float(ssim(a, b)[i]) == pytest.approx(np.mean(values), rel=1e-9)
    torch.testing.assert_close(ssim(a, a), torch.ones(3, dtype=torch.float64))
    assert psnr(a, a).isinf().all()
    image, recon = (pixels.double() / 127.5 - 1 for pixels in (a, b))
    error = (a.double() - b.double()).square().mean()
    assert float(batch_psnr(image, recon)) == pytest.approx(float(10 * torch.log10(255**2 / error)), rel=1e-9)


@pytest.mark.parametrize("size", [24, 56])
def test_images_are_resized_as_pillow_does(size):
    a = torch.tensor(photos(2, 40)).permute(0, 3, 1, 2)
    ours = resize_as_pillow(a, size)
    for i in range(2):
        image = Image.fromarray(a[i].permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.BICUBIC)
        difference = np.asarray(image).astype(int) - ours[i].permute(1, 2, 0).numpy()
        assert np.abs(difference).max() <= 1
        assert (difference != 0).mean() < 0.01
