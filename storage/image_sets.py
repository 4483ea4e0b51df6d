"""Sets of images that metrics compare: an `.npz` as the ADM evaluation suite reads it, or a folder of pictures.

Map-style data sets of uint8 pixels (3,H,W), in the npz's order, or in that of the sorted file names.
"""

import math
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from errors import UserError
from storage.photographs import choose_images, count_reasons, list_tree, read_rgb

DAMAGE = (EOFError, ValueError, KeyError, OSError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)


class NpzImages(Dataset):
    """`arr_0` of an npz, uint8 (N,H,W,3): mapped into memory if it is stored uncompressed, as it should be."""

    def __init__(self, path: Path):
        self.path = path
        self.array = map_member(path, "arr_0.npy")
        if self.array.dtype != np.uint8 or self.array.ndim != 4 or self.array.shape[3] != 3:
            raise UserError(
                f"{path}: arr_0 is {self.array.dtype} {self.array.shape}, expected uint8 pixels of shape (N,H,W,3)"
            )
        self.size = self.array.shape[1:3]

    def __reduce__(self) -> tuple:
        return NpzImages, (self.path,)  # a spawned worker maps the file itself

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self.array[index])).permute(2, 0, 1)


class FolderImages(Dataset):
    """The pictures below a folder, found and converted as preprocessing.py does, but of one size, which is checked when
    a picture is read. `skipped` lists the other files."""

    def __init__(self, folder: Path):
        self.path = folder
        paths, hidden = list_tree(folder)
        images, others = choose_images(folder, paths)
        self.skipped = hidden + others
        self.files = [folder / path for path in images]
        if not self.files:
            raise UserError(f"{folder}: no images below it")
        self.size = self.read(self.files[0]).shape[:2]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        pixels = self.read(self.files[index])
        if pixels.shape[:2] != self.size:
            size = size_text(pixels.shape[:2])
            raise UserError(f"{self.files[index]}: {size}, but {self.files[0]} is {size_text(self.size)}")
        return torch.from_numpy(pixels).permute(2, 0, 1)

    @staticmethod
    def read(path: Path) -> np.ndarray:
        """(H,W,3) uint8."""
        try:
            return np.array(read_rgb(path))
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{path}: not a readable image ({error})") from None


def size_text(size: tuple[int, int]) -> str:
    """Height and width as text."""
    return f"{size[0]}x{size[1]} px"


def npz_arrays(path: Path) -> list[str]:
    """Names of the arrays in an npz; a UserError if it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except DAMAGE as error:
        raise UserError(f"{path}: not a readable npz ({error})") from None


def map_member(path: Path, name: str) -> np.ndarray:
    """An array of an npz, read-only: mapped, without comparing its checksum, or read into memory if it is compressed.

    Raises:
        UserError: the file is damaged, or holds no such array of numbers or text.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if name not in archive.namelist():
                others = ", ".join(archive.namelist()[:8])
                raise UserError(f"{path}: no {name.removesuffix('.npy')} inside, but {others}; unpack zipped images")
            info = archive.getinfo(name)
            with archive.open(name) as file:
                formats = np.lib.format
                first = formats.read_magic(file) == (1, 0)
                read_header = formats.read_array_header_1_0 if first else formats.read_array_header_2_0
                shape, fortran, dtype = read_header(file)
                offset = file.tell()
            if dtype.hasobject:  # mapped, pickled objects would be taken for addresses
                raise ValueError(f"{name} holds Python objects")
            if info.file_size != offset + math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} says {dtype} {shape}, which its {info.file_size} bytes are not")
            if info.compress_type != zipfile.ZIP_STORED:
                with archive.open(name) as file:
                    return np.lib.format.read_array(file, allow_pickle=False)
        with open(path, "rb") as file:
            file.seek(info.header_offset + 26)
            lengths = np.frombuffer(file.read(4), "<u2")
        start = info.header_offset + 30 + int(lengths.sum()) + offset
        return np.memmap(path, dtype, "r", start, shape, "F" if fortran else "C")
    except DAMAGE as error:
        raise UserError(f"{path}: not a readable npz ({error})") from None


def open_image_set(path: Path, what: str, log: Callable[[str], object]) -> Dataset:
    """The 8-bit RGB images of an npz or below a folder; `what` names them in messages."""
    if path.is_dir():
        images = FolderImages(path)
        if images.skipped:
            log(f"{what} {path}: {len(images)} images; left out: {count_reasons(images.skipped)}")
    elif path.is_file():
        images = NpzImages(path)
    else:
        raise UserError(f"{what} {path}: no such file or folder")
    if len(images) == 0:
        raise UserError(f"{what} {path}: no images")
    return images
