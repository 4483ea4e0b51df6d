"""The transformer's update, which joint training and training on a frozen VAE share, and its EMA."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion.transport import diffusion_loss, interpolate
from loss.alignment import alignment_loss, spatial_normalise
from models.sit import SiT
from training.distributed import unwrap
from training.optimizer import Optimizer
from training.randomness import Draws


@dataclass
class TransformerNets:
    """The transformer, its EMA and the frozen encoders it aligns to; sit may be wrapped in DistributedDataParallel."""

    sit: nn.Module
    ema: SiT
    encoders: list[Callable[[Tensor], Tensor]]
    opt_sit: Optimizer


@dataclass(frozen=True, kw_only=True)
class TransformerStepConfig:
    """Constants of the transformer's step; spatial_norm is iREPA's gamma, None without that normalisation."""

    autocast: Callable[[], AbstractContextManager]
    path_type: str = "linear"
    proj_coeff: float = 0.5
    spatial_norm: float | None = None
    ema_decay: float = 0.9999


@torch.no_grad()
def encoder_tokens(
    encoders: list[Callable[[Tensor], Tensor]], pixels: Tensor, cfg: TransformerStepConfig
) -> list[Tensor]:
    """The frozen encoders' tokens (B,T,D_k) of uint8 pixels (B,3,R,R), the targets of alignment."""
    with cfg.autocast():
        zs = [encoder(pixels) for encoder in encoders]
    return [z if cfg.spatial_norm is None else spatial_normalise(z, cfg.spatial_norm) for z in zs]


def update_transformer(
    nets: TransformerNets, z_norm: Tensor, labels: Tensor, zs: list[Tensor], draws: Draws, cfg: TransformerStepConfig
) -> dict[str, Tensor | None]:
    """Update the transformer by diffusion (SiT, Ma et al., arXiv 2401.08740) and alignment (REPA, Yu et al.,
    2410.06940), then its EMA.

    Args:
        nets: updated in place.
        z_norm: normalised latents (B,C,h,w), without a graph.
        labels: (B,) int64; where `draws.drop` is true, they are replaced by the null label.
        zs: the encoders' tokens, (B,T,D_k) each; empty without alignment.
        draws: noise, t and drop are used.
        cfg: the step's constants.

    Returns:
        metrics as detached scalars on the device, as those of `repae_step`.
    """
    sit = unwrap(nets.sit)
    if sit.null_label is not None:
        labels = labels.masked_fill(draws.drop, sit.null_label)
    x_t, velocity = interpolate(cfg.path_type, z_norm, draws.noise, draws.t)
    with cfg.autocast():
        prediction, tokens = nets.sit(x_t, draws.t, labels)
    loss = diffusion_loss(prediction.to(velocity.dtype), velocity).mean()
    metrics = {"denoising_loss": loss.detach()}
    if zs:
        alignment = alignment_loss(tokens, zs)
        metrics["proj_loss"] = alignment.detach()
        loss = loss + cfg.proj_coeff * alignment
    metrics["grad_norm_sit"] = nets.opt_sit.backward_and_step(loss)
    if metrics["grad_norm_sit"] is not None:
        update_ema(nets.ema, sit, cfg.ema_decay)
    return metrics


def copy_for_ema(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Move `ema` in place to decay·ema + (1 - decay)·model.

    Float buffers are averaged like parameters: SiT's batch-norm statistics are the latent normaliser at sampling time.
    Integer buffers are copied.
    """
    averages, values = ema.state_dict(), model.state_dict()
    floating = [key for key, value in averages.items() if value.is_floating_point()]
    torch._foreach_lerp_([averages[key] for key in floating], [values[key] for key in floating], 1 - decay)
    for key in averages.keys() - set(floating):
        averages[key].copy_(values[key])
