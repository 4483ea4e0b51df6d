"""What makes the steps fast, as far as it shows without a clock."""

import contextlib
import copy
import dataclasses
import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks.watched_training import READS
from joint_golden import CONFIG
from models.autoencoder import VAE_CONFIGS, pixels_to_image
from models.discriminator import PatchDiscriminator
from models.numerics import autocast_factory
from scripts import ROOT
from test_joint_step import small_batch, small_nets
from train_repae import repae_step
from training.optimizer import Optimizer


def test_help_waits_for_no_large_library():
    code = """
import importlib, sys
for script in ("train_repae", "train_ldm_only", "train_vae", "generate", "cache_latents", "evaluate"):
    sys.argv = [script, "--help"]
    try:
        importlib.import_module(script).main()
    except SystemExit:
        pass
print([name for name in ("timm", "torchvision", "diffusers", "wandb") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_convolutions_get_channels_last_images_and_weights():
    last = torch.channels_last
    assert pixels_to_image(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).is_contiguous(memory_format=last)
    for network in (VAE_CONFIGS["f4d4-tiny"].build(), PatchDiscriminator()):
        assert all(p.is_contiguous(memory_format=last) for p in network.parameters() if p.ndim == 4)
        assert not all(p.is_contiguous() for p in network.parameters())


def test_moments_of_another_layout_continue_as_their_own():
    """Fused AdamW would take the numbers for each other's without a word."""

    def step(optimizer: Optimizer, seed: int) -> None:
        for parameter in optimizer.parameters:
            gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        optimizer.backward_and_step(torch.zeros((), requires_grad=True))

    def optimizer_of(network: torch.nn.Module) -> Optimizer:
        return Optimizer(network.parameters(), torch.device("cpu"))

    network = PatchDiscriminator()
    one = optimizer_of(network)
    step(one, 1)
    state = copy.deepcopy(one.adamw.state_dict())
    state["state"] = {i: {k: v.contiguous() for k, v in s.items()} for i, s in state["state"].items()}
    assert any(
        v.stride() != one.parameters[i].stride() for i, s in state["state"].items() for v in s.values() if v.ndim
    )
    other_network = PatchDiscriminator()
    other_network.load_state_dict(network.state_dict())
    other = optimizer_of(other_network)
    other.load_state_dict(state)
    step(one, 2)
    step(other, 2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters, other.parameters, strict=True))


@contextlib.contextmanager
def no_host_reads():
    """Within, whatever makes the host wait for a tensor's value fails, as it would stall a GPU."""

    def refuse(*_, **__):
        raise AssertionError("the host reads a tensor")

    with pytest.MonkeyPatch.context() as patch:
        for name in READS:
            patch.setattr(torch.Tensor, name, refuse)
        yield


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_the_host_waits_for_no_value_of_a_joint_step(precision):
    nets = small_nets(mixed_precision=precision)
    batch, draws, zs = small_batch()
    nets.encoders = [lambda pixels: zs]
    cfg = dataclasses.replace(CONFIG, autocast=autocast_factory(torch.device("cpu"), precision))
    with no_host_reads(), pytest.raises(AssertionError, match="reads a tensor"):
        float(torch.zeros(()))
    with no_host_reads():
        metrics = repae_step(nets, batch, draws, cfg)
    assert metrics["vae_loss"].isfinite()


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_networks_are_compiled_in_the_first_step_only(recompute):
    torch._dynamo.reset()
    counters.clear()
    nets = small_nets()
    batch, draws, zs = small_batch()
    nets.encoders = [lambda pixels: zs]
    nets.vae.encoder.recompute = nets.vae.decoder.recompute = nets.lpips.net.recompute = nets.sit.recompute = recompute
    expected = repae_step(copy.deepcopy(nets), batch, draws, CONFIG)
    for module in [nets.vae.encoder, nets.vae.decoder, nets.discriminator.main, nets.lpips.net, *nets.sit.blocks]:
        module.compile(backend="aot_eager")
    metrics = repae_step(nets, batch, draws, CONFIG)
    graphs = counters["stats"]["unique_graphs"]
    assert all(torch.allclose(metrics[name], expected[name], rtol=1e-5) for name in metrics)
    for _ in range(2):
        repae_step(nets, batch, draws, CONFIG)
    assert counters["stats"]["unique_graphs"] == graphs == 8  # 4 blocks share 2: of the frozen pass and the trained one
    assert not counters["graph_break"]
