"""Groups of command-line flags, from which the scripts compose their parsers.

Names and defaults are the reference's, so that its command lines and args.json files keep their meaning.
A flag that a run may change when it continues is also listed in training/resume_checks.py.
"""

from argparse import BooleanOptionalAction

from errors import Parser
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

# flags of the reference's command lines that have no effect here, with the only value that they may have, if any
WITHOUT_EFFECT = {"--wandb-history-path": None, "--prediction": "v"}


def add(group, flag: str, default: object, kind, what: str = "", **options) -> None:
    """Add a flag of type `kind` to a parser or group; its help is `what` it does, and its default."""
    group.add_argument(flag, default=default, type=kind, help=f"{what} (default: %(default)s)".strip(), **options)


def add_switch(group, flag: str, default: bool, what: str) -> None:
    """Add a flag that takes --x and --no-x; argparse adds the default to its help."""
    group.add_argument(flag, default=default, action=BooleanOptionalAction, help=what)


def add_run_flags(parser: Parser, max_train_steps: int = 400000) -> None:
    """Where the run writes, how long it trains, what it logs and how it resumes."""
    group = parser.add_argument_group("run")
    group.add_argument("--exp-name", required=True, help="the run's folder below --output-dir")
    add(group, "--output-dir", "exps", str, "where runs are kept")
    add(group, "--logging-dir", "logs", str, "tracker files, below the run's folder")
    trackers = ("wandb", "tensorboard", "none")
    add(group, "--report-to", "wandb", str, "tracker beside metrics.jsonl, which is always written", choices=trackers)
    add(group, "--seed", 0, int, "decides initial weights, data order and every draw")
    add(group, "--max-train-steps", max_train_steps, POSITIVE, "optimiser steps")
    add(group, "--epochs", 1400, POSITIVE, "stop after so many, if that is sooner")
    add(group, "--checkpointing-steps", 50000, POSITIVE, "save and keep a checkpoint every N steps")
    add(group, "--checkpointing-minutes", 30.0, WEIGHT, "also save this long after the last checkpoint; 0: never")
    add(group, "--keep-last", 2, POSITIVE, "how many checkpoints saved by time or by a signal are kept")
    add(group, "--check-ranks", 1000, COUNT, "compare the states of all ranks every N steps and before a checkpoint")
    add(group, "--sampling-steps", 10000, POSITIVE, "write pictures every N steps")
    start = "start from the checkpoint of this step (default: the latest)"
    group.add_argument("--resume-step", type=COUNT, default=0, help=start)
    group.add_argument("--continue-train-exp-dir", help="another run's folder whose checkpoint this run starts from")
    dry_run = "build and check everything, print sizes, steps and disk space, and stop; nothing is written"
    group.add_argument("--dry-run", action="store_true", help=dry_run)
    add_offline_flag(group)
    for flag, value in WITHOUT_EFFECT.items():
        choices = None if value is None else (value,)
        group.add_argument(flag, default=value, choices=choices, help="taken as in the reference; without effect")


def add_data_flags(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    add(group, "--data-dir", "data", str, "output of preprocessing.py")
    add(group, "--resolution", 256, POSITIVE, "side of the images in pixels")
    add(group, "--batch-size", 256, POSITIVE, "images per step over all processes")
    add(group, "--num-workers", 4, COUNT, "reading processes a training process")


def add_flip_flag(parser: Parser) -> None:
    add_switch(parser, "--random-flip", False, "mirror each image of a step with probability 1/2")


def add_optimisation_flags(parser: Parser) -> None:
    group = parser.add_argument_group("optimisation")
    add(group, "--mixed-precision", "fp16", str, choices=("no", "fp16", "bf16"))
    add_switch(group, "--allow-tf32", True, "TF32 matrix products on GPUs")
    add_switch(group, "--compile", True, "compile the networks on GPUs")
    add(group, "--lr-warmup-steps", 0, COUNT, "raise all learning rates linearly over the first N steps", metavar="N")
    falls = "of all learning rates after that; cosine falls towards 0 at the last step"
    add(group, "--lr-schedule", "constant", str, falls, choices=("constant", "cosine"))
    add(group, "--gradient-accumulation-steps", 1, POSITIVE, "micro-batches a step")
    memory = "recompute activations in the backward pass: less memory, about a third more time"
    add_switch(group, "--gradient-checkpointing", False, memory)
    add(group, "--adam-beta1", 0.9, DECAY)
    add(group, "--adam-beta2", 0.999, DECAY)
    add(group, "--adam-weight-decay", 0.0, WEIGHT)
    add(group, "--adam-epsilon", 1e-8, RATE)
    add(group, "--max-grad-norm", 1.0, RATE, "clip gradients to this norm")


def add_transformer_flags(parser: Parser, default_model: str) -> None:
    from diffusion.transport import PATH_TYPES, WEIGHTINGS

    group = parser.add_argument_group("transformer")
    add(group, "--model", default_model, model, "SiT size and patch; without a patch the VAE decides it")
    start = "a checkpoint of joint or frozen-VAE training whose averaged transformer a new run starts from"
    group.add_argument("--sit-ckpt", help=f"{start}; image size, classes and encoders may differ")
    classes = "rows of the label table (default: the classes of the data, or as in the run that this one continues)"
    group.add_argument("--num-classes", type=POSITIVE, help=classes)
    add(group, "--encoder-depth", 8, POSITIVE, "block whose tokens are aligned")
    add_switch(group, "--qk-norm", False, "LayerNorm on queries and keys")
    add_switch(group, "--fused-attn", True, "scaled_dot_product_attention")
    add(group, "--cfg-prob", 0.1, PROBABILITY, "probability of dropping a label")
    add(group, "--path-type", "linear", str, "interpolant", choices=PATH_TYPES)
    add(group, "--weighting", "uniform", str, "distribution of t", choices=WEIGHTINGS)
    add(group, "--learning-rate", 1e-4, RATE, "of the transformer")
    add(group, "--ema-decay", 0.9999, DECAY, "of the transformer's average")
    add_alignment_flags(parser)
    add_evaluation_flags(parser)


def add_alignment_flags(parser: Parser) -> None:
    from models.sit import PROJECTORS

    group = parser.add_argument_group("alignment")
    names = "encoders to align to: names in docs/networks.md, timm:MODEL, or none"
    add(group, "--enc-type", "dinov2-vit-b", enc_type, names, metavar="NAME[,NAME...]")
    add_enc_ckpt_flag(group)
    resample = "interpolate an encoder's tokens where its grid is not the transformer's, instead of stopping"
    add_switch(group, "--resample-tokens", False, resample)
    add(group, "--proj-coeff", 0.5, WEIGHT, "weight of the transformer's alignment")
    projector = "from the transformer's tokens to an encoder's: REPA's MLP or iREPA's convolution"
    add(group, "--projector", "mlp", str, projector, choices=tuple(PROJECTORS))
    norm = "iREPA's normalisation of encoder tokens over space, (z - GAMMA mean)/std (default: off; alone: 0.6)"
    group.add_argument("--spatial-norm", type=WEIGHT, nargs="?", const=0.6, metavar="GAMMA", help=norm)


def add_evaluation_flags(parser: Parser) -> None:
    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval-steps", type=COUNT, default=0, help="measure samples every N steps (default: never)")
    add(group, "--eval-samples", 10000, number(int, at_least=2), "how many")
    names = "as --features of evaluate.py; the first decides which checkpoint is best"
    add(group, "--eval-features", "inception", features, names, metavar="NAME[,NAME...]")
    reference = "as --reference of evaluate.py (default: up to 50000 of the training images)"
    group.add_argument("--eval-reference", help=reference)
    add_inception_flag(group)


def add_feature_flags(parser: Parser) -> None:
    group = parser.add_argument_group("features")
    names = "inception, or encoders as in --enc-type, whose distances are called fd_NAME"
    add(group, "--features", "inception", features, names, metavar="NAME[,NAME...]")
    add_inception_flag(group)
    add_enc_ckpt_flag(group)
    add_offline_flag(group)


def add_reconstruction_flags(parser: Parser) -> None:
    group = parser.add_argument_group("reconstruction")
    group.add_argument("--vae", help=f"VAE whose reconstructions are measured instead of samples: {VAE_WEIGHTS}")
    add_vae_name(group, "--vae-arch", "f8d4", "vae")
    group.add_argument("--data-dir", help="output of preprocessing.py, of images that it was not trained on")
    add_lpips_flag(group)


def add_caching_flags(parser: Parser) -> None:
    add_vae_name(parser, "--vae-arch", "f16d32", "vae_ckpt_path")
    parser.add_argument("--vae-ckpt-path", help=f"the VAE's {VAE_WEIGHTS}")
    add(parser, "--vae-latents-name", "repae-invae-400k", str, "folder below --output-dir")
    add(parser, "--dtype", "float32", str, "float16 halves the disk", choices=("float16", "float32"))
    add_switch(parser, "--compile", True, "compile the encoder on GPUs")
    add(parser, "--data-dir", "data", str, "output of preprocessing.py")
    add(parser, "--output-dir", "data", str, "where the folder goes")
    add(parser, "--pproc-batch-size", 128, POSITIVE, "images that each process encodes at once")
    mirrored = "also cache the mirrored images; an epoch then has both of each"
    parser.add_argument("--mirrored", action="store_true", help=mirrored)
    add(parser, "--num-workers", 4, COUNT, "data workers per process")
    add_switch(parser, "--allow-tf32", True, "TF32 on GPUs")
    add_offline_flag(parser)


def add_joint_flags(parser: Parser) -> None:
    group = parser.add_argument_group("joint training")
    add(group, "--bn-momentum", 0.1, PROBABILITY, "of the latent normaliser")
    add(group, "--vae-align-proj-coeff", 1.5, WEIGHT, "weight of the VAE's alignment")
    naive = "weight of the diffusion loss in the VAE's; it degrades the VAE, and is only for showing that"
    add(group, "--vae-diffusion-coeff", 0.0, WEIGHT, naive)


def add_vae_flags(parser: Parser, vae: str | None, vae_ckpt: str | None) -> None:
    group = parser.add_argument_group("VAE")
    add_vae_name(group, "--vae", vae, "vae_ckpt")
    add(group, "--vae-ckpt", vae_ckpt, str, VAE_WEIGHTS)


def add_vae_loss_flags(parser: Parser) -> None:
    group = parser.add_argument_group("VAE training")
    add(group, "--loss-cfg-path", "configs/l1_lpips_kl_gan.yaml", str, "loss weights")
    group.add_argument("--disc-pretrained-ckpt", help="discriminator weights (default: fresh)")
    warmup = "train the discriminator for N steps before its term enters the VAE's loss"
    add(group, "--disc-warmup-steps", 0, COUNT, warmup, metavar="N")
    levels = "recompute the VAE's N finest levels in the backward pass (all of a diffusers: one): 1 saves most memory"
    add(group, "--recompute-levels", 0, COUNT, levels, metavar="N")
    add(group, "--vae-learning-rate", 1e-4, RATE)
    add(group, "--disc-learning-rate", 1e-4, RATE)
    add_lpips_flag(group)


def add_vae_name(group, flag: str, default: str | None, weights: str) -> None:
    """`flag` names a VAE's architecture; diffusers:PATH_OR_ID also sets the flag of destination `weights`."""
    names = "a row of VAE_CONFIGS, or diffusers:PATH_OR_ID with its weights"
    group.add_argument(flag, default=default, action=VAEName, weights=weights, help=f"{names} (default: %(default)s)")


def add_enc_ckpt_flag(group) -> None:
    what = "an encoder's weights, a file or hf-hub:REPOSITORY[@REVISION]; may be repeated (default: a download)"
    group.add_argument("--enc-ckpt", type=enc_ckpt, action="append", default=[], metavar="NAME=PATH", help=what)


def add_inception_flag(group) -> None:
    group.add_argument("--inception-weights", help="torch-fidelity's file (default: its download)")


def add_lpips_flag(group) -> None:
    group.add_argument("--lpips-vgg-ckpt", help="VGG16 state dict for LPIPS (default: torchvision's download)")


def add_offline_flag(group) -> None:
    what = "never use the network: weights must be on this machine, wandb keeps its files"
    add_switch(group, "--offline", False, what)
