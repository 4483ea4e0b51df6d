"""Preprocessed images, read from the shards that preprocessing.py writes.

Shards are uncompressed safetensors (196 kB an image at 256 px): opening one maps it into memory, so reading any row
costs one copy, and datasets may be used by any number of workers, forked or spawned.
"""

import json
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

from errors import UserError

IMAGE_FORMAT = "repae-images/1"


def images_directory(data_dir: str | Path) -> Path:
    """Where the image shards lie below a data directory."""
    return Path(data_dir) / "images"


class ImageDataset:
    """Map-style dataset of (pixels (3,R,R) uint8 tensor, label int).

    Args:
        data_dir: the `--output-path` of preprocessing.py.
        resolution: R that is expected; None takes what is there.

    Raises:
        UserError: no index, an index of another format or resolution, or a missing shard.
    """

    def __init__(self, data_dir: str | Path, resolution: int | None = None):
        self.directory = images_directory(data_dir)
        self.index = read_index(self.directory)
        self.resolution = self.index["resolution"]
        if resolution is not None and self.resolution != resolution:
            raise UserError(
                f"{self.directory} holds images of {self.resolution} px, but --resolution is {resolution}; "
                "preprocess again, or change the flag"
            )
        self.paths = [self.directory / shard["file"] for shard in self.index["shards"]]
        self.ends = list(accumulate(shard["images"] for shard in self.index["shards"]))
        for path in self.paths:
            if not path.is_file():
                raise UserError(f"{path}: no such file, but index.json lists it; run preprocessing.py again")
        if not len(self):
            raise UserError(f"{self.directory} holds no images")
        self.opened: dict[int, tuple] = {}

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, i: int) -> tuple:
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        number = bisect_right(self.ends, i)
        row = i - (self.ends[number - 1] if number else 0)
        pixels, labels = self._shard(number)
        return pixels[row], int(labels[row])

    def _shard(self, number: int) -> tuple:
        if number not in self.opened:
            from safetensors import safe_open

            shard = safe_open(self.paths[number], "pt")
            self.opened[number] = (shard.get_slice("pixels"), shard.get_tensor("labels"))
        return self.opened[number]

    def __getstate__(self) -> dict:
        # memory maps do not travel to spawned workers; each opens its own
        return {**self.__dict__, "opened": {}}


def read_index(directory: Path) -> dict:
    """The index.json of a folder of image shards.

    Raises:
        UserError: it is missing or of another format.
    """
    path = directory / "index.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; run preprocessing.py with --output-path {directory.parent} to the end")
    try:
        index = json.loads(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); run preprocessing.py again") from None
    if not isinstance(index, dict) or index.get("format") != IMAGE_FORMAT:
        raise UserError(f"{path}: not an index of {IMAGE_FORMAT}; run preprocessing.py again")
    return index
