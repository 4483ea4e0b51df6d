"""Joint end-to-end training of a VAE and a SiT: REPA-E (Leng et al., arXiv 2504.10483).

    accelerate launch train_repae.py --exp-name joint --vae f8d4 --vae-ckpt pretrained/sdvae/sdvae-f8d4.pt

Starts from a VAE, its latent statistics and its discriminator (train_vae.py makes all three). The step itself is
`repae_step`; the same command run again continues from the last checkpoint.
"""

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.transport import diffusion_loss, interpolate
from errors import Parser, run_script
from flags import groups
from flags.config import load_loss_config, parse_flags
from loss.alignment import alignment_loss
from models.autoencoder import pixels_to_image
from training.build import (
    build_transformer_nets,
    build_vae_nets,
    find_vae,
    identity_of,
    print_plan,
    training_images,
    transformer_draws,
    transformer_step_options,
    warn_of_untrained_discriminator,
)
from training.distributed import frozen_call, unwrap
from training.evaluation import Monitor
from training.loop import Batch, Run
from training.randomness import Draws
from training.transformer_step import TransformerNets, TransformerStepConfig, encoder_tokens, update_transformer
from training.vae_step import VAENets, VAEStepConfig, update_discriminator, vae_objective
from weights.vae import VAESource, known_statistics, latent_shape


@dataclass
class JointNets(VAENets, TransformerNets):
    """All networks of the joint step; vae, discriminator and sit may be wrapped in DistributedDataParallel."""


@dataclass(frozen=True, kw_only=True)
class JointStepConfig(VAEStepConfig, TransformerStepConfig):
    """Constants of the joint step."""

    vae_align_proj_coeff: float = 1.5
    vae_diffusion_coeff: float = 0.0


def repae_step(nets: JointNets, batch: Batch, draws: Draws, cfg: JointStepConfig) -> dict[str, Tensor | None]:
    """One joint step on one batch; updates `nets` in place and returns its metrics as detached scalars on the device.

    `draws` holds every random number, so the step is deterministic. Gradient norms are those before clipping, and None
    before the last micro-batch of an accumulated step.
    """
    sit = unwrap(nets.sit)
    image = pixels_to_image(batch.pixels).to(draws.noise.dtype)

    # 1. Tokens of the frozen encoders, the targets of alignment.
    zs = encoder_tokens(nets.encoders, batch.pixels, cfg)

    # 2. The VAE's posterior, a sample z of it, and the reconstruction.
    with cfg.autocast():
        posterior, z, recon = nets.vae(image, draws.posterior)

    # 3. VAE update. Alignment reaches the VAE through z and the frozen transformer's first blocks. z is normalised by
    #    the running statistics, which do not change; no label is dropped. The diffusion loss does not train the VAE,
    #    unless vae_diffusion_coeff shows what happens then.
    vae_loss, metrics = vae_objective(nets, image, posterior, recon, cfg, batch.step)
    if zs or cfg.vae_diffusion_coeff:
        x_t, velocity = interpolate(cfg.path_type, sit.bn.by_running_statistics(z), draws.noise, draws.t)
        depth = None if cfg.vae_diffusion_coeff else sit.encoder_depth
        with cfg.autocast():
            prediction, tokens = frozen_call(sit, x_t, draws.t, batch.labels, depth=depth)
    if zs:
        vae_align_loss = alignment_loss(tokens, zs)
        metrics["vae_align_loss"] = vae_align_loss.detach()
        vae_loss = vae_loss + cfg.vae_align_proj_coeff * vae_align_loss
    if cfg.vae_diffusion_coeff:
        vae_loss = vae_loss + cfg.vae_diffusion_coeff * diffusion_loss(prediction.to(velocity.dtype), velocity).mean()
    metrics |= {"vae_loss": vae_loss.detach(), "grad_norm_vae": nets.opt_vae.backward_and_step(vae_loss)}

    # 4. Discriminator update on the image and the detached reconstruction.
    metrics |= update_discriminator(nets, image, recon, cfg, batch.step)

    # 5. Transformer update on the detached z, with the same t and noise as in 3. Batch statistics normalise z
    #    and update the running statistics; labels are dropped.
    # 6. EMA of the transformer, batch-norm statistics included (in `update_transformer`); samples are drawn from it.
    metrics |= update_transformer(nets, sit.bn(z.detach()), batch.labels, zs, draws, cfg)
    return metrics


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    groups.add_run_flags(parser)
    groups.add_data_flags(parser)
    groups.add_flip_flag(parser)
    groups.add_vae_flags(parser, vae="f8d4", vae_ckpt="pretrained/sdvae-f8d4/sdvae-f8d4.pt")
    groups.add_vae_loss_flags(parser)
    groups.add_transformer_flags(parser, default_model="SiT-XL/2")
    groups.add_joint_flags(parser)
    groups.add_optimisation_flags(parser)
    return parse_flags(parser, argv, "train_repae")


def build(args: argparse.Namespace, run: Run, source: VAESource) -> JointNets:
    vae_nets = build_vae_nets(args, run, source)
    statistics = known_statistics(source, run.print)
    transformer_nets = build_transformer_nets(args, run, latent_shape(source, args.resolution), statistics)
    return JointNets(**vars(vae_nets), **vars(transformer_nets))


def step_config(args: argparse.Namespace, device: torch.device) -> JointStepConfig:
    return JointStepConfig(
        loss=load_loss_config(args.loss_cfg_path),
        disc_warmup_steps=args.disc_warmup_steps,
        vae_align_proj_coeff=args.vae_align_proj_coeff,
        vae_diffusion_coeff=args.vae_diffusion_coeff,
        **transformer_step_options(args, device),
    )


def main() -> None:
    args = parse_args()
    run = Run(args)
    data = training_images(args, run)
    cfg = step_config(args, run.device)
    source = find_vae(args)
    latent = latent_shape(source, args.resolution)
    nets = build(args, run, source)
    run.begin(nets, identity_of(args, source, nets, data=data.fingerprint), cfg.loss)
    warn_of_untrained_discriminator(args, run, cfg.loss)
    monitor = Monitor(args, run, unwrap(nets.vae), nets.ema, originals=data, reference=data)
    if args.dry_run:
        print_plan(run, data, nets, latent)
        return

    for step, batch in run.steps(data):
        draws = transformer_draws(args, latent, step, batch.rows).to(run.device)
        run.log(repae_step(nets, batch, draws, cfg))
        monitor.run_due()
    run.end()


if __name__ == "__main__":
    run_script(main)
