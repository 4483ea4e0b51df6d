"""Gradient checkpointing: less memory, and in everything else the same to the bit."""

import weakref
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_ldm_only
import train_repae
from loss.lpips import LPIPS, VGG16Features
from models.autoencoder import EVERYTHING, VAE_CONFIGS, Decoder, Encoder
from models.sit import SiT
from published import STATISTICS, write_vae
from scripts import assert_same_run, equal, run
from test_joint_step import small_nets, step_once, with_cfg
from training.build import build_transformer_nets
from training.distributed import frozen_call
from weights.checkpoint_io import read_checkpoint
from weights.vae import open_vae

BF16 = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
RUN = SimpleNamespace(device=torch.device("cpu"), directory=Path("nowhere"), prepare=lambda net: net, print=print)


@contextmanager
def checkpointing(on: bool = True, levels: int = EVERYTHING):
    """Every network, whenever it was built, computes its activations again in the backward pass; the VAE so many."""
    with pytest.MonkeyPatch.context() as patch:
        for network in (SiT, Encoder, Decoder, VGG16Features):
            patch.setattr(network, "recompute", on * (levels if network in (Encoder, Decoder) else True))
        yield


def everything_in(nets) -> dict:
    """Copies of the state dicts of a step's networks, averages and optimisers."""
    states = {}
    for name, value in vars(nets).items():
        if isinstance(value, nn.Module):
            states[name] = {key: tensor.clone() for key, tensor in value.state_dict().items()}
        elif name.startswith("opt"):
            states[name] = [{k: v.clone() for k, v in state.items()} for state in value.adamw.state.values()]
    return states


def joint_run(on: bool, steps: int, accumulation: int, cfg) -> tuple[list[dict], dict]:
    nets = small_nets(accumulation_steps=accumulation)
    with checkpointing(on):
        metrics = [step_once(nets, cfg) for _ in range(steps * accumulation)]
    return metrics, everything_in(nets)


@pytest.mark.parametrize(("steps", "accumulation", "autocast"), [(1, 2, nullcontext), (2, 1, BF16)])
def test_joint_steps_are_the_same(steps, accumulation, autocast):
    cfg = with_cfg(autocast=autocast)
    without, with_it = (joint_run(on, steps, accumulation, cfg) for on in (False, True))
    assert equal(without, with_it)
    assert without[1]["sit"]["bn.num_batches_tracked"] == steps * accumulation


class Meter(TorchDispatchMode):
    """Within, `peak` is the most bytes that tensors made within hold at once."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known | given:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def free(self, key: int, count: int) -> None:
        self.known.discard(key)
        self.live -= count


def peak_memory(make_loss, on: bool, levels: int = EVERYTHING) -> int:
    """Bytes at the peak of a forward and a backward pass, gradients among them, parameters not."""
    with checkpointing(on, levels), Meter() as memory:
        make_loss().backward()
    return memory.peak


def sit_loss(frozen: bool):
    """A deep, narrow transformer's loss on latents of 32x32, which are 256 tokens."""
    sit = SiT(depth=12, width=64, heads=2, num_classes=3, z_dims=(8,), encoder_depth=12, projector="conv")
    x, t, y = torch.randn(4, 4, 32, 32, requires_grad=True), torch.rand(4), torch.arange(4) % 3
    return lambda: (frozen_call(sit, x, t, y, depth=12) if frozen else sit(x, t, y))[1][0].square().mean()


def vae_loss():
    vae, image, noise = VAE_CONFIGS["f8d4-small"].build(), torch.randn(1, 3, 64, 64), torch.randn(1, 4, 8, 8)
    return lambda: vae(image, noise)[2].square().mean()


def lpips_loss():
    """LPIPS at 64 px; its linear heads keep as much as before."""
    lpips, image, recon = LPIPS(), torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64, requires_grad=True)
    return lambda: lpips(image, recon).mean()


@pytest.mark.parametrize(
    ("make_loss", "times"),
    [(partial(sit_loss, False), 6), (partial(sit_loss, True), 4), (vae_loss, 2.5), (lpips_loss, 1.3)],
    ids=["transformer", "alignment", "vae", "lpips"],
)
def test_the_peak_of_memory_is_many_times_lower(make_loss, times):
    loss = make_loss()
    without, with_it = peak_memory(loss, False), peak_memory(loss, True)
    assert without > times * with_it, f"{without} bytes without, {with_it} with gradient checkpointing"


def test_the_finest_level_holds_most_of_a_vaes_memory_and_its_recomputation_changes_nothing():
    torch.manual_seed(0)
    loss = vae_loss()
    without, finest, with_it = (peak_memory(loss, levels > 0, levels) for levels in (0, 1, EVERYTHING))
    assert without > 1.5 * finest and finest > with_it
    vae, image, noise = VAE_CONFIGS["f8d4-small"].build(), torch.randn(1, 3, 64, 64), torch.randn(1, 4, 8, 8)
    gradients = []
    for levels in (0, 1, 2, EVERYTHING):
        vae.recompute(levels)
        vae(image, noise)[2].square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in vae.named_parameters()})
        vae.zero_grad()
    assert all(equal(found, gradients[0]) for found in gradients)


@pytest.mark.parametrize("on", [False, True])
def test_the_flag_reaches_the_networks(tmp_path, vgg_weights, on):
    flags = f"""--exp-name x --resolution 32 --vae f4d4-tiny --model SiT-XXS/2 --encoder-depth 2 --enc-type none
        --num-classes 3 --vae-ckpt {write_vae(tmp_path)} {"--gradient-checkpointing" if on else ""}"""
    joint = train_repae.parse_args([*flags.split(), "--lpips-vgg-ckpt", str(vgg_weights), "--recompute-levels", "1"])
    nets = train_repae.build(joint, RUN, open_vae(joint.vae, joint.vae_ckpt, offline=True))
    networks = (nets.sit, nets.vae.encoder, nets.vae.decoder, nets.lpips.net)
    statistics = tuple(value.reshape(1, -1, 1, 1) for value in STATISTICS.values())
    args = train_ldm_only.parse_args(flags.split())
    frozen = build_transformer_nets(args, RUN, (4, 8, 8), statistics).sit
    levels = EVERYTHING if on else 1
    assert [network.recompute for network in (*networks, frozen)] == [on, levels, levels, on, on]


@pytest.mark.slow
def test_joint_runs_are_the_same(joint):
    output, flags = joint
    for name, more in (("kept", ()), ("recomputed", ("--gradient-checkpointing",))):
        run("train_repae.py", *flags, *more, "--exp-name", name, "--max-train-steps", 2)
    assert_same_run(output / "kept", output / "recomputed", last=2)
    args = read_checkpoint(output / "recomputed/checkpoints/0000002.pt")["args"]
    assert args["gradient_checkpointing"]
