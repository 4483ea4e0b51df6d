"""SiT: the diffusion transformer that predicts velocities, with projectors of its early tokens.

Architecture: DiT (Peebles & Xie, arXiv 2212.09748) as used by SiT (Ma et al., 2401.08740); projectors from REPA
(Yu et al., 2410.06940); the latent normaliser `bn` inside the model from REPA-E (Leng et al., 2504.10483). State-dict
keys are those of the published checkpoints.

The forward pass is the network alone: its input is normalised and noised latents, with dropped labels replaced by the
null label. The training step applies `sit.bn`, and diffusion/transport.py adds the noise.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

from models.numerics import GlobalBatchNorm2d, checkpointed_call

# size: (depth, width, heads). S to XL are the published ones; XXS and XS are for images of 32 and 64 pixels.
SIT_SIZES = {
    "SiT-XXS": (4, 64, 2),
    "SiT-XS": (8, 192, 3),
    "SiT-S": (12, 384, 6),
    "SiT-B": (12, 768, 12),
    "SiT-L": (24, 1024, 16),
    "SiT-XL": (28, 1152, 16),
}
PATCH_SIZES = (1, 2, 4, 8)
PROJECTOR_WIDTH = 2048
LATENT_NORM_EPS = 1e-4


def sincos_pos_embed(width: int, grid: int) -> Tensor:
    """Fixed 2-D sine-cosine position table, (1, grid², width) float32.

    The first half of the channels encodes the column, the second the row, each as [sin, cos] (MAE, He et al.,
    2111.06377, as DiT uses it).
    """
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    column = axis.repeat(grid, 1)
    row = axis.repeat_interleave(grid, dim=0)
    return torch.cat([column, row], dim=1).float()[None]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: x·(1 + scale) + shift, with x (B,T,D), shift and scale (B,D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class TimestepEmbedder(nn.Module):
    """256-dimensional sinusoid of t itself (cosines first, longest period 10000), then a two-layer MLP."""

    frequencies = 256

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """t (B,) in [0, 1] -> (B, width)."""
        half = self.frequencies // 2
        omega = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
        angles = t[:, None].float() * omega
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Table of class embeddings, with one more row for the null label if `has_null`."""

    def __init__(self, num_classes: int, width: int, has_null: bool):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + has_null, width)

    def forward(self, y: Tensor) -> Tensor:
        """y (B,) int64 -> (B, width)."""
        return self.embedding_table(y)


class SiTBlock(nn.Module):
    """Attention and MLP, each modulated and gated by the condition (adaLN-Zero)."""

    def __init__(self, width: int, heads: int, qk_norm: bool, fused_attn: bool):
        from timm.models.vision_transformer import Attention, Mlp  # here, so that --help needs no timm

        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads=heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=nn.LayerNorm)
        self.attn.fused_attn = fused_attn
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, 4 * width, act_layer=partial(nn.GELU, approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B,T,D), condition c (B,D) -> (B,T,D)."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_attn[:, None] * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Modulated LayerNorm and a linear layer to the latent values of a patch."""

    def __init__(self, width: int, out_features: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B,T,D), condition c (B,D) -> (B,T,out_features)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class MLPProjector(nn.Sequential):
    """REPA's projector: an MLP of each token, (B,T,width) -> (B,T,z_dim)."""

    def __init__(self, width: int, z_dim: int, grid: int):
        first, second = nn.Linear(width, PROJECTOR_WIDTH), nn.Linear(PROJECTOR_WIDTH, PROJECTOR_WIDTH)
        super().__init__(first, nn.SiLU(), second, nn.SiLU(), nn.Linear(PROJECTOR_WIDTH, z_dim))


class ConvProjector(nn.Conv2d):
    """iREPA's projector (Singh et al., arXiv 2512.10794): a 3x3 convolution over the grid of tokens."""

    def __init__(self, width: int, z_dim: int, grid: int):
        super().__init__(width, z_dim, kernel_size=3, padding=1)
        self.grid = grid

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, grid², width) -> (B, grid², z_dim)."""
        image = tokens.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return super().forward(image).flatten(2).transpose(1, 2)


PROJECTORS = {"mlp": MLPProjector, "conv": ConvProjector}


class SiT(nn.Module):
    """Velocity network v(x, t, y) over latents (B, in_channels, input_size, input_size).

    `null_label` is the index of the null label (num_classes), or None if class_dropout_prob is 0. `bn` is the latent
    normaliser, which the training step applies, not `forward`. With `recompute`, the backward pass computes the blocks
    again.
    """

    recompute = False

    def __init__(
        self,
        depth: int = 28,
        width: int = 1152,
        heads: int = 16,
        patch_size: int = 2,
        input_size: int = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        z_dims: tuple[int, ...] = (768,),
        projector: str = "mlp",
        encoder_depth: int = 8,
        bn_momentum: float = 0.1,
        qk_norm: bool = False,
        fused_attn: bool = True,
    ):
        from timm.models.vision_transformer import PatchEmbed

        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"the latent is {input_size}x{input_size}, which patch size {patch_size} does not divide")
        if not 1 <= encoder_depth <= depth:
            raise ValueError(f"encoder depth {encoder_depth} is outside this transformer's blocks 1 to {depth}")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.encoder_depth, self.num_classes = encoder_depth, num_classes
        self.null_label = num_classes if class_dropout_prob > 0 else None
        self.grid = input_size // patch_size

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, width)
        self.pos_embed = nn.Parameter(sincos_pos_embed(width, self.grid), requires_grad=False)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width, class_dropout_prob > 0)
        self.blocks = nn.ModuleList(SiTBlock(width, heads, qk_norm, fused_attn) for _ in range(depth))
        self.projectors = nn.ModuleList(PROJECTORS[projector](width, z_dim, self.grid) for z_dim in z_dims)
        self.final_layer = FinalLayer(width, patch_size**2 * in_channels)
        self.bn = GlobalBatchNorm2d(in_channels, eps=LATENT_NORM_EPS, momentum=bn_momentum, affine=False)
        self.initialise()

    def initialise(self) -> None:
        """DiT's initialisation: every block is the identity and the output is zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.adaLN_modulation[-1].weight)
        nn.init.zeros_(self.final_layer.adaLN_modulation[-1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    @torch.no_grad()
    def set_latent_statistics(self, scale: Tensor, bias: Tensor) -> None:
        """Set the normaliser to a VAE's statistics, (1,C,1,1) each: running_var = 1/scale², running_mean = bias."""
        self.bn.running_mean.copy_(bias.flatten())
        self.bn.running_var.copy_(scale.flatten() ** -2)

    def latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Scale 1/sqrt(running_var), without eps, and bias running_mean of the latents, (1,C,1,1) each."""
        return torch.rsqrt(self.bn.running_var)[None, :, None, None], self.bn.running_mean[None, :, None, None]

    def denormalise(self, z_norm: Tensor) -> Tensor:
        """Normalised latents (B,C,h,w) -> the VAE's latents: z_norm/scale + bias."""
        scale, bias = self.latent_statistics()
        return z_norm / scale + bias

    def unpatchify(self, x: Tensor) -> Tensor:
        """(B, T, patch²·C), channel last within a patch, -> (B, C, H, W)."""
        x = x.unflatten(1, (self.grid, self.grid)).unflatten(3, (self.patch_size, self.patch_size, self.in_channels))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, depth: int | None = None, project: bool = True
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Velocity at x and the projected tokens of block `encoder_depth`.

        Args:
            x: normalised, noised latents, (B, C, H, W).
            t: (B,) in [0, 1]; 0 is data, 1 is noise.
            y: (B,) int64 labels, `null_label` where dropped.
            depth: stop after this block (1-based, at least `encoder_depth`); the velocity is then None.
            project: whether tokens are projected; sampling does not need them.

        Returns:
            velocity (B, C, H, W) or None, and with `project` one (B, T, z_dim) tensor per projector.
        """
        tokens = []
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for number, block in enumerate(self.blocks[:depth], start=1):
            x = checkpointed_call(block, x, c, recompute=self.recompute)
            if project and number == self.encoder_depth:
                tokens = [projector(x) for projector in self.projectors]
        if depth is not None:
            return None, tokens
        return self.unpatchify(self.final_layer(x, c)), tokens


SiT_models = {
    f"{name}/{patch}": partial(SiT, depth=depth, width=width, heads=heads, patch_size=patch)
    for name, (depth, width, heads) in SIT_SIZES.items()
    for patch in PATCH_SIZES
}
