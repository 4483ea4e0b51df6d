"""The losses of the VAE and of its discriminator: L1 + LPIPS + KL + GAN as in latent diffusion (Rombach et al., arXiv
2112.10752; Esser et al., 2012.09841), with optional LeCam regularisation (Tseng et al., 2104.03310).

training/vae_step.py computes their inputs.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.numerics import float32_or_wider, mean_over_batches


@dataclass(frozen=True)
class VAELossConfig:
    """Weights of the terms, by their names in the loss YAML.

    `quantizer_weight` belongs to the vector-quantised models of the reference and has no effect on a KL autoencoder.
    """

    reconstruction_loss: str = "l1"
    reconstruction_weight: float = 1.0
    perceptual_loss: str = "lpips"
    perceptual_weight: float = 1.0
    kl_weight: float = 1e-6
    logvar_init: float = 0.0
    discriminator_start: int = 0
    discriminator_factor: float = 1.0
    discriminator_weight: float = 0.1
    lecam_regularization_weight: float = 0.0
    lecam_ema_decay: float = 0.999
    quantizer_weight: float = 1.0


def first_gan_step(cfg: VAELossConfig) -> float:
    """The first 1-based step in which the discriminator is trained; infinity if it never is."""
    return cfg.discriminator_start + 1 if cfg.discriminator_factor > 0 else math.inf


def vae_loss(
    image: Tensor,
    recon: Tensor,
    kl: Tensor,
    perceptual: Tensor,
    logits_fake: Tensor,
    cfg: VAELossConfig,
    step: int,
    disc_warmup_steps: int = 0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the VAE and its terms as they enter the sum.

    Args:
        image, recon: (B,3,R,R) in [-1, 1].
        kl: (B,) KL divergence of each posterior.
        perceptual: LPIPS distance of each image, (B,1,1,1).
        logits_fake: logits of the frozen discriminator on `recon`.
        cfg: weights.
        step: 0-based optimiser step.
        disc_warmup_steps: steps after `discriminator_start`, when the discriminator's training starts, in which the GAN
            term is still 0.
    """
    image, recon = float32_or_wider(image), float32_or_wider(recon)
    difference = F.l1_loss(recon, image) if cfg.reconstruction_loss == "l1" else F.mse_loss(recon, image)
    gan = -float32_or_wider(logits_fake).mean()
    factor = cfg.discriminator_factor if step >= cfg.discriminator_start + disc_warmup_steps else 0.0
    terms = {
        "reconstruction_loss": cfg.reconstruction_weight * difference / math.exp(cfg.logvar_init),
        "perceptual_loss": cfg.perceptual_weight * float32_or_wider(perceptual).mean(),
        "kl_loss": cfg.kl_weight * float32_or_wider(kl).mean(),
        "weighted_gan_loss": cfg.discriminator_weight * factor * gan,
    }
    return sum(terms.values()), {**terms, "gan_loss": gan}


def discriminator_loss(
    logits_real: Tensor, logits_fake: Tensor, lecam: Tensor, cfg: VAELossConfig, step: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Hinge loss 0.5·(mean relu(1 - real) + mean relu(1 + fake)) plus LeCam regularisation.

    Args:
        logits_real, logits_fake: logits of the discriminator on images and on detached reconstructions.
        lecam: (2,) running means of the real and the fake logits, not changed here (see `update_lecam`).
        cfg: weights.
        step: 0-based optimiser step; before `discriminator_start` the loss is 0.
    """
    real, fake = float32_or_wider(logits_real), float32_or_wider(logits_fake)
    hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    # over the global batch, because LeCam is not a mean over images
    mean_real, mean_fake = mean_over_batches(torch.stack([real.mean(), fake.mean()]))
    lecam_loss = torch.zeros_like(hinge)
    if cfg.lecam_regularization_weight > 0:
        lecam_loss = F.relu(mean_real - lecam[1]).square() + F.relu(lecam[0] - mean_fake).square()
        lecam_loss = cfg.lecam_regularization_weight * lecam_loss
    factor = cfg.discriminator_factor if step >= cfg.discriminator_start else 0.0
    total = factor * (hinge + lecam_loss)
    terms = {"d_loss": total, "logits_real": mean_real, "logits_fake": mean_fake, "lecam_loss": lecam_loss}
    return total, terms


@torch.no_grad()
def update_lecam(lecam: Tensor, mean_real: Tensor, mean_fake: Tensor, decay: float) -> None:
    """Update the running means (2,) of real and fake logits in place, after the loss has used them."""
    lecam.lerp_(torch.stack([mean_real, mean_fake]).to(lecam), 1 - decay)
