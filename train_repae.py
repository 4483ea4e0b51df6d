"""Joint end-to-end training of a VAE and a SiT: REPA-E (Leng et al., arXiv 2504.10483).

    accelerate launch train_repae.py --exp-name joint --vae f8d4 --vae-ckpt pretrained/sdvae/sdvae-f8d4.pt

Starts from a VAE, its latent statistics and its discriminator (train_vae.py makes all three). The step itself is
`repae_step`; the same command run again continues from the last checkpoint.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from dataset import ImageDataset
from errors import Parser, run_script
from loss.alignment import alignment_loss
from loss.vae_loss import VAELossConfig
from models.autoencoder import pixels_to_image
from models.encoders import load_encoders
from models.sit import SiT
from training import cli
from training.autoencoding import VAENets, VAEStepConfig, detached, update_discriminator, vae_objective
from training.checkpoint import TrainingState, read_latent_statistics
from training.distributed import frozen_call, unwrap
from training.ema import copy_for_ema, update_ema
from training.networks import (
    build_transformer,
    build_vae_nets,
    check_labels,
    compile_in_place,
    latent_shape,
    optimizer_options,
    use_tf32,
)
from training.precision import Optimizer, autocast_factory
from training.previews import evenly_spaced, reconstruction_grid, sample_grid
from training.randomness import Draws, step_draws
from training.run import Batch, Run
from transport import diffusion_loss, interpolate


@dataclass
class JointNets(VAENets):
    """All networks of the joint step; vae, discriminator and sit may be wrapped for several processes."""

    sit: nn.Module
    ema: SiT
    encoders: list[Callable[[Tensor], Tensor]]
    opt_sit: Optimizer


@dataclass(frozen=True)
class JointStepConfig(VAEStepConfig):
    """Numbers of the joint step."""

    path_type: str = "linear"
    proj_coeff: float = 0.5
    vae_align_proj_coeff: float = 1.5
    ema_decay: float = 0.9999


def repae_step(nets: JointNets, batch: Batch, draws: Draws, cfg: JointStepConfig) -> dict[str, Tensor | None]:
    """One joint step on one batch; updates `nets` in place and returns its metrics as scalars on the device.

    `draws` holds every random number, so the step is deterministic. Gradient norms are those before clipping, and None
    before the last micro-batch of an accumulated step.
    """
    sit = unwrap(nets.sit)
    image = pixels_to_image(batch.pixels).to(draws.noise.dtype)

    # 1. The frozen encoders' tokens are what representations align to.
    with torch.no_grad(), cfg.autocast():
        zs = [encoder(batch.pixels) for encoder in nets.encoders]

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
    metrics |= {"vae_loss": vae_loss, "grad_norm_vae": nets.opt_vae.update(vae_loss)}

    # 4. Discriminator update on the image and the detached reconstruction.
    metrics |= update_discriminator(nets, image, recon, cfg, batch.step)

    # 5. Transformer update on the detached z, with the t and noise of 3; batch statistics normalise z and move the
    #    running ones; labels are dropped.
    labels = batch.labels if sit.null_label is None else batch.labels.masked_fill(draws.drop, sit.null_label)
    x_t, velocity = interpolate(cfg.path_type, sit.bn(z.detach()), draws.noise, draws.t)
    with cfg.autocast():
        prediction, tokens = nets.sit(x_t, draws.t, labels)
    metrics["denoising_loss"] = sit_loss = diffusion_loss(prediction.to(velocity.dtype), velocity).mean()
    if zs:
        metrics["proj_loss"] = alignment_loss(tokens, zs)
        sit_loss = sit_loss + cfg.proj_coeff * metrics["proj_loss"]
    metrics["grad_norm_sit"] = nets.opt_sit.update(sit_loss)

    # 6. The average that samples are drawn from, batch-norm statistics included.
    if metrics["grad_norm_sit"] is not None:
        update_ema(nets.ema, sit, cfg.ema_decay)
    return detached(metrics)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    cli.add_run_flags(parser)
    cli.add_data_flags(parser)
    cli.add_vae_flags(parser, vae="f8d4", vae_ckpt="pretrained/sdvae-f8d4/sdvae-f8d4.pt")
    cli.add_vae_loss_flags(parser)
    cli.add_transformer_flags(parser, model="SiT-XL/2")
    cli.add_joint_flags(parser)
    cli.add_optimisation_flags(parser)
    return parser.parse_args(argv)


def build(args: argparse.Namespace, run: Run) -> tuple[JointNets, TrainingState]:
    """Everything that trains, on this process's device, as the flags say."""
    torch.manual_seed(args.seed)
    vae_nets = build_vae_nets(args, run)
    latent = latent_shape(args.vae, args.resolution)
    sit = build_transformer(args, latent, read_latent_statistics(args.vae_ckpt, latent[0]))
    encoders = load_encoders(args.enc_type, args.resolution, sit.grid, run.device)
    ema = copy_for_ema(sit).to(run.device)
    compile_in_place(sit.blocks, args, run.device)
    sit = run.prepare(sit)
    opt_sit = Optimizer(sit.parameters(), learning_rate=args.learning_rate, **optimizer_options(args, run.device))
    nets = JointNets(**vars(vae_nets), sit=sit, ema=ema, encoders=encoders, opt_sit=opt_sit)
    state = TrainingState(
        networks={"model": sit, "ema": ema, "vae": nets.vae, "discriminator": nets.discriminator},
        optimizers={"opt": nets.opt_sit, "opt_vae": nets.opt_vae, "opt_disc": nets.opt_disc},
        tensors={"lecam": nets.lecam},
    )
    return nets, state


def step_config(args: argparse.Namespace, loss: VAELossConfig, device: torch.device) -> JointStepConfig:
    """The step's numbers as the flags say."""
    return JointStepConfig(
        loss=loss,
        autocast=autocast_factory(device, args.mixed_precision),
        path_type=args.path_type,
        proj_coeff=args.proj_coeff,
        vae_align_proj_coeff=args.vae_align_proj_coeff,
        ema_decay=args.ema_decay,
    )


def draws_of(args: argparse.Namespace, step: int) -> Draws:
    """The random numbers of 1-based `step` for the global batch."""
    latent = latent_shape(args.vae, args.resolution)
    return step_draws(args.seed, step, args.batch_size, latent, args.weighting, args.path_type, args.cfg_prob)


def main() -> None:
    """Parse, build, loop."""
    args = parse_args()
    use_tf32(args.allow_tf32)
    data = ImageDataset(args.data_dir, args.resolution)
    check_labels(data, args.num_classes)
    loss = cli.load_loss_config(args.loss_cfg_path)
    run = Run(args)
    nets, state = build(args, run)
    run.begin(state, {"data": data.index["fingerprint"], "loss": asdict(loss)})
    cfg = step_config(args, loss, run.device)
    shown = evenly_spaced(data, 32)

    for step, batch in run.steps(data):
        draws = draws_of(args, step).rows(batch.rows).to(run.device)
        metrics = repae_step(nets, batch, draws, cfg)
        run.log({**metrics, **nets.opt_sit.health("sit"), **nets.opt_vae.health("vae"), **nets.opt_disc.health("disc")})
        if run.due(args.sampling_steps) and run.is_main:
            run.save_image("samples", sample_grid(nets.ema, unwrap(nets.vae), args.seed, cfg.autocast))
            run.save_image("reconstructions", reconstruction_grid(unwrap(nets.vae), shown, cfg.autocast))
    run.end()


if __name__ == "__main__":
    run_script(main)
