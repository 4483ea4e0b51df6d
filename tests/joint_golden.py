"""The nets, batches and draws of golden/joint_step.npz, for any test that runs the joint step on them."""

import contextlib

import torch

from golden_weights import fill, golden, lpips_state
from loss.lpips import LPIPS
from loss.vae_loss import VAELossConfig
from models.autoencoder import VAE_CONFIGS
from models.discriminator import PatchDiscriminator
from models.numerics import compile_in_place
from models.sit import SiT_models
from train_repae import JointNets, JointStepConfig
from training.loop import Batch
from training.optimizer import Optimizer
from training.randomness import Draws, Rows
from training.transformer_step import copy_for_ema

CONFIG = JointStepConfig(loss=VAELossConfig(), autocast=contextlib.nullcontext)


def golden_lpips() -> LPIPS:
    """LPIPS with golden weights; its linear heads are non-negative."""
    lpips = LPIPS()
    lpips.load_state_dict({**lpips.state_dict(), **lpips_state()})
    for i in range(5):
        getattr(lpips, f"lin{i}").model[0].weight.abs_()
    return lpips


def golden_nets(
    vae: str = "f8d4", sit: str = "SiT-S/2", depth: int = 4, z_dims: tuple[int, ...] = (48,), **optimizer
) -> JointNets:
    """The networks of the golden joint step, compiled on GPUs; other rows of the registries make smaller ones."""
    vae = fill(VAE_CONFIGS[vae].build())
    discriminator = fill(PatchDiscriminator(), "discriminator.")
    size = 32 // vae.config.downsampling
    sit = SiT_models[sit](
        input_size=size, in_channels=vae.config.z_channels, num_classes=10, z_dims=z_dims, encoder_depth=depth
    )
    fill(sit)
    device, lpips, ema = torch.get_default_device(), golden_lpips(), copy_for_ema(sit)
    parts = [vae.encoder, vae.decoder, discriminator.main, lpips.net, *sit.blocks]
    compile_in_place(parts, True, device)
    return JointNets(
        vae=vae,
        discriminator=discriminator,
        lpips=lpips,
        opt_vae=Optimizer(vae.parameters(), device, **optimizer),
        opt_disc=Optimizer(discriminator.parameters(), device, **optimizer),
        lecam=torch.zeros(2),
        sit=sit,
        ema=ema,
        encoders=[],
        opt_sit=Optimizer(sit.parameters(), device, **optimizer),
    )


def golden_steps():
    """The three steps' (batch, draws, encoder tokens)."""
    arrays = {name: torch.tensor(array) for name, array in golden("joint_step").items()}
    for i in range(3):
        batch = Batch(arrays["pixels"][i], arrays["labels"][i], i, Rows(0, 4))
        drop = torch.zeros(4, dtype=torch.bool)
        draws = Draws(arrays["posterior_noise"][i], arrays["noise"][i], arrays["t"][i], drop)
        yield batch, draws, arrays["zs"][i]
