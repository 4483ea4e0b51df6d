"""Shards of images and latents, as training reads them, and the import of the reference's HDF5 images."""

import hashlib
import json
import os
import pickle
import shutil
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.utils.data import DataLoader

import cache_latents
import preprocessing
import published
from dataset import LATENT_FORMAT, fingerprint_of, open_images, open_latents
from errors import UserError
from good import cache_flags
from images import make_data
from models.autoencoder import pixels_to_image
from scripts import refusal, run
from storage.shards import Shards, shard_name, write_shard
from train_ldm_only import check_vae
from weights.checkpoint_io import fingerprint


def cache(data, *flags, name="latents") -> None:
    """Cache the latents of five shards beside the images, by threes."""
    vae = data.parent / "vae/sdvae.pt"
    run("cache_latents.py", *cache_flags(data, vae, name=name), "--pproc-batch-size", "3", *flags)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("sharded")
    published.write_vae(root / "vae")
    return make_data(root, per_class=6, shard_images=4)


def shard_digest(path) -> str:
    """SHA-256 of a shard's tensors and their names, sorted by name."""
    digest = hashlib.sha256()
    for name, array in sorted(load_file(path).items()):
        digest.update(name.encode() + array.tobytes())
    return digest.hexdigest()


@torch.no_grad()
def moments_of(pixels: torch.Tensor) -> torch.Tensor:
    posterior = published.fresh_vae().encode(pixels_to_image(pixels[None]))
    return torch.cat([posterior.mean, posterior.std], dim=1)[0]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_are_the_images_moments_and_then_the_mirrored_ones(data, dtype):
    cache(data, "--dtype", dtype, "--mirrored", name=dtype)
    images = open_images(data)
    latents = open_latents(data, dtype, images)
    assert (len(latents), latents.shape) == (36, (4, 8, 8))
    assert len(list(latents)) == 36  # it ends
    assert (images.class_counts, images.classes) == ([6, 6, 6], ["ape", "bee", "cat"])
    assert (latents.class_counts, latents.classes) == (images.class_counts, images.classes)
    tolerance = {"atol": 2e-3, "rtol": 2e-3} if dtype == "float16" else {"atol": 1e-5, "rtol": 1e-5}
    for i in (0, 5, 17):
        pixels, label, moments = latents[i]
        assert torch.equal(pixels, images[i][0])
        assert label == images[i][1]
        assert moments.dtype == torch.float32
        torch.testing.assert_close(moments, moments_of(pixels), **tolerance)
        mirrored, label_again, moments = latents[18 + i]
        assert torch.equal(mirrored, pixels.flip(-1))
        assert label_again == label
        torch.testing.assert_close(moments, moments_of(mirrored), **tolerance)
    stored = (data / dtype / "00001.safetensors").stat().st_size
    rows = 4 * 2 * 8 * 8 * 8 * (2 if dtype == "float16" else 4)
    assert rows < stored < rows + 1500


def test_the_index_holds_the_vaes_fingerprint_and_statistics_which_training_checks(data):
    cache(data, name="indexed")
    index = json.loads((data / "indexed/index.json").read_text())
    good = fingerprint(published.fresh_vae().state_dict())
    assert index["vae_fingerprint"] == good
    for key, value in published.STATISTICS.items():
        assert index["statistics"][key] == pytest.approx(value.tolist())
    assert [shard["images"] for shard in index["shards"]] == [4, 4, 4, 4, 2]
    digests = [shard_digest(data / f"indexed/{i:05d}.safetensors") for i in range(5)]
    assert [shard["digest"] for shard in index["shards"]] == digests
    latents, args = open_latents(data, "indexed"), Namespace(vae_ckpt="vae.pt")
    assert torch.equal(latents[3][0], torch.empty(0, dtype=torch.uint8))
    statistics = tuple(value.reshape(1, -1, 1, 1) for value in published.STATISTICS.values())
    check_vae(latents, good, statistics, args)
    with pytest.raises(UserError, match=r"other statistics \(latents_bias\)"):
        check_vae(latents, good, (statistics[0], statistics[1] + 1e-3), args)


def test_numbers_of_images_are_no_part_of_the_fingerprint():
    """Caching and training recognise latents by the fingerprint."""
    assert len({fingerprint_of({"format": LATENT_FORMAT, **part}) for part in ({}, {"class_counts": [1]})}) == 1


@pytest.fixture(scope="module")
def hdf5(data, tmp_path_factory):
    images = open_images(data)
    pixels, labels = zip(*(images[i] for i in range(len(images))), strict=True)
    path = tmp_path_factory.mktemp("hdf5") / "images.h5"
    published.write_hdf5_images(path, list(pixels), list(labels))
    return path


def test_the_references_hdf5_images_are_imported(data, hdf5, tmp_path):
    flags = ("--imagenet-path", hdf5, "--output-path", tmp_path, "--resolution", 32, "--num-workers", 2)
    for _ in range(2):  # the second time, all is there
        run("preprocessing.py", *flags)
    shards, images = open_images(data), open_images(tmp_path)
    assert (len(images), images.num_classes, images.classes) == (18, 3, None)
    for i in range(18):
        assert torch.equal(images[i][0], shards[i][0])
        assert images[i][1] == shards[i][1]


def test_unusable_hdf5_is_one_clear_line(hdf5, tmp_path, monkeypatch):
    path = shutil.copyfile(hdf5, tmp_path / "images.h5")
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=f"^(--imagenet-path )?{path}: not a readable HDF5 file"):
        preprocessing.preprocess(path, tmp_path / "data", 32, 1, None)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match="reading HDF5 needs h5py; pip install -r requirements-hdf5.txt"):
        preprocessing.preprocess(path, tmp_path / "data", 32, 1, None)


def test_latents_that_are_not_finite_are_not_written(data, tmp_path, monkeypatch):
    encode = cache_latents.encode
    monkeypatch.setattr(cache_latents, "encode", lambda *args: encode(*args) * 1e9)
    flags = cache_flags(data, data.parent / "vae/sdvae.pt", tmp_path)
    line = refusal("cache_latents.py", *flags, "--dtype", "float16")
    assert "00000.safetensors: moments are not finite in float16; use --dtype float32" in line
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("batch", [3, 64])
def test_a_compiled_encoder_sees_one_shape_and_gives_the_same_rows(data, monkeypatch, batch):
    """Shards of 4, 4, 4, 4 and 2 images, by threes or whole."""
    counters, shapes = torch._dynamo.utils.counters, set()

    def compile_on_cpus(modules, wanted, device) -> bool:
        (encoder,) = modules
        encoder.register_forward_pre_hook(lambda _, inputs: shapes.add(inputs[0].shape))
        encoder.compile(backend="eager", dynamic=False)
        return wanted

    flags = ("--mirrored", "--pproc-batch-size", batch)
    cache(data, *flags, name=f"plain-{batch}")
    monkeypatch.setattr(cache_latents, "compile_in_place", compile_on_cpus)
    torch._dynamo.reset()
    counters.clear()
    cache(data, *flags, name=f"compiled-{batch}")
    assert [shape[0] for shape in shapes] == [min(batch, 4)]
    assert counters["stats"]["unique_graphs"] == 1
    plain, compiled = (open_latents(data, f"{how}-{batch}") for how in ("plain", "compiled"))
    assert len(compiled) == len(plain) == 36
    for i in range(36):
        assert compiled[i][1] == plain[i][1]
        torch.testing.assert_close(compiled[i][2], plain[i][2], rtol=1e-4, atol=1e-5)


def test_many_shards_are_read_with_few_open_and_none_in_memory(tmp_path, monkeypatch):
    """By this process, one that it forks, and one that unpickles the set."""
    monkeypatch.setattr("storage.shards.KEPT_OPEN", 7)
    count = 300
    for i in range(count):
        pixels = np.full((2, 3, 4, 4), i % 256, np.uint8)
        write_shard(tmp_path / shard_name(i), {"pixels": pixels, "labels": np.array([0, 1])}, {"plan": ""})
    index = {"shards": [{"images": 2}] * count}

    def files_open() -> int:
        return sum(str(tmp_path) in os.path.realpath(file) for file in Path("/proc/self/fd").iterdir())

    def read(shards: Shards, i: int) -> np.ndarray:
        pixels, label = shards.row(i, "pixels")
        assert label == i % 2
        return pixels

    shards = Shards(tmp_path, index, {"pixels": ("uint8", (3, 4, 4))}, "")
    worker = DataLoader(range(2 * count), num_workers=1, collate_fn=lambda numbers, rows=shards: read(rows, *numbers))
    copy = pickle.loads(pickle.dumps(shards))
    for rows in (map(partial(read, shards), range(2 * count)), worker, map(partial(read, copy), range(2 * count))):
        assert all((pixels == i // 2 % 256).all() for i, pixels in enumerate(rows))
    assert files_open() == 14
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert len(pickle.dumps(shards)) < 100 * count
    del shards, copy, worker, rows
    assert files_open() == 0
