"""Command-line flags of the training scripts, in groups that a script composes. argparse is the only schema.

Names and defaults are the reference's, so that its command lines and args.json files keep their meaning.
"""

import argparse
import math
from argparse import BooleanOptionalAction
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path

from errors import UserError, unknown_name
from loss.vae_loss import VAELossConfig


def one_of(what: str, known: Iterable[str]):
    """An argparse type that takes the names of a table and, for any other, names the nearest."""
    known = list(known)

    def check(name: str) -> str:
        if name not in known:
            raise argparse.ArgumentTypeError(unknown_name(what, name, known))
        return name

    return check


def number(kind: type, at_least: float = -math.inf, above: float = -math.inf, below: float = math.inf):
    """An argparse type: a finite int or float within bounds."""

    def check(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'integer' if kind is int else 'number'}") from None
        if value < at_least:
            raise argparse.ArgumentTypeError(f"{text} is too small, expected at least {at_least}")
        if value <= above:
            raise argparse.ArgumentTypeError(f"{text} is too small, expected more than {above}")
        if not value < below:  # NaN too
            raise argparse.ArgumentTypeError(f"{text} is too large, expected less than {below}")
        return value

    return check


def model(name: str) -> str:
    """An argparse type: a row of the transformers, or one without its patch size, which the VAE then decides."""
    from models.sit import SIT_SIZES, SiT_models

    return one_of("model", [*SiT_models, *SIT_SIZES])(name)


def vae(name: str) -> str:
    """An argparse type: a row of the VAEs, or diffusers:PATH_OR_ID."""
    from models.autoencoder import VAE_CONFIGS
    from training.vae_weights import DIFFUSERS

    if name.startswith(DIFFUSERS) and name != DIFFUSERS:
        return name
    return one_of("VAE", VAE_CONFIGS)(name)


class VAEName(argparse.Action):
    """Store the name of a VAE; one of diffusers has its weights with it, unless another flag names others."""

    def __init__(self, *args, weights: str, **options):
        super().__init__(*args, type=vae, metavar="NAME", **options)
        self.weights = weights

    def __call__(self, parser, namespace, name, option_string=None):
        from training.vae_weights import DIFFUSERS

        setattr(namespace, self.dest, name)
        if name.startswith(DIFFUSERS) and getattr(namespace, self.weights) in (None, parser.get_default(self.weights)):
            setattr(namespace, self.weights, name.removeprefix(DIFFUSERS))


def checked(text: str, check: Callable[[str], object]) -> str:
    """`text`, if `check` has nothing against it; argparse's error, if it raises a UserError."""
    try:
        check(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def enc_type(text: str) -> str:
    """An argparse type: names of encoders, joined by commas, or none."""
    from models.encoders import encoder_specs

    return checked(text, encoder_specs)


def features(text: str) -> str:
    """An argparse type: inception and encoders, joined by commas."""
    from training.feature_networks import check_feature_names

    return checked(text, check_feature_names)


def enc_ckpt(text: str) -> str:
    """An argparse type: NAME=PATH, where PATH is a file or hf-hub:REPOSITORY[@REVISION]."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    from training.encoder_weights import HUB_PREFIX

    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r}, expected NAME=PATH")
    if path.startswith(HUB_PREFIX):
        repository, at, revision = path.removeprefix(HUB_PREFIX).partition("@")
        try:
            validate_repo_id(repository)
        except HFValidationError:
            repository = ""
        if not repository or bool(at) != bool(revision):
            raise argparse.ArgumentTypeError(f"{path!r}, expected {HUB_PREFIX}REPOSITORY[@REVISION]")
    elif not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"weights of {name}: no such file {path}")
    return text


VAE_WEIGHTS = "weights: a file with its statistics beside, a folder of diffusers, or ORGANISATION/NAME on the hub"
POSITIVE = number(int, at_least=1)
COUNT = number(int, at_least=0)
RATE = number(float, above=0)
WEIGHT = number(float, at_least=0)
DECAY = number(float, at_least=0, below=1)
PROBABILITY = number(float, at_least=0, below=1 + 1e-9)


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
        "--resume-step", type=COUNT, default=0, help="go back, once, to this step's checkpoint (default: the latest)"
    )
    group.add_argument("--continue-train-exp-dir", help="another run's folder whose checkpoint this run starts from")
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
    from transport import PATH_TYPES, WEIGHTINGS

    group = parser.add_argument_group("transformer")
    group.add_argument(
        "--model",
        default=default_model,
        type=model,
        help="SiT size and patch; without a patch the VAE decides it (default: %(default)s)",
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
    group.add_argument(
        "--cached-tokens",
        metavar="NAME[,NAME...]",
        help="folders of cache_tokens.py below --data-dir, one for each of --enc-type: no encoder is loaded and no "
        "pixels are read (default: encoders run at every step)",
    )


def add_vae_loss_flags(parser: argparse.ArgumentParser) -> None:
    """How the VAE and its discriminator are trained."""
    group = parser.add_argument_group("VAE training")
    group.add_argument(
        "--loss-cfg-path", default="configs/l1_lpips_kl_gan.yaml", help="loss weights (default: %(default)s)"
    )
    group.add_argument("--disc-pretrained-ckpt", help="discriminator weights (default: fresh)")
    group.add_argument("--vae-learning-rate", type=RATE, default=1e-4, help="(default: %(default)s)")
    group.add_argument("--disc-learning-rate", type=RATE, default=1e-4, help="(default: %(default)s)")
    add_lpips_flag(group)


def load_loss_config(path: str) -> VAELossConfig:
    """Read the `losses:` section of a YAML like configs/l1_lpips_kl_gan.yaml.

    Raises:
        UserError: one line naming the file, what was found and what was expected.
    """
    what = f"--loss-cfg-path {path}"
    config = read_yaml(path, what)
    losses = config.get("losses")
    if not isinstance(losses, dict):
        raise UserError(f"{what}: no section `losses:`")
    mode = ((config.get("model") or {}).get("vq_model") or {}).get("quantize_mode", "vae")
    if mode != "vae":
        raise UserError(f"{what}: model.vq_model.quantize_mode is {mode!r}; only vae is supported")
    known = {field.name: type(field.default) for field in fields(VAELossConfig)}
    for name, value in losses.items():
        if name not in known:
            raise UserError(f"{what}: " + unknown_name("key below losses:", name, known))
        if isinstance(value, bool) or not isinstance(value, str if known[name] is str else (int, float)):
            raise UserError(f"{what}: losses.{name} is {value!r}, expected {known[name].__name__}")
    for name, allowed in {"reconstruction_loss": ("l1", "l2"), "perceptual_loss": ("lpips",)}.items():
        if losses.get(name, allowed[0]) not in allowed:
            raise UserError(f"{what}: losses.{name} is {losses[name]!r}, expected {' or '.join(allowed)}")
    return VAELossConfig(**{name: known[name](value) for name, value in losses.items()})


def read_yaml(path: str, what: str) -> dict:
    """The mapping in a YAML file, interpolations resolved; a UserError that begins with `what` if there is none."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not Path(path).is_file():
        raise UserError(f"{what}: no such file")
    try:
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{what}: not a readable YAML file ({type(error).__name__})") from error
    if not isinstance(config, dict):
        raise UserError(f"{what}: expected a mapping of keys to values")
    return config
