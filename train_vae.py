"""Train a VAE and its discriminator, from scratch or from weights, and write what joint training starts from.

    accelerate launch train_vae.py --exp-name my-vae --vae f8d4 --data-dir data

At the end exps/my-vae/ holds my-vae.pt, my-vae-latents-stats.pt and my-vae-discriminator-ckpt.pt. The losses are latent
diffusion's (Rombach et al., arXiv 2112.10752).
"""

import argparse
from dataclasses import asdict

import torch
from torch import Tensor

from dataset import open_images
from errors import Parser, run_script
from loss.vae_loss import first_gan_step
from models.autoencoder import pixels_to_image
from training import cli
from training.autoencoding import (
    VAENets,
    VAEStepConfig,
    detached,
    latent_statistics,
    update_discriminator,
    vae_objective,
)
from training.checkpoint import TrainingState, vae_files, write_atomically
from training.distributed import unwrap
from training.dry_run import dry_run
from training.networks import build_vae_nets, check_data, latent_shape, use_tf32
from training.precision import autocast_factory
from training.previews import evenly_spaced, reconstruction_grid
from training.randomness import Draws, step_draws
from training.run import Batch, Run


def vae_step(nets: VAENets, batch: Batch, draws: Draws, cfg: VAEStepConfig) -> dict[str, Tensor | None]:
    """One step: VAE update, then discriminator update on the same reconstruction; metrics as in train_repae.py."""
    image = pixels_to_image(batch.pixels).to(draws.posterior.dtype)
    with cfg.autocast():
        posterior, _, recon = nets.vae(image, draws.posterior)
    loss, metrics = vae_objective(nets, image, posterior, recon, cfg, batch.step)
    metrics |= {"vae_loss": loss, "grad_norm_vae": nets.opt_vae.update(loss)}
    metrics |= update_discriminator(nets, image, recon, cfg, batch.step)
    return detached(metrics)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    cli.add_run_flags(parser, max_train_steps=100000)
    cli.add_data_flags(parser)
    cli.add_vae_flags(parser, vae="f8d4", vae_ckpt=None)
    cli.add_vae_loss_flags(parser)
    cli.add_optimisation_flags(parser)
    return parser.parse_args(argv)


def build(args: argparse.Namespace, run: Run) -> tuple[VAENets, TrainingState]:
    """Everything that trains, on this process's device, as the flags say."""
    torch.manual_seed(args.seed)
    nets = build_vae_nets(args, run)
    state = TrainingState(
        networks={"vae": nets.vae, "discriminator": nets.discriminator},
        optimizers={"opt_vae": nets.opt_vae, "opt_disc": nets.opt_disc},
        tensors={"lecam": nets.lecam},
    )
    return nets, state


def write_vae(args: argparse.Namespace, run: Run, nets: VAENets, data) -> None:
    """Measure the latents' statistics over all images and write the VAE's three files."""
    vae, discriminator = unwrap(nets.vae), unwrap(nets.discriminator)
    statistics = latent_statistics(
        vae,
        data,
        run.micro_batch,
        args.num_workers,
        run.accelerator.process_index,
        run.world,
        run.device,
    )
    if run.is_main:
        files = vae_files(run.directory / f"{args.exp_name}.pt")
        write_atomically(vae.state_dict(), files.weights)
        write_atomically(statistics, files.statistics)
        write_atomically(discriminator.state_dict(), files.discriminator)
        run.print("wrote " + ", ".join(str(path) for path in files))


def main() -> None:
    """Parse, build, loop, write."""
    args = parse_args()
    use_tf32(args.allow_tf32)
    data = open_images(args.data_dir, args.resolution)
    check_data(data, args)
    loss = cli.load_loss_config(args.loss_cfg_path)
    latent = latent_shape(args.vae, args.resolution)
    run = Run(args)
    nets, state = build(args, run)
    run.begin(state, {"data": data.fingerprint, "loss": asdict(loss)}, gan_start=first_gan_step(loss))
    cfg = VAEStepConfig(loss=loss, autocast=autocast_factory(run.device, args.mixed_precision))
    shown = evenly_spaced(data, 32)
    if args.dry_run:
        dry_run(run, data, vae_step, nets, cfg)
        return

    for step, batch in run.steps(data):
        draws = step_draws(args.seed, step, batch.rows, latent).to(run.device)
        metrics = vae_step(nets, batch, draws, cfg)
        run.log({**metrics, **nets.opt_vae.health("vae"), **nets.opt_disc.health("disc")})
        if run.due(args.sampling_steps) and run.is_main:
            run.save_image("reconstructions", reconstruction_grid(unwrap(nets.vae), shown, cfg.autocast))

    write_vae(args, run, nets, data)
    run.end()


if __name__ == "__main__":
    run_script(main)
