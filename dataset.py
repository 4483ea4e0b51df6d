"""Preprocessed images and cached latents, as training reads them.

Images are shards written by preprocessing.py (196 kB an image at 256 px), latents shards of the same rows written by
cache_latents.py. The reference's HDF5 files are read where they lie instead (reference_hdf5.py). All are map-style
datasets that any number of workers may use.
"""

from pathlib import Path

from errors import UserError
from shards import Shards, read_index

IMAGE_FORMAT = "repae-images/1"
LATENT_FORMAT = "repae-latents/1"


def images_directory(data_dir: str | Path) -> Path:
    """Where the image shards lie below a data directory."""
    return Path(data_dir) / "images"


def latents_directory(data_dir: str | Path, name: str) -> Path:
    """Where the shards of the latents called `name` lie below a data directory."""
    return Path(data_dir) / name


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
        UserError: no index or one of another format, or a shard that is missing or cut short.
    """

    def __init__(self, data_dir: str | Path):
        self.source = images_directory(data_dir)
        remedy = f"run preprocessing.py with --output-path {data_dir} to the end"
        index = read_index(self.source, IMAGE_FORMAT, remedy)
        self.resolution, self.num_classes = index["resolution"], index["num_classes"]
        self.classes, self.fingerprint = index["classes"], index["fingerprint"]
        self.shards = Shards(self.source, index, remedy)
        self.sizes = self.shards.sizes

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, i: int) -> tuple:
        pixels, label = self.shards.row(i, ("pixels", "labels"))
        return pixels, int(label)


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
        UserError: no index or one of another format, or a shard that is missing or cut short.
    """

    def __init__(self, data_dir: str | Path, name: str, images):
        self.source, self.images = latents_directory(data_dir, name), images
        remedy = f"run cache_latents.py with --vae-latents-name {name} to the end"
        index = read_index(self.source, LATENT_FORMAT, remedy)
        self.num_classes, self.fingerprint = index["num_classes"], index["fingerprint"]
        self.image_fingerprint = index["image_fingerprint"]
        self.shape, self.mirrored = tuple(index["shape"]), index["mirrored"]
        self.vae_fingerprint, self.statistics = index["vae_fingerprint"], index["statistics"]
        self.shards = Shards(self.source, index, remedy)

    def __len__(self) -> int:
        return len(self.shards) * (2 if self.mirrored else 1)

    def __getitem__(self, i: int) -> tuple:
        import torch  # here, so that preprocessing.py starts without it

        row, mirror = i % len(self.shards), i >= len(self.shards)
        moments, label = self.shards.row(row, ("mirrored" if mirror else "moments", "labels"))
        pixels = torch.empty(0, dtype=torch.uint8) if self.images is None else self.images[row][0]
        return pixels.flip(-1) if mirror else pixels, int(label), moments.float()


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
    if not (latents_directory(data_dir, name) / "index.json").is_file() and (Path(data_dir) / f"{name}.h5").is_file():
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
