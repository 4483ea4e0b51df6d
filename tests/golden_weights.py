"""The golden values' weights: every tensor is a function of its name and shape, so none are stored."""

import functools
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of golden/NAME.npz."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


def filled(key: str, shape: tuple[int, ...], prefix: str = "") -> Tensor:
    """The float32 tensor that belongs to state-dict key `key`."""
    values = np.random.RandomState(zlib.crc32((prefix + key).encode())).standard_normal(shape)
    if len(shape) >= 2:
        values = values / np.sqrt(np.prod(shape[1:]))
    elif key.endswith("running_var"):
        values = np.exp(0.1 * values)
    else:
        values = 0.1 * values + (1.0 if key.endswith("weight") else 0.0)
    return torch.tensor(values, dtype=torch.float32).reshape(shape)


@functools.cache
def lpips_state() -> dict[str, Tensor]:
    """LPIPS' golden weights but its scaling layer; so many that they are filled once a process."""
    shapes = json.loads((GOLDEN / "state_dicts.json").read_text())["lpips (taming layout)"]
    shapes = {key: tuple(shape) for key, shape in shapes.items() if not key.startswith("scaling_layer")}
    return {key: filled(key, shape, "perceptual_loss.lpips.") for key, shape in shapes.items()}


@torch.no_grad()
def fill(module: nn.Module, prefix: str = "", keep: tuple[str, ...] = ("pos_embed",)) -> nn.Module:
    """Fill `module` in place; integer tensors and keys containing a word of `keep` stay as they are."""
    for key, tensor in module.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not any(word in key for word in keep):
            tensor.copy_(filled(key, tuple(tensor.shape), prefix))
    return module


def assert_close(actual: Tensor | np.ndarray, expected: Tensor | np.ndarray, tolerance: float = 1e-5) -> None:
    """|actual - expected| <= tolerance · max|expected|, wherever the two lie."""
    actual, expected = (
        array.detach().cpu().double().numpy() if isinstance(array, Tensor) else np.asarray(array, dtype=np.float64)
        for array in (actual, expected)
    )
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    error = np.abs(actual - expected).max()
    assert error <= tolerance * np.abs(expected).max(), f"off by {error / np.abs(expected).max():.2e} of the largest"
