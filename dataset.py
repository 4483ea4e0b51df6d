"""Preprocessed images and cached latents, as training reads them.

Images are shards written by preprocessing.py (196 kB an image at 256 px), latents shards of the same rows written by
cache_latents.py. `python dataset.py --verify data` reads all shards of a data directory and names each that is damaged.
A damaged shard can be deleted; the script that made it makes it again.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from errors import Parser, UserError, run_script
from progress import progress_bar
from storage.shards import Layout, Shards, read_index, shard_name, verify_shard

IMAGE_FORMAT = "repae-images/2"
LATENT_FORMAT = "repae-latents/2"


def images_directory(data_dir: str | Path) -> Path:
    """Where the image shards lie below a data directory."""
    return Path(data_dir) / "images"


def shard_layout(index: dict) -> Layout:
    """What shards hold beside labels, by their index."""
    if index["format"] == IMAGE_FORMAT:
        return {"pixels": ("uint8", (3, index["resolution"], index["resolution"]))}
    channels, height, width = index["shape"]
    names = ("moments", "mirrored") if index["mirrored"] else ("moments",)
    return dict.fromkeys(names, (index["dtype"], (2 * channels, height, width)))


def fingerprint_of(index: dict) -> str:
    """The fingerprint of images, from the digests of their shards, or of latents, from how they were made."""
    if index["format"] == IMAGE_FORMAT:
        facts = [shard["digest"] for shard in index["shards"]]
    else:
        facts = {key: value for key, value in index.items() if key not in ("class_counts", "fingerprint", "shards")}
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def remedy(folder: Path, form: str) -> str:
    """How to get the shards of `folder` and their index, for messages."""
    if form == IMAGE_FORMAT:
        return f"run preprocessing.py with --output-path {folder.parent} to the end"
    return f"run cache_latents.py with --vae-latents-name {folder.name} to the end"


def open_shards(folder: Path, form: str) -> tuple[dict, Shards]:
    """Index and shards of a folder; a UserError if one is missing, damaged or not what the index says."""
    index = read_index(folder, form, remedy(folder, form))
    return index, Shards(folder, index, shard_layout(index), remedy(folder, form))


class ImageDataset:
    """Map-style dataset of (pixels (3,R,R) uint8 tensor, label int) in `data_dir`, preprocessing.py's --output-path.

    Attributes:
        source: the folder, for messages.
        resolution: R.
        num_classes: one more than the highest label, or the number of class folders if that is more.
        class_counts: images of each class, num_classes integers.
        classes: their names, or None.
        fingerprint: a hash of all pixels and labels.
        sizes: rows of each shard.
    """

    def __init__(self, data_dir: str | Path):
        self.source = images_directory(data_dir)
        index, self.shards = open_shards(self.source, IMAGE_FORMAT)
        self.resolution, self.num_classes = index["resolution"], index["num_classes"]
        self.class_counts, self.classes = index["class_counts"], index["classes"]
        self.fingerprint = index["fingerprint"]
        self.sizes = self.shards.sizes

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, i: int) -> tuple:
        import torch  # here, so that preprocessing.py starts without it

        pixels, label = self.shards.row(i, "pixels")
        return torch.from_numpy(pixels), label


class LatentDataset:
    """Map-style dataset of (pixels (3,R,R) uint8, label int, moments (2C,h,w) float32: mean, then std).

    Where the mirrored images' moments were cached too, there are twice as many rows: the second half is the first one
    mirrored, pixels and latents.

    Attributes:
        source, num_classes, class_counts, classes: as for images.
        fingerprint: a hash of how the latents were made.
        shape: (C, h, w).
        mirrored: whether the mirrored images' moments are there.
        vae_fingerprint: the hash of the VAE's weights.
        statistics: latents_scale and latents_bias, C floats each.
        image_fingerprint: of the images that were encoded.

    Args:
        data_dir: the `--output-dir` of cache_latents.py.
        name: its `--vae-latents-name`.
        images: what the pixels are read from; with None each row's pixels are an empty tensor.
    """

    def __init__(self, data_dir: str | Path, name: str, images: ImageDataset | None):
        self.source, self.images = Path(data_dir) / name, images
        index, self.shards = open_shards(self.source, LATENT_FORMAT)
        self.num_classes, self.fingerprint = index["num_classes"], index["fingerprint"]
        self.class_counts, self.classes = index["class_counts"], index["classes"]
        self.image_fingerprint = index["image_fingerprint"]
        self.shape, self.mirrored = tuple(index["shape"]), index["mirrored"]
        self.vae_fingerprint, self.statistics = index["vae_fingerprint"], index["statistics"]

    def __len__(self) -> int:
        return len(self.shards) * (2 if self.mirrored else 1)

    def __getitem__(self, i: int) -> tuple:
        import torch

        if i >= len(self):
            raise IndexError(f"row {i} of {len(self)}")  # it also ends a plain iteration
        row, mirror = i % len(self.shards), i >= len(self.shards)
        moments, label = self.shards.row(row, "mirrored" if mirror else "moments")
        pixels = torch.empty(0, dtype=torch.uint8) if self.images is None else self.images[row][0]
        return pixels.flip(-1) if mirror else pixels, label, torch.from_numpy(moments).float()


def open_images(data_dir: str | Path, resolution: int | None = None) -> ImageDataset:
    """The images in a data directory; a UserError if there are none, or not of `resolution` pixels (None: any)."""
    images = ImageDataset(data_dir)
    if resolution is not None and images.resolution != resolution:
        raise UserError(
            f"{images.source} holds images of {images.resolution} px, but --resolution is {resolution}; "
            "preprocess again, or change the flag"
        )
    return images


def open_latents(data_dir: str | Path, name: str, images: ImageDataset | None = None) -> LatentDataset:
    """The cached latents called `name` in a data directory; a UserError if there are none, or not of `images`."""
    latents = LatentDataset(data_dir, name, images)
    if images is not None and images.fingerprint != latents.image_fingerprint:
        raise UserError(f"{latents.source} holds latents of other images than {images.source}; cache them again")
    return latents


def folder_errors(folder: Path) -> Iterator[str]:
    """What is wrong with the shards of a folder and their index, a line each."""
    form = IMAGE_FORMAT if folder.name == images_directory("").name else LATENT_FORMAT
    how = remedy(folder, form)
    try:
        index = read_index(folder, form, how)
    except UserError as error:
        yield str(error)
        return
    for number, shard in enumerate(progress_bar(index["shards"], desc=str(folder), unit="shard")):
        try:
            path = folder / shard_name(number)
            verify_shard(path, shard_layout(index), shard["images"], shard["digest"], how)
        except UserError as error:
            yield str(error)
    if index["fingerprint"] != fingerprint_of(index):
        yield f"{folder / 'index.json'}: damaged (its fingerprint is not that of its content); {how}"


def verify(directory: Path) -> None:
    """Check every shard of a data directory, or of one folder of it, and print what is wrong.

    Raises:
        UserError: there are none, or something is wrong.
    """
    names = ("index.json", shard_name(0))
    below = sorted(directory.iterdir()) if directory.is_dir() else []
    folders = [folder for folder in (directory, *below) if any((folder / name).is_file() for name in names)]
    if not folders:
        raise UserError(f"{directory}: no shards below it; expected the --output-path of preprocessing.py")
    count = 0
    for folder in folders:
        errors = list(folder_errors(folder))
        for line in errors or [f"{folder}: all shards are as index.json says"]:
            tqdm.write(line)
        count += len(errors)
    if count:
        raise UserError(f"{directory}: {count} damaged or missing files; what to do is said above")


def main() -> None:
    """Verify a data directory."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--verify", type=Path, required=True, metavar="DIR", help="a data directory, or one folder of shards"
    )
    verify(parser.parse_args().verify.absolute())


if __name__ == "__main__":
    run_script(main)
