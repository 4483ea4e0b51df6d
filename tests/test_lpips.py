"""LPIPS with real weights: the converter, and parity with the lpips package's own code."""

import pickle

import pytest
import torch
from torchvision.models import vgg16

from demo.convert_lpips import NumpyUnpickler
from errors import UserError
from images import photos
from loss.lpips import unit
from test_trust import Executed
from weights.features import load_lpips


def photographs(count: int) -> torch.Tensor:
    return torch.tensor(photos(count, 64)).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_values_equal_the_lpips_packages(vgg_weights, monkeypatch):
    import lpips

    def pretrained_vgg(**_):
        network = vgg16(weights=None)
        network.load_state_dict(torch.load(vgg_weights, weights_only=True), strict=False)
        return network

    monkeypatch.setattr("lpips.pretrained_networks.tv.vgg16", pretrained_vgg)
    theirs = lpips.LPIPS(net="vgg", verbose=False).eval()
    ours = load_lpips(vgg_weights)
    a, b = photographs(4), photographs(8)[4:]
    recon = b.clone().requires_grad_()
    value = ours(a, recon)
    torch.testing.assert_close(value, theirs(a, b), atol=1e-6, rtol=1e-5)
    (gradient,) = torch.autograd.grad(value.sum(), recon)
    other = b.clone().requires_grad_()
    (expected,) = torch.autograd.grad(theirs(a, other).sum(), other)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-3)
    assert float(ours(a, a).abs().max()) == 0
    assert float(value.min()) > 0.05


def test_the_converter_unpickles_nothing_but_numpy(tmp_path):
    path = tmp_path / "evil.ckpt"
    path.write_bytes(pickle.dumps({"VGG16_0": Executed(tmp_path / "canary")}))
    with open(path, "rb") as file, pytest.raises(pickle.UnpicklingError, match="refused.*mkdir"):
        NumpyUnpickler(file).load()
    assert not (tmp_path / "canary").exists()


def test_gradient_is_finite_where_all_features_are_zero():
    features = torch.zeros(1, 4, 2, 2, requires_grad=True)
    unit(features).sum().backward()
    assert features.grad.isfinite().all()


def test_half_precision_input_is_compared_in_float32(vgg_weights):
    ours = load_lpips(vgg_weights)
    a, b = photographs(2), photographs(4)[2:]
    with torch.autocast("cpu", torch.bfloat16):
        value = ours(a, b)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, ours(a, b))


def test_offline_the_missing_file_and_its_place_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"and offline; put torchvision's vgg16-397923af.pth at {tmp_path}/hub/check"):
        load_lpips(None, offline=True)
