"""Photographs: the files of a tree and their labels, and how a file becomes a square RGB image."""

import errno
import json
import os
from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from errors import UserError

# bytes of text in a PNG, which may hold its orientation; by default Pillow refuses more than a megabyte
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 28
NOT_DECODED = {"BUFR", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}  # formats that Pillow only recognises or writes
# whether a file of this suffix is an image; text, backups and partial copies, which may lie beside it, are not opened
SUFFIXES = {suffix: form not in NOT_DECODED for suffix, form in Image.registered_extensions().items()}
BESIDE = ".bak .crdownload .csv .jpg_original .json .npy .orig .part .swp .tmp .txt .xml"
SUFFIXES |= dict.fromkeys(BESIDE.split(), False)
SYSTEM_NAMES = {  # of macOS, Windows and network disks
    *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "recycler", "system volume information"),
    *("lost+found", "found.000", "@eadir", "@synoeastream", "@thumb", "@tmp", "@recycle", "@recently-snapshot"),
    *("#recycle", "#snapshot", "~snapshot"),
}
# not of an image, but of the machine or a network disk; they end the run
MACHINE_ERRORS = {errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT}


class Source(NamedTuple):
    """A file, by its path relative to the tree, and its label."""

    path: str
    label: int


class Skipped(NamedTuple):
    """A file that gives no image, and why."""

    path: str
    reason: str


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


def read_rgb(file: Path | BinaryIO) -> Image.Image:
    """Decode one file, upright and in RGB. Raises whatever Pillow raises for a file that is no image, or whose pixels,
    more than 179 million, should not be decoded into memory."""
    with Image.open(file) as image:
        return upright_rgb(image)


def read_image(file: Path | BinaryIO, size: int) -> np.ndarray:
    """Decode and crop one file: (3, size, size) uint8. Raises as `read_rgb`."""
    return np.asarray(center_crop(read_rgb(file), size)).transpose(2, 0, 1)


def reason_for(error: Exception) -> str:
    """Why a file gives no image, by the error of reading it, which is raised again if it is of the machine."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) in MACHINE_ERRORS:
        raise error
    return f"{type(error).__name__}: {error}"


def list_tree(root: Path, output: Path | None = None) -> tuple[list[str], list[Skipped]]:
    """The files below `root` but not below `output`, as sorted relative POSIX paths, and the hidden ones. Links are
    followed, but never in a circle."""

    def fail(error: OSError) -> None:
        if Path(error.filename) == root or not is_hidden(Path(error.filename).relative_to(root).as_posix()):
            raise error

    paths = []
    for folder, below, names in os.walk(root, followlinks=True, onerror=fail):
        here = Path(folder)
        above = {folder.resolve() for folder in here.parents if folder.is_relative_to(root)}
        if here.resolve() in above or (output is not None and here.resolve() == output.resolve()):
            below.clear()
            continue
        start = "" if here == root else f"{here.relative_to(root).as_posix()}/"
        paths += [start + name for name in names]
    hidden = {path for path in paths if is_hidden(path)}
    return sorted(set(paths) - hidden), [Skipped(path, "hidden or system file") for path in sorted(hidden)]


def is_hidden(path: str) -> bool:
    """Whether a file, or a folder on the way to it, is hidden or of the system."""
    return any(part.startswith(".") or part.endswith("~") or part.lower() in SYSTEM_NAMES for part in path.split("/"))


def is_image(path: Path) -> bool:
    """Whether a file is an image, perhaps damaged, by its suffix or, if no format has that, by its first bytes."""
    if path.suffix.lower() in SUFFIXES or not path.is_file():
        return SUFFIXES.get(path.suffix.lower(), False)
    try:
        with Image.open(path) as image:
            return image.format not in NOT_DECODED
    except Exception:  # Pillow raises a dozen kinds
        return False


def choose_images(root: Path, paths: list[str]) -> tuple[list[str], list[Skipped]]:
    """The images among files of a tree, and the others."""
    images = [path for path in paths if is_image(root / path)]
    others = sorted(set(paths) - set(images))
    return images, [Skipped(path, f"not an image ({Path(path).suffix or 'no suffix'})") for path in others]


def printable(text: str) -> str:
    """`text` on one line: tabs, line breaks and bytes that are no UTF-8 are shown as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def count_reasons(skipped: list[Skipped]) -> str:
    """The most frequent reasons for which files were skipped."""
    reasons = Counter(printable(entry.reason).split(":")[0] for entry in skipped)
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(8))


def parse_labels(content: bytes, where: str, images: Iterable[str] = ()) -> dict[str, int]:
    """The labels of a `dataset.json`, called `where` in messages: {"labels": [[path, label], ...]}, or of null, which
    is 0 for all `images`."""
    try:
        labels = json.loads(content)["labels"]
        labels = dict.fromkeys(images, 0) if labels is None else labels
        labels = {str(name): label for name, label in (labels.items() if isinstance(labels, dict) else labels)}
    except (KeyError, TypeError, ValueError):
        raise UserError(f'{where}: expected JSON of the form {{"labels": [["path.png", 7], ...]}}') from None
    for name, label in labels.items():
        if type(label) is not int or label < 0:
            raise UserError(f"{where}: the label of {name} is {label!r}, expected an integer of at least 0")
    return labels


def list_sources(root: Path, output: Path | None = None) -> tuple[list[Source], list[Skipped], list[str] | None]:
    """The labelled images of a tree but for its folder `output`, the other files, and the class names, if known."""
    files, hidden = list_tree(root, output)
    label = label_by_file if "dataset.json" in files else label_by_folder
    sources, skipped, classes = label(root, files)
    return sources, [Skipped(*entry) for entry in (dict(skipped) | dict(hidden)).items()], classes


def label_by_file(root: Path, files: list[str]) -> tuple[list[Source], list[Skipped], None]:
    """Labels by the tree's `dataset.json`; its paths may have backslashes, be absolute or begin with a dot."""
    where, present = root / "dataset.json", set(files) - {"dataset.json"}
    labels = parse_labels(where.read_bytes(), str(where), (path for path in sorted(present) if is_image(root / path)))
    for name in [name for name in labels if name not in present]:
        path = os.path.relpath(root / name.replace("\\", "/").removeprefix(f"{root.resolve()}/"), root)
        if path in present:
            labels.setdefault(path, labels.pop(name))
    if labels and present.isdisjoint(labels):
        found = f"none of the {len(labels)} files that it names, such as {next(iter(labels))}, is in {root}"
        raise UserError(f"{where}: {found}; expected paths relative to this folder")
    skipped = [Skipped(path, "no label in dataset.json") for path in sorted(present - labels.keys())]
    skipped += [Skipped(path, "in dataset.json, but no such file") for path in sorted(labels.keys() - present)]
    return [Source(path, labels[path]) for path in sorted(present & labels.keys())], skipped, None


def label_by_folder(root: Path, files: list[str]) -> tuple[list[Source], list[Skipped], list[str]]:
    """Labels by the sorted top-level folders that give an image, whose names are the classes."""
    images, skipped = choose_images(root, files)
    reasons = {path: "not inside a class folder" for path in images if "/" not in path}
    classes = []
    for folder, paths in groupby((path for path in images if "/" in path), lambda path: path.split("/")[0]):
        for path in paths:
            try:
                read_image(root / path, 1)
                classes.append(folder)
                break
            except Exception as error:
                reasons[path] = reason_for(error)
    labels = {folder: label for label, folder in enumerate(sorted(classes))}
    sources = [Source(path, labels[path.split("/")[0]]) for path in images if path not in reasons]
    return sources, [*skipped, *(Skipped(*entry) for entry in reasons.items())], list(labels)
