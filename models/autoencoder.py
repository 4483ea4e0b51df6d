"""The KL autoencoder of latent diffusion (Rombach et al., arXiv 2112.10752): image in [-1, 1] <-> latent z.

State-dict keys are those of CompVis's AutoencoderKL, in which SD-VAE, IN-VAE, VA-VAE and the E2E-VAEs are published.
`VAE_CONFIGS` has one row per architecture.
"""

from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.numerics import channels_last, checkpointed_call, float32_or_wider

LOGVAR_RANGE = (-30.0, 20.0)
EVERYTHING = 100  # levels


@dataclass(frozen=True)
class VAEConfig:
    """An architecture.

    `widths` are the channels of each level, from full resolution down. A decoder level has one block more than
    `encoder_blocks`. `scaling_factor` and `shift_factor` are the published normaliser, z_norm = (z - shift)·scaling,
    where all published weights of the architecture share it; comparing two architectures ignores them.
    """

    z_channels: int
    widths: tuple[int, ...]
    encoder_blocks: int = 2
    attention_levels: tuple[int, ...] = ()
    middle_attention: bool = True
    quant_conv: bool = True
    post_quant_conv: bool = True
    norm_groups: int = 32
    scaling_factor: float | None = field(default=None, compare=False)
    shift_factor: float = field(default=0.0, compare=False)

    @property
    def downsampling(self) -> int:
        """Ratio of the sides of image and latent."""
        return 2 ** (len(self.widths) - 1)

    def described(self) -> dict:
        """The architecture as plain data: VAEConfig(**described) is equal to this one."""
        return {part.name: getattr(self, part.name) for part in fields(self) if part.compare}

    def build(self) -> "AutoencoderKL":
        """The autoencoder, freshly initialised."""
        return AutoencoderKL(self)


F8 = (128, 256, 512, 512)
NO_QUANT = {"quant_conv": False, "post_quant_conv": False}
VAE_CONFIGS = {
    "f8d4": VAEConfig(4, F8),
    "f16d32": VAEConfig(32, (128, 128, 256, 256, 512), attention_levels=(4,)),
    "flux-f8d16": VAEConfig(16, F8, **NO_QUANT, scaling_factor=0.3611, shift_factor=0.1159),
    "sd35-f8d16": VAEConfig(16, F8, **NO_QUANT, scaling_factor=1.5305, shift_factor=0.0609),
    # for images of 32 and 64 pixels
    "f4d4-small": VAEConfig(4, (64, 128, 128), encoder_blocks=1),
    "f8d4-small": VAEConfig(4, (64, 128, 128, 256), encoder_blocks=1),
    "f4d4-tiny": VAEConfig(4, (32, 32, 32), encoder_blocks=1),
}


class Posterior(NamedTuple):
    """Diagonal Gaussian over latents: mean and log-variance, (B,C,h,w) each, float32 or wider.

    That of a deterministic autoencoder has no log-variance: its standard deviation and its divergence are 0.
    """

    mean: Tensor
    logvar: Tensor | None = None

    @property
    def std(self) -> Tensor:
        """Standard deviation, (B,C,h,w)."""
        return torch.zeros_like(self.mean) if self.logvar is None else torch.exp(0.5 * self.logvar)

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std·noise, with N(0,1) `noise` (B,C,h,w)."""
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """KL divergence from N(0, I) of each image, (B,): 0.5·sum(mean² + var - 1 - logvar)."""
        if self.logvar is None:
            return torch.zeros_like(self.mean[:, 0, 0, 0])
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).sum((1, 2, 3))


def group_norm(groups: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two GroupNorm-swish-convolution stages with a skip connection."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = group_norm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over positions, with 1x1 convolutions as projections."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = group_norm(groups, channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Stride-2 convolution, padded on the right and below only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention if `attention`."""

    def __init__(self, in_channels: int, channels: int, blocks: int, attention: bool, groups: int):
        super().__init__()
        before = [in_channels, *[channels] * (blocks - 1)]
        self.block = nn.ModuleList(ResnetBlock(width, channels, groups) for width in before)
        self.attn = nn.ModuleList(AttnBlock(channels, groups) for _ in range(blocks if attention else 0))

    def stages(self) -> list[nn.Module]:
        """What is applied in turn; the change of resolution is last."""
        found = []
        for i, block in enumerate(self.block):
            found += [block, self.attn[i]] if self.attn else [block]
        return found + [part for name, part in self.named_children() if name in ("downsample", "upsample")]


def in_turn(stages: list[nn.Module], x: Tensor, recompute: bool) -> Tensor:
    """Apply `stages` to x; with `recompute`, each is computed again in the backward pass."""
    for stage in stages:
        x = checkpointed_call(stage, x, recompute=recompute)
    return x


def middle(config: VAEConfig) -> nn.ModuleDict:
    """The bottleneck of encoder and decoder: block, attention if the architecture has it, block."""
    channels, groups = config.widths[-1], config.norm_groups
    modules = {"block_1": ResnetBlock(channels, channels, groups)}
    if config.middle_attention:
        modules["attn_1"] = AttnBlock(channels, groups)
    return nn.ModuleDict({**modules, "block_2": ResnetBlock(channels, channels, groups)})


class Encoder(nn.Module):
    """Image (B,3,R,R) -> features (B, 2·z_channels, r, r).

    The `recompute` finest levels are computed again in the backward pass; more than there are: all but the first layer.
    """

    recompute = 0

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.widths, config.norm_groups
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for i, (previous, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            level = Level(previous, width, config.encoder_blocks, i in config.attention_levels, groups)
            if i < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = middle(config)
        self.norm_out = group_norm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)
        self.head = (nn.Sequential(self.norm_out, nn.SiLU(), self.conv_out),)  # in a tuple: adds no state-dict keys

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for number, level in enumerate(self.down):
            x = in_turn(level.stages(), x, number < self.recompute)
        return in_turn([*self.mid.values(), *self.head], x, self.recompute > len(self.down))


class Decoder(nn.Module):
    """Features (B, z_channels, r, r) -> image (B,3,R,R). `up` is indexed by resolution: up.0 is the finest level.

    The `recompute` finest levels are computed again in the backward pass; more than there are: all but the first layer.
    """

    recompute = 0

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.widths, config.norm_groups
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = middle(config)
        self.up = nn.ModuleList()
        for i, (width, previous) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True)):
            level = Level(previous, width, config.encoder_blocks + 1, i in config.attention_levels, groups)
            if i > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = group_norm(groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)
        self.head = (nn.Sequential(self.norm_out, nn.SiLU(), self.conv_out),)  # in a tuple: adds no state-dict keys

    def forward(self, z: Tensor) -> Tensor:
        x = in_turn(list(self.mid.values()), self.conv_in(z), self.recompute > len(self.up))
        for number, level in reversed(list(enumerate(self.up))):
            x = in_turn(level.stages(), x, number < self.recompute)
        return in_turn(list(self.head), x, self.recompute > 0)


class Autoencoder(nn.Module):
    """An autoencoder of some `config`; `forward` is the one pass that training needs (and that
    DistributedDataParallel wraps).

    `parts` are its encoder and its decoder, which can be compiled.
    """

    def forward(self, image: Tensor, noise: Tensor) -> tuple[Posterior, Tensor, Tensor]:
        """Posterior, its sample z made with N(0,1) `noise` (B,C,h,w), and the reconstruction from z."""
        posterior = self.encode(image)
        z = posterior.sample(noise)
        return posterior, z, self.decode(z)


class AutoencoderKL(Autoencoder):
    """The autoencoder of a row of `VAE_CONFIGS`, or of diffusers' class of the same name."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        moments, channels = 2 * config.z_channels, config.z_channels
        self.quant_conv = nn.Conv2d(moments, moments, 1) if config.quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.post_quant_conv else nn.Identity()
        channels_last(self)

    @property
    def parts(self) -> list[nn.Module]:
        return [self.encoder, self.decoder]

    def recompute(self, levels: int) -> None:
        """Compute the activations of the finest `levels` again in the backward pass; of all, from EVERYTHING on."""
        self.encoder.recompute = self.decoder.recompute = levels

    def encode(self, image: Tensor) -> Posterior:
        """image (B,3,R,R) in [-1, 1] -> posterior over (B,C,R/f,R/f)."""
        mean, logvar = float32_or_wider(self.quant_conv(self.encoder(image))).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*LOGVAR_RANGE))

    def decode(self, z: Tensor) -> Tensor:
        """un-normalised z (B,C,h,w) -> image (B,3,h·f,w·f), float32 or wider, about [-1, 1]."""
        return float32_or_wider(self.decoder(self.post_quant_conv(z)))


def pixels_to_image(pixels: Tensor) -> Tensor:
    """uint8 pixels (B,3,R,R) -> float32 image in [-1, 1]: pixels/127.5 - 1. The only place where this is done.

    The image is laid out as the networks' convolutions have it: channels last.
    """
    return pixels.float(memory_format=torch.channels_last) / 127.5 - 1


def image_to_pixels(image: Tensor) -> Tensor:
    """Image (B,3,R,R) in [-1, 1] -> uint8 pixels, rounded and clamped. The only place where this is done."""
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
