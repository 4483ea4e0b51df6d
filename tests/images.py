"""Small image trees and data directories for tests."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from preprocessing import SHARD_IMAGES, preprocess

CLASSES = ("ape", "bee", "cat")


def photo(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    small = np.random.RandomState(seed).randint(0, 256, (4, 4, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def photos(count: int, side: int = 32, first: int = 0) -> np.ndarray:
    """(count,side,side,3) uint8: smooth random pictures."""
    return np.stack([np.asarray(photo(first + i, side, side)) for i in range(count)])


def make_tree(root: Path, per_class: int) -> Path:
    """A folder a class, `per_class` PNG files in each."""
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            photo(100 * label + i).save(root / name / f"{i}.png")
    return root


def make_data(directory: Path, per_class: int, resolution: int = 32, shard_images: int = SHARD_IMAGES) -> Path:
    """A preprocessed data directory of 3·per_class images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("preprocessing.SHARD_IMAGES", shard_images)
        preprocess(make_tree(directory / "tree", per_class), directory / "data", resolution, 1, None)
    return directory / "data"
