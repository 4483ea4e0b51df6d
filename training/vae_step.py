"""The VAE's loss, its discriminator's update and its latent statistics, for training it alone or jointly."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from loss.vae_loss import VAELossConfig, discriminator_loss, first_gan_step, update_lecam, vae_loss
from metrics.images import batch_psnr
from metrics.statistics import ReadOptions, batches
from models.autoencoder import Autoencoder, Posterior, pixels_to_image
from models.numerics import sum_over_processes
from training.distributed import frozen_call
from training.optimizer import Optimizer


@dataclass
class VAENets:
    """The networks and optimisers that train a VAE; `lecam` holds the running means (2,) of real and fake logits."""

    vae: nn.Module
    discriminator: nn.Module
    lpips: Callable[[Tensor, Tensor], Tensor]
    opt_vae: Optimizer
    opt_disc: Optimizer
    lecam: Tensor


@dataclass(frozen=True, kw_only=True)
class VAEStepConfig:
    """Constants of the VAE's step; in the first disc_warmup_steps only the discriminator is trained adversarially."""

    loss: VAELossConfig
    autocast: Callable[[], AbstractContextManager]
    disc_warmup_steps: int = 0


def vae_objective(
    nets: VAENets, image: Tensor, posterior: Posterior, recon: Tensor, cfg: VAEStepConfig, step: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The VAE loss of a reconstruction; the discriminator is frozen, but in training mode as in the reference.

    Returns the scalar to minimise, and its detached terms with the reconstruction's PSNR in dB.
    """
    with cfg.autocast():
        (logits_fake,) = frozen_call(nets.discriminator, recon)
    perceptual = nets.lpips(image, recon)
    total, metrics = vae_loss(
        image, recon, posterior.kl(), perceptual, logits_fake, cfg.loss, step, cfg.disc_warmup_steps
    )
    return total, detached({**metrics, "psnr": batch_psnr(image, recon)})


def update_discriminator(
    nets: VAENets, image: Tensor, recon: Tensor, cfg: VAEStepConfig, step: int
) -> dict[str, Tensor | None]:
    """One discriminator update on images and detached reconstructions; returns its metrics, detached.

    Before its first step the discriminator only looks: its batch-norm and LeCam averages move, its weights do not.
    """
    active = step + 1 >= first_gan_step(cfg.loss)
    with cfg.autocast(), torch.set_grad_enabled(active):
        logits_real, logits_fake = nets.discriminator(image, recon.detach())
    total, metrics = discriminator_loss(logits_real, logits_fake, nets.lecam, cfg.loss, step)
    update_lecam(nets.lecam, metrics["logits_real"], metrics["logits_fake"], cfg.loss.lecam_ema_decay)
    # steps of a loss that is 0 would double the loss scale without end, and use up Adam's bias correction
    norm = nets.opt_disc.backward_and_step(total) if active else torch.zeros_like(total)
    return {**detached(metrics), "grad_norm_disc": norm}


def detached(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in metrics.items()}


class LatentMoments:
    """Mean and variance of each channel of posterior samples over batches of images, in closed form.

    E[z] = E[mean], Var[z] = E[mean² + std²] - E[z]², in float64.
    """

    def __init__(self, channels: int, device: torch.device):
        self.sums = torch.zeros(2, channels, dtype=torch.float64, device=device)
        self.count = torch.zeros_like(self.sums[0, 0])

    def update(self, posterior: Posterior) -> None:
        """Add the posteriors (B,C,h,w) of some images."""
        mean, std = (x.double() for x in (posterior.mean, posterior.std))
        self.sums += torch.stack([mean.sum((0, 2, 3)), (mean.square() + std.square()).sum((0, 2, 3))])
        self.count += mean.numel() // mean.shape[1]

    def statistics(self) -> dict[str, Tensor]:
        """Scale 1/sqrt(var) and bias mean, (1,C,1,1) float32 each, over all ranks; call once."""
        sum_over_processes(self.sums, self.count)
        mean, square = (self.sums / self.count).cpu()
        scale = torch.rsqrt(square - mean.square())
        return {"latents_scale": scale.float().reshape(1, -1, 1, 1), "latents_bias": mean.float().reshape(1, -1, 1, 1)}


@torch.no_grad()
def latent_statistics(vae: Autoencoder, images: Dataset, reading: ReadOptions) -> dict[str, Tensor]:
    """Scale and bias of the latents of all images, as `LatentMoments` gives them; each rank reads its share."""
    moments = LatentMoments(vae.config.z_channels, reading.state.device)
    for _, pixels in batches(images, "latent statistics", reading):
        moments.update(vae.encode(pixels_to_image(pixels)))
    return moments.statistics()
