"""The reference implementation's `images.h5`: one data set an image, the bytes of a PNG file, and a `dataset.json` of
labels, {"labels": [[name, label], ...]}. h5py is an extra (requirements-hdf5.txt).
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from errors import UserError
from storage.photographs import Source, parse_labels

LABELS = "dataset.json"


def is_hdf5(path: Path) -> bool:
    return path.suffix in (".h5", ".hdf5")


@contextmanager
def opened_hdf5(path: Path) -> Iterator[Callable[[str], io.BytesIO]]:
    """A function from a data set's name to its bytes, as a file. HDF5 files must not be shared by processes."""
    try:
        import h5py
    except ImportError:
        raise UserError(f"{path}: reading HDF5 needs h5py; pip install -r requirements-hdf5.txt") from None
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{path}: not a readable HDF5 file ({error})") from None
    with file:
        yield lambda name: io.BytesIO(np.asarray(file[name][()]).tobytes())


def list_hdf5(path: Path) -> list[Source]:
    """The names and labels of all images, sorted by name."""
    with opened_hdf5(path) as read:
        try:
            content = read(LABELS).read()
        except KeyError:
            raise UserError(f"{path}: holds no {LABELS}; expected the reference's images.h5") from None
    labels = parse_labels(content, f"{path}: its {LABELS}")
    return [Source(name, labels[name]) for name in sorted(labels)]
