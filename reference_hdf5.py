"""The reference implementation's HDF5 data, read as it is; h5py is an extra (requirements-hdf5.txt).

`images.h5` holds one data set an image, the bytes of a PNG file; `NAME.h5` one (2C,h,w) array an image, mean and std.
Each also holds a `dataset.json` of labels, {"labels": [[name, label], ...]}, and has a list of its names beside it,
`images_h5.json` and `NAME_h5.json`. Sorted by name, image i and latent i belong together.
"""

import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from errors import UserError
from storage.photographs import opened_image, refuse_more_than_memory

LABELS = "dataset.json"
ROWS_A_SHARD = 512
CHECKED_NAMES = 1000  # looking each of a million up would take many seconds


class HDF5File:
    """The named data sets of one file and their labels; every process that reads opens its own handle.

    Raises:
        UserError: h5py is not installed, a file is missing or damaged, or an image has no label.
    """

    def __init__(self, path: Path):
        try:
            import h5py  # noqa: F401
        except ImportError:
            raise UserError(f"{path}: reading HDF5 needs h5py; pip install -r requirements-hdf5.txt") from None
        self.path, self.opened = path, (0, None)
        listing = path.with_name(f"{path.stem}_h5.json")
        for file in (path, listing):
            if not file.is_file():
                raise UserError(f"{file}: no such file; expected the reference's HDF5 file and its list of names")
        try:
            self.names = sorted(str(name) for name in json.loads(listing.read_text(encoding="utf8")) if name != LABELS)
        except (ValueError, TypeError, RecursionError):
            raise UserError(f"{listing}: expected a JSON list of names") from None
        if not self.names:
            raise UserError(f"{listing} names no images")
        self.labels = self._read_labels()
        for name in self.names[:: 1 + len(self.names) // CHECKED_NAMES]:
            if name not in self.handle:
                raise UserError(f"{path}: holds no {name}, which {listing.name} names")

    def _read_labels(self) -> list[int]:
        try:
            labels = dict(json.loads(as_bytes(self.handle[LABELS]))["labels"])
            labels = [int(labels[name]) for name in self.names]
            if min(labels) < 0:
                raise ValueError(f"one is {min(labels)}")
            return labels
        except OSError as error:
            raise UserError(f"{self.path}: not a readable HDF5 file ({error})") from None
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{self.path}: its {LABELS} gives no label for every name ({error})") from None

    @property
    def handle(self):
        """The open file. A handle of the process that this one forked from is closed first: HDF5 would share it."""
        if self.opened[0] != os.getpid():
            import h5py

            if self.opened[1] is not None:
                self.opened[1].close()
            self.opened = (os.getpid(), h5py.File(self.path, "r"))
        return self.opened[1]

    def __getitem__(self, i: int):
        """The data set of row `i`. Raises a UserError if there is none, a ValueError if memory could not hold it."""
        entry = self.handle.get(self.names[i])
        if not hasattr(entry, "nbytes"):  # nothing, or a group
            raise UserError(f"{self.path}: holds no {self.names[i]}, which its list names")
        refuse_more_than_memory(entry.nbytes, "it")
        return entry

    def __getstate__(self) -> dict:
        return {**self.__dict__, "opened": (0, None)}

    def fingerprint(self) -> str:
        """Hash of names, labels and the file's size: hashing the content would mean reading all of it."""
        facts = [self.names, self.labels, self.path.stat().st_size]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class HDF5Images:
    """`images.h5` as a map-style dataset of (pixels, label), with the attributes of dataset.ImageDataset."""

    def __init__(self, data_dir: str | Path):
        self.source = Path(data_dir) / "images.h5"
        self.file = HDF5File(self.source)
        self.fingerprint, self.classes = self.file.fingerprint(), None
        self.num_classes = max(self.file.labels) + 1
        rows = len(self.file.names)
        self.sizes = [min(ROWS_A_SHARD, rows - first) for first in range(0, rows, ROWS_A_SHARD)]
        self.resolution = self._decode(0).shape[0]

    def __len__(self) -> int:
        return len(self.file.names)

    def _decode(self, i: int) -> np.ndarray:
        try:
            with opened_image(io.BytesIO(as_bytes(self.file[i]))) as image:
                return np.array(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{self.source}: {self.file.names[i]} is no readable image ({error})") from None

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        pixels = self._decode(i)
        if pixels.shape[:2] != (self.resolution, self.resolution):
            size = f"{pixels.shape[1]}x{pixels.shape[0]}"
            raise UserError(f"{self.source}: {self.file.names[i]} is {size}, expected {self.resolution} px squared")
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), self.file.labels[i]


class HDF5Latents:
    """`NAME.h5` as a map-style dataset of (pixels, label, moments), with the attributes of dataset.LatentDataset.

    The file does not say which VAE and which statistics it was made with, so `vae_fingerprint` and `statistics` are
    None. `images` are what the pixels are read from, or None.
    """

    def __init__(self, data_dir: str | Path, name: str, images: HDF5Images | None):
        self.source, self.images = Path(data_dir) / f"{name}.h5", images
        self.file = HDF5File(self.source)
        self.fingerprint, self.num_classes = self.file.fingerprint(), max(self.file.labels) + 1
        self.vae_fingerprint = self.statistics = None
        self.image_fingerprint = None if images is None else images.fingerprint
        first = self._moments(0).shape
        if len(first) != 3:
            raise UserError(f"{self.source}: {self.file.names[0]} has shape {first}, expected (2C, h, w)")
        self.shape = (first[0] // 2, *first[1:])

    def __len__(self) -> int:
        return len(self.file.names)

    def _moments(self, i: int) -> np.ndarray:
        try:
            return np.asarray(self.file[i], dtype=np.float32)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{self.source}: {self.file.names[i]} is no readable array ({error})") from None

    def __getitem__(self, i: int) -> tuple[Tensor, int, Tensor]:
        pixels = torch.empty(0, dtype=torch.uint8) if self.images is None else self.images[i][0]
        moments = torch.from_numpy(self._moments(i))
        if moments.shape != (2 * self.shape[0], *self.shape[1:]):
            raise UserError(f"{self.source}: {self.file.names[i]} has shape {tuple(moments.shape)}, unlike the first")
        return pixels, self.file.labels[i], moments


def as_bytes(stored) -> bytes:
    """The bytes of a data set that holds a file: an array of uint8, or a string."""
    value = stored[()]
    if isinstance(value, str):
        return value.encode("utf8")
    return value if isinstance(value, bytes) else np.asarray(value).tobytes()
