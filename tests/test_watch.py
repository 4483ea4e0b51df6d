"""A run whose numbers say that it is lost stops, names step, term and last good checkpoint, and overwrites nothing."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from omegaconf import OmegaConf

from joint_golden import CONFIG
from loss.vae_loss import VAELossConfig, first_gan_step
from models.discriminator import PatchDiscriminator
from models.numerics import autocast_factory
from scripts import ROOT, records, refusal, run
from training.log import SKIPPED, VANISHED, Watch
from training.optimizer import Optimizer
from training.vae_step import VAENets, update_discriminator
from weights.checkpoint_io import read_checkpoint, write_atomically

CPU = torch.device("cpu")
GOOD = {"denoising_loss": 0.5, "grad_norm_sit": 1.0, "grad_norm_vae": 1.0, "grad_norm_disc": 1.0}


def reason(*changes: dict, scaled: bool = False, gan_start: float = 1) -> str | None:
    """What a watch says of steps 1, 2, ... that differ from good ones."""
    watch = Watch(scaled)
    watch.gan_start = gan_start
    reasons = [watch.reason_to_stop([{"step": step, **GOOD, **change}]) for step, change in enumerate(changes, 1)]
    assert all(said is None for said in reasons[:-1])
    return reasons[-1]


def test_a_gradient_that_is_not_finite_stops_unless_losses_are_scaled():
    for scaled in (False, True):  # a loss does at once
        assert reason({}, {"denoising_loss": float("-inf")}, scaled=scaled) == "step 2: denoising_loss is -inf"
    assert reason({"grad_norm_sit": float("inf")}) == "step 1: grad_norm_sit is inf"
    assert reason({"grad_norm_sit": float("inf")}, scaled=True) is None


def test_a_long_run_of_skipped_steps_stops():
    skip = {"grad_norm_vae": float("inf")}
    assert reason(*[skip] * (SKIPPED - 1), {}, *[skip] * (SKIPPED - 1), scaled=True) is None
    said = reason({}, *[skip] * SKIPPED, scaled=True)
    assert said == f"step {SKIPPED + 1}: grad_norm_vae has not been finite for {SKIPPED} steps, which were all skipped"


def test_a_loss_scale_at_its_floor_stops():
    assert reason({"loss_scale_disc": 1.0}, scaled=True) is None
    assert reason({"loss_scale_disc": 0.5}, scaled=True).startswith("step 1: loss_scale_disc is 0.5, so low")


@pytest.mark.parametrize("name", ["grad_norm_vae", "grad_norm_sit"])
def test_a_vanished_gradient_stops(name):
    limit = VANISHED[name]
    assert reason(*[{name: 0.0}] * (limit - 1), {}, {name: 0.0}) is None
    assert reason(*[{name: 0.0}] * limit) == f"step {limit}: {name} has been 0 for {limit} steps"


def test_a_collapsed_gan_stops_once_the_discriminator_learns():
    starts = [first_gan_step(VAELossConfig(**options)) for options in ({}, {"discriminator_start": 10})]
    never = first_gan_step(VAELossConfig(discriminator_factor=0.0))
    assert (starts, never) == ([1, 11], float("inf"))
    limit = VANISHED["grad_norm_disc"]
    zero = [{"grad_norm_disc": 0.0}] * (limit + 9)
    assert reason(*zero[:limit]) == f"step {limit}: grad_norm_disc has been 0 for {limit} steps: the GAN has collapsed"
    assert reason(*zero, gan_start=11) is None
    assert reason(*zero, {"grad_norm_disc": 0.0}, gan_start=11).startswith(f"step {limit + 10}: ")
    assert reason(*zero, gan_start=never) is None


def small_gan(**optimizer) -> VAENets:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=2, layers=1)
    optimizer = Optimizer(discriminator.parameters(), CPU, learning_rate=1e-2, **optimizer)
    return VAENets(None, discriminator, None, None, optimizer, lecam=torch.zeros(2))


def discriminator_steps(nets: VAENets, start: int, steps: int) -> tuple[list[dict], str | None]:
    """What `steps` float16 updates of the discriminator log, if it begins after `start`; what a watch says of them."""
    cfg = replace(CONFIG, loss=VAELossConfig(discriminator_start=start), autocast=autocast_factory(CPU, "fp16"))
    image, recon = torch.rand(2, 4, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found, watch = [], Watch(scaled=True)
    watch.gan_start = first_gan_step(cfg.loss)
    for step in range(steps):
        metrics = update_discriminator(nets, image, recon, cfg, step) | nets.opt_disc.scaler_metrics("disc")
        found.append({"step": step + 1, **{name: float(value) for name, value in metrics.items()}})
    return found, watch.reason_to_stop(found)


def test_a_late_gan_starts_from_the_initial_loss_scale_with_fresh_moments(monkeypatch):
    monkeypatch.setattr("torch.amp.GradScaler", partial(torch.amp.GradScaler, growth_interval=1))
    nets = small_gan(mixed_precision="fp16")
    weights = [parameter.clone() for parameter in nets.discriminator.parameters()]
    records, said = discriminator_steps(nets, start=50, steps=50)
    assert said is None
    assert all((r["loss_scale_disc"], r["grad_norm_disc"], r["d_loss"]) == (65536, 0, 0) for r in records)
    assert not nets.opt_disc.adamw.state
    assert all(map(torch.equal, weights, nets.discriminator.parameters()))
    records, said = discriminator_steps(nets, start=3, steps=33)
    assert said is None
    taken = 30 - records[-1]["skipped_disc"]
    assert {int(state["step"]) for state in nets.opt_disc.adamw.state.values()} == {taken} != {0}
    assert records[-1]["d_loss"] < records[3]["d_loss"]


def test_a_loss_scale_that_was_inflated_before_may_fall_to_where_training_goes_on():
    nets = small_gan(mixed_precision="fp16")
    nets.opt_disc.scaler.load_state_dict({**nets.opt_disc.scaler.state_dict(), "scale": 2.0**60})
    records, said = discriminator_steps(nets, start=0, steps=60)
    assert said is None
    assert records[-1]["skipped_disc"] > SKIPPED
    assert records[-1]["d_loss"] < records[0]["d_loss"]
    lost = {"grad_norm_vae": float("inf"), "loss_scale_vae": 65536.0}
    assert reason(*[lost] * SKIPPED, scaled=True).startswith(f"step {SKIPPED}: grad_norm_vae has not been finite")


def files_of(folder) -> dict:
    return {path: path.read_bytes() for path in folder.glob("checkpoints/*")}


@pytest.fixture
def started(joint):
    """Flags of a joint run that has a checkpoint at step 3, and its folder."""
    output, flags = joint
    name = f"watched-{len(list(output.glob('watched-*')))}"
    flags = (*flags, "--exp-name", name, "--num-workers", 0, "--checkpointing-steps", 3)
    run("train_repae.py", *flags, "--max-train-steps", 3)
    return output / name, flags


@pytest.mark.slow
def test_a_run_that_becomes_nan_stops_and_overwrites_nothing(started):
    folder, flags = started
    path, term = folder / "checkpoints/0000003.pt", "denoising_loss"
    content = read_checkpoint(path)
    content["model"]["final_layer.linear.bias"].fill_(float("nan"))
    write_atomically(content, path)
    before = files_of(folder)
    said = refusal("train_repae.py", *flags, "--max-train-steps", 9)
    assert f"error: step 4: {term} is nan; training stopped. Last good checkpoint: {path}. Start another" in said
    assert files_of(folder) == before
    assert [record["step"] for record in records(folder / "metrics.jsonl")][-1] < 9
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[3])[term] is None


@pytest.mark.slow
def test_a_discriminator_without_gradients_stops_the_run(joint, tmp_path, monkeypatch):
    monkeypatch.setitem(VANISHED, "grad_norm_disc", 3)
    output, flags = joint
    loss = OmegaConf.load(ROOT / "configs/l1_lpips_kl_gan.yaml")
    loss.losses.discriminator_factor = 1e-60  # so that its gradients are 0 in float32
    OmegaConf.save(loss, tmp_path / "loss.yaml")
    names = ("--exp-name", "collapsed", "--num-workers", 0, "--loss-cfg-path", tmp_path / "loss.yaml")
    run("train_repae.py", *flags, *names, "--max-train-steps", 2)
    said = refusal("train_repae.py", *flags, *names, "--max-train-steps", 6)
    assert "step 5: grad_norm_disc has been 0 for 3 steps: the GAN has collapsed; training stopped" in said
    assert f"Last good checkpoint: {output / 'collapsed/checkpoints/0000002.pt'}" in said
    assert not (output / "collapsed/checkpoints/0000006.pt").exists()


@pytest.mark.slow
def test_half_precision_whose_gradients_always_overflow_stops(joint, monkeypatch):
    monkeypatch.setattr("training.log.SKIPPED", 2)
    output, flags = joint
    names = ("--exp-name", "overflows", "--num-workers", 0, "--mixed-precision", "fp16", "--max-train-steps", 2)
    said = refusal("train_repae.py", *flags, *names, "--batch-size", 2, "--proj-coeff", 1e30)
    assert "step 2: grad_norm_sit has not been finite for 2 steps, which were all skipped; training stopped" in said
    assert not list((output / "overflows").glob("checkpoints/*.pt"))


@pytest.mark.slow
def test_weights_that_are_not_finite_are_not_saved(started, monkeypatch):
    folder, flags = started
    before = files_of(folder)
    monkeypatch.setattr("training.optimizer.nn.utils.clip_grad_norm_", spoil_gradients)
    said = refusal("train_repae.py", *flags, "--max-train-steps", 4)
    assert "error: step 4: model." in said
    assert "is not finite; training stopped. Last good checkpoint:" in said
    assert files_of(folder) == before
    assert records(folder / "metrics.jsonl")[-1]["step"] == 4  # whose gradients' norms tell why


def spoil_gradients(parameters, *_, **__) -> torch.Tensor:
    """A norm that looks right, of gradients that are not."""
    for parameter in parameters:
        parameter.grad.fill_(float("nan"))
    return torch.ones(())


@pytest.mark.slow
def test_another_run_goes_on_from_the_last_good_checkpoint_with_another_recipe(started):
    folder, flags = started
    changed = ("--learning-rate", 1e-5, "--mixed-precision", "bf16", "--max-train-steps", 4)
    said = refusal("train_repae.py", *flags, *changed)
    assert "made with other flags (--learning-rate 0.0001 -> 1e-05, --mixed-precision no -> bf16)" in said
    branch = ("--exp-name", f"{folder.name}-branch", "--continue-train-exp-dir", folder)
    run("train_repae.py", *flags, *branch, *changed)
    checkpoint = read_checkpoint(folder.with_name(f"{folder.name}-branch") / "checkpoints/0000004.pt")
    assert checkpoint["opt"]["param_groups"][0]["lr"] == 1e-5
    assert checkpoint["opt_vae"]["param_groups"][0]["lr"] == 1e-4
    said = refusal("train_repae.py", *flags, *branch, *changed, "--seed", 1, "--max-train-steps", 5)
    assert "--seed 0 -> 1" in said
