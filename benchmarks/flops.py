"""Floating-point operations and parameters of every stage, counted on the meta device.

    python -m benchmarks.flops --vae f8d4 --model SiT-XL/2 --enc-type dinov2-vit-b

A multiplication and an addition are two operations. PyTorch's FlopCounterMode counts matrix products, convolutions and
attention in the forward and in the backward pass. Elementwise operations (norms, activations, optimisers) are left out:
they cost memory traffic rather than operations.
"""

import contextlib
import functools
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from errors import Parser, run_script
from loss.lpips import LPIPS
from loss.vae_loss import VAELossConfig
from models.autoencoder import VAE_CONFIGS, pixels_to_image
from models.discriminator import PatchDiscriminator
from models.encoder_table import encoder_specs
from models.encoders import Encoder
from models.sit import SiT_models
from train_repae import JointNets, JointStepConfig
from training.distributed import frozen_call
from training.loop import Batch
from training.randomness import Draws, Rows
from training.transformer_step import copy_for_ema, encoder_tokens, update_transformer
from training.vae_step import update_discriminator
from weights.vae import latent_shape, open_vae

IMAGES = 2  # a batch; counts are divided by it
SAMPLING_STEPS = 250
# torch.autocast does not know the meta device
ON_META = patch("torch.autocast", lambda *args, **kwargs: contextlib.nullcontext())
CONFIG = JointStepConfig(loss=VAELossConfig(), autocast=contextlib.nullcontext)


class BackwardOnly:
    """An optimiser that computes gradients and leaves the parameters unchanged."""

    def backward_and_step(self, loss: Tensor) -> None:
        loss.backward()


def count(function: Callable[..., object], *args: object) -> float:
    """Operations of a call, per image."""
    with ON_META, FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops() / IMAGES


def build_nets(
    vae: str,
    model: str,
    enc_type: str = "dinov2-vit-b",
    resolution: int = 256,
    encoder_depth: int = 8,
    optimizer: Callable[[nn.Module], object] = lambda network: BackwardOnly(),
) -> JointNets:
    """The untrained networks of the joint step, by their names, on torch's default device."""
    channels, side, _ = latent_shape(open_vae(vae, None, offline=True), resolution)
    specs = encoder_specs(enc_type).values()
    vae, discriminator = VAE_CONFIGS[vae].build(), PatchDiscriminator()
    widths = tuple(spec.embed_dim for spec in specs)
    sit = SiT_models[model](input_size=side, in_channels=channels, z_dims=widths, encoder_depth=encoder_depth)
    return JointNets(
        vae=vae,
        discriminator=discriminator,
        lpips=LPIPS(),
        opt_vae=optimizer(vae),
        opt_disc=optimizer(discriminator),
        lecam=torch.zeros(2),
        sit=sit,
        ema=copy_for_ema(sit),
        encoders=[Encoder(spec, sit.grid if spec.any_grid else spec.grid(resolution), sit.grid) for spec in specs],
        opt_sit=optimizer(sit),
    )


def build_batch(vae: str, resolution: int, images: int = IMAGES) -> tuple[Batch, Draws]:
    """Images, cached moments and draws, all zero, on torch's default device."""
    noise = torch.zeros(images, *latent_shape(open_vae(vae, None, offline=True), resolution))
    pixels = torch.zeros(images, 3, resolution, resolution, dtype=torch.uint8)
    labels = torch.zeros(images, dtype=torch.int64)
    draws = Draws(noise, noise, torch.zeros(images), labels.bool())
    return Batch(pixels, labels, 0, Rows(0, images), noise.repeat(1, 2, 1, 1)), draws


def joint_terms(nets: JointNets, batch: Batch, draws: Draws) -> dict[str, float]:
    """Operations per image of each part of `repae_step`."""
    t = draws.t
    image = pixels_to_image(batch.pixels)
    zs = encoder_tokens(nets.encoders, batch.pixels, CONFIG)
    _, z, recon = nets.vae(image, draws.posterior)
    through_vae = count(lambda: (z.sum() + recon.sum()).backward())
    z, recon = z.detach().requires_grad_(), recon.detach().requires_grad_()

    def align() -> None:
        _, tokens = frozen_call(nets.sit, z, t, batch.labels, depth=nets.sit.encoder_depth)
        sum(token.sum() for token in tokens).backward()

    return {
        "encoders, forward": count(encoder_tokens, nets.encoders, batch.pixels, CONFIG),
        "VAE, forward": count(nets.vae, image, draws.posterior),
        "VAE, backward": through_vae,
        "LPIPS": count(lambda: nets.lpips(image, recon).sum().backward()),
        "generator's term": count(lambda: frozen_call(nets.discriminator, recon)[0].sum().backward()),
        "alignment through the transformer": count(align) if zs else 0.0,
        "discriminator's update": count(update_discriminator, nets, image, recon, CONFIG, 0),
        "transformer's update": count(update_transformer, nets, z.detach(), batch.labels, zs, draws, CONFIG),
    }


@functools.cache
def stage_flops(
    vae: str, model: str, enc_type: str = "dinov2-vit-b", resolution: int = 256, encoder_depth: int = 8
) -> dict[str, float]:
    """Operations per image of the parts of the joint step, then of every stage.

    A joint step is the sum of its parts, and a frozen-VAE step that of the encoders and the transformer's update.
    """
    with torch.device("meta"):
        nets = build_nets(vae, model, enc_type, resolution, encoder_depth)
        batch, draws = build_batch(vae, resolution)
    found = joint_terms(nets, batch, draws)
    found["joint step"] = sum(found.values())
    found["frozen-VAE step"] = found["encoders, forward"] + found["transformer's update"]
    with torch.no_grad():
        found["caching"] = count(nets.vae.encode, pixels_to_image(batch.pixels))
        found["sampling, an evaluation"] = count(lambda: nets.sit(draws.noise, draws.t, batch.labels, project=False))
        found["sampling, decoding"] = count(nets.vae.decode, draws.noise)
    found["sampling"] = SAMPLING_STEPS * found["sampling, an evaluation"] + found["sampling, decoding"]
    return found


def add_network_flags(parser: Parser) -> None:
    """The arguments of `build_nets`."""
    parser.add_argument("--vae", default="f8d4", help="name of a VAE")
    parser.add_argument("--model", default="SiT-XL/2", help="name of a transformer")
    parser.add_argument("--enc-type", default="dinov2-vit-b", help="encoders to align to, or none")
    parser.add_argument("--resolution", type=int, default=256, help="pixels a side")
    parser.add_argument("--encoder-depth", type=int, default=8, help="block whose tokens are aligned")


def main() -> None:
    parser = Parser(__doc__)
    add_network_flags(parser)
    args = parser.parse_args()
    with torch.device("meta"):
        nets = build_nets(**vars(args))
    for name in ("vae", "discriminator", "sit"):
        trained = sum(p.numel() for p in getattr(nets, name).parameters() if p.requires_grad)
        print(f"{name}: {trained:,} parameters")
    for name, flops in stage_flops(**vars(args)).items():
        print(f"{name}: {flops / 1e9:,.1f} GFLOP an image")


if __name__ == "__main__":
    run_script(main)
