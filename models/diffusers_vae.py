"""Any autoencoder of diffusers that encodes images, with the interface of models/autoencoder.py.

A video network encodes an image as a video of one frame. One without a posterior is deterministic.
"""

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from errors import one_line
from models.autoencoder import Autoencoder, Posterior, VAEConfig
from models.numerics import channels_last, float32_or_wider

# of config.json: what describes latents, not the network
STATISTICS = {"scaling_factor", "shift_factor", "latents_mean", "latents_std"}
PROBE_SIDE = 256  # a multiple of every published factor


class Probe(NamedTuple):
    """What a pass of one image shows of an architecture."""

    is_video: bool
    z_channels: int
    downsampling: int
    unused: frozenset[str]  # parameters without a gradient, like those that only later frames of a video reach


@dataclass(frozen=True)
class DiffusersConfig:
    """An architecture of diffusers: `settings` are the class and those of config.json that differ from its defaults,
    without the statistics of latents."""

    settings: dict

    @classmethod
    def from_json(cls, found: dict) -> "DiffusersConfig":
        """The architecture in the content of a config.json.

        Raises:
            ValueError: it is of no autoencoder of diffusers, or of none that reconstructs single images.
        """
        defaults = defaults_of(found)
        own = {key: value for key, value in found.items() if key in defaults and value != defaults[key]}
        config = cls({"_class_name": found["_class_name"], **own})
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
        """Found by a pass of one image and its gradients, on tensors without memory."""
        return probe_of(json.dumps(self.settings, sort_keys=True))

    @property
    def z_channels(self) -> int:
        return self.probe.z_channels

    @property
    def downsampling(self) -> int:
        """Ratio of the sides of image and latent."""
        return self.probe.downsampling

    def to_json(self) -> dict:
        """All settings, as config.json has them."""
        return {**defaults_of(self.settings), **self.settings}

    def takes(self, setting: str) -> bool:
        """Whether the class has this setting."""
        return setting in inspect.signature(type_of(self.settings)).parameters


Architecture = VAEConfig | DiffusersConfig


class DiffusersAutoencoder(Autoencoder):
    """A network of diffusers, in its own state-dict keys below `network.`, always in eval mode: as its batch norms,
    noise and dropout are when it is used.

    Parameters that no image reaches have no gradients: DistributedDataParallel would wait for them.
    """

    def __init__(self, config: DiffusersConfig):
        super().__init__()
        self.config = config
        self.network = network_of(config.settings).eval()
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name not in config.probe.unused)
        for module in self.network.modules():
            if hasattr(module, "apply_linear_attention"):  # of DC-AE, whose denominator is 0 in half precision
                module.apply_linear_attention = partial(in_float32, module.apply_linear_attention)
        channels_last(self)

    def train(self, mode: bool = True) -> "DiffusersAutoencoder":
        return super().train(False)

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


def defaults_of(settings: dict) -> dict:
    """The settings of a class and their defaults as JSON has them, None where there is none; without statistics."""
    parameters = inspect.signature(type_of(settings)).parameters.values()
    known = {p.name: None if p.default is p.empty else p.default for p in parameters if p.name not in STATISTICS}
    return json.loads(json.dumps(known))


def network_of(settings: dict) -> nn.Module:
    return type_of(settings).from_config(settings)


def in_float32(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function` of `inputs`, computed in float32 also where autocast is on."""
    with torch.autocast(inputs[0].device.type, enabled=False):
        return function(*(x.float() for x in inputs))


def encode(network: nn.Module, image: Tensor, is_video: bool) -> Posterior:
    output = network.encode(image[:, :, None] if is_video else image)
    found = output.latent_dist if hasattr(output, "latent_dist") else output[0]
    if isinstance(found, Tensor):
        moments = (found,)
    else:
        moments = (found.mean, found.logvar) if hasattr(found, "logvar") else (found.mode(),)
    return Posterior(*(float32_or_wider(x[:, :, 0] if is_video else x) for x in moments))


def decode(network: nn.Module, z: Tensor, is_video: bool) -> Tensor:
    frames = {"num_frames": 1} if "num_frames" in inspect.signature(network.decode).parameters else {}
    recon = network.decode(z[:, :, None] if is_video else z, **frames).sample
    return float32_or_wider(recon[:, :, 0] if is_video else recon)


@cache
def probe_of(settings: str) -> Probe:
    """The `Probe` of an architecture whose settings are this JSON; a ValueError if no image passes through it."""
    failures = []
    for is_video, form in enumerate(("an image", "a video of one frame")):
        try:
            return probed(json.loads(settings), bool(is_video))
        except Exception as error:  # whatever a class of diffusers raises
            failures.append(f"{form} ({type(error).__name__}: {one_line(error)})")
    raise ValueError(f"reconstructs neither {' nor '.join(failures)}")


@torch.enable_grad()
def probed(settings: dict, is_video: bool) -> Probe:
    """A `Probe` of the network that takes images, or videos of one frame; raises an Exception if it does not."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        network, image = network_of(settings), torch.empty(1, 3, PROBE_SIDE, PROBE_SIDE)
        posterior = encode(network, image, is_video)
        recon = decode(network, posterior.sample(torch.empty_like(posterior.mean)), is_video)
        if recon.shape != image.shape:
            raise ValueError(f"reconstructions are of shape {tuple(recon.shape)}")
        recon.sum().backward()
    unused = frozenset(name for name, parameter in network.named_parameters() if parameter.grad is None)
    return Probe(is_video, posterior.mean.shape[1], PROBE_SIDE // posterior.mean.shape[-1], unused)
