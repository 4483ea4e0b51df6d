"""The reference implementation's HDF5 data, read as it is; h5py is an extra (requirements-hdf5.txt).

`images.h5` holds one data set an image, the bytes of a PNG file; `NAME.h5` one (2C,h,w) array an image, mean and std.
Each also holds a `dataset.json` of labels, {"labels": [[name, label], ...]}, and has a list of its names beside it,
`images_h5.json` and `NAME_h5.json`. Sorted by name, image i and latent i belong together.
"""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dataset import ImageDataset
from errors import UserError

LABELS = "dataset.json"
ROWS_A_SHARD = 512
CHECKED_NAMES = 1000  # looking each of a million up would take many seconds


class HDF5File:
    """The named data sets of one file, opened once in every process that reads.

    Raises:
        UserError: h5py is not installed, a file is missing or damaged, or an image has no label.
    """

    def __init__(self, path: Path):
        try:
            import h5py  # noqa: F401
        except ImportError:
            raise UserError(f"{path}: reading HDF5 needs h5py; pip install -r requirements-hdf5.txt") from None
        self.path, self.handle = path, None
        listing = path.with_name(f"{path.stem}_h5.json")
        for file in (path, listing):
            if not file.is_file():
                raise UserError(f"{file}: no such file; expected the reference's HDF5 file and its list of names")
        try:
            self.names = sorted(name for name in json.loads(listing.read_text(encoding="utf8")) if name != LABELS)
        except (ValueError, TypeError):
            raise UserError(f"{listing}: expected a JSON list of names") from None
        try:
            labels = dict(json.loads(as_bytes(self.open()[LABELS]))["labels"])
            self.labels = [int(labels[name]) for name in self.names]
        except OSError as error:
            raise UserError(f"{path}: not a readable HDF5 file ({error})") from None
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path}: its {LABELS} gives no label for every name ({error})") from None
        if not self.names:
            raise UserError(f"{listing} names no images")
        for name in self.names[:: 1 + len(self.names) // CHECKED_NAMES]:
            if name not in self.open():
                raise UserError(f"{path}: holds no {name}, which {listing.name} names")
        self.close()

    def open(self):
        """This process's handle."""
        if self.handle is None:
            import h5py

            self.handle = h5py.File(self.path, "r")
        return self.handle

    def close(self) -> None:
        """Close it: what is open in one process must not be used by those that fork from it."""
        if self.handle is not None:
            self.handle.close()
            self.handle = None

    def __getitem__(self, i: int):
        return self.open()[self.names[i]]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "handle": None}

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
        self.resolution = self.decode(0).shape[-1]
        self.file.close()

    def __len__(self) -> int:
        return len(self.file.names)

    def decode(self, i: int) -> Tensor:
        """Image `i`, (3,R,R) uint8.

        Raises:
            UserError: it is no square image.
        """
        stored = self.file[i]
        if stored.ndim == 3:  # pixels (R,R,3) instead of a PNG's bytes
            pixels = np.asarray(stored)
        else:
            with Image.open(io.BytesIO(as_bytes(stored))) as image:
                pixels = np.asarray(image.convert("RGB"))
        if pixels.shape[0] != pixels.shape[1]:
            raise UserError(f"{self.source}: {self.file.names[i]} is {pixels.shape[1]}x{pixels.shape[0]}, not square")
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.decode(i), self.file.labels[i]


class HDF5Latents:
    """`NAME.h5` as a map-style dataset of (pixels, label, moments), with the attributes of dataset.LatentDataset.

    The file does not say which VAE and which statistics it was made with, so `vae_fingerprint` and `statistics` are
    None.

    Raises:
        UserError: as HDF5File, or the labels are not those of `images`.
    """

    def __init__(self, data_dir: str | Path, name: str, images: HDF5Images | None):
        self.source, self.images = Path(data_dir) / f"{name}.h5", images
        self.file = HDF5File(self.source)
        self.fingerprint, self.classes = self.file.fingerprint(), None
        self.num_classes = max(self.file.labels) + 1
        self.vae_fingerprint = self.statistics = self.resolution = None
        self.image_fingerprint = None if images is None else images.fingerprint
        self.mirrored = False
        channels, height, width = self.file[0].shape
        self.shape = (channels // 2, height, width)
        self.file.close()
        if isinstance(images, ImageDataset):
            raise UserError(f"{self.source} belongs to an images.h5, but {data_dir} holds shards; cache latents again")
        if images is not None and images.file.labels != self.file.labels:
            raise UserError(
                f"{self.source} holds {len(self)} latents, which are not those of the {len(images)} images of "
                f"{images.source}: their labels differ"
            )

    def __len__(self) -> int:
        return len(self.file.names)

    def __getitem__(self, i: int) -> tuple[Tensor, int, Tensor]:
        pixels = torch.empty(0, dtype=torch.uint8) if self.images is None else self.images[i][0]
        return pixels, self.file.labels[i], torch.from_numpy(np.asarray(self.file[i], dtype=np.float32))


def as_bytes(stored) -> bytes:
    """The bytes of a data set that holds a file: an array of uint8, or a string."""
    value = stored[()]
    if isinstance(value, str):
        return value.encode("utf8")
    return value if isinstance(value, bytes) else np.asarray(value).tobytes()
