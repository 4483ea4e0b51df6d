"""Train a SiT on the cached latents of a frozen VAE, such as the one that joint training tuned.

    accelerate launch train_ldm_only.py --exp-name ldm --vae f16d32 --vae-ckpt exps/e2e-vae/e2e-vae.pt \\
        --vae-latents-name e2e-vae --model SiT-XL/1

This is the transformer's part of the joint step (REPA, Yu et al., arXiv 2410.06940), on samples of cached posteriors
(cache_latents.py), normalised by the VAE's statistics. The same command run again continues from the last checkpoint.
"""

import argparse

import torch
from torch import Tensor

from dataset import open_images, open_latents
from errors import Parser, UserError, run_script
from flags import groups
from flags.config import parse_flags
from training.build import (
    build_transformer_nets,
    check_data,
    find_vae,
    identity_of,
    print_plan,
    transformer_draws,
    transformer_step_options,
)
from training.distributed import unwrap
from training.evaluation import Monitor
from training.loop import Batch, Run
from training.randomness import Draws
from training.transformer_step import TransformerNets, TransformerStepConfig, encoder_tokens, update_transformer
from weights.checkpoint_io import fingerprint, same_statistics
from weights.vae import VAESource, known_statistics, latent_shape, load_vae


def ldm_step(nets: TransformerNets, batch: Batch, draws: Draws, cfg: TransformerStepConfig) -> dict[str, Tensor | None]:
    """One step on one batch of cached moments; updates `nets` in place and returns its metrics as detached scalars.

    As in `repae_step`, `draws` holds every random number, so the step is deterministic.
    """
    # 1. Tokens of the frozen encoders, the targets of alignment.
    zs = encoder_tokens(nets.encoders, batch.pixels, cfg)

    # 2. A sample of the cached posterior, normalised by the VAE's statistics, which do not change.
    mean, std = batch.moments.to(draws.posterior.dtype).chunk(2, dim=1)
    z_norm = unwrap(nets.sit).bn.by_running_statistics(mean + std * draws.posterior)

    # 3. Transformer update, and its EMA, which samples are drawn from.
    return update_transformer(nets, z_norm, batch.labels, zs, draws, cfg)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    groups.add_run_flags(parser)
    groups.add_data_flags(parser)
    groups.add_vae_flags(parser, vae="f16d32", vae_ckpt="pretrained/e2e-vavae-400k/e2e-vavae-400k.pt")
    name = "folder of cache_latents.py below --data-dir"
    groups.add(parser, "--vae-latents-name", "e2e-vavae-400k", str, name)
    groups.add_transformer_flags(parser, default_model="SiT-XL/1")
    groups.add_optimisation_flags(parser)
    return parse_flags(parser, argv, "train_ldm_only")


def open_data(args: argparse.Namespace, run: Run, source: VAESource):
    """The cached latents that the flags name, with their images if an encoder needs them."""
    images = open_images(args.data_dir, args.resolution) if args.enc_type != "none" else None
    latents = open_latents(args.data_dir, args.vae_latents_name, images)
    check_data(latents, args, run)
    if latents.shape != (shape := latent_shape(source, args.resolution)):
        flags = f"--vae {args.vae} --resolution {args.resolution}"
        raise UserError(f"{latents.source} holds latents of {latents.shape}, but {flags} needs {shape}; cache again")
    return latents


def check_vae(latents, weights: str, statistics: tuple[Tensor, Tensor], args: argparse.Namespace) -> None:
    """Raise a UserError unless the latents were cached with the VAE at --vae-ckpt, of fingerprint `weights`."""
    what = f"{latents.source} was cached with {{}} than those of --vae-ckpt {args.vae_ckpt}; cache again, or change it"
    if latents.vae_fingerprint != weights:
        raise UserError(what.format("other VAE weights"))
    for key, value in zip(("latents_scale", "latents_bias"), statistics, strict=True):
        if not torch.equal(torch.tensor(latents.statistics[key]), value.flatten()):
            raise UserError(what.format(f"other statistics ({key})"))


def set_normaliser(nets: TransformerNets, statistics: tuple[Tensor, Tensor], args: argparse.Namespace) -> None:
    """Set the normaliser of restored networks to the VAE's `statistics`, which their EMA must normalise by.

    The statistics of a joint run's VAE are those of its EMA; the statistics of its transformer are slightly newer.
    """
    if not same_statistics(nets.ema.latent_statistics(), statistics):
        what = f"--exp-name {args.exp_name} continues from a checkpoint that was trained on another VAE"
        raise UserError(f"{what}: the latents' statistics beside --vae-ckpt {args.vae_ckpt} are not those in it")
    for sit in (unwrap(nets.sit), nets.ema):
        sit.set_latent_statistics(*statistics)


def main() -> None:
    args = parse_args()
    run = Run(args)
    source = find_vae(args)
    data = open_data(args, run, source)
    statistics = known_statistics(source, run.print)
    vae = load_vae(source).eval().requires_grad_(False)
    weights = fingerprint(vae.state_dict())
    check_vae(data, weights, statistics, args)
    nets = build_transformer_nets(args, run, data.shape, statistics)
    identity = identity_of(args, source, nets, data=data.image_fingerprint, latents=data.fingerprint, vae=weights)
    run.begin(nets, identity, check=lambda: set_normaliser(nets, statistics, args))
    cfg = TransformerStepConfig(**transformer_step_options(args, run.device))
    measured = args.eval_steps and not args.eval_reference
    reference = open_images(args.data_dir, args.resolution) if measured else None
    monitor = Monitor(args, run, vae.to(run.device), nets.ema, reference=reference)
    if args.dry_run:
        print_plan(run, data, nets, data.shape)
        return

    for step, batch in run.steps(data):
        draws = transformer_draws(args, data.shape, step, batch.rows).to(run.device)
        run.log(ldm_step(nets, batch, draws, cfg))
        monitor.run_due()
    run.end()


if __name__ == "__main__":
    run_script(main)
