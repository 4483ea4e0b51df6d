"""Optimisers, EMA, checkpoints, draws and data order."""

import argparse
import copy
import json

import pytest
import torch
from torch import nn

from diffusion import previews
from diffusion.previews import reconstruction_grid, sample_grid
from errors import UserError
from joint_golden import golden_nets
from training.log import json_line, truncate_log
from training.optimizer import Optimizer, learning_rate_factor
from training.randomness import BatchOrder, Rows, randomly_flipped, step_draws
from training.resume_checks import FORKABLE, IDENTITY, RESUMABLE, refuse_changed_flags

CPU = torch.device("cpu")


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_gradient_that_is_not_finite_is_skipped(precision):
    model = linear()
    optimizer = Optimizer(model.parameters(), CPU, mixed_precision=precision)
    optimizer.backward_and_step(model(torch.ones(1, 4)).sum())
    before, moments = model.weight.clone(), optimizer.adamw.state[model.weight]["exp_avg"].clone()
    norm = optimizer.backward_and_step(model(torch.full((1, 4), float("inf"))).sum())
    assert not norm.isfinite()
    assert torch.equal(model.weight, before)
    assert torch.equal(optimizer.adamw.state[model.weight]["exp_avg"], moments)
    assert int(optimizer.skipped) == 1
    optimizer.backward_and_step(model(torch.ones(1, 4)).sum())
    assert not torch.equal(model.weight, before)


def test_loss_scaling_changes_no_gradient_and_each_optimizer_has_its_own_scale():
    plain, scaled = linear(), linear()
    a = Optimizer(plain.parameters(), CPU)
    b = Optimizer(scaled.parameters(), CPU, mixed_precision="fp16")
    other = Optimizer(linear().parameters(), CPU, mixed_precision="fp16")
    x = torch.randn(8, 4)
    torch.testing.assert_close(
        a.backward_and_step(plain(x).square().mean()), b.backward_and_step(scaled(x).square().mean())
    )
    torch.testing.assert_close(plain.weight, scaled.weight)
    b.backward_and_step(scaled(torch.full((1, 4), float("inf"))).sum())
    assert float(b.scaler_metrics("x")["loss_scale_x"]) == 32768
    assert int(b.scaler_metrics("x")["skipped_x"]) == 1
    assert other.scaler.get_scale() == 65536
    assert a.scaler_metrics("x") == {}


def test_draws_depend_on_seed_step_and_row_only():
    a, b = (step_draws(3, 5, Rows(0, 8), (4, 2, 2), "lognormal", "cosine", 0.5) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for rows in (Rows(0, 3), Rows(3, 4), Rows(4, 8)):
        part = step_draws(3, 5, rows, (4, 2, 2), "lognormal", "cosine", 0.5)
        assert all(torch.equal(x, y[rows.start : rows.stop]) for x, y in zip(part, a, strict=True))
    for other in (step_draws(3, 6, Rows(0, 8), (4, 2, 2)), step_draws(4, 5, Rows(0, 8), (4, 2, 2))):
        assert not torch.equal(a.noise, other.noise)
    assert not torch.equal(a.noise, a.posterior)
    assert step_draws(0, 0, Rows(0, 10000), (1, 1, 1), cfg_prob=0.1).drop.float().mean() == pytest.approx(0.1, abs=0.01)
    assert not step_draws(0, 0, Rows(0, 1000), (1, 1, 1), cfg_prob=0.0).drop.any()


def test_images_are_mirrored_by_seed_step_and_row():
    pixels = torch.arange(4000 * 3 * 2).reshape(4000, 3, 1, 2).to(torch.uint8)
    found = randomly_flipped(pixels, 3, 5, Rows(0, 4000))
    mirrored = (found == pixels.flip(3)).flatten(1).all(1)
    assert torch.equal(found[~mirrored], pixels[~mirrored])
    assert mirrored.float().mean() == pytest.approx(0.5, abs=0.03)
    assert torch.equal(found[7:9], randomly_flipped(pixels[7:9], 3, 5, Rows(7, 9)))
    assert not torch.equal(found, randomly_flipped(pixels, 3, 6, Rows(0, 4000)))


def test_learning_rates_rise_linearly_and_fall_as_half_a_cosine():
    def factors(*options):
        return [learning_rate_factor(step, 8, *options) for step in range(8)]

    assert factors(0, "constant") == [1.0] * 8
    assert factors(4, "constant") == [0.25, 0.5, 0.75, *[1.0] * 5]
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4]
    assert factors(4, "cosine") == pytest.approx(expected)


ORDER = {"length": 23, "batch": 4, "seed": 0, "start": 0, "stop": 10, "rank": 0, "world": 1, "accumulation": 1}


def order(**changes) -> list[list[int]]:
    return list(BatchOrder(**{**ORDER, **changes}))


def test_data_order_is_a_permutation_an_epoch_and_drops_the_last_partial_batch():
    first = sum(order(stop=5), [])
    second = sum(order(start=5, stop=10), [])
    assert len(set(first)) == len(set(second)) == 20
    assert first != second
    assert order(seed=1) != order()
    assert len(BatchOrder(**{**ORDER, "accumulation": 2})) == len(order(accumulation=2)) == 20


def test_data_order_does_not_depend_on_interruption_processes_or_micro_batches():
    whole = order()
    assert order(stop=3) + order(start=3) == whole
    ranks = [order(rank=rank, world=2) for rank in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole
    micro = order(accumulation=2)
    assert [a + b for a, b in zip(micro[::2], micro[1::2], strict=True)] == whole


def test_a_reference_optimisers_state_is_restored():
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    ours[0].bias.requires_grad_(False)
    theirs = copy.deepcopy(ours)
    adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-3)  # not fused, and it lists the fixed parameter too
    x = torch.randn(8, 4)
    theirs(x).square().mean().backward()
    adamw.step()
    adamw.zero_grad()
    ours.load_state_dict(theirs.state_dict())
    optimizer = Optimizer(ours.parameters(), CPU, learning_rate=1e-3, max_grad_norm=1e9)
    optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))
    assert optimizer.adamw.param_groups[0]["fused"]
    optimizer.backward_and_step(ours(x).square().mean())
    theirs(x).square().mean().backward()
    adamw.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="size of optimizer's group"):
        Optimizer(linear().parameters(), CPU).load_state_dict(adamw.state_dict())


def test_changed_flags_are_refused_but_for_those_that_may_change(tmp_path):
    flags = {"seed": 0, "max_train_steps": 5, "learning_rate": 1e-4, "gradient_accumulation_steps": 1}
    before = {"args": argparse.Namespace(**flags)}
    refuse_changed_flags(before, {**flags, "max_train_steps": 9, "new": 1}, {}, tmp_path)
    refuse_changed_flags(before, {**flags, "gradient_accumulation_steps": 4}, {}, tmp_path)
    with pytest.raises(UserError, match="--learning-rate .* -> 4"):
        refuse_changed_flags(before, {**flags, "learning_rate": 4}, {}, tmp_path)
    refuse_changed_flags(before, {**flags, "learning_rate": 4}, {}, tmp_path, RESUMABLE | FORKABLE)
    known = {"identity": {"data": "a", "loss": {"kl_weight": 1e-6}, "latents": "c", "vae": "d"}}
    refuse_changed_flags(known, {}, known["identity"], tmp_path)
    refuse_changed_flags(known, {}, {"data": "a", "encoders": {}}, tmp_path)  # of another kind of training
    for name in known["identity"]:
        with pytest.raises(UserError, match=f"made with other {IDENTITY[name]}"):
            refuse_changed_flags(known, {}, {name: "b"}, tmp_path)


def test_log_is_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(1, 6)) + '{"st')
    truncate_log(path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    damaged = b'{"step": 1}\n\xff\n7\n{"loss": 1}\n{"step": 2}\n'
    path.write_bytes(damaged + b'{"step": 3}\n4\n\xfe\n{"step": 2}')
    truncate_log(path, 2)  # what is damaged further up costs nothing else
    assert path.read_bytes() == damaged
    truncate_log(path, 0)
    truncate_log(path, 0)
    assert path.read_bytes() == b""
    assert json_line({"a": float("nan"), "b": float("inf"), "c": 1.0}) == '{"a": null, "b": null, "c": 1.0}\n'


def test_previews_come_from_the_ema_and_its_statistics(monkeypatch):
    assert (previews.SAMPLES, previews.STEPS, previews.GUIDANCE_SCALE) == (64, 50, 4.0)
    monkeypatch.setattr(previews, "STEPS", 4)
    nets = golden_nets("f4d4-tiny", "SiT-XXS/2", depth=2)
    before = sample_grid(nets.ema, nets.vae, seed=0)
    assert before.shape == (3, 8 * 34 + 2, 8 * 34 + 2)
    assert torch.equal(before, sample_grid(nets.ema, nets.vae, seed=0))
    assert not torch.equal(before, sample_grid(nets.ema, nets.vae, seed=1))
    nets.ema.bn.running_mean += 1
    assert not torch.equal(before, sample_grid(nets.ema, nets.vae, seed=0))
    # originals above reconstructions
    pixels = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    grid = reconstruction_grid(nets.vae, pixels)
    assert grid.shape == (3, 4 * 34 + 2, 8 * 34 + 2)
    assert torch.equal(grid[:, 2:34, 2:34], pixels[0])
    assert torch.equal(grid[:, 70:102, 2:34], pixels[8])
    assert not torch.equal(grid[:, 36:68, 2:34], pixels[0])
