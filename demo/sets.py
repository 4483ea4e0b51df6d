"""Write two sets of images for comparison with samples: held-out photographs and noise.

python demo/sets.py data-demo/test exps/demo/sets
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from dataset import open_images  # noqa: E402
from demo.run import COMPARED  # noqa: E402
from diffusion.previews import evenly_spaced  # noqa: E402


def main() -> None:
    """Write held-out.npz, evenly spaced over the classes, and noise.npz."""
    data_dir, folder = map(Path, sys.argv[1:])
    images = open_images(data_dir)
    chosen = evenly_spaced(images, COMPARED).permute(0, 2, 3, 1).numpy()
    noise = np.random.RandomState(0).randint(0, 256, chosen.shape).astype(np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "held-out.npz", arr_0=chosen)
    np.savez(folder / "noise.npz", arr_0=noise)
    print(f"{COMPARED} held-out images and {COMPARED} of noise in {folder}")


if __name__ == "__main__":
    main()
