"""Networks, losses, samplers and crop against numbers of the reference implementation (tests/golden)."""

import json
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffusion.samplers import Guidance, sample_ode, sample_sde
from diffusion.transport import diffusion_loss, interpolate
from flags.config import load_loss_config
from golden_weights import GOLDEN, assert_close, fill, golden
from joint_golden import golden_lpips
from loss.alignment import alignment_loss
from loss.lpips import LPIPS
from loss.vae_loss import VAELossConfig, discriminator_loss, update_lecam, vae_loss
from models.autoencoder import VAE_CONFIGS
from models.discriminator import PatchDiscriminator
from models.sit import SiT, SiT_models, SiTBlock
from storage.photographs import center_crop

KEYS = json.loads((GOLDEN / "state_dicts.json").read_text())
PATHS = ("linear", "cosine")
SIT_CASES = {
    "sit_s2": ("SiT-S/2", {"input_size": 8, "in_channels": 4}),
    "sit_s1_qknorm": ("SiT-S/1", {"input_size": 4, "in_channels": 32, "qk_norm": True}),
}


def shapes(module: nn.Module) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in module.state_dict().items()}


@pytest.mark.parametrize("name", [name for name in KEYS if name.startswith("SiT") and ":" not in name])
def test_sit_keys_and_size(name):
    size, channels = (16, 32) if name.endswith("/1") else (32, 4)
    with torch.device("meta"):
        sit = SiT_models[name](input_size=size, in_channels=channels)
    assert shapes(sit) == KEYS[name]
    assert sum(p.numel() for p in sit.parameters()) == KEYS[f"{name}:parameters"]


def test_keys_and_sizes_of_vaes_discriminator_and_lpips():
    for name in ("f8d4", "f16d32"):
        with torch.device("meta"):
            vae = VAE_CONFIGS[name].build()
        assert shapes(vae) == KEYS[f"vae:{name}"]
        assert sum(p.numel() for p in vae.parameters()) == KEYS[f"vae:{name}:parameters"]
    assert shapes(PatchDiscriminator()) == KEYS["discriminator"]
    assert shapes(LPIPS()) == KEYS["lpips (taming layout)"]


def case(name: str, path: str) -> tuple[SiT, dict[str, torch.Tensor]]:
    model, options = SIT_CASES[name]
    sit = fill(SiT_models[model](num_classes=10, z_dims=(48, 32), encoder_depth=4, **options))
    return sit, {key: torch.tensor(value) for key, value in golden(f"{name}_{path}").items()}


def run_sit(sit: SiT, g: dict, path: str, x: torch.Tensor):
    t = g["t"].flatten()
    x_t, target = interpolate(path, sit.bn(x), g["noise"], t)
    prediction, tokens = sit(x_t, t, g["y"])
    return prediction, diffusion_loss(prediction, target), alignment_loss(tokens, [g["z0"], g["z1"]])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SIT_CASES)
def test_sit(name, path):
    sit, g = case(name, path)
    sit.eval()
    x = g["x"].clone().requires_grad_()
    prediction, denoising, projection = run_sit(sit, g, path, x)
    (denoising.mean() + 0.5 * projection).backward()
    assert_close(prediction, g["model_output"])
    assert_close(denoising, g["denoising_loss"])
    assert_close(projection, g["proj_loss"])
    assert_close(x.grad, g["grad_x"], 1e-4)
    assert_close(sit.pos_embed, g["pos_embed"])
    t = g["t"].flatten()
    assert_close(sit(g["x"], t, g["y"])[0], g["inference"])
    parameters = dict(sit.named_parameters())
    for key in (key for key in g if key.startswith("grad:")):
        assert_close(parameters[key.removeprefix("grad:")].grad.norm(), g[key], 1e-4)
    sit.train()
    x_t, _ = interpolate(path, sit.bn.by_running_statistics(g["x"]), g["noise"], t)
    with mock.patch.object(SiTBlock, "forward", autospec=True, side_effect=SiTBlock.forward) as forward:
        velocity, tokens = sit(x_t, t, g["y"], depth=4)
    assert (velocity, forward.call_count) == (None, 4)
    assert_close(alignment_loss(tokens, [g["z0"], g["z1"]]), g["align_only_proj_loss"])
    _, denoising, projection = run_sit(sit, g, path, g["x"])
    assert_close(denoising, g["train_denoising_loss"])
    assert_close(projection, g["train_proj_loss"])
    assert_close(sit.bn.running_mean, g["train_bn_mean"])
    assert_close(sit.bn.running_var, g["train_bn_var"])


@pytest.mark.parametrize("name", ["f8d4", "f16d32"])
def test_vae(name):
    g = golden(f"vae_{name}")
    vae = fill(VAE_CONFIGS[name].build())
    with torch.no_grad():
        posterior = vae.encode(torch.tensor(g["x"]))
        recon = vae.decode(posterior.mean)
    assert_close(posterior.mean, g["mean"])
    assert_close(posterior.std, g["std"])
    assert_close(posterior.kl(), g["kl"])
    assert_close(recon, g["recon_of_mean"])


def test_lpips():
    g = golden("lpips")
    assert_close(golden_lpips()(torch.tensor(g["x"]), torch.tensor(g["recon"])), g["lpips"])


def test_vae_loss_and_discriminator_loss():
    g = golden("vae_loss")
    cfg = load_loss_config("configs/l1_lpips_kl_gan.yaml")
    assert cfg == VAELossConfig()
    discriminator = fill(PatchDiscriminator(), "discriminator.").train()
    x, recon = torch.tensor(g["x"]), torch.tensor(g["recon"], requires_grad=True)
    perceptual = golden_lpips()(x, recon)
    total, terms = vae_loss(x, recon, torch.tensor(g["kl"]), perceptual, discriminator(recon)[0], cfg, step=0)
    total.backward()
    assert_close(total, g["total"])
    assert_close(recon.grad, g["grad_recon"], 1e-4)
    for name in ("reconstruction_loss", "perceptual_loss", "kl_loss", "weighted_gan_loss", "gan_loss"):
        assert_close(terms[name], g[name])
    d_loss, d_terms = discriminator_loss(*discriminator(x, recon.detach()), torch.zeros(2), cfg, step=0)
    assert_close(d_loss, g["d_loss"])
    assert_close(d_terms["logits_real"], g["d_logits_real"])
    assert_close(d_terms["logits_fake"], g["d_logits_fake"])


@pytest.mark.parametrize("guided", [False, True])
def test_samplers(guided):
    g = golden("samplers")
    sit = fill(SiT_models["SiT-S/2"](input_size=8, z_dims=(48,), encoder_depth=4)).eval()
    guidance = Guidance(2.5, sit.null_label, 0.2, 0.8) if guided else None
    name = "cfg" if guided else "plain"
    arguments = (lambda x, t, y: sit(x, t, y)[0], torch.tensor(g["latents"]), torch.tensor(g["y"]), 8)
    with torch.no_grad():
        euler, heun = sample_ode(*arguments, guidance), sample_ode(*arguments, guidance, heun=True)
        for path in PATHS:
            assert_close(euler, g[f"euler_{name}_{path}"])
            assert_close(heun, g[f"heun_{name}_{path}"])
            sde = sample_sde(*arguments, path, lambda i: torch.tensor(g["sde_noise"][i]), guidance)
            assert_close(sde, g[f"sde_{name}_{path}"])


def test_center_crop_is_adms_to_the_pixel():
    g = golden("center_crop_64")
    for i in range(5):
        np.testing.assert_array_equal(np.asarray(center_crop(Image.fromarray(g[f"in{i}"]), 64)), g[f"out{i}"])


def test_attributes_that_golden_values_cannot_see():
    sit = SiT_models["SiT-S/2"](input_size=8, qk_norm=True)
    assert sit.bn.eps == 1e-4
    assert not sit.bn.affine
    assert sit.bn.momentum == 0.1
    assert not sit.pos_embed.requires_grad
    for block in sit.blocks:
        assert (block.norm1.eps, block.norm2.eps) == (1e-6, 1e-6)
        assert (block.attn.q_norm.eps, block.attn.k_norm.eps) == (1e-5, 1e-5)
        assert block.mlp.act.approximate == "tanh"
        assert block.attn.fused_attn
    assert sit.final_layer.norm_final.eps == 1e-6
    assert all(m.eps == 1e-6 for m in VAE_CONFIGS["f8d4"].build().modules() if isinstance(m, nn.GroupNorm))
    assert all(m.eps == 1e-5 for m in PatchDiscriminator().modules() if isinstance(m, nn.BatchNorm2d))
    assert all(m.negative_slope == 0.2 for m in PatchDiscriminator().modules() if isinstance(m, nn.LeakyReLU))


def test_initialisation():
    torch.manual_seed(0)
    sit = SiT_models["SiT-S/2"](input_size=8)
    assert sit.final_layer.linear.weight.abs().max() == 0
    assert all(block.adaLN_modulation[1].weight.abs().max() == 0 for block in sit.blocks)
    assert abs(sit.y_embedder.embedding_table.weight.std() - 0.02) < 1e-3
    bound = (6 / (384 + 1152)) ** 0.5
    assert bound * 0.99 < sit.blocks[0].attn.qkv.weight.abs().max() <= bound
    bound = (6 / (384 + 16)) ** 0.5
    assert bound * 0.95 < sit.x_embedder.proj.weight.abs().max() <= bound
    discriminator = PatchDiscriminator()
    assert abs(discriminator.main[5].weight.std() - 0.02) < 1e-3
    assert abs(discriminator.main[6].weight.mean() - 1) < 0.01
    assert discriminator.main[6].bias.abs().max() == 0


def test_unfused_attention_gives_the_same_velocity():
    torch.manual_seed(0)
    inputs = (torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2]))
    options = {"input_size": 8, "encoder_depth": 4}
    fused, plain = (fill(SiT_models["SiT-XXS/2"](**options, fused_attn=f)).eval() for f in (True, False))
    assert not plain.blocks[0].attn.fused_attn
    with torch.no_grad():
        assert_close(plain(*inputs)[0], fused(*inputs)[0])


def test_gan_terms_wait_for_discriminator_start_and_the_warmup():
    images, logits, zero = torch.zeros(2, 3, 8, 8), torch.ones(2, 1, 2, 2), torch.zeros(2)
    cfg = VAELossConfig(discriminator_start=1)
    for warmup, step, weighted, d_loss in ((0, 0, 0, 0), (0, 1, -0.1, 1), (3, 0, 0, 0), (3, 1, 0, 1), (3, 4, -0.1, 1)):
        total, terms = vae_loss(images, images, zero, zero, logits, cfg, step, disc_warmup_steps=warmup)
        assert float(total) == float(terms["weighted_gan_loss"]) == pytest.approx(weighted)
        assert float(terms["gan_loss"]) == -1.0
        assert float(discriminator_loss(logits, logits, zero, cfg, step)[0]) == d_loss


def test_lecam_uses_its_averages_before_it_moves_them():
    cfg = VAELossConfig(lecam_regularization_weight=2.0)
    real, fake, lecam = torch.full((2, 1), 0.5), torch.full((2, 1), -0.25), torch.tensor([0.1, 0.2])
    total, terms = discriminator_loss(real, fake, lecam, cfg, step=0)
    assert float(terms["lecam_loss"]) == pytest.approx(2 * ((0.5 - 0.2) ** 2 + (0.1 + 0.25) ** 2))
    assert float(total) == pytest.approx(0.5 * (0.5 + 0.75) + float(terms["lecam_loss"]))
    update_lecam(lecam, terms["logits_real"], terms["logits_fake"], decay=0.9)
    assert lecam.tolist() == pytest.approx([0.9 * 0.1 + 0.1 * 0.5, 0.9 * 0.2 - 0.1 * 0.25])


def test_l2_reconstruction_and_logvar():
    images, other = torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), 0.5)
    zero = torch.zeros(2)
    cfg = VAELossConfig(reconstruction_loss="l2", logvar_init=1.0, reconstruction_weight=3.0)
    total, _ = vae_loss(images, other, zero, zero, zero, cfg, step=0)
    assert float(total) == pytest.approx(3 * 0.25 / np.e)
