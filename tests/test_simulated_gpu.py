"""Both steps on a GPU that does not exist: every tensor is there, none is read, and metrics are float32.

Without a driver, torch runs no backward pass there.
"""

from dataclasses import replace

import pytest
import torch

from benchmarks.flops import CONFIG, build_batch
from benchmarks.memory import CUDA, fixed_bytes, kept_bytes, simulated_gpu
from models.numerics import autocast_factory
from train_ldm_only import ldm_step
from train_repae import repae_step

SIZES = ("f4d4-tiny", "SiT-XXS/4", "dinov2-vit-s", 64, 2)


class ForwardOnly:
    """An optimiser that changes nothing."""

    def backward_and_step(self, loss: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(loss)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_steps_leave_their_values_on_the_device(precision):
    cfg = replace(CONFIG, autocast=autocast_factory(CUDA, precision), vae_diffusion_coeff=0.5)
    with simulated_gpu(*SIZES) as nets:
        nets.opt_vae = nets.opt_disc = nets.opt_sit = ForwardOnly()
        with CUDA:
            batch, draws = build_batch(SIZES[0], SIZES[3])
        metrics = repae_step(nets, batch, draws, cfg) | ldm_step(nets, batch, draws, cfg)
    assert {"vae_align_loss", "proj_loss", "denoising_loss", "d_weight"} & metrics.keys()
    assert {(value.device, value.dtype, value.shape) for value in metrics.values()} == {(CUDA, torch.float32, ())}


def test_memory_that_the_backward_pass_needs():
    """It grows with the batch by what half precision halves, and less where levels are computed again."""
    with simulated_gpu(*SIZES) as nets:

        def an_image(precision: str) -> dict[str, int]:
            with CUDA:
                batches = [build_batch(SIZES[0], SIZES[3], images) for images in (1, 2)]
            one, two = (kept_bytes(nets, *batch, precision) for batch in batches)
            return {name: two[name] - one[name] for name in two}

        wide, half = an_image("no"), an_image("bf16")
        nets.vae.recompute(1)
        finest = "VAE's decoder, level 0"
        assert an_image("bf16").get(finest, 0) < half[finest] / 2
        trained = fixed_bytes(nets)["weights"]
    assert 0.3 < half["transformer's update"] / wide["transformer's update"] < 0.8
    assert trained == fixed_bytes(nets)["gradients"]
