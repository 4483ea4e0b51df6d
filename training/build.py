"""What the training scripts build from their flags: data, VAE, networks with their starting weights, optimisers."""

import argparse
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from dataset import open_images
from errors import UserError
from loss.vae_loss import VAELossConfig
from models.autoencoder import EVERYTHING
from models.discriminator import SMALLEST_IMAGE
from models.encoder_table import encoder_specs
from models.numerics import autocast_factory, compile_in_place
from models.sit import SiT, SiT_models
from storage.files import free_space
from training.loop import Run
from training.optimizer import Optimizer
from training.randomness import Draws, Rows, step_draws
from training.transformer_step import TransformerNets, copy_for_ema
from training.vae_step import VAENets
from weights.checkpoint_io import numbered_checkpoints, read_checkpoint, training_flags
from weights.downloads import is_offline
from weights.encoders import load_encoders
from weights.features import load_lpips
from weights.trained_run import REFERENCE_DEFAULTS, start_from_trained
from weights.vae import VAESource, load_discriminator, load_vae, open_vae


def training_images(args: argparse.Namespace, run: Run):
    images = open_images(args.data_dir, args.resolution)
    check_data(images, args, run)
    return images


def check_data(data, args: argparse.Namespace, run: Run) -> None:
    """Complete --num-classes and tell `run` of the classes of a data set of dataset.py; a UserError if it is too small
    for a batch, or has more classes than the model."""
    if len(data) < args.batch_size:
        raise UserError(f"{data.source} holds {len(data)} images, fewer than --batch-size {args.batch_size}")
    if "num_classes" not in args:  # a VAE has none
        return
    if args.num_classes is None:
        args.num_classes = continued_classes(run.directory, args.continue_train_exp_dir) or data.num_classes
    if data.num_classes > args.num_classes:
        highest = data.num_classes - 1
        raise UserError(f"{data.source} has labels up to {highest}, but --num-classes is {args.num_classes}")
    if data.num_classes < args.num_classes:
        what = f"--num-classes {args.num_classes} is more than the {data.num_classes} of {data.source}"
        run.print(f"{what}: labels without images are not trained, and not drawn unless --classes names them")
    run.classes = {"names": data.classes, "counts": data.class_counts}


def continued_classes(run_folder: Path, elsewhere: str | None) -> int | None:
    """The number of classes of the run that goes on from `run_folder`, or else from the folder `elsewhere`, if any."""
    for folder in (run_folder, *([Path(elsewhere)] if elsewhere else [])):
        for path in reversed(numbered_checkpoints(folder / "checkpoints")):
            with suppress(UserError):  # a damaged one is reported where the run goes on
                return (REFERENCE_DEFAULTS | training_flags(read_checkpoint(path, verify=False), path))["num_classes"]
    return None


def find_vae(args: argparse.Namespace) -> VAESource:
    """The VAE of --vae and --vae-ckpt, which also completes a --model without a patch size."""
    source = open_vae(args.vae, args.vae_ckpt, is_offline(args))
    if "model" in args and args.model not in SiT_models:  # a token is 16 x 16 pixels, as in most encoders
        args.model = f"{args.model}/{max(16 // source.config.downsampling, 1)}"
    return source


def identity_of(args: argparse.Namespace, source: VAESource, nets, **fingerprints: str) -> dict:
    """The fingerprints of data and weights that must stay the same when a run continues (training/resume_checks.py)."""
    identity = {"architecture": source.config.described(), **fingerprints}
    if isinstance(nets, TransformerNets):
        hashes = [encoder.fingerprint for encoder in nets.encoders]
        identity["encoders"] = dict(zip(encoder_specs(args.enc_type), hashes, strict=True))
    return identity


def build_transformer(args: argparse.Namespace, latent: tuple[int, int, int], statistics: tuple[Tensor, Tensor]) -> SiT:
    """A fresh SiT for latents (C,h,w), its normaliser started from a VAE's statistics (scale, bias)."""
    try:
        sit = SiT_models[args.model](
            input_size=latent[1],
            in_channels=latent[0],
            num_classes=args.num_classes,
            class_dropout_prob=args.cfg_prob,
            z_dims=tuple(spec.embed_dim for spec in encoder_specs(args.enc_type).values()),
            projector=args.projector,
            encoder_depth=args.encoder_depth,
            bn_momentum=getattr(args, "bn_momentum", 0.1),
            qk_norm=args.qk_norm,
            fused_attn=args.fused_attn,
        )
    except ValueError as error:
        raise UserError(f"--model {args.model}: {error}") from None
    if args.spatial_norm is not None and sit.grid == 1:
        raise UserError("--spatial-norm needs more than one token, but the transformer has one; use a smaller patch")
    sit.set_latent_statistics(*statistics)
    return sit


def build_transformer_nets(
    args: argparse.Namespace, run: Run, latent: tuple[int, int, int], statistics: tuple[Tensor, Tensor]
) -> TransformerNets:
    """The transformer for latents (C,h,w) with these statistics (scale, bias), its EMA, encoders and optimiser.

    Raises:
        UserError: patch size, encoder depth or an encoder's token grid do not fit, or an encoder's weights are missing.
    """
    torch.manual_seed(args.seed)  # so that the initial weights are the same with and without a VAE to train
    sit = build_transformer(args, latent, statistics)
    start_from_trained(sit, args, run.directory, run.print)
    encoders = load_encoders(args, sit.grid, run.device, log=run.print)
    ema = copy_for_ema(sit).to(run.device)
    sit.recompute = args.gradient_checkpointing
    compile_in_place(sit.blocks, args.compile, run.device)
    sit = run.prepare(sit)
    return TransformerNets(sit, ema, encoders, build_optimizer(sit, args.learning_rate, args, run.device))


def build_vae_nets(args: argparse.Namespace, run: Run, source: VAESource) -> VAENets:
    """The VAE, its discriminator, LPIPS and optimisers, on this process's device."""
    if args.resolution < SMALLEST_IMAGE:
        raise UserError(f"--resolution {args.resolution} is too small: the discriminator needs {SMALLEST_IMAGE}")
    torch.manual_seed(args.seed)
    vae = load_vae(source)
    discriminator = load_discriminator(args.disc_pretrained_ckpt)
    lpips = load_lpips(args.lpips_vgg_ckpt, is_offline(args)).to(run.device)
    # not the discriminator: recomputation would move its running statistics twice
    lpips.net.recompute = args.gradient_checkpointing
    try:
        vae.recompute(EVERYTHING if args.gradient_checkpointing else args.recompute_levels)
    except ValueError as error:
        raise UserError(f"--gradient-checkpointing, --recompute-levels: {error}; leave them out") from None
    compile_in_place([*vae.parts, discriminator.main, lpips.net], args.compile, run.device)
    vae, discriminator = run.prepare(vae), run.prepare(discriminator)
    return VAENets(
        vae=vae,
        discriminator=discriminator,
        lpips=lpips,
        opt_vae=build_optimizer(vae, args.vae_learning_rate, args, run.device),
        opt_disc=build_optimizer(discriminator, args.disc_learning_rate, args, run.device),
        lecam=torch.zeros(2, device=run.device),
    )


def build_optimizer(network: nn.Module, learning_rate: float, args: argparse.Namespace, device: torch.device):
    """AdamW for a network; only the learning rate differs between a run's optimisers."""
    return Optimizer(
        network.parameters(),
        device,
        learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        epsilon=args.adam_epsilon,
        max_grad_norm=args.max_grad_norm,
        mixed_precision=args.mixed_precision,
        accumulation_steps=args.gradient_accumulation_steps,
    )


def transformer_draws(args: argparse.Namespace, latent: tuple[int, int, int], step: int, rows: Rows) -> Draws:
    """The random numbers of 1-based `step` for these rows of the global batch, of latents (C,h,w)."""
    return step_draws(args.seed, step, rows, latent, args.weighting, args.path_type, args.cfg_prob)


def transformer_step_options(args: argparse.Namespace, device: torch.device) -> dict:
    names = ("path_type", "proj_coeff", "spatial_norm", "ema_decay")
    return {"autocast": autocast_factory(device, args.mixed_precision), **{name: getattr(args, name) for name in names}}


def warn_of_untrained_discriminator(args: argparse.Namespace, run: Run, loss: VAELossConfig) -> None:
    """Warn if a new run tunes its VAE against a fresh discriminator from the first step."""
    if run.step == 0 and loss.discriminator_factor > 0 and not (args.disc_pretrained_ckpt or args.disc_warmup_steps):
        what = "warning: the VAE is tuned against an untrained discriminator from the start"
        run.print(f"{what}; give --disc-pretrained-ckpt or, without one, --disc-warmup-steps 1000")


def print_plan(run: Run, data, nets, latent: tuple[int, int, int]) -> None:
    """--dry-run: print what a run that has begun consists of and what it will write, and end it."""
    args, networks, last = run.args, run.state.networks, max(run.last_step(data), run.step)
    modules = {name: net for name, net in vars(nets).items() if isinstance(net, nn.Module)}
    counts = {name: sum(p.numel() for p in net.parameters()) for name, net in modules.items()}
    sizes = ", ".join(f"{name} {count / 1e6:,.3g} M" for name, count in counts.items())
    trained = sum(p.numel() for net in networks.values() for p in net.parameters() if p.requires_grad)
    # float32 weights and, of those that are trained, AdamW's two moments
    checkpoint = 4 * sum(p.numel() for net in networks.values() for p in net.parameters()) + 8 * trained
    permanent = -(-last // args.checkpointing_steps) - run.step // args.checkpointing_steps
    kept = permanent + args.keep_last + (getattr(args, "eval_steps", 0) > 0)
    free = free_space(run.directory)
    tokens = f", {networks['ema'].grid ** 2} tokens" if "ema" in networks else ""
    seen = last * args.batch_size
    run.print(
        f"""dry run: nothing was written, and no step was taken
    data        {len(data):,} images of {args.resolution} px, {data.num_classes:,} classes
    latents     {"x".join(map(str, latent))}{tokens}
    parameters  {sizes}; trained {trained / 1e6:,.3g} M
    steps       {last:,}, which are {seen / len(data):,.1f} epochs and {seen:,} images; {last - run.step:,} to do
    disk        up to {kept} checkpoints of {checkpoint / 1e9:,.3g} GB each; {free / 1e9:,.3g} GB free"""
    )
    if kept * checkpoint > free:
        run.print("warning: the checkpoints will not fit; free some space, or take a larger --checkpointing-steps")
    run.end()
