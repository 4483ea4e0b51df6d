"""Any autoencoder of diffusers that encodes images, with the interface of models/autoencoder.py.

A video network encodes an image as a video of one frame. One without a posterior is deterministic.
"""

import inspect
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.autoencoder import Autoencoder, Posterior
from models.numerics import channels_last, float32_or_wider

# of config.json: what describes latents, not the network
FACTORS = ("scaling_factor", "shift_factor")
STATISTICS = {*FACTORS, "latents_mean", "latents_std"}
PROBE_SIDE = 256  # a multiple of every published factor


class Probe(NamedTuple):
    """What a pass of one image shows of an architecture."""

    is_video: bool
    z_channels: int
    downsampling: int
    unused: frozenset[str]  # parameters without a gradient, like those that only later frames of a video reach


@dataclass(frozen=True)
class DiffusersConfig:
    """An architecture of diffusers: `settings` is its config.json, complete and without the statistics of latents.

    The factors are as in `VAEConfig`.
    """

    settings: dict
    scaling_factor: float | None = field(default=None, compare=False)
    shift_factor: float = field(default=0.0, compare=False)

    @classmethod
    def from_json(cls, found: dict) -> "DiffusersConfig":
        """The architecture in the content of a config.json.

        Raises:
            ValueError: it is of no autoencoder of diffusers, or of none that reconstructs single images.
        """
        known = inspect.signature(type_of(found)).parameters.keys() - STATISTICS
        own = {key: value for key, value in found.items() if key in known or key == "_class_name"}
        with torch.device("meta"):
            complete = json.loads(json.dumps(dict(network_of(own).config)))
        settings = {key: value for key, value in complete.items() if key in known}
        factors = {key: float(found[key]) for key in FACTORS if found.get(key) is not None}
        config = cls({"_class_name": found["_class_name"], **settings}, **factors)
        _ = config.probe  # raises
        return config

    def build(self) -> "DiffusersAutoencoder":
        """The autoencoder, freshly initialised."""
        return DiffusersAutoencoder(self)

    def described(self) -> dict:
        """The architecture as plain data: DiffusersConfig(**described) is equal to this one."""
        return {"settings": self.settings}

    @cached_property
    def probe(self) -> Probe:
        """Found by a pass of one image and its gradients on the meta device, without data."""
        failures = []
        for is_video, form in enumerate(("an image", "a video of one frame")):
            try:
                return probed(self.settings, bool(is_video))
            except (RuntimeError, TypeError, ValueError) as error:
                failures.append(f"{form} ({str(error).splitlines()[0]})")
        raise ValueError(f"reconstructs neither {' nor '.join(failures)}")

    @property
    def z_channels(self) -> int:
        return self.probe.z_channels

    @property
    def downsampling(self) -> int:
        """Ratio of the sides of image and latent."""
        return self.probe.downsampling

    def takes(self, setting: str) -> bool:
        """Whether the class has this setting."""
        return setting in inspect.signature(type_of(self.settings)).parameters


class DiffusersAutoencoder(Autoencoder):
    """A network of diffusers, in its own state-dict keys below `network.`.

    Parameters that no image reaches have no gradients: DistributedDataParallel would wait for them.
    """

    def __init__(self, config: DiffusersConfig):
        super().__init__()
        self.config = config
        self.network = network_of(config.settings)
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name not in config.probe.unused)
        channels_last(self)

    @property
    def parts(self) -> list[nn.Module]:
        return [self.network.encoder, self.network.decoder]

    def recompute(self, levels: int) -> None:
        """Compute all activations again in the backward pass, unless `levels` is 0; a ValueError if the class does not
        support it."""
        if levels:
            self.network.enable_gradient_checkpointing()

    def encode(self, image: Tensor) -> Posterior:
        """image (B,3,R,R) in [-1, 1] -> posterior over (B,C,R/f,R/f)."""
        return encode(self.network, image, self.config.probe.is_video)

    def decode(self, z: Tensor) -> Tensor:
        """un-normalised z (B,C,h,w) -> image (B,3,h·f,w·f), float32 or wider, about [-1, 1]."""
        return decode(self.network, z, self.config.probe.is_video)


def type_of(settings: dict) -> type:
    """The class of diffusers that a config.json names; a ValueError if it is no autoencoder."""
    import diffusers  # here, because importing it takes seconds

    name = settings["_class_name"]
    if "Autoencoder" not in name or not hasattr(diffusers, name):
        raise ValueError(f"no autoencoder of diffusers {diffusers.__version__}")
    return getattr(diffusers, name)


def network_of(settings: dict) -> nn.Module:
    return type_of(settings).from_config(settings)


def encode(network: nn.Module, image: Tensor, is_video: bool) -> Posterior:
    output = network.encode(image[:, :, None] if is_video else image)
    found = output.latent_dist if hasattr(output, "latent_dist") else output[0]
    moments = (found.mean, found.logvar) if hasattr(found, "logvar") else (found,)
    return Posterior(*(float32_or_wider(x[:, :, 0] if is_video else x) for x in moments))


def decode(network: nn.Module, z: Tensor, is_video: bool) -> Tensor:
    recon = network.decode(z[:, :, None] if is_video else z).sample
    return float32_or_wider(recon[:, :, 0] if is_video else recon)


@torch.enable_grad()
def probed(settings: dict, is_video: bool) -> Probe:
    """A `Probe` of the network that takes images, or videos of one frame.

    Raises:
        RuntimeError, TypeError, ValueError: it does not take those, or reconstructs another shape.
    """
    with torch.device("meta"):
        network, image = network_of(settings), torch.empty(1, 3, PROBE_SIDE, PROBE_SIDE)
        posterior = encode(network, image, is_video)
        recon = decode(network, posterior.sample(torch.empty_like(posterior.mean)), is_video)
    if recon.shape != image.shape:
        raise ValueError(f"reconstructions are of shape {tuple(recon.shape)}")
    recon.sum().backward()
    unused = frozenset(name for name, parameter in network.named_parameters() if parameter.grad is None)
    return Probe(is_video, posterior.mean.shape[1], PROBE_SIDE // posterior.mean.shape[-1], unused)
