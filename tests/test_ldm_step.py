"""The step on cached latents: what it samples, normalises by and leaves alone."""

import contextlib
import copy

import torch

import published
from diffusion.transport import interpolate
from train_ldm_only import ldm_step
from training.loop import Batch
from training.optimizer import Optimizer
from training.randomness import Draws, Rows
from training.transformer_step import TransformerNets, TransformerStepConfig, copy_for_ema

CPU = torch.device("cpu")
CONFIG = TransformerStepConfig(autocast=contextlib.nullcontext, ema_decay=0.5)


def nets(encoders=(), **options) -> TransformerNets:
    sit = published.fresh_sit().train()
    optimizer = Optimizer(sit.parameters(), CPU, **options)
    return TransformerNets(sit=sit, ema=copy_for_ema(sit), encoders=list(encoders), opt_sit=optimizer)


def toy_encoder(pixels: torch.Tensor) -> torch.Tensor:
    """Tokens (B,16,112) for pixels (B,3,32,32), as an encoder gives them."""
    return pixels.double().flatten(1)[:, : 16 * 112].unflatten(1, (16, 112))


def batch_and_draws(count: int = 4) -> tuple[Batch, Draws]:
    generator = torch.Generator().manual_seed(3)

    def normal() -> torch.Tensor:
        return torch.randn(count, 4, 8, 8, generator=generator)

    moments = torch.cat([normal(), normal().abs() + 0.1], dim=1)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    batch = Batch(pixels, torch.arange(count) % 3, 0, Rows(0, count), moments)
    drop = torch.arange(count) % 2 == 1
    return batch, Draws(normal(), normal(), torch.rand(count, generator=generator), drop)


def test_loss_is_the_formulas_on_a_sample_of_the_cached_posterior():
    batch, draws = batch_and_draws()
    mine = nets()
    before = copy.deepcopy(mine.sit)
    metrics = ldm_step(mine, batch, draws, CONFIG)
    mean, std = batch.moments[:, :4], batch.moments[:, 4:]
    scale, bias = (value.reshape(1, 4, 1, 1) for value in published.STATISTICS.values())
    z_norm = (mean + std * draws.posterior - bias) / (scale**-2 + 1e-4).sqrt()
    x_t, velocity = interpolate("linear", z_norm, draws.noise, draws.t)
    labels = torch.where(draws.drop, torch.tensor(3), batch.labels)
    with torch.no_grad():
        expected = (before(x_t, draws.t, labels)[0] - velocity).square().mean()
    torch.testing.assert_close(metrics["denoising_loss"], expected)
    assert "proj_loss" not in metrics


def test_latent_statistics_stay_and_everything_else_moves():
    batch, draws = batch_and_draws()
    mine = nets(encoders=[toy_encoder])
    before = copy.deepcopy(mine.sit.state_dict())
    metrics = ldm_step(mine, batch, draws, CONFIG)
    assert -1 <= float(metrics["proj_loss"]) <= 1
    for key, value in mine.sit.state_dict().items():
        fixed = key.startswith("bn.") or key == "pos_embed"
        assert torch.equal(value, before[key]) == fixed, key
        average = mine.ema.state_dict()[key]
        torch.testing.assert_close(average, (before[key] + value) / 2 if value.is_floating_point() else value)
