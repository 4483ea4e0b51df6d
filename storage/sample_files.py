"""The files of a set of samples: PNGs, the `.npz` of the ADM evaluation suite, and the manifest of what made them.

A set NAME is NAME/000000.png ..., NAME.npz and NAME.json in one folder. Until the npz is complete, raw pixels lie in
NAME.parts/, one file per batch. Every file is written atomically, so that sampling can stop at any time and resume.
"""

import json
import shutil
import zipfile
from collections.abc import Iterator
from functools import partial
from itertools import repeat
from pathlib import Path

import numpy as np
from PIL import Image

from errors import UserError
from storage.files import Action, remove_leftovers, replace_text, written_whole
from storage.image_sets import FolderImages, NpzImages

MANIFEST_FORMAT = "repae-samples/1"


class SampleFiles:
    """A set of samples at FOLDER/NAME, written as PNGs, as an npz, or both.

    Samples are kept as parts until `clean`, unless PNGs alone are wanted. `samples` is everything that determines the
    samples, plain data; "count" and "resolution" are used here.
    """

    def __init__(self, folder: Path, name: str, samples: dict, png: bool, npz: bool):
        self.samples, self.png, self.npz = samples, png, npz
        self.in_parts = npz or not png
        self.count, self.resolution = samples["count"], samples["resolution"]
        self.shape = (self.count, self.resolution, self.resolution, 3)
        self.png_folder, self.npz_file, self.picture = folder / name, folder / f"{name}.npz", folder / f"{name}.png"
        self.parts, self.manifest = folder / f"{name}.parts", folder / f"{name}.json"

    def check(self) -> None:
        """Raise a UserError if the name is taken by samples that were made with other settings."""
        if self.manifest.is_file():
            before = json.loads(self.manifest.read_text(encoding="utf8"))["samples"]
            changed = [key for key in self.samples.keys() | before.keys() if before.get(key) != self.samples.get(key)]
            if changed:
                what = ", ".join(f"{key} {before.get(key)} -> {self.samples.get(key)}" for key in sorted(changed))
                raise UserError(f"{self.manifest} is of other samples ({what}); choose another --sample-dir")
        elif other := next((path for path in self._outputs() if path.exists()), None):
            raise UserError(f"{other} is there, but no {self.manifest.name} says how it was made; move it")

    def _outputs(self) -> Iterator[Path]:
        yield from (self.png_folder, self.npz_file, *self.parts.glob("*.raw"))

    def begin(self, made_with: dict) -> None:
        """Write the manifest if it is not there; `made_with` is what made the samples without determining them."""
        self.check()
        if not self.manifest.is_file():
            content = {"format": MANIFEST_FORMAT, "samples": self.samples, "made_with": made_with}
            replace_text(self.manifest, json.dumps(content, indent=2) + "\n")

    def missing(self) -> set[int]:
        """The indices of the samples that still have to be made."""
        return set() if self.has_npz() else set(range(self.count)) - self._done()

    def has_npz(self) -> bool:
        """Whether the npz is there, which finishes the set; a UserError if it is another one."""
        if not self.npz_file.is_file():
            return False
        if NpzImages(self.npz_file).array.shape != self.shape:
            raise UserError(f"{self.npz_file} is not of this set; delete it and run the same again")
        return True

    @property
    def bytes_needed(self) -> int:
        """Disk space for what is not there yet; a PNG takes about as much as its raw pixels, or less."""
        if self.has_npz():
            return 0
        images = (self.count - len(self._done())) * (self.png + self.in_parts) + self.count * self.npz
        return images * 3 * self.resolution**2

    def _done(self) -> set[int]:
        if not self.in_parts:
            return self._pngs()
        return self._pngs() & self._rows().keys() if self.png else set(self._rows())

    def _pngs(self) -> set[int]:
        return {int(path.stem) for path in self.png_folder.glob("*.png") if path.stem.isdigit()}

    def _rows(self) -> dict[int, tuple[Path, int]]:
        """Index -> part and row in it."""
        rows = {}
        for path in sorted(self.parts.glob("*.raw")):
            first, last = map(int, path.stem.split("-"))
            rows |= {index: (path, index - first) for index in range(first, last + 1)}
        return rows

    def writes(self, indices: list[int], pixels: np.ndarray) -> list[Action]:
        """The writes of a batch, `pixels` (B,R,R,3) uint8 of consecutive indices, for any order and thread."""
        part = [partial(self._write_part, indices, pixels)] if self.in_parts else []
        pngs = map(partial, repeat(self._write_png), indices, pixels) if self.png else ()
        return [*part, *pngs]

    def _write_part(self, indices: list[int], pixels: np.ndarray) -> None:
        with written_whole(self.parts / f"{indices[0]:06d}-{indices[-1]:06d}.raw") as file:
            file.write(np.ascontiguousarray(pixels).data)

    def _write_png(self, index: int, image: np.ndarray) -> None:
        self.png_folder.mkdir(exist_ok=True)
        with written_whole(self.png_folder / f"{index:06d}.png") as file:
            Image.fromarray(image).save(file, "png")

    def in_order(self) -> Iterator[np.ndarray]:
        """All samples by index, (R,R,3) uint8 each: from the npz, the parts, or the PNGs if there is nothing else."""
        if self.npz_file.is_file():
            yield from NpzImages(self.npz_file).array
        elif self.in_parts:
            opened, pixels = None, None
            for _, (path, row) in sorted(self._rows().items()):
                if path != opened:
                    opened, pixels = path, np.memmap(path, np.uint8, "r").reshape(-1, *self.shape[1:])
                yield pixels[row]
        else:
            yield from map(FolderImages.read, sorted(self.png_folder.glob("*.png")))

    def finish(self) -> None:
        """Write the npz from the parts, if it is wanted and not there yet; a UserError if a sample is missing."""
        if missing := self.missing():
            raise UserError(f"sample {min(missing)} is missing; put --sample-dir where every machine sees it")
        if self.npz and not self.npz_file.is_file():
            write_npz(self.npz_file, self.shape, self.in_order())

    def clean(self) -> None:
        """Remove the parts, and temporary files of a process that was killed."""
        shutil.rmtree(self.parts, ignore_errors=True)
        remove_leftovers(self.png_folder)
        for path in self.parts.parent.glob(".*.tmp"):
            if path.name.startswith(f".{self.manifest.stem}."):
                path.unlink()


def write_npz(path: Path, shape: tuple[int, ...], rows: Iterator[np.ndarray]) -> None:
    """Write uint8 `rows` as `arr_0` of an uncompressed npz of that shape, one row in memory at a time, atomically."""
    with (
        written_whole(path) as target,
        zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for row in rows:
            file.write(np.ascontiguousarray(row))
