"""Joint end-to-end training of a VAE and a SiT: REPA-E (Leng et al., arXiv 2504.10483).

    accelerate launch train_repae.py --exp-name joint --vae f8d4 --vae-ckpt pretrained/sdvae/sdvae-f8d4.pt

Starts from a VAE, its latent statistics and its discriminator (train_vae.py makes all three). The step itself is
`repae_step`; the same command run again continues from the last checkpoint.
"""

import argparse
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from dataset import open_images
from diffusion.previews import evenly_spaced, reconstruction_grid, sample_grid
from diffusion.transport import interpolate
from errors import Parser, run_script
from flags import config, groups
from flags.config import parse_flags
from loss.alignment import alignment_loss
from loss.vae_loss import VAELossConfig, first_gan_step
from models.autoencoder import pixels_to_image
from training.build import (
    build_transformer_nets,
    build_vae_nets,
    check_data,
    choose_patch,
    transformer_draws,
    transformer_step_options,
    use_tf32,
    warn_of_untrained_discriminator,
)
from training.distributed import frozen_call, unwrap
from training.dry_run import dry_run
from training.evaluation import build_evaluation
from training.log import normaliser_drift
from training.loop import Batch, Run
from training.randomness import Draws
from training.state import TrainingState
from training.transformer_step import TransformerNets, TransformerStepConfig, encoder_tokens, update_transformer
from training.vae_step import VAENets, VAEStepConfig, detached, update_discriminator, vae_objective
from weights.downloads import is_offline
from weights.encoders import encoder_fingerprints
from weights.vae import VAESource, known_statistics, latent_shape, open_vae


@dataclass
class JointNets(VAENets, TransformerNets):
    """All networks of the joint step; vae, discriminator and sit may be wrapped for several processes."""


@dataclass(frozen=True, kw_only=True)
class JointStepConfig(VAEStepConfig, TransformerStepConfig):
    """Numbers of the joint step."""

    vae_align_proj_coeff: float = 1.5


def repae_step(nets: JointNets, batch: Batch, draws: Draws, cfg: JointStepConfig) -> dict[str, Tensor | None]:
    """One joint step on one batch; updates `nets` in place and returns its metrics as scalars on the device.

    `draws` holds every random number, so the step is deterministic. Gradient norms are those before clipping, and None
    before the last micro-batch of an accumulated step.
    """
    sit = unwrap(nets.sit)
    image = pixels_to_image(batch.pixels).to(draws.noise.dtype)

    # 1. The frozen encoders' tokens are what representations align to.
    zs = encoder_tokens(nets.encoders, batch.pixels, cfg)

    # 2. The VAE's posterior, a sample z of it, and the reconstruction.
    with cfg.autocast():
        posterior, z, recon = nets.vae(image, draws.posterior)

    # 3. VAE update. Alignment reaches the VAE through z and the frozen transformer's first blocks; z is normalised by
    #    the running statistics, which stay as they are, and no label is dropped. The diffusion loss has no part in it.
    vae_loss, metrics = vae_objective(nets, image, posterior, recon, cfg, batch.step)
    if zs:
        x_t, _ = interpolate(cfg.path_type, sit.bn.by_running_statistics(z), draws.noise, draws.t)
        with cfg.autocast():
            _, tokens = frozen_call(sit, x_t, draws.t, batch.labels, depth=sit.encoder_depth)
        metrics["vae_align_loss"] = alignment_loss(tokens, zs)
        vae_loss = vae_loss + cfg.vae_align_proj_coeff * metrics["vae_align_loss"]
    metrics |= {"vae_loss": vae_loss, "grad_norm_vae": nets.opt_vae.backward_and_step(vae_loss)}

    # 4. Discriminator update on the image and the detached reconstruction.
    metrics |= update_discriminator(nets, image, recon, cfg, batch.step)

    # 5. Transformer update on the detached z, with the t and noise of 3; batch statistics normalise z and move the
    #    running ones; labels are dropped.
    # 6. The average that samples are drawn from, batch-norm statistics included.
    metrics |= update_transformer(nets, sit.bn(z.detach()), batch.labels, zs, draws, cfg)
    return detached(metrics)


def command_line() -> Parser:
    """All flags."""
    parser = Parser(__doc__)
    groups.add_run_flags(parser)
    groups.add_data_flags(parser)
    groups.add_vae_flags(parser, vae="f8d4", vae_ckpt="pretrained/sdvae-f8d4/sdvae-f8d4.pt")
    groups.add_vae_loss_flags(parser)
    groups.add_transformer_flags(parser, default_model="SiT-XL/2")
    groups.add_joint_flags(parser)
    groups.add_optimisation_flags(parser)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    return parse_flags(command_line(), argv, "train_repae")


def build(args: argparse.Namespace, run: Run, source: VAESource) -> tuple[JointNets, TrainingState]:
    """Everything that trains, on this process's device, as the flags say, starting from the VAE that was found."""
    latent = latent_shape(source, args.resolution)
    torch.manual_seed(args.seed)
    vae_nets = build_vae_nets(args, run, source)
    statistics = known_statistics(source, run.print)
    transformer_nets = build_transformer_nets(args, run, latent, statistics)
    nets = JointNets(**vars(vae_nets), **vars(transformer_nets))
    bn = unwrap(nets.sit).bn
    state = TrainingState(
        networks={"model": nets.sit, "ema": nets.ema, "vae": nets.vae, "discriminator": nets.discriminator},
        optimizers={"opt": nets.opt_sit, "opt_vae": nets.opt_vae, "opt_disc": nets.opt_disc},
        tensors={"lecam": nets.lecam, "bn_start": torch.stack([bn.running_mean, bn.running_var])},
    )
    return nets, state


def step_config(args: argparse.Namespace, loss: VAELossConfig, device: torch.device) -> JointStepConfig:
    """The step's numbers as the flags say."""
    return JointStepConfig(
        loss=loss,
        disc_warmup_steps=args.disc_warmup_steps,
        vae_align_proj_coeff=args.vae_align_proj_coeff,
        **transformer_step_options(args, device),
    )


def main() -> None:
    """Parse, build, loop."""
    args = parse_args()
    use_tf32(args.allow_tf32)
    data = open_images(args.data_dir, args.resolution)
    check_data(data, args)
    loss = config.load_loss_config(args.loss_cfg_path)
    run = Run(args)
    source = open_vae(args.vae, args.vae_ckpt, is_offline(args))
    choose_patch(args, source.config)
    nets, state = build(args, run, source)
    encoders = encoder_fingerprints(args, nets.encoders)
    architecture = source.config.described()
    identity = {"data": data.fingerprint, "loss": asdict(loss), "encoders": encoders, "architecture": architecture}
    run.begin(state, identity, gan_start=first_gan_step(loss))
    warn_of_untrained_discriminator(args, run, loss)
    cfg = step_config(args, loss, run.device)
    shown = evenly_spaced(data, 32)
    evaluation = build_evaluation(args, run, data)
    latent = latent_shape(source, args.resolution)
    if args.dry_run:
        dry_run(run, data, repae_step, nets, cfg)
        return

    for step, batch in run.steps(data):
        draws = transformer_draws(args, latent, step, batch.rows).to(run.device)
        metrics = repae_step(nets, batch, draws, cfg)
        health = (
            nets.opt_sit.scaler_metrics("sit")
            | nets.opt_vae.scaler_metrics("vae")
            | nets.opt_disc.scaler_metrics("disc")
        )
        run.log({**metrics, **health, **normaliser_drift(unwrap(nets.sit).bn, state.tensors["bn_start"])})
        if run.due(args.sampling_steps) and run.is_main:
            run.save_image("samples", sample_grid(nets.ema, unwrap(nets.vae), args.seed, cfg.autocast))
            run.save_image("reconstructions", reconstruction_grid(unwrap(nets.vae), shown, cfg.autocast))
        if evaluation is not None and run.due(args.eval_steps):
            run.evaluate(evaluation, nets.ema, unwrap(nets.vae))
    run.end()


if __name__ == "__main__":
    run_script(main)
