"""Train a VAE and its discriminator, from scratch or from weights, and write what joint training starts from.

    accelerate launch train_vae.py --exp-name my-vae --vae f8d4 --data-dir data

At the end exps/my-vae/ holds my-vae.pt, my-vae-latents-stats.pt and my-vae-discriminator-ckpt.pt. The losses are latent
diffusion's (Rombach et al., arXiv 2112.10752).

    python train_vae.py --stats-only --exp-name flux --vae diffusers:ORGANISATION/NAME --data-dir data

trains nothing: it measures the latents of a VAE on these images, and writes its weights and their statistics.
"""

import argparse

from torch import Tensor, nn

from errors import Parser, UserError, run_script
from flags import groups
from flags.config import load_loss_config, parse_flags
from metrics.statistics import ReadOptions
from models.autoencoder import Autoencoder, pixels_to_image
from models.numerics import autocast_factory
from training.build import (
    build_vae_nets,
    find_vae,
    identity_of,
    print_plan,
    training_images,
    warn_of_untrained_discriminator,
)
from training.distributed import unwrap
from training.evaluation import Monitor
from training.loop import Batch, Run
from training.randomness import Draws, step_draws
from training.vae_step import VAENets, VAEStepConfig, latent_statistics, update_discriminator, vae_objective
from weights.checkpoint_io import fingerprint, read_checkpoint, vae_files, write_atomically
from weights.vae import VAESource, latent_shape, load_discriminator, load_vae


def vae_step(nets: VAENets, batch: Batch, draws: Draws, cfg: VAEStepConfig) -> dict[str, Tensor | None]:
    """One step: VAE update, then discriminator update on the same reconstruction; metrics as in train_repae.py."""
    image = pixels_to_image(batch.pixels).to(draws.posterior.dtype)
    with cfg.autocast():
        posterior, _, recon = nets.vae(image, draws.posterior)
    loss, metrics = vae_objective(nets, image, posterior, recon, cfg, batch.step)
    metrics |= {"vae_loss": loss.detach(), "grad_norm_vae": nets.opt_vae.backward_and_step(loss)}
    return metrics | update_discriminator(nets, image, recon, cfg, batch.step)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    groups.add_run_flags(parser, max_train_steps=100000)
    groups.add_data_flags(parser)
    groups.add_flip_flag(parser)
    groups.add_vae_flags(parser, vae="f8d4", vae_ckpt=None)
    groups.add_vae_loss_flags(parser)
    groups.add_optimisation_flags(parser)
    measure_only = "do not train: measure the latents of a trained VAE, and write its weights and their statistics"
    parser.add_argument("--stats-only", action="store_true", help=measure_only)
    args = parse_flags(parser, argv, "train_vae")
    if args.dry_run and args.stats_only:
        parser.error("--dry-run is about training, which --stats-only does not do; leave one of them out")
    return args


def write_vae(args: argparse.Namespace, run: Run, vae: Autoencoder, discriminator: nn.Module | None, data) -> None:
    """Measure the latents' statistics over all images and write the VAE's files; also a discriminator, if any."""
    reading = ReadOptions(run.micro_batch, args.num_workers, run.accelerator.state)
    statistics = latent_statistics(vae, data, reading)
    if run.is_main:
        files = vae_files(run.directory / f"{args.exp_name}.pt")
        parts = {files.weights: vae.state_dict(), files.statistics: statistics}
        if discriminator is not None:
            parts[files.discriminator] = discriminator.state_dict()
        for path, part in parts.items():
            write_atomically(part, path)
        run.print("wrote " + ", ".join(map(str, parts)))


def measure(args: argparse.Namespace, run: Run, source: VAESource, data) -> None:
    """Write a trained VAE with the statistics of its latents on `data`; its discriminator too, if one is given."""
    if source.weights is None:
        raise UserError("--stats-only measures a trained VAE; name one by --vae-ckpt, or --vae diffusers:PATH_OR_ID")
    vae = load_vae(source).eval().requires_grad_(False)
    discriminator = load_discriminator(args.disc_pretrained_ckpt) if args.disc_pretrained_ckpt else None
    files = vae_files(run.directory / f"{args.exp_name}.pt")
    if files.statistics.is_file():
        run.print(f"warning: statistics of an earlier time are replaced: {files.statistics}")
    if files.weights.exists() and fingerprint(read_checkpoint(files.weights)) != fingerprint(vae.state_dict()):
        raise UserError(f"{files.weights} holds another VAE; delete it, or choose another --exp-name")
    write_vae(args, run, vae.to(run.device), discriminator, data)
    run.end()


def main() -> None:
    args = parse_args()
    run = Run(args)
    data = training_images(args, run)
    loss, autocast = load_loss_config(args.loss_cfg_path), autocast_factory(run.device, args.mixed_precision)
    cfg = VAEStepConfig(loss=loss, autocast=autocast, disc_warmup_steps=args.disc_warmup_steps)
    source = find_vae(args)
    latent = latent_shape(source, args.resolution)
    if args.stats_only:
        measure(args, run, source, data)
        return
    nets = build_vae_nets(args, run, source)
    run.begin(nets, identity_of(args, source, nets, data=data.fingerprint), loss)
    if source.weights is not None:
        warn_of_untrained_discriminator(args, run, loss)
    monitor = Monitor(args, run, unwrap(nets.vae), originals=data)
    if args.dry_run:
        print_plan(run, data, nets, latent)
        return

    for step, batch in run.steps(data):
        draws = step_draws(args.seed, step, batch.rows, latent).to(run.device)
        run.log(vae_step(nets, batch, draws, cfg))
        monitor.run_due()
    write_vae(args, run, unwrap(nets.vae), unwrap(nets.discriminator), data)
    run.end()


if __name__ == "__main__":
    run_script(main)
