"""Preprocessed images and cached latents, as training reads them.

Images are shards written by preprocessing.py (196 kB an image at 256 px), latents shards of the same rows
written by cache_latents.py. The reference's HDF5 files are read where they lie instead
(reference_hdf5.py). All are map-style datasets that any number of workers may use.

    python dataset.py --verify data

reads all shards below a folder and names each that is damaged. What it names can be deleted: the script that made it
makes it again.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from errors import Parser, UserError, run_script
from storage.shards import (
    DTYPES,
    SUFFIX,
    Layout,
    ShardFacts,
    Shards,
    damage,
    examine,
    open_shard,
    own_layout,
    read_index,
)

IMAGE_FORMAT = "repae-images/1"
LATENT_FORMAT = "repae-latents/1"


def images_directory(data_dir: str | Path) -> Path:
    """Where the image shards lie below a data directory."""
    return Path(data_dir) / "images"


def cache_directory(data_dir: str | Path, name: str) -> Path:
    """Where the shards of the latents or tokens called `name` lie below a data directory."""
    return Path(data_dir) / name


class ShardFormat(NamedTuple):
    """What folders of images, of latents and of tokens differ in."""

    format: str
    fields: dict  # the form, as of shards.misfit, of what is read from the index beside its shards
    layout: Callable[[dict], Layout]  # index -> what its shards hold
    fingerprint: Callable[[dict, list[str]], str]  # index, digests of its shards -> what its "fingerprint" has to be
    remedy: Callable[[Path], str]  # folder -> how to get it

    def open(self, folder: Path) -> tuple[dict, Shards]:
        """Index and shards of a folder.

        Raises:
            UserError: no index or a damaged one, or a shard that is missing, cut short or not what the index says.
        """
        index = read_index(folder, self.format, self.fields, self.remedy(folder))
        return index, Shards(folder, index, self.layout(index), self.remedy(folder))


def image_layout(index: dict) -> Layout:
    """What the shards of images hold, by their index."""
    return {"pixels": ("U8", (3, index["resolution"], index["resolution"]))}


def latent_layout(index: dict) -> Layout:
    """What the shards of latents hold, by their index."""
    channels, *sides = index["shape"]
    moments = (DTYPES.get(index["dtype"], index["dtype"]), (2 * channels, *sides))
    return {"moments": moments, **({"mirrored": moments} if index["mirrored"] else {})}


def image_fingerprint(digests: list[str]) -> str:
    """The fingerprint of images, from the digests of their shards."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def cache_fingerprint(index: dict) -> str:
    """The fingerprint of latents or tokens, from everything that their index says of how they were made."""
    made_by = {key: value for key, value in index.items() if key not in ("fingerprint", "shards")}
    return hashlib.sha256(json.dumps(made_by).encode()).hexdigest()


COMMON_FIELDS = {"num_classes": int, "classes": object, "fingerprint": str}
IMAGES = ShardFormat(
    IMAGE_FORMAT,
    {**COMMON_FIELDS, "resolution": int},
    image_layout,
    lambda index, digests: image_fingerprint(digests),
    lambda folder: f"run preprocessing.py with --output-path {folder.parent} to the end",
)
LATENTS = ShardFormat(
    LATENT_FORMAT,
    {
        **COMMON_FIELDS,
        "shape": (int, int, int),
        "dtype": str,
        "mirrored": bool,
        "image_fingerprint": str,
        "vae_fingerprint": str,
        "statistics": {"latents_scale": [float], "latents_bias": [float]},
    },
    latent_layout,
    lambda index, digests: cache_fingerprint(index),
    lambda folder: f"run cache_latents.py with --vae-latents-name {folder.name} to the end",
)
KINDS = {kind.format: kind for kind in (IMAGES, LATENTS)}


class ImageDataset:
    """Map-style dataset of (pixels (3,R,R) uint8 tensor, label int).

    Attributes:
        source: the folder or file, for messages.
        resolution: R.
        num_classes: one more than the highest label, or the number of class folders if that is more.
        classes: their names, or None.
        fingerprint: a hash of all pixels and labels.
        sizes: rows of each shard.

    Args:
        data_dir: the `--output-path` of preprocessing.py.

    Raises:
        UserError: no index or a damaged one, or a shard that is missing, cut short or not what the index says; when it
            is read, a row that is not what was written.
    """

    def __init__(self, data_dir: str | Path):
        self.source = images_directory(data_dir)
        index, self.shards = IMAGES.open(self.source)
        self.resolution, self.num_classes = index["resolution"], index["num_classes"]
        self.classes, self.fingerprint = index["classes"], index["fingerprint"]
        self.sizes = self.shards.sizes

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, i: int) -> tuple:
        return self.shards.row(i, "pixels")


class LatentDataset:
    """Map-style dataset of (pixels (3,R,R) uint8, label int, moments (2C,h,w) float32: mean, then std).

    Where the mirrored images' moments were cached too, there are twice as many rows: the second half is the first one
    mirrored, pixels and latents.

    Attributes:
        source, num_classes, fingerprint: as for images.
        shape: (C, h, w).
        vae_fingerprint: the hash of the VAE's weights.
        statistics: latents_scale and latents_bias, C floats each.
        image_fingerprint: of the images that were encoded.

    Args:
        data_dir: the `--output-dir` of cache_latents.py.
        name: its `--vae-latents-name`.
        images: from `open_images`, what the pixels are read from; with None each row's pixels are an empty tensor.

    Raises:
        UserError: no index or a damaged one, or a shard that is missing, cut short or not what the index says; when it
            is read, a row that is not what was written.
    """

    def __init__(self, data_dir: str | Path, name: str, images):
        self.source, self.images = cache_directory(data_dir, name), images
        index, self.shards = LATENTS.open(self.source)
        self.num_classes, self.fingerprint = index["num_classes"], index["fingerprint"]
        self.image_fingerprint = index["image_fingerprint"]
        self.shape, self.mirrored = tuple(index["shape"]), index["mirrored"]
        self.vae_fingerprint, self.statistics = index["vae_fingerprint"], index["statistics"]

    def __len__(self) -> int:
        return len(self.shards) * (2 if self.mirrored else 1)

    def __getitem__(self, i: int) -> tuple:
        import torch  # here, so that preprocessing.py starts without it

        row, mirror = i % len(self.shards), i >= len(self.shards)
        moments, label = self.shards.row(row, "mirrored" if mirror else "moments")
        pixels = torch.empty(0, dtype=torch.uint8) if self.images is None else self.images[row][0]
        return pixels.flip(-1) if mirror else pixels, label, moments.float()


def open_images(data_dir: str | Path, resolution: int | None = None):
    """The images in a data directory: shards, or else the reference's images.h5.

    Raises:
        UserError: there are none, or they are not of `resolution` pixels (None takes what is there).
    """
    if not (images_directory(data_dir) / "index.json").is_file() and (Path(data_dir) / "images.h5").is_file():
        from reference_hdf5 import HDF5Images

        images = HDF5Images(data_dir)
    else:
        images = ImageDataset(data_dir)
    if resolution is not None and images.resolution != resolution:
        raise UserError(
            f"{images.source} holds images of {images.resolution} px, but --resolution is {resolution}; "
            "preprocess again, or change the flag"
        )
    return images


def open_latents(data_dir: str | Path, name: str, images=None):
    """The cached latents called `name` in a data directory: shards, or else the reference's NAME.h5.

    `images`, from `open_images`, are where pixels are read from; None where no pixels are needed.

    Raises:
        UserError: there are none, or they are not the latents of `images`.
    """
    if not (cache_directory(data_dir, name) / "index.json").is_file() and (Path(data_dir) / f"{name}.h5").is_file():
        from reference_hdf5 import HDF5Latents

        if isinstance(images, ImageDataset):
            raise UserError(
                f"{data_dir}/{name}.h5 belongs to an images.h5, not to {images.source}; cache latents again"
            )
        latents = HDF5Latents(data_dir, name, images)
        if images is not None and images.file.labels != latents.file.labels:
            raise UserError(
                f"{latents.source} holds {len(latents)} latents, which are not those of the {len(images)} images of "
                f"{images.source}: their labels differ"
            )
        return latents
    latents = LatentDataset(data_dir, name, images)
    if images is not None and images.fingerprint != latents.image_fingerprint:
        raise UserError(f"{latents.source} holds latents of other images than {images.source}; cache them again")
    return latents


def shard_folders(directory: Path) -> list[Path]:
    """`directory` and the folders below it that hold an index or shards, sorted; links are followed, never in a circle.

    Files that are no shards by their name, like weights, make none.
    """
    found, seen = [], set()
    for folder, below, files in os.walk(directory, followlinks=True):
        here = os.path.realpath(folder)
        if here in seen:
            below.clear()
            continue
        seen.add(here)
        below.sort()
        if "index.json" in files or any(Path(name).stem.isdigit() and name.endswith(SUFFIX) for name in files):
            found.append(Path(folder))
    return found


def kind_of(folder: Path) -> ShardFormat:
    """What a folder is of: by its index, or else by its name and what its first whole shard holds."""
    try:
        form = json.loads((folder / "index.json").read_text(encoding="utf8"))["format"]
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        form = None
    if isinstance(form, str) and form in KINDS:
        return KINDS[form]
    if folder.name == "images":
        return IMAGES
    return LATENTS


def verify_shard(
    path: Path, kind: ShardFormat, index: dict | None, rows: int | None
) -> tuple[ShardFacts | None, str | None]:
    """What reading a shard gives, and what is wrong with it, with what to do.

    Args:
        path: the shard.
        kind: of its folder.
        index: of its folder, or None if that is damaged; the shard is then taken for what its own header says.
        rows: how many the index lists, or None if it does not list the shard.
    """
    remedy = kind.remedy(path.parent)
    if index is None:
        shard = open_shard(path)
        layout, rows = ({}, 0) if shard is None else own_layout(shard)
    elif rows is None:
        return None, f"{path}: index.json does not list it; delete it and {remedy}"
    else:
        layout = kind.layout(index)
    if wrong := damage(path, layout, rows, remedy):
        return None, wrong
    facts = examine(path)
    if facts.damage:
        return facts, f"{path}: {facts.damage}; delete the file and {remedy}"
    outside = [label for label in facts.labels if index and not 0 <= label < index["num_classes"]]
    if outside:
        classes = f"label {outside[-1]}, but index.json says {index['num_classes']} classes"
        return facts, f"{path}: has {classes}; delete both and {remedy}"
    return facts, None


def verify_folder(folder: Path) -> tuple[int, int, bool]:
    """Check the shards of a folder against its index and their own checksums and hashes.

    Prints a line of everything that is wrong, with what to do, or one of the folder. Returns how many shards there are
    or should be, how many are damaged, and whether the index is.
    """
    kind, index = kind_of(folder), None
    try:
        index = read_index(folder, kind.format, kind.fields, kind.remedy(folder))
    except UserError as error:
        tqdm.write(str(error))
    listed = {shard["file"]: shard["images"] for shard in index["shards"]} if index else {}
    names = sorted({*listed, *(path.name for path in folder.glob(f"*{SUFFIX}"))})
    facts, damaged = {}, set()
    for name in tqdm(names, desc=str(folder), unit="shard"):
        facts[name], wrong = verify_shard(folder / name, kind, index, listed.get(name))
        if wrong:
            damaged.add(name)
            tqdm.write(wrong)
    for name in other_plans({name: facts[name] for name in names if name not in damaged}):
        damaged.add(name)
        tqdm.write(f"{folder / name}: of another plan than most; delete it and {kind.remedy(folder)}")
    if index is None or damaged:
        return len(names), len(damaged), index is None
    if wrong := index_difference(kind, index, list(facts.values())):
        tqdm.write(f"{folder / 'index.json'}: {wrong}; delete it and {kind.remedy(folder)}")
        return len(names), 0, True
    tqdm.write(summary(folder, list(facts.values())))
    return len(names), 0, False


def other_plans(shards: dict[str, ShardFacts]) -> list[str]:
    """The names of those shards that were not made by the plan of most."""
    plans = {name: shard.metadata.get("plan") for name, shard in shards.items()}
    common = Counter(plans.values()).most_common(1)
    return [name for name, plan in plans.items() if plan != common[0][0]]


def index_difference(kind: ShardFormat, index: dict, shards: list[ShardFacts]) -> str | None:
    """What an index says of all its shards, whole ones of one plan, and they do not, in words, or None."""
    rows = sum(shard.rows for shard in shards)
    if index.get("images", rows) != rows:
        return f"says {index['images']} images, but its shards hold {rows}"
    digests = [shard.digest for shard in shards]
    plans = {shard.metadata.get("plan") for shard in shards if kind is not IMAGES}
    if {index["fingerprint"]} != {kind.fingerprint(index, digests), *plans}:
        return "damaged (its fingerprint is not that of its content)"
    return None


def summary(folder: Path, shards: list[ShardFacts]) -> str:
    """What was found to be right, in a line."""
    size = sum(shard.bytes for shard in shards)
    counts = f"{sum(shard.rows for shard in shards)} images in {len(shards)} shards, {size / 1e6:.1f} MB"
    line = f"{folder}: {counts}; sizes, headers, checksums, hashes, labels and fingerprint are right"
    if unchecked := sum("digest" not in shard.metadata for shard in shards):
        line += f", but {unchecked} shards are older than checksums and could not be checked beyond size and header"
    elif unchecked := sum("metadata_digest" not in shard.metadata for shard in shards):
        line += f", but {unchecked} shards are older than checksums of rows: damage is not noticed when they are read"
    return line


def verify(directory: Path) -> None:
    """Check every shard below a data directory, or in one folder of it, and print what was found.

    Raises:
        UserError: there are none, or something is wrong.
    """
    if not (folders := shard_folders(directory)):
        raise UserError(f"{directory}: no shards below it; expected the --output-path of preprocessing.py")
    shards, damaged, indices_wrong = map(sum, zip(*map(verify_folder, folders), strict=True))
    wrong = [f"{damaged} of {shards} shards are damaged"] if damaged else []
    wrong += [f"{indices_wrong} of {len(folders)} index.json are damaged"] if indices_wrong else []
    if wrong:
        raise UserError(f"{directory}: {' and '.join(wrong)}; what to do is said above")


def main() -> None:
    """Verify a data directory."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--verify", type=Path, required=True, metavar="DIR", help="a data directory, or one folder of shards"
    )
    verify(parser.parse_args().verify)


if __name__ == "__main__":
    run_script(main)
