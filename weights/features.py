"""The networks of metrics/features.py with their trained weights: from files, packages or downloads."""

import argparse
import hashlib
from pathlib import Path

import torch
from torch import Tensor

from errors import UserError
from loss.lpips import LPIPS, trained_lpips
from metrics.features import (
    CONVOLUTION_GRID,
    ENCODER_GRID,
    EncoderFeatures,
    FeatureNetwork,
    Inception,
    dinov2_positions,
)
from models.encoders import Encoder, encoder_spec, unwrapped
from weights.checkpoint_io import read_checkpoint
from weights.downloads import download, first_on_each_machine, is_offline
from weights.encoders import given_files, load_encoder_weights, weights_file


def check_feature_names(text: str) -> list[str]:
    """The names in a --features: inception, and encoders of models/encoders.py, joined by commas.

    Raises:
        UserError: an unknown or repeated name.
    """
    names = text.split(",")
    for name in names:
        if name != "inception":
            encoder_spec(name)
        if names.count(name) > 1:
            raise UserError(f"{name} is named twice")
    return names


def load_feature_networks(names: list[str], args: argparse.Namespace, device: torch.device) -> list[FeatureNetwork]:
    """The networks with these names, on `device`; the flags say where weights lie, as for alignment.

    Raises:
        UserError: weights cannot be had, or are another network's.
    """
    given, offline = given_files(args), is_offline(args)
    files = first_on_each_machine(
        lambda: {
            name: inception_file(args.inception_weights, offline)
            if name == "inception"
            else weights_file(name, encoder_spec(name), given.get(name), offline)
            for name in names
        }
    )
    networks = []
    for name, path in files.items():
        module = load_inception(path) if name == "inception" else load_encoder(name, path)
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        networks.append(FeatureNetwork(name, module.to(device), path, sha256))
    return networks


@torch.no_grad()
def load_encoder(name: str, path: Path) -> EncoderFeatures:
    """An encoder that sees whole images at its usual input size."""
    spec = encoder_spec(name)
    encoder = Encoder(spec, CONVOLUTION_GRID if spec.any_grid else ENCODER_GRID)
    content = load_encoder_weights(encoder, name, path)
    if name.startswith("dinov2-vit"):  # those with registers are resampled as timm does
        table = unwrapped(content, spec.inside)["pos_embed"]
        encoder.network.pos_embed.copy_(dinov2_positions(table, ENCODER_GRID))
    return EncoderFeatures(encoder)


def inception_file(given: str | None, offline: bool) -> Path:
    """torch-fidelity's Inception-2015 weights: the file that was given, its copy on this machine, or a download."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    if given is not None:
        return Path(given)
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    if path.is_file():
        return path
    advice = (
        f"put {path.name} of torch-fidelity's release v0.2.0 at {path}, or name the file by --inception-weights; or "
        "compare other features, like --features efficientnet-lite0"
    )
    if offline:
        raise UserError(f"weights of inception: not on this machine, and offline; {advice} ({URL_INCEPTION_V3})")
    return download("weights of inception", URL_INCEPTION_V3, path, advice, sha256=path.stem.rsplit("-", 1)[1])


def load_inception(path: Path) -> Inception:
    """Inception-2015 with a file's weights, which are checked to be plain data before torch-fidelity reads them."""
    read_checkpoint(path, "weights of inception")
    try:
        return Inception(path)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"weights of inception {path}: not torch-fidelity's Inception-2015 ({reason})") from error


def load_lpips(vgg_path: str | None, offline: bool = False) -> LPIPS:
    """LPIPS with VGG16's trained convolutions from `vgg_path`, or by torchvision's download of IMAGENET1K_V1.

    The v0.1 linear heads are those in the installed lpips package (md5 d507d7349b931f0638a25a48a722f98a).

    Raises:
        UserError: a file is missing or lacks weights, or the download failed or, if `offline`, would be needed.
    """
    import importlib.util

    if vgg_path is None:
        vgg = first_on_each_machine(lambda: torchvision_vgg16(offline))
    else:
        vgg = read_checkpoint(vgg_path, "VGG16 weights")
    package = Path(importlib.util.find_spec("lpips").origin).parent
    try:
        return trained_lpips(vgg, read_checkpoint(package / "weights/v0.1/vgg.pth", "LPIPS heads"))
    except KeyError as error:
        raise UserError(f"VGG16 weights {vgg_path}: no {error.args[0]}; expected torchvision's state dict") from error


def torchvision_vgg16(offline: bool) -> dict[str, Tensor]:
    """torchvision's VGG16 (IMAGENET1K_V1), downloaded unless it is on this machine."""
    from torchvision.models import VGG16_Weights

    weights = VGG16_Weights.IMAGENET1K_V1
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    advice = f"put torchvision's {cached.name} at {cached}, or name the file by --lpips-vgg-ckpt"
    if not cached.is_file():
        if offline:
            raise UserError(f"VGG16 for LPIPS is not on this machine, and offline; {advice}")
        download("VGG16 for LPIPS", weights.url, cached, advice, sha256=cached.stem.rsplit("-", 1)[1])
    return read_checkpoint(cached, "VGG16 weights")
