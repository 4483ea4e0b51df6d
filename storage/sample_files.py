"""The files of a set of samples: PNGs, the `.npz` of the ADM evaluation suite, and the manifest of what made them.

In a folder, a set NAME is NAME/000000.png ..., NAME.npz and NAME.json. Until the npz is written, its samples' raw
pixels lie in NAME.parts/, one file a batch. Every file is written under a temporary name, synced and renamed, so that
work can stop anywhere; what is there in one form is never sampled again for another.
"""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice, repeat
from pathlib import Path

import numpy as np
from PIL import Image

from errors import UserError
from storage.files import WRITERS, Action, replace_text, written_whole
from storage.photographs import opened_image

MANIFEST_FORMAT = "repae-samples/1"
DAMAGE = (EOFError, ValueError, KeyError, SyntaxError, zipfile.BadZipFile)
PNGS_AT_ONCE = 64  # images in memory where PNGs are made from what is there


class SampleFiles:
    """A set of samples at FOLDER/NAME, kept as PNGs, as an npz, or both, and until `clean` as parts for the npz.

    With neither, they are kept as parts alone.

    Args:
        folder: where the set goes.
        name: what it is called.
        samples: everything that shaped the samples, plain data; "count" and "resolution" are used here.
        png: whether PNGs are wanted.
        npz: whether an npz is wanted.
    """

    def __init__(self, folder: Path, name: str, samples: dict, png: bool, npz: bool):
        self.samples, self.png, self.npz = samples, png, npz
        self.count, self.resolution = samples["count"], samples["resolution"]
        self.plan = hashlib.sha256(json.dumps(samples, sort_keys=True).encode()).hexdigest()
        self.png_folder, self.npz_file, self.picture = folder / name, folder / f"{name}.npz", folder / f"{name}.png"
        self.parts, self.manifest = folder / f"{name}.parts", folder / f"{name}.json"

    def check(self) -> None:
        """Raise a UserError if the name is taken by samples that were made otherwise."""
        if self.manifest.is_file():
            try:
                before = dict(json.loads(self.manifest.read_text(encoding="utf8"))["samples"])
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self.manifest}: damaged; delete it together with its samples") from None
            changed = [key for key in self.samples.keys() | before.keys() if before.get(key) != self.samples.get(key)]
            if changed:
                what = ", ".join(f"{key} {before.get(key)} -> {self.samples.get(key)}" for key in sorted(changed))
                raise UserError(f"{self.manifest} is of other samples ({what}); choose another --sample-dir")
        elif other := next((path for path in (self.png_folder, self.npz_file) if path.exists()), None):
            raise UserError(f"{other} is there, but no {self.manifest.name} says how it was made; move it")

    def begin(self, made_with: dict) -> None:
        """Write the manifest if it is not there; `made_with` is what made the samples without shaping them."""
        self.check()
        if not self.manifest.is_file():
            content = {"format": MANIFEST_FORMAT, "samples": self.samples, "made_with": made_with}
            replace_text(self.manifest, json.dumps(content, indent=2) + "\n")

    def missing(self) -> list[int]:
        """The indices of the samples that still have to be made, in order."""
        if self._has_npz():
            return []
        done = self._png_indices() | self._part_rows().keys()
        return [index for index in range(self.count) if index not in done]

    @property
    def bytes_needed(self) -> int:
        """Disk space for what is not there yet; a PNG takes at most about the raw pixels."""
        done, has_npz = self._png_indices(), self._has_npz()
        pngs = self.count - len(done) if self.png else 0
        parts = self.count - len(done | self._part_rows().keys()) if self.in_parts and not has_npz else 0
        npz = self.count if self.npz and not has_npz else 0
        return (pngs + parts + npz) * 3 * self.resolution**2

    @property
    def in_parts(self) -> bool:
        """Whether the raw pixels of what is sampled are kept until `clean`."""
        return self.npz or not self.png

    def _png_path(self, index: int) -> Path:
        return self.png_folder / f"{index:06d}.png"

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        return self.count, self.resolution, self.resolution, 3

    def _has_npz(self) -> bool:
        """Whether the npz is there; a UserError if it is of other samples or cut short."""
        if self.npz_file.is_file():
            check_npz(self.npz_file, self._shape)
        return self.npz_file.is_file()

    def _png_indices(self) -> set[int]:
        paths = (path for path in self.png_folder.glob("*.png") if path.stem.isdigit() and path.stat().st_size > 0)
        return {int(path.stem) for path in paths if path == self._png_path(int(path.stem))}

    def _part_rows(self) -> dict[int, tuple[Path, int]]:
        """Index -> part and row, for the parts of this set that are whole."""
        rows = {}
        for path in sorted(self.parts.glob("*.npz")):
            try:
                with np.load(path) as part:
                    indices, plan = part["indices"].tolist(), str(part["plan"])
                    stored = part.zip.getinfo("pixels.npy").file_size
            except (*DAMAGE, OSError):
                continue
            if plan == self.plan and stored > len(indices) * 3 * self.resolution**2:
                rows.update({index: (path, row) for row, index in enumerate(indices)})
        return rows

    def writes(self, indices: list[int], pixels: np.ndarray) -> list[Action]:
        """What keeps samples, `pixels` (B,R,R,3) uint8 of the given indices: to be called in any order and thread."""
        parts = [partial(self._write_part, indices, pixels)] if self.in_parts else []
        pngs = map(partial, repeat(self._write_png), indices, pixels) if self.png else ()
        return [*parts, *pngs]

    def _write_part(self, indices: list[int], pixels: np.ndarray) -> None:
        digest = hashlib.sha256(f"{self.plan} {indices}".encode()).hexdigest()[:12]
        with written_whole(self.parts / f"{indices[0]:06d}-{digest}.npz") as file:
            np.savez(file, indices=np.array(indices), pixels=pixels, plan=np.array(self.plan))

    def _write_png(self, index: int, image: np.ndarray) -> None:
        self.png_folder.mkdir(exist_ok=True)
        with written_whole(self._png_path(index)) as file:
            Image.fromarray(image).save(file, "png")

    def in_order(self) -> Iterator[np.ndarray]:
        """All samples by index, (R,R,3) uint8 each: from the npz, from parts, and from PNGs only where nothing is raw.

        Raises:
            UserError: one is missing or damaged; a damaged part is removed, so that its samples are made again.
        """
        if self._has_npz():
            yield from read_npz(self.npz_file)
            return
        pngs, rows = self._png_indices(), self._part_rows()
        opened, pixels = None, None
        for index in range(self.count):
            if index in rows:
                path, row = rows[index]
                if path != opened:
                    opened, pixels = path, read_part(path)
                yield pixels[row]
            elif index in pngs:
                yield read_png(self._png_path(index), self._shape[1:])
            else:
                raise UserError(f"sample {index} of {self.manifest.stem} is missing; run the same again")

    def finish(self) -> None:
        """Write what is wanted and not there yet from what is, and check that there are exactly `count` PNGs."""
        if self.npz and not self._has_npz():
            write_npz(self.npz_file, self._shape, self.in_order())
        if not self.png:
            return
        if missing := set(range(self.count)) - self._png_indices():
            rows = ((index, image) for index, image in enumerate(self.in_order()) if index in missing)
            with ThreadPoolExecutor(WRITERS) as pool:
                while some := list(islice(rows, PNGS_AT_ONCE)):
                    list(pool.map(self._write_png, *zip(*some, strict=True)))
        expected = {self._png_path(index).name for index in range(self.count)}
        if others := sorted({path.name for path in self.png_folder.glob("*.png")} - expected):
            raise UserError(f"{self.png_folder} holds {others[0]}, which is not of this set; move it and run again")

    def clean(self) -> None:
        """Remove the parts, and what a process that was killed left half written."""
        shutil.rmtree(self.parts, ignore_errors=True)
        beside = (path for path in self.parts.parent.glob(".*.tmp") if path.name.startswith(f".{self.manifest.stem}."))
        for path in (*beside, *self.png_folder.glob(".*.tmp")):
            path.unlink()


def read_png(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A PNG's pixels. Raises a UserError if it is damaged or of another shape."""
    try:
        with opened_image(path) as image:
            pixels = np.asarray(image)
    except (*DAMAGE, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the disk's trouble, not the file's
            raise
        pixels = np.empty(0)
    if pixels.shape != shape:
        raise UserError(f"{path}: damaged, or no sample of this set; delete it and run the same again")
    return pixels


def read_part(path: Path) -> np.ndarray:
    """A part's pixels. If they are damaged, removes the part and raises a UserError."""
    try:
        with np.load(path) as part:
            return part["pixels"]
    except DAMAGE as error:
        path.unlink(missing_ok=True)
        raise UserError(f"{path} was damaged ({error}) and is removed; run the same again") from None


def write_npz(path: Path, shape: tuple[int, ...], rows: Iterator[np.ndarray]) -> None:
    """Write uint8 `rows` as `arr_0` of an uncompressed npz of that shape, one at a time, atomically."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with (
        written_whole(path) as target,
        zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for row in rows:
            file.write(np.ascontiguousarray(row))


def check_npz(path: Path, shape: tuple[int, ...]) -> None:
    """Raise a UserError unless `arr_0` of an npz is whole, by its size, and of `shape`, uint8."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            np.lib.format.read_magic(file)
            found = np.lib.format.read_array_header_1_0(file)
    except DAMAGE as error:
        raise UserError(f"{path}: damaged ({error}); delete it and run the same again") from None
    if found != (shape, False, np.dtype(np.uint8)):
        raise UserError(f"{path}: holds {found[2]} {found[0]}, expected uint8 {shape}; move it and run the same again")


def read_npz(path: Path) -> Iterator[np.ndarray]:
    """The uint8 rows of an npz's `arr_0`, one at a time: 50k images do not fit into memory.

    Raises:
        UserError: its checksum, which is looked at first, differs.
    """
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:
            raise UserError(f"{path}: damaged (its checksum differs); delete it and run the same again")
        with archive.open("arr_0.npy") as file:
            np.lib.format.read_magic(file)
            shape, _, _ = np.lib.format.read_array_header_1_0(file)
            for _ in range(shape[0]):
                yield np.frombuffer(file.read(int(np.prod(shape[1:]))), np.uint8).reshape(shape[1:])
