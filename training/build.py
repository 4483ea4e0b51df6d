"""Building the networks that a command line asks for, with their starting weights."""

import argparse
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from errors import UserError
from loss.vae_loss import VAELossConfig
from models.autoencoder import VAEConfig
from models.discriminator import SMALLEST_IMAGE
from models.encoder_table import encoder_specs
from models.numerics import autocast_factory
from models.sit import SiT, SiT_models
from training.loop import Run
from training.optimizer import Optimizer
from training.randomness import Draws, Rows, step_draws
from training.transformer_step import TransformerNets, copy_for_ema
from training.vae_step import VAENets
from weights.downloads import is_offline
from weights.encoders import load_encoders
from weights.features import load_lpips
from weights.trained_run import start_from_trained
from weights.vae import VAESource, load_discriminator, load_vae


def build_transformer(args: argparse.Namespace, latent: tuple[int, int, int], statistics: tuple[Tensor, Tensor]) -> SiT:
    """A fresh SiT as the flags say, for latents (C,h,w), its normaliser started from a VAE's (scale, bias).

    Raises:
        UserError: patch size or encoder depth do not fit.
    """
    widths = tuple(spec.embed_dim for spec in encoder_specs(args.enc_type).values())
    try:
        sit = SiT_models[args.model](
            input_size=latent[1],
            in_channels=latent[0],
            num_classes=args.num_classes,
            class_dropout_prob=args.cfg_prob,
            z_dims=widths,
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


def choose_patch(args: argparse.Namespace, config: VAEConfig) -> None:
    """Complete a --model without a patch size by the one that makes a token of 16 x 16 pixels, as encoders have them.

    At a downsampling of 8 SiT-XL becomes SiT-XL/2, at 16 or more SiT-XL/1.
    """
    if args.model not in SiT_models:
        args.model = f"{args.model}/{max(16 // config.downsampling, 1)}"


def build_transformer_nets(
    args: argparse.Namespace, run: Run, latent: tuple[int, int, int], statistics: tuple[Tensor, Tensor]
) -> TransformerNets:
    """The transformer, its average, its encoders and its optimiser as the flags say, on this process's device.

    It is for latents (C,h,w) with these statistics (scale, bias).

    Raises:
        UserError: patch size, encoder depth or an encoder's token grid do not fit, or an encoder's weights are missing.
    """
    sit = build_transformer(args, latent, statistics)
    start_from_trained(sit, args, run.directory, run.print)
    encoders = load_encoders(args, sit.grid, run.device, log=run.print)
    ema = copy_for_ema(sit).to(run.device)
    sit.recompute = args.gradient_checkpointing
    compile_in_place(sit.blocks, args, run.device)
    sit = run.prepare(sit)
    opt_sit = Optimizer(sit.parameters(), learning_rate=args.learning_rate, **optimizer_options(args, run.device))
    return TransformerNets(sit=sit, ema=ema, encoders=encoders, opt_sit=opt_sit)


def transformer_draws(args: argparse.Namespace, latent: tuple[int, int, int], step: int, rows: Rows) -> Draws:
    """The random numbers of 1-based `step` for these rows of the global batch, of latents (C,h,w)."""
    return step_draws(args.seed, step, rows, latent, args.weighting, args.path_type, args.cfg_prob)


def transformer_step_options(args: argparse.Namespace, device: torch.device) -> dict:
    """What the flags say of the transformer's step, as keywords of TransformerStepConfig."""
    return {
        "autocast": autocast_factory(device, args.mixed_precision),
        "path_type": args.path_type,
        "proj_coeff": args.proj_coeff,
        "spatial_norm": args.spatial_norm,
        "ema_decay": args.ema_decay,
    }


def optimizer_options(args: argparse.Namespace, device: torch.device) -> dict:
    """What the flags say of every optimiser alike, as keywords of Optimizer."""
    return {
        "device": device,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "epsilon": args.adam_epsilon,
        "max_grad_norm": args.max_grad_norm,
        "mixed_precision": args.mixed_precision,
        "accumulation_steps": args.gradient_accumulation_steps,
    }


def check_data(data, args: argparse.Namespace) -> None:
    """Raise a UserError if a data set of dataset.py has fewer images than a batch, or more classes than the model."""
    if len(data) < args.batch_size:
        raise UserError(f"{data.source} holds {len(data)} images, fewer than --batch-size {args.batch_size}")
    num_classes = getattr(args, "num_classes", data.num_classes)  # a VAE has none
    if data.num_classes > num_classes:
        raise UserError(f"{data.source} has labels up to {data.num_classes - 1}, but --num-classes is {num_classes}")


def build_vae_nets(args: argparse.Namespace, run: Run, source: VAESource) -> VAENets:
    """The VAE that was found, its discriminator, LPIPS and optimisers as the flags say, on this process's device."""
    if args.resolution < SMALLEST_IMAGE:
        raise UserError(
            f"--resolution {args.resolution} is too small for the discriminator, which needs at least {SMALLEST_IMAGE}"
        )
    vae = load_vae(source)
    discriminator = load_discriminator(args.disc_pretrained_ckpt)
    lpips = load_lpips(args.lpips_vgg_ckpt, is_offline(args)).to(run.device)
    # not the discriminator: computing again would move its running statistics twice
    vae.encoder.recompute = vae.decoder.recompute = lpips.net.recompute = args.gradient_checkpointing
    compile_in_place([vae.encoder, vae.decoder, discriminator.main, lpips.net], args, run.device)
    vae, discriminator = run.prepare(vae), run.prepare(discriminator)
    options = optimizer_options(args, run.device)
    return VAENets(
        vae=vae,
        discriminator=discriminator,
        lpips=lpips,
        opt_vae=Optimizer(vae.parameters(), learning_rate=args.vae_learning_rate, **options),
        opt_disc=Optimizer(discriminator.parameters(), learning_rate=args.disc_learning_rate, **options),
        lecam=torch.zeros(2, device=run.device),
    )


def warn_of_untrained_discriminator(args: argparse.Namespace, run: Run, loss: VAELossConfig) -> None:
    """Say so where a new run tunes its VAE against a discriminator that has not learnt anything yet."""
    if run.step == 0 and loss.discriminator_factor > 0 and not (args.disc_pretrained_ckpt or args.disc_warmup_steps):
        run.print(
            "warning: the VAE is tuned against an untrained discriminator from the start; better give "
            "--disc-pretrained-ckpt or, where there is none, --disc-warmup-steps 1000"
        )


def compile_in_place(modules: Iterable[nn.Module], args: argparse.Namespace, device: torch.device) -> None:
    """torch.compile every module in place, so that state-dict keys stay; on GPUs only, and unless --no-compile."""
    if args.compile and device.type == "cuda":
        for module in modules:
            module.compile(dynamic=False)  # previews and guided batches get graphs of their own


def use_tf32(allow: bool) -> None:
    """Let GPUs round float32 matrix products and convolutions to TF32, or not."""
    torch.backends.cuda.matmul.allow_tf32 = allow
    torch.backends.cudnn.allow_tf32 = allow
