"""PSNR and SSIM of pairs of images."""

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of uint8 images (B,3,H,W), (B,) float64; infinite for equal ones."""
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error)


@torch.no_grad()
def batch_psnr(image: Tensor, recon: Tensor) -> Tensor:
    """PSNR in dB of a whole batch (B,3,R,R) in [-1, 1], by its mean squared error: a scalar, at most 106 dB."""
    return 10 * torch.log10(4 / (recon.clamp(-1, 1) - image).square().mean().clamp_min(1e-10))


def local_mean(x: Tensor) -> Tensor:
    """Gaussian means of (B,C,H,W) float64 where the window fits."""
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=x.device) - WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * SIGMA**2))
    kernel = (weights / weights.sum()).expand(x.shape[1], 1, 1, WINDOW)
    return F.conv2d(F.conv2d(x, kernel, groups=x.shape[1]), kernel.mT, groups=x.shape[1])


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al., IEEE TIP 2004) of uint8 images (B,3,H,W), H, W >= 11; (B,) float64.

    Gaussian window of 11 pixels and sigma 1.5, biased moments, averaged over channels and over positions where the
    window fits.
    """
    a, b = a.double(), b.double()
    mean_a, mean_b = local_mean(a), local_mean(b)
    var_a = local_mean(a * a) - mean_a.square()
    var_b = local_mean(b * b) - mean_b.square()
    covariance = local_mean(a * b) - mean_a * mean_b
    c1, c2 = (K1 * 255) ** 2, (K2 * 255) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return (luminance * structure).flatten(1).mean(1)
