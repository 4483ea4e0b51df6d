"""The files of a set of samples: PNGs, the `.npz` of the ADM evaluation suite, and the manifest of what made them.

In a folder, a set NAME is NAME/000000.png ..., NAME.npz and NAME.json. Until all are there, the npz's samples lie in
NAME.parts/, one file a batch; every file is written under a temporary name and renamed, so that work can stop anywhere.
"""

import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from errors import UserError
from files import replace_text

MANIFEST_FORMAT = "repae-samples/1"
ZIP_ERRORS = (OSError, ValueError, KeyError, zipfile.BadZipFile)


class SampleFiles:
    """A set of `count` samples of `resolution` pixels at FOLDER/NAME, kept as PNGs, as an npz, or both.

    With neither, samples stay in NAME.parts/ until `clean`.
    """

    def __init__(self, folder: Path, name: str, count: int, resolution: int, png: bool, npz: bool):
        self.count, self.resolution = count, resolution
        self.pngs, self.npz = (folder / name if png else None), (folder / f"{name}.npz" if npz else None)
        self.parts, self.manifest = folder / f"{name}.parts", folder / f"{name}.json"
        self.picture = folder / f"{name}.png"
        self.others = [path for path in (folder / name, folder / f"{name}.npz") if path.exists()]

    @property
    def bytes_needed(self) -> int:
        """Disk space for what is missing: an npz is written from parts, and a PNG takes at most about raw pixels."""
        copies = (self.pngs is not None) + self._needs_parts
        npz = 0 if self.npz is None or self.npz.is_file() else self.count
        return ((self.count - len(self._done())) * copies + npz) * 3 * self.resolution**2

    def begin(self, samples: dict, made_with: dict) -> None:
        """Write the manifest, or check the one that is there: it must say the same of the samples.

        Raises:
            UserError: the name is taken by samples that were made otherwise.
        """
        if self.manifest.is_file():
            try:
                before = json.loads(self.manifest.read_text(encoding="utf8"))["samples"]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self.manifest}: damaged; delete it together with its samples") from None
            changed = [key for key in samples.keys() | before.keys() if before.get(key) != samples.get(key)]
            if changed:
                what = ", ".join(f"{key} {before.get(key)} -> {samples.get(key)}" for key in sorted(changed))
                raise UserError(f"{self.manifest} is of other samples ({what}); choose another --sample-dir")
        elif self.others:
            raise UserError(
                f"{self.others[0]} is there, but no {self.manifest.name} says how it was made; move it away"
            )
        else:
            content = {"format": MANIFEST_FORMAT, "samples": samples, "made_with": made_with}
            replace_text(self.manifest, json.dumps(content, indent=2) + "\n")

    def missing(self) -> list[int]:
        """The indices of the samples that still have to be made, in order."""
        done = self._done()
        return [index for index in range(self.count) if index not in done]

    def _done(self) -> set[int]:
        kept = []
        if self.pngs is not None:
            kept.append({int(path.stem) for path in self.pngs.glob("*.png") if path.stem.isdigit()})
        if self._needs_parts:
            kept.append({int(index) for path in self._part_files() for index in read_part(path, "indices")})
        return set.intersection(*kept) if kept else set(range(self.count))

    @property
    def _needs_parts(self) -> bool:
        return not self.npz.is_file() if self.npz is not None else self.pngs is None

    def _part_files(self) -> list[Path]:
        return sorted(self.parts.glob("*.npz"))

    def write(self, indices: list[int], pixels: np.ndarray) -> None:
        """Keep samples: `pixels` (B,R,R,3) uint8 of the given indices."""
        if self.pngs is not None:
            self.pngs.mkdir(exist_ok=True)
            for index, image in zip(indices, pixels, strict=True):
                temporary = self.pngs / f".{index:06d}.tmp"
                Image.fromarray(image).save(temporary, "png")
                os.replace(temporary, self.pngs / f"{index:06d}.png")
        if self._needs_parts:
            path = self.parts / f"{indices[0]:06d}-{len(indices)}.npz"
            with open(temporary := path.with_suffix(".tmp"), "wb") as file:
                np.savez(file, indices=np.array(indices), pixels=pixels)
            os.replace(temporary, path)

    def in_order(self) -> Iterator[np.ndarray]:
        """All samples by index, (R,R,3) uint8 each.

        Raises:
            UserError: one is missing.
        """
        if self.pngs is not None:
            for index in range(self.count):
                yield np.asarray(Image.open(self.pngs / f"{index:06d}.png"))
        elif self._part_files():
            yield from self._from_parts()
        else:
            yield from read_npz(self.npz)

    def _from_parts(self) -> Iterator[np.ndarray]:
        where = {int(i): (path, row) for path in self._part_files() for row, i in enumerate(read_part(path, "indices"))}
        opened, pixels = None, None
        for index in range(self.count):
            if index not in where:
                raise UserError(f"{self.parts} lacks sample {index}; run the same again")
            path, row = where[index]
            if path != opened:
                opened, pixels = path, read_part(path, "pixels")
            yield pixels[row]

    def finish(self) -> None:
        """Write the npz from the parts, sample by sample, and check that there are exactly `count` PNGs."""
        if self.npz is not None and not self.npz.is_file():
            shape = (self.count, self.resolution, self.resolution, 3)
            write_npz(self.npz, shape, self._from_parts())
        if self.pngs is not None and (found := len(list(self.pngs.glob("*.png")))) != self.count:
            raise UserError(f"{self.pngs} holds {found} samples instead of {self.count}; move it away and run again")

    def clean(self) -> None:
        """Remove the parts, and what a process that was killed left half written."""
        shutil.rmtree(self.parts, ignore_errors=True)
        for path in self.pngs.glob(".*.tmp") if self.pngs is not None else ():
            path.unlink()


def read_part(path: Path, name: str) -> np.ndarray:
    """An array of a part; no indices where the part is damaged, which makes its samples missing again."""
    try:
        with np.load(path) as part:
            return part[name]
    except ZIP_ERRORS:
        return np.empty(0, int)


def write_npz(path: Path, shape: tuple[int, ...], rows: Iterator[np.ndarray]) -> None:
    """Write uint8 `rows` as `arr_0` of an uncompressed npz of that shape, one at a time, atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with (
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for row in rows:
            file.write(row.tobytes())
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_npz(path: Path) -> Iterator[np.ndarray]:
    """The uint8 rows of an npz's `arr_0`, one at a time: 50k images do not fit into memory."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        np.lib.format.read_magic(file)
        shape, _, _ = np.lib.format.read_array_header_1_0(file)
        for _ in range(shape[0]):
            yield np.frombuffer(file.read(int(np.prod(shape[1:]))), np.uint8).reshape(shape[1:])
