"""Types of command-line flags: each checks a word of the command line, and names the nearest entry of a table."""

import argparse
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from errors import UserError, expanded, unknown_name


def one_of(what: str, known: Iterable[str]):
    """An argparse type: one of `known` names; the error for any other suggests the nearest."""
    known = list(known)

    def check(name: str) -> str:
        if name not in known:
            raise argparse.ArgumentTypeError(unknown_name(what, name, known))
        return name

    return check


def number(kind: type, at_least: float = -math.inf, above: float = -math.inf, below: float = math.inf):
    """An argparse type: an int or float within bounds; NaN is refused."""

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
            raise argparse.ArgumentTypeError(f"{text} is too large, expected less than {below:g}")
        return value

    return check


def model(name: str) -> str:
    """An argparse type: a row of the transformers, or one without its patch size, which the VAE decides."""
    from models.sit import SIT_SIZES, SiT_models

    return one_of("model", [*SiT_models, *SIT_SIZES])(name)


def vae(name: str) -> str:
    """An argparse type: a row of the VAEs, or diffusers:PATH_OR_ID."""
    from models.autoencoder import VAE_CONFIGS
    from weights.vae import DIFFUSERS

    if name.startswith(DIFFUSERS) and name != DIFFUSERS:
        return DIFFUSERS + expanded(name.removeprefix(DIFFUSERS))
    return one_of("VAE", VAE_CONFIGS)(name)


class VAEName(argparse.Action):
    """Store the name of a VAE; diffusers:PATH_OR_ID also sets the flag of its weights, unless that one is given."""

    def __init__(self, *args, weights: str, **options):
        super().__init__(*args, type=vae, metavar="NAME", **options)
        self.weights = weights

    def __call__(self, parser, namespace, name, option_string=None):
        from weights.vae import DIFFUSERS

        setattr(namespace, self.dest, name)
        if name.startswith(DIFFUSERS) and getattr(namespace, self.weights) in (None, parser.get_default(self.weights)):
            setattr(namespace, self.weights, name.removeprefix(DIFFUSERS))


def checked(text: str, check: Callable[[str], object]) -> str:
    try:
        check(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def enc_type(text: str) -> str:
    """An argparse type: names of encoders, joined by commas, or none."""
    from models.encoder_table import encoder_specs

    return checked(text, encoder_specs)


def features(text: str) -> str:
    """An argparse type: inception and encoders, joined by commas."""
    from weights.features import check_feature_names

    return checked(text, check_feature_names)


def enc_ckpt(text: str) -> str:
    """An argparse type: NAME=PATH, where PATH is a file or hf-hub:REPOSITORY[@REVISION]."""
    from weights.encoders import HUB_PREFIX

    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r}, expected NAME=PATH")
    path = expanded(path)
    if path.startswith(HUB_PREFIX):
        if not re.fullmatch(r"([\w.-]+/)?[\w.-]+(@\S+)?", path.removeprefix(HUB_PREFIX)):
            raise argparse.ArgumentTypeError(f"{path!r}, expected {HUB_PREFIX}REPOSITORY[@REVISION]")
    elif not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"weights of {name}: no such file {path}")
    return f"{name}={path}"


VAE_WEIGHTS = "weights: a file with its statistics beside, a folder of diffusers, or ORGANISATION/NAME on the hub"
POSITIVE = number(int, at_least=1)
COUNT = number(int, at_least=0)
RATE = number(float, above=0)
WEIGHT = number(float, at_least=0)
DECAY = number(float, at_least=0, below=1)
PROBABILITY = number(float, at_least=0, below=1 + 1e-9)
