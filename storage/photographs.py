"""Photographs: the files of a tree and their labels, and how a file becomes a square RGB image."""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from errors import UserError

# 89 million: a small file can announce any size, and is decoded into memory; Pillow only warns at this bound
MAX_PIXELS = Image.MAX_IMAGE_PIXELS
MAX_ASPECT_RATIO = 100


class Source(NamedTuple):
    """A file, by its path relative to the tree, and its label."""

    path: str
    label: int


class Skipped(NamedTuple):
    """A file that gives no image, and why."""

    path: str
    reason: str


@contextmanager
def opened_image(file: Path | BinaryIO) -> Iterator[Image.Image]:
    """A file's image, not decoded yet; a ValueError if it, or another in its file, has more than MAX_PIXELS pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file) as image:
                yield image
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise ValueError(f"more than {MAX_PIXELS} pixels") from None


def refuse_more_than_memory(size: int, what: str) -> None:
    """Raise a ValueError if `what` would take more bytes than the machine's memory has."""
    if size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise ValueError(f"{what} claims {size / 1e9:.1f} GB, more than this machine's memory")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop (Dhariwal & Nichol, arXiv 2105.05233): halve with a box filter while at least twice too large,
    resize the shorter side to `size` bicubically, cut the middle. `image` is RGB; returns size x size."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def upright_rgb(image: Image.Image) -> Image.Image:
    """`image` in 8-bit RGB, turned by its EXIF orientation, on white where it is transparent, 16-bit grey scaled.

    Floating-point pixels, whose range is unknown, are a ValueError.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode.startswith("I"):
        grey = (np.asarray(image, dtype=np.float64) / 257).round().clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def read_image(file: Path | BinaryIO, size: int) -> np.ndarray:
    """Decode and crop one file: (3, size, size) uint8. Raises whatever Pillow raises for a file that is no image."""
    if isinstance(file, Path) and not file.is_file():
        raise ValueError("no such file, or not a regular one")
    with opened_image(file) as image:
        if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
            raise ValueError(f"{image.width}x{image.height} pixels, a strip")
        image.load()
        return np.asarray(center_crop(upright_rgb(image), size)).transpose(2, 0, 1)


def list_tree(root: Path) -> list[str]:
    """Every file below `root` as a relative POSIX path, sorted. Links are followed, but never in a circle."""

    def fail(error: OSError) -> None:
        raise error

    paths = []
    for folder, below, names in os.walk(root, followlinks=True, onerror=fail):
        here = Path(folder)
        if here.resolve() in {above.resolve() for above in here.parents if above.is_relative_to(root)}:
            below.clear()
            continue
        start = "" if here == root else f"{here.relative_to(root).as_posix()}/"
        paths += [start + name for name in names]
    return sorted(paths)


def parse_labels(content: bytes, where: str) -> dict[str, int]:
    """The labels of a `dataset.json`, {"labels": [[path, label], ...]}; `where` names it in messages."""
    try:
        labels = json.loads(content)["labels"]
        labels = {str(name): label for name, label in (labels.items() if isinstance(labels, dict) else labels)}
    except (KeyError, TypeError, ValueError):
        raise UserError(f'{where}: expected JSON of the form {{"labels": [["path.png", 7], ...]}}') from None
    for name, label in labels.items():
        if type(label) is not int or label < 0:
            raise UserError(f"{where}: the label of {name} is {label!r}, expected an integer of at least 0")
    return labels


def list_sources(root: Path) -> tuple[list[Source], list[Skipped], list[str] | None]:
    """The labelled files of a tree, the files without a label, and the class names (None with a dataset.json)."""
    files = list_tree(root)
    if (root / "dataset.json").is_file():
        labels = parse_labels((root / "dataset.json").read_bytes(), str(root / "dataset.json"))
        files.remove("dataset.json")
        present = set(files)
        sources = [Source(path, labels[path]) for path in files if path in labels]
        skipped = [Skipped(path, "no label in dataset.json") for path in files if path not in labels]
        skipped += [Skipped(path, "in dataset.json, but no such file") for path in labels if path not in present]
        return sources, skipped, None
    shown = [path for path in files if "/" in path and not path.startswith(".")]
    classes = sorted({path.split("/")[0] for path in shown})
    index = {name: i for i, name in enumerate(classes)}
    sources = [Source(path, index[path.split("/")[0]]) for path in shown]
    skipped = [Skipped(path, "not inside a class folder") for path in sorted(set(files) - set(shown))]
    return sources, skipped, classes
