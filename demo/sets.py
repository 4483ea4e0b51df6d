"""Two sets of images that samples are compared with: photographs that no network has seen, and noise.

python demo/sets.py data-demo/test exps/demo/sets
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from dataset import open_images  # noqa: E402
from demo.run import COMPARED  # noqa: E402
from storage.sample_files import write_npz


def main() -> None:
    """Write held-out.npz, evenly spaced over the classes, and noise.npz."""
    data_dir, folder = map(Path, sys.argv[1:])
    images = open_images(data_dir)
    chosen = [images[i * len(images) // COMPARED][0].permute(1, 2, 0).numpy() for i in range(COMPARED)]
    shape = (COMPARED, *chosen[0].shape)
    noise = np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (("held-out", chosen), ("noise", noise)):
        write_npz(folder / f"{name}.npz", shape, iter(array))
    print(f"{COMPARED} held-out images and {COMPARED} of noise in {folder}")


if __name__ == "__main__":
    main()
