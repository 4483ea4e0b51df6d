"""Opening image files that may hold anything."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image

# A file of a kilobyte can announce any size, and is decoded into memory. Pillow's own bound, at which it only warns, is
# 89 million pixels: a quarter of a GB in RGB, and more than photographs have.
MAX_PIXELS = Image.MAX_IMAGE_PIXELS


@contextmanager
def opened_image(file: Path | BinaryIO) -> Iterator[Image.Image]:
    """A file's image, not decoded yet; it may be decoded within.

    Raises:
        ValueError: the image, or one inside of its file, is of more than MAX_PIXELS pixels.
        OSError, SyntaxError, ...: whatever Pillow raises where it is no image.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file) as image:
                yield image
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise ValueError(f"more than {MAX_PIXELS} pixels") from None


def memory_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def refuse_more_than_memory(size: int, what: str) -> None:
    """Raise a ValueError if `what` would take more bytes than the machine's memory has."""
    if size > memory_bytes():
        raise ValueError(f"{what} claims {size / 1e9:.1f} GB, more than this machine's memory")
