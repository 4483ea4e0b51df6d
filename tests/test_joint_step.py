"""The joint step: golden numbers, and who gets gradient from whom."""

import copy
import dataclasses

import pytest
import torch

from diffusion.transport import diffusion_loss, interpolate
from golden_weights import assert_close, golden
from joint_golden import CONFIG, golden_nets, golden_steps
from loss.alignment import alignment_loss
from train_repae import JointNets, repae_step
from training.loop import Batch
from training.randomness import Draws, Rows, step_draws

METRICS = (
    *("grad_norm_vae", "reconstruction_loss", "perceptual_loss", "kl_loss", "weighted_gan_loss", "vae_align_loss"),
    *("grad_norm_disc", "d_loss", "grad_norm_sit", "denoising_loss", "proj_loss"),
)


def small_nets(**optimizer) -> JointNets:
    return golden_nets("f4d4-tiny", "SiT-XXS/2", depth=2, **optimizer)


def small_batch(count: int = 4) -> tuple[Batch, Draws, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    draws = step_draws(0, 0, Rows(0, count), (4, 8, 8))
    zs = torch.randn(count, 16, 48, generator=generator)
    return Batch(pixels, torch.arange(count) % 10, 0, Rows(0, count)), draws, zs


def step_once(nets: JointNets, cfg=CONFIG, draws: Draws | None = None) -> dict:
    batch, own_draws, zs = small_batch()
    nets.encoders = [lambda pixels: zs]
    return repae_step(nets, batch, draws or own_draws, cfg)


def with_cfg(**changes):
    return dataclasses.replace(CONFIG, **changes)


def gradients_of(nets: JointNets, cfg=CONFIG, draws: Draws | None = None) -> dict[str, list[torch.Tensor]]:
    """The gradient that each optimiser saw, before clipping."""
    for name in ("vae", "disc", "sit"):
        getattr(nets, f"opt_{name}").max_grad_norm = float("inf")
    return seen_in_a_step(nets, cfg, draws)[0]


def seen_in_a_step(nets: JointNets, cfg=CONFIG, draws: Draws | None = None) -> tuple[dict, dict]:
    """The gradient that each optimiser's AdamW saw, and the step's metrics."""
    seen = {}
    for name in ("vae", "disc", "sit"):
        optimizer = getattr(nets, f"opt_{name}")

        def record(*_, optimizer=optimizer, name=name):
            seen[name] = [None if p.grad is None else p.grad.clone() for p in optimizer.parameters]

        optimizer.adamw.register_step_pre_hook(record)
    return seen, step_once(nets, cfg, draws)


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# float64: the third step amplifies rounding of the first two, which differs between processors in float32
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerances"), [(torch.float64, (1e-4,) * 3), (torch.float32, (1e-4, 1e-3, 1e-2))])
def test_golden_joint_steps(dtype, tolerances):
    g = golden("joint_step")
    nets = golden_nets()
    for module in (nets.vae, nets.discriminator, nets.sit, nets.ema, nets.lpips):
        module.to(dtype)
    nets.lecam = nets.lecam.to(dtype)
    for i, (batch, draws, zs) in enumerate(golden_steps()):
        nets.encoders = [lambda pixels, zs=zs: zs.to(dtype)]
        draws = Draws(draws.posterior.to(dtype), draws.noise.to(dtype), draws.t.to(dtype), draws.drop)
        metrics = repae_step(nets, batch, draws, CONFIG)
        for name in METRICS:
            error = abs(float(metrics[name]) - g[name][i]) / abs(g[name]).max()
            assert error <= tolerances[i], f"step {i}: {name} is off by {error:.1e} of the largest"
        assert float(metrics["vae_loss"]) == pytest.approx(g["vae_total"][i], rel=tolerances[i])
    results = {
        "bn_mean": nets.sit.bn.running_mean,
        "bn_var": nets.sit.bn.running_var,
        "ema_bn_mean": nets.ema.bn.running_mean,
        "ema_bn_var": nets.ema.bn.running_var,
        "sit_qkv": nets.sit.blocks[0].attn.qkv.weight[:8, :8],
        "vae_conv_in": nets.vae.encoder.conv_in.weight[:8],
        "disc_conv_in": nets.discriminator.main[0].weight[:4],
        "ema_qkv": nets.ema.blocks[0].attn.qkv.weight[:8, :8],
        "final_linear": nets.sit.final_layer.linear.weight,
    }
    for name, value in results.items() if dtype == torch.float64 else ():
        assert_close(value, g[name], 1e-4)


def test_diffusion_loss_never_reaches_the_vae():
    nets = small_nets()
    noisy = small_batch()[1]._replace(t=torch.full((4,), 0.9), drop=torch.ones(4, dtype=torch.bool))
    reference = gradients_of(copy.deepcopy(nets), with_cfg(vae_align_proj_coeff=0.0))
    # with no alignment, neither times, labels nor the transformer's weights may change what the VAE gets
    assert equal(reference["vae"], gradients_of(copy.deepcopy(nets), with_cfg(vae_align_proj_coeff=0.0), noisy)["vae"])
    for parameter in nets.sit.parameters():
        parameter.data.mul_(2)
    changed = gradients_of(nets, with_cfg(vae_align_proj_coeff=0.0))
    assert equal(reference["vae"], changed["vae"])
    assert not equal(reference["sit"], changed["sit"])


def test_alignment_of_the_vae_step_does_not_reach_the_transformer():
    nets = small_nets()
    a = gradients_of(copy.deepcopy(nets), with_cfg(vae_align_proj_coeff=1.5))
    b = gradients_of(copy.deepcopy(nets), with_cfg(vae_align_proj_coeff=15.0))
    assert not equal(a["vae"], b["vae"])
    # z was made before the VAE moved, so nothing of the transformer's step depends on the coefficient
    assert equal(a["sit"], b["sit"])


@pytest.mark.parametrize("naive", [False, True], ids=["alignment", "diffusion"])
def test_gradient_of_the_vae_is_the_formulas(naive):
    nets = small_nets()
    batch, draws, zs = small_batch()
    with_term = gradients_of(
        copy.deepcopy(nets), with_cfg(vae_align_proj_coeff=0.0, vae_diffusion_coeff=0.7) if naive else CONFIG
    )["vae"]
    without = gradients_of(copy.deepcopy(nets), with_cfg(vae_align_proj_coeff=0.0))["vae"]
    image = batch.pixels.float() / 127.5 - 1
    _, z, _ = nets.vae(image, draws.posterior)
    bn = nets.sit.bn
    z_norm = (z - bn.running_mean[:, None, None]) / torch.sqrt(bn.running_var + 1e-4)[:, None, None]
    x_t = (1 - draws.t)[:, None, None, None] * z_norm + draws.t[:, None, None, None] * draws.noise
    velocity, tokens = nets.sit(x_t, draws.t, batch.labels)
    cosine = torch.nn.functional.normalize(tokens[0], dim=-1) * torch.nn.functional.normalize(zs, dim=-1)
    term = 0.7 * (velocity - (draws.noise - z_norm)).square().mean() if naive else -1.5 * cosine.sum(-1).mean()
    expected = torch.autograd.grad(term, list(nets.vae.parameters()), allow_unused=True)
    largest = max(e.abs().max() for e in expected if e is not None)
    for a, b, e in zip(with_term, without, expected, strict=True):
        assert ((a - b) - (0 if e is None else e)).abs().max() < 1e-3 * largest


def test_transformer_loss_is_the_formulas_with_the_same_t_and_noise():
    nets = small_nets()
    before = copy.deepcopy(nets)
    batch, draws, zs = small_batch()
    metrics = step_once(nets)
    _, z, _ = before.vae(batch.pixels.float() / 127.5 - 1, draws.posterior)
    mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3), unbiased=False)
    z_norm = (z - mean[:, None, None]) / torch.sqrt(var + 1e-4)[:, None, None]
    x_t, target = interpolate("linear", z_norm, draws.noise, draws.t)
    prediction, tokens = before.sit(x_t, draws.t, batch.labels)
    assert float(metrics["denoising_loss"]) == pytest.approx(float(diffusion_loss(prediction, target).mean()), rel=1e-5)
    assert float(metrics["proj_loss"]) == pytest.approx(float(alignment_loss(tokens, [zs])), rel=1e-4, abs=1e-6)


def test_latent_statistics_move_once_a_step():
    nets = small_nets()
    batch, draws, _ = small_batch()
    mean, var = nets.sit.bn.running_mean.clone(), nets.sit.bn.running_var.clone()
    _, z, _ = nets.vae(batch.pixels.float() / 127.5 - 1, draws.posterior)
    step_once(nets)
    assert int(nets.sit.bn.num_batches_tracked) == 1
    torch.testing.assert_close(nets.sit.bn.running_mean, 0.9 * mean + 0.1 * z.mean((0, 2, 3)))
    torch.testing.assert_close(nets.sit.bn.running_var, 0.9 * var + 0.1 * z.var((0, 2, 3), unbiased=True))


def test_dropped_labels_reach_the_transformer_only():
    nets = small_nets()
    batch, draws, zs = small_batch()
    dropped = draws._replace(drop=torch.tensor([True, False, True, False]))
    plain = gradients_of(copy.deepcopy(nets))
    drop = gradients_of(copy.deepcopy(nets), draws=dropped)
    assert equal(plain["vae"], drop["vae"])
    table = [i for i, p in enumerate(nets.opt_sit.parameters) if p is nets.sit.y_embedder.embedding_table.weight][0]
    used = drop["sit"][table].abs().sum(1) > 0
    assert used.tolist() == [False, True, False, True, *[False] * 6, True]


def test_pos_embed_never_moves_and_every_trainable_parameter_does():
    nets = small_nets()
    before = copy.deepcopy(nets)
    step_once(nets)
    assert torch.equal(nets.sit.pos_embed, before.sit.pos_embed)
    assert torch.equal(nets.ema.pos_embed, before.sit.pos_embed)
    for name in ("vae", "discriminator", "sit"):
        old = dict(getattr(before, name).named_parameters())
        for key, parameter in getattr(nets, name).named_parameters():
            assert parameter.requires_grad == old[key].requires_grad == (key != "pos_embed"), f"{name}: {key}"
            assert torch.equal(parameter, old[key]) == (key == "pos_embed"), f"{name}: {key}"


def test_gradients_are_clipped():
    seen, metrics = seen_in_a_step(small_nets())
    for name, gradients in seen.items():
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        assert float(norm) == pytest.approx(min(1.0, float(metrics[f"grad_norm_{name}"])), rel=1e-4), name
    assert max(float(metrics[f"grad_norm_{name}"]) for name in seen) > 1


def test_ema_averages_parameters_and_float_buffers():
    nets = small_nets()
    old = copy.deepcopy(nets.ema.state_dict())
    step_once(nets, with_cfg(ema_decay=0.75))
    for key, new in nets.sit.state_dict().items():
        expected = 0.75 * old[key] + 0.25 * new if new.is_floating_point() else new
        torch.testing.assert_close(nets.ema.state_dict()[key], expected, msg=key)
    assert not torch.equal(nets.ema.bn.running_mean, old["bn.running_mean"])
    assert all(not p.requires_grad for p in nets.ema.parameters())


def test_discriminator_gets_no_gradient_from_the_vaes_loss():
    nets = small_nets()
    a = gradients_of(copy.deepcopy(nets))["disc"]
    heavy = with_cfg(loss=CONFIG.loss.__class__(discriminator_weight=50.0))
    assert equal(a, gradients_of(copy.deepcopy(nets), heavy)["disc"])


def test_discriminators_statistics_are_the_batchs_in_the_generator_pass():
    nets = small_nets()
    metrics = step_once(copy.deepcopy(nets))
    batch, draws, _ = small_batch()
    _, _, recon = nets.vae(batch.pixels.float() / 127.5 - 1, draws.posterior)
    expected = -float(nets.discriminator.train()(recon)[0].mean())
    assert float(metrics["gan_loss"]) == pytest.approx(expected, rel=1e-4)


def test_shuffled_tokens_align_worse():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, 16, 48, generator=generator)
    shuffled = tokens[:, torch.randperm(16, generator=generator)]
    assert float(alignment_loss([tokens], [tokens])) == pytest.approx(-1)
    assert float(alignment_loss([shuffled], [tokens])) > -0.5
    both = alignment_loss([tokens, shuffled], [tokens, tokens])
    assert float(both) == pytest.approx((-1 + float(alignment_loss([shuffled], [tokens]))) / 2)
