"""Sixty-four photographs, learnt by heart: proof that the steps learn, not only run."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from demo.cifar10 import SHEETS, SIDE
from loss.vae_loss import VAELossConfig
from models.autoencoder import AutoencoderKL, VAEConfig, pixels_to_image
from train_vae import vae_step
from training.autoencoding import VAENets, VAEStepConfig, psnr
from training.precision import Optimizer, autocast_factory
from training.randomness import Rows, step_draws
from training.run import Batch

pytestmark = pytest.mark.slow


def photographs() -> torch.Tensor:
    """Sixty-four of the demo's photographs at half their size, (64,3,16,16) uint8."""
    sheets = [np.asarray(Image.open(SHEETS / "test" / f"{name}.png")) for name in ("ship", "frog")]
    tiles = [sheet.reshape(-1, SIDE, 25, SIDE, 3).swapaxes(1, 2).reshape(-1, SIDE, SIDE, 3) for sheet in sheets]
    pixels = torch.tensor(np.concatenate(tiles)[18:82]).permute(0, 3, 1, 2).float()
    return F.avg_pool2d(pixels, 2).round().byte().contiguous()


class NoJudge(torch.nn.Module):
    """In place of the discriminator, whose patches are larger than these images."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, *batches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.weight * images.mean() for images in batches)


def test_reconstructions_of_64_images_exceed_30_db():
    torch.manual_seed(0)
    pixels, device = photographs(), torch.device("cpu")
    vae, judge = AutoencoderKL(VAEConfig(16, (1, 2), width=32, encoder_blocks=1)), NoJudge()
    nets = VAENets(
        vae=vae,
        discriminator=judge,
        lpips=lambda image, recon: torch.zeros(()),
        opt_vae=Optimizer(vae.parameters(), device, learning_rate=4e-3),
        opt_disc=Optimizer(judge.parameters(), device),
        lecam=torch.zeros(2),
    )
    loss = VAELossConfig(discriminator_start=10**9, reconstruction_loss="l2")
    cfg = VAEStepConfig(loss=loss, autocast=autocast_factory(device, "no"))
    for step in range(900):
        draws = step_draws(0, step, 64, (16, 8, 8))
        metrics = vae_step(nets, Batch(pixels, torch.zeros(64), step, Rows(0, 64)), draws, cfg)
        if metrics["psnr"] > 31:
            break
    with torch.no_grad():
        image = pixels_to_image(pixels)
        recon = vae.decode(vae.encode(image).mean)
    assert float(psnr(image, recon)) > 30
