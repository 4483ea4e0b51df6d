"""The step on cached latents: what it samples, normalises by and leaves alone."""

import contextlib
import copy

import torch

import published
from diffusion.transport import interpolate
from scripts import TINY, TINY_SIT, call, records
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


def test_a_run_continues_with_other_micro_batches_but_no_other_flags(tmp_path, tiny_data):
    vae_path = published.write_vae(tmp_path / "vae")
    cached = ("--vae-latents-name", "cache", "--num-workers", 0)
    where = ("--data-dir", tiny_data, "--output-dir", tmp_path)
    assert call("cache_latents.py", *where, *cached, "--vae-arch", published.VAE, "--vae-ckpt-path", vae_path)[0] == 0
    where = ("--data-dir", tmp_path, "--output-dir", tmp_path, "--exp-name", "run", "--vae-ckpt", vae_path)
    flags = (*TINY, *TINY_SIT, *cached, *where, "--enc-type", "none", "--sampling-steps", 9)
    assert call("train_ldm_only.py", *flags, "--max-train-steps", 1)[0] == 0
    assert call("train_ldm_only.py", *flags, "--max-train-steps", 2, "--gradient-accumulation-steps", 2)[0] == 0
    assert [record["step"] for record in records(tmp_path / "run/metrics.jsonl")] == [1, 2]
    code, said = call("train_ldm_only.py", *flags, "--max-train-steps", 3, "--learning-rate", 1)
    assert (code, "made with other flags (--learning-rate 0.0001 -> 1.0)" in said) == (2, True)
