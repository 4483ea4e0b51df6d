"""Command-line flags of the training scripts, in groups that a script composes. argparse is the only schema.

Names and defaults are the reference's, so that its command lines and args.json files keep their meaning.
"""

import argparse
from argparse import BooleanOptionalAction

from flags.types import (
    COUNT,
    DECAY,
    POSITIVE,
    PROBABILITY,
    RATE,
    VAE_WEIGHTS,
    WEIGHT,
    VAEName,
    enc_ckpt,
    enc_type,
    features,
    model,
    number,
)


def add_run_flags(parser: argparse.ArgumentParser, max_train_steps: int = 400000) -> None:
    """Where the run writes, how long it goes, what it logs and how it continues."""
    group = parser.add_argument_group("run")
    group.add_argument("--exp-name", required=True, help="the run's folder below --output-dir")
    group.add_argument("--output-dir", default="exps", help="where runs are kept (default: %(default)s)")
    group.add_argument(
        "--logging-dir", default="logs", help="tracker files, below the run's folder (default: %(default)s)"
    )
    group.add_argument(
        "--report-to",
        default="wandb",
        choices=("wandb", "tensorboard", "none"),
        help="tracker beside metrics.jsonl, which is always written (default: %(default)s)",
    )
    group.add_argument(
        "--seed", type=int, default=0, help="decides initial weights, data order and every draw (default: 0)"
    )
    group.add_argument(
        "--max-train-steps", type=POSITIVE, default=max_train_steps, help="optimiser steps (default: %(default)s)"
    )
    group.add_argument(
        "--epochs", type=POSITIVE, default=1400, help="stop after so many, if that is sooner (default: %(default)s)"
    )
    group.add_argument(
        "--checkpointing-steps",
        type=POSITIVE,
        default=50000,
        help="save every N steps, and keep that (default: %(default)s)",
    )
    group.add_argument(
        "--checkpointing-minutes",
        type=WEIGHT,
        default=30.0,
        help="also save this long after the last time; 0: never (default: %(default)g)",
    )
    group.add_argument(
        "--keep-last",
        type=POSITIVE,
        default=2,
        help="how many of those saved by time or by a signal are kept (default: %(default)s)",
    )
    group.add_argument(
        "--check-ranks",
        type=COUNT,
        default=1000,
        help="compare all processes' states every N steps, and before every checkpoint (default: %(default)s)",
    )
    group.add_argument(
        "--sampling-steps", type=POSITIVE, default=10000, help="write pictures every N steps (default: %(default)s)"
    )
    group.add_argument(
        "--resume-step", type=COUNT, default=0, help="start from the checkpoint of this step (default: the latest)"
    )
    group.add_argument("--continue-train-exp-dir", help="another run's folder whose checkpoint this run starts from")
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, print sizes, FLOPs and what memory and disk it takes, and stop; nothing is written",
    )
    add_offline_flag(group)
    group.add_argument("--wandb-history-path", help="accepted for old command lines; has no effect")


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Images and how they are read."""
    group = parser.add_argument_group("data")
    group.add_argument("--data-dir", default="data", help="output of preprocessing.py (default: %(default)s)")
    group.add_argument(
        "--resolution", type=POSITIVE, default=256, help="side of the images in pixels (default: %(default)s)"
    )
    group.add_argument(
        "--batch-size", type=POSITIVE, default=256, help="images a step over all processes (default: %(default)s)"
    )
    group.add_argument(
        "--num-workers", type=COUNT, default=4, help="reading processes a training process (default: %(default)s)"
    )


def add_optimisation_flags(parser: argparse.ArgumentParser) -> None:
    """Precision and the optimisers."""
    group = parser.add_argument_group("optimisation")
    add_precision_flag(group, default="fp16")
    group.add_argument("--allow-tf32", action=BooleanOptionalAction, default=True, help="TF32 matrix products on GPUs")
    group.add_argument("--compile", action=BooleanOptionalAction, default=True, help="compile the networks on GPUs")
    group.add_argument(
        "--gradient-accumulation-steps", type=POSITIVE, default=1, help="micro-batches a step (default: 1)"
    )
    group.add_argument(
        "--gradient-checkpointing",
        action=BooleanOptionalAction,
        default=False,
        help="recompute activations in the backward pass: less memory, about a third more time",
    )
    group.add_argument("--adam-beta1", type=DECAY, default=0.9, help="(default: %(default)s)")
    group.add_argument("--adam-beta2", type=DECAY, default=0.999, help="(default: %(default)s)")
    group.add_argument("--adam-weight-decay", type=WEIGHT, default=0.0, help="(default: %(default)s)")
    group.add_argument("--adam-epsilon", type=RATE, default=1e-8, help="(default: %(default)s)")
    group.add_argument(
        "--max-grad-norm", type=RATE, default=1.0, help="clip gradients to this norm (default: %(default)s)"
    )


def add_transformer_flags(parser: argparse.ArgumentParser, default_model: str) -> None:
    """The transformer, its diffusion objective and its alignment."""
    from diffusion.transport import PATH_TYPES, WEIGHTINGS

    group = parser.add_argument_group("transformer")
    group.add_argument(
        "--model",
        default=default_model,
        type=model,
        help="SiT size and patch; without a patch the VAE decides it (default: %(default)s)",
    )
    group.add_argument(
        "--sit-ckpt",
        help="a checkpoint of train_repae.py or train_ldm_only.py, ours or published, whose averaged transformer a new "
        "run starts from; image size, classes and encoders may be others (default: fresh weights)",
    )
    group.add_argument("--num-classes", type=POSITIVE, default=1000, help="(default: %(default)s)")
    group.add_argument(
        "--encoder-depth", type=POSITIVE, default=8, help="block whose tokens are aligned (default: %(default)s)"
    )
    group.add_argument("--qk-norm", action=BooleanOptionalAction, default=False, help="LayerNorm on queries and keys")
    group.add_argument("--fused-attn", action=BooleanOptionalAction, default=True, help="scaled_dot_product_attention")
    group.add_argument(
        "--cfg-prob", type=PROBABILITY, default=0.1, help="probability of dropping a label (default: %(default)s)"
    )
    group.add_argument("--path-type", default="linear", choices=PATH_TYPES, help="interpolant (default: %(default)s)")
    group.add_argument(
        "--prediction", default="v", choices=("v",), help="what the network predicts (default: %(default)s)"
    )
    group.add_argument(
        "--weighting", default="uniform", choices=WEIGHTINGS, help="distribution of t (default: %(default)s)"
    )
    group.add_argument("--learning-rate", type=RATE, default=1e-4, help="of the transformer (default: %(default)s)")
    group.add_argument(
        "--ema-decay", type=DECAY, default=0.9999, help="of the transformer's average (default: %(default)s)"
    )
    add_alignment_flags(parser)
    add_evaluation_flags(parser)


def add_alignment_flags(parser: argparse.ArgumentParser) -> None:
    """The frozen encoders that representations align to, and how."""
    from models.sit import PROJECTORS

    group = parser.add_argument_group("alignment")
    group.add_argument(
        "--enc-type",
        type=enc_type,
        default="dinov2-vit-b",
        metavar="NAME[,NAME...]",
        help="encoders to align to: rows of the README's table, timm:MODEL, or none (default: %(default)s)",
    )
    add_enc_ckpt_flag(group)
    add_resample_flag(group)
    group.add_argument(
        "--proj-coeff", type=WEIGHT, default=0.5, help="weight of the transformer's alignment (default: %(default)s)"
    )
    group.add_argument(
        "--projector",
        default="mlp",
        choices=tuple(PROJECTORS),
        help="from the transformer's tokens to an encoder's: REPA's MLP or iREPA's convolution (default: %(default)s)",
    )
    group.add_argument(
        "--spatial-norm",
        type=WEIGHT,
        nargs="?",
        const=0.6,
        metavar="GAMMA",
        help="iREPA's normalisation of encoder tokens over space, (z - GAMMA mean)/std (default: off; alone: 0.6)",
    )


def add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    """Distances of samples that are measured as training goes."""
    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval-steps", type=COUNT, default=0, help="measure samples every N steps (default: never)")
    group.add_argument(
        "--eval-samples", type=number(int, at_least=2), default=10000, help="how many (default: %(default)s)"
    )
    group.add_argument(
        "--eval-features",
        type=features,
        default="inception",
        metavar="NAME[,NAME...]",
        help="as --features of evaluate.py; the first decides which checkpoint is best (default: %(default)s)",
    )
    group.add_argument(
        "--eval-reference", help="as --reference of evaluate.py (default: up to 50000 of the training images)"
    )
    add_inception_flag(group)


def add_inception_flag(group) -> None:
    """Where Inception's weights lie."""
    group.add_argument("--inception-weights", help="torch-fidelity's file (default: its download)")


def add_feature_flags(parser: argparse.ArgumentParser) -> None:
    """Networks whose features are compared, for evaluate.py."""
    group = parser.add_argument_group("features")
    group.add_argument(
        "--features",
        type=features,
        default="inception",
        metavar="NAME[,NAME...]",
        help="inception, or encoders as in --enc-type, whose distances are called fd_NAME (default: %(default)s)",
    )
    add_inception_flag(group)
    add_enc_ckpt_flag(group)
    add_offline_flag(group)


def add_reconstruction_flags(parser: argparse.ArgumentParser) -> None:
    """A VAE and the images that it reconstructs, for evaluate.py."""
    group = parser.add_argument_group("reconstruction")
    group.add_argument("--vae", help=f"VAE whose reconstructions are measured instead of samples: {VAE_WEIGHTS}")
    add_vae_name(group, "--vae-arch", "f8d4", "vae")
    group.add_argument("--data-dir", help="output of preprocessing.py, of images that it was not trained on")
    add_lpips_flag(group)


def add_caching_flags(parser: argparse.ArgumentParser) -> None:
    """How what a frozen network makes of images is cached."""
    group = parser.add_argument_group("caching")
    group.add_argument("--data-dir", default="data", help="output of preprocessing.py (default: %(default)s)")
    group.add_argument("--output-dir", default="data", help="where the folder goes (default: %(default)s)")
    group.add_argument(
        "--pproc-batch-size", type=POSITIVE, default=128, help="images a process encodes at once (default: 128)"
    )
    group.add_argument(
        "--mirrored", action="store_true", help="also cache the mirrored images; an epoch then has both of each"
    )
    group.add_argument("--num-workers", type=COUNT, default=4, help="reading processes a process (default: 4)")
    group.add_argument("--allow-tf32", action=BooleanOptionalAction, default=True, help="TF32 on GPUs")


def add_enc_ckpt_flag(group) -> None:
    """Where encoders' weights lie."""
    group.add_argument(
        "--enc-ckpt",
        type=enc_ckpt,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="an encoder's weights, in the project's own format or timm's: a file, or hf-hub:REPOSITORY[@REVISION]; "
        "may be repeated (default: the usual file below ckpts/, else a download)",
    )


def add_resample_flag(group) -> None:
    """Whether an encoder's grid may be another one than the transformer's."""
    group.add_argument(
        "--resample-tokens",
        action=BooleanOptionalAction,
        default=False,
        help="interpolate an encoder's tokens where its grid is not the transformer's (default: stop)",
    )


def add_precision_flag(group, default: str) -> None:
    """What networks compute in."""
    group.add_argument(
        "--mixed-precision", default=default, choices=("no", "fp16", "bf16"), help="(default: %(default)s)"
    )


def add_offline_flag(group) -> None:
    """Whether anything may be downloaded."""
    group.add_argument(
        "--offline",
        action=BooleanOptionalAction,
        default=False,
        help="never touch the network: weights must be on this machine, wandb keeps its files",
    )


def add_lpips_flag(group) -> None:
    """Where LPIPS's convolutions lie."""
    group.add_argument("--lpips-vgg-ckpt", help="VGG16 state dict for LPIPS (default: torchvision's download)")


def add_joint_flags(parser: argparse.ArgumentParser) -> None:
    """What only joint training has."""
    group = parser.add_argument_group("joint training")
    group.add_argument(
        "--bn-momentum", type=PROBABILITY, default=0.1, help="of the latent normaliser (default: %(default)s)"
    )
    group.add_argument(
        "--vae-align-proj-coeff", type=WEIGHT, default=1.5, help="weight of the VAE's alignment (default: %(default)s)"
    )


def add_vae_name(group, flag: str, default: str | None, weights: str) -> None:
    """`flag` names a VAE's architecture, and with diffusers:PATH_OR_ID what the flag of destination `weights` does."""
    names = "a row of VAE_CONFIGS, or diffusers:PATH_OR_ID with its weights"
    group.add_argument(flag, default=default, action=VAEName, weights=weights, help=f"{names} (default: %(default)s)")


def add_vae_flags(parser: argparse.ArgumentParser, vae: str, vae_ckpt: str | None) -> None:
    """Which VAE, and its weights."""
    group = parser.add_argument_group("VAE")
    add_vae_name(group, "--vae", vae, "vae_ckpt")
    group.add_argument("--vae-ckpt", default=vae_ckpt, help=f"{VAE_WEIGHTS} (default: %(default)s)")


def add_latent_flags(parser: argparse.ArgumentParser) -> None:
    """What is cached: latents, and tokens if they are."""
    group = parser.add_argument_group("latents")
    group.add_argument(
        "--vae-latents-name",
        default="e2e-vavae-400k",
        help="folder of cache_latents.py below --data-dir (default: %(default)s)",
    )


def add_vae_loss_flags(parser: argparse.ArgumentParser) -> None:
    """How the VAE and its discriminator are trained."""
    group = parser.add_argument_group("VAE training")
    group.add_argument(
        "--loss-cfg-path", default="configs/l1_lpips_kl_gan.yaml", help="loss weights (default: %(default)s)"
    )
    group.add_argument("--disc-pretrained-ckpt", help="discriminator weights (default: fresh)")
    group.add_argument(
        "--disc-warmup-steps",
        type=COUNT,
        default=0,
        help="so long the discriminator learns before it has a part in the VAE's loss (default: %(default)s)",
    )
    group.add_argument("--vae-learning-rate", type=RATE, default=1e-4, help="(default: %(default)s)")
    group.add_argument("--disc-learning-rate", type=RATE, default=1e-4, help="(default: %(default)s)")
    add_lpips_flag(group)
