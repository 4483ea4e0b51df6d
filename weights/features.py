"""The networks of metrics/features.py and LPIPS with their trained weights: from files, packages or downloads."""

import argparse
import hashlib
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from loss.lpips import LPIPS
from metrics.features import (
    EncoderFeatures,
    FeatureNetwork,
    Inception,
    dinov2_positions,
)
from models.encoder_table import encoder_spec
from models.encoders import Encoder, unwrapped
from weights.checkpoint_io import load_weights, read_checkpoint
from weights.downloads import first_on_each_machine, is_offline, torch_hub_file
from weights.encoders import given_files, load_encoder_weights, weights_file


def check_feature_names(text: str) -> list[str]:
    """The names in a --features: inception, and encoders of models/encoder_table.py, joined by commas."""
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name != "inception":
            encoder_spec(name)
    return names


def load_feature_networks(
    names: list[str], args: argparse.Namespace, device: torch.device, autocast: Callable = nullcontext
) -> list[FeatureNetwork]:
    """The networks with these names, on `device`, from --inception-weights, --enc-ckpt or their usual places.

    Encoders run within `autocast()`.
    """
    given, offline = given_files(args), is_offline(args)

    def file_of(name: str) -> Path:
        if name == "inception":
            return inception_file(args.inception_weights, offline)
        return weights_file(name, encoder_spec(name), given.get(name), offline)

    files = first_on_each_machine(lambda: {name: file_of(name) for name in names})
    networks = []
    for name, path in files.items():
        module = load_inception(path) if name == "inception" else load_encoder(name, path, autocast)
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        networks.append(FeatureNetwork(name, module.to(device), path, sha256))
    return networks


@torch.no_grad()
def load_encoder(name: str, path: Path, autocast: Callable = nullcontext) -> EncoderFeatures:
    """An encoder that sees whole images at its usual input size."""
    spec = encoder_spec(name)
    encoder = Encoder(spec, spec.feature_grid)
    content = load_encoder_weights(encoder, name, path)
    if name.startswith("dinov2-vit"):  # those with registers are resampled as timm does
        table = unwrapped(content, spec.inside)["pos_embed"]
        encoder.network.pos_embed.copy_(dinov2_positions(table, spec.feature_grid))
    return EncoderFeatures(encoder, autocast)


def inception_file(given: str | None, offline: bool) -> Path:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    advice = (
        "put {name} of torch-fidelity's release v0.2.0 at {path}, or name the file by --inception-weights; or "
        "compare other features, like --features efficientnet-lite0"
    )
    return Path(given) if given else torch_hub_file("weights of inception", URL_INCEPTION_V3, offline, advice)


def load_inception(path: Path) -> Inception:
    """Inception-2015 with a file's weights, which are checked to be plain data before torch-fidelity reads them."""
    read_checkpoint(path, "weights of inception", refuse_unknown=True)
    return Inception(path)


def load_lpips(vgg_path: str | None, offline: bool = False) -> LPIPS:
    """LPIPS with VGG16's trained convolutions from `vgg_path`, or by torchvision's download of IMAGENET1K_V1.

    The v0.1 linear heads are those in the installed lpips package (md5 d507d7349b931f0638a25a48a722f98a).
    """
    from torchvision.models import VGG16_Weights

    if vgg_path is None:
        url = VGG16_Weights.IMAGENET1K_V1.url
        advice = "put torchvision's {name} at {path}, or name the file by --lpips-vgg-ckpt"
        vgg_path = first_on_each_machine(lambda: torch_hub_file("VGG16 for LPIPS", url, offline, advice))
    package = Path(importlib.util.find_spec("lpips").origin).parent
    model, vgg = LPIPS(), read_checkpoint(vgg_path, "VGG16 weights")
    state = read_checkpoint(package / "weights/v0.1/vgg.pth", "LPIPS heads")
    for key, value in model.state_dict().items():
        name = "features." + key.split(".", 2)[-1]  # net.slice3.10.weight is torchvision's features.10.weight
        if key.startswith("scaling_layer."):
            state[key] = value
        elif name in vgg:
            state[key] = vgg[name]
    load_weights(model, state, f"VGG16 weights {vgg_path}")
    return model.eval()
