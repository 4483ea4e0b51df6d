"""Sets of images for metrics, and how data sets reach the processes that read them."""

import json
import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Subset

import published
from dataset import open_images, open_latents
from good import LITE0, cache_flags
from images import make_data, make_tree, photo
from scripts import TINY, TINY_SIT, records, run
from storage.image_sets import FolderImages, NpzImages
from storage.photographs import list_sources
from test_photographs import write_oddities
from test_preprocessing import save_kinds

FID = (*LITE0, "--metrics", "fid")


def test_a_folder_holds_every_kind_of_picture_as_preprocessing_converts_it(tmp_path):
    expected = save_kinds(tmp_path, height=48)
    photo(6, 48, 48).save(tmp_path / "picture.webp", lossless=True)
    photo(7, 48, 48).save(tmp_path / "no-suffix", format="PNG")
    exif = Image.Exif()
    exif[0x0112] = 3
    photo(8, 48, 48).save(tmp_path / "turned.jpg", quality=100, exif=exif)
    expected |= {"picture.webp": photo(6, 48, 48), "no-suffix": photo(7, 48, 48)}
    expected["turned.jpg"] = Image.open(tmp_path / "turned.jpg").transpose(Image.Transpose.ROTATE_180)
    images = FolderImages(tmp_path)
    assert [path.name for path in images.files] == sorted(expected)
    for pixels, path in zip((images[i] for i in range(len(images))), images.files, strict=True):
        assert pixels.dtype == torch.uint8
        picture = np.asarray(expected[path.name].convert("RGB"))
        np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), picture, err_msg=path.name)


@pytest.mark.slow
def test_what_is_left_out_of_a_folder_is_counted_on_one_line(tmp_path):
    for i in range(4):
        photo(i).save(tmp_path / f"{i}.png")
    flags = ("--samples", tmp_path, "--reference", tmp_path, *FID, "--output", tmp_path / "result.json")
    assert "left out" not in run("evaluate.py", *flags).stderr
    (tmp_path / "ape").mkdir()
    for path in (tmp_path / "._0.png", tmp_path / "ape/Thumbs.db", tmp_path / "log.txt", tmp_path / "LICENSE"):
        path.write_text("no picture")
    said = run("evaluate.py", *flags).stderr.splitlines()
    for what in ("--samples", "--reference"):
        (line,) = (line for line in said if line.startswith(f"{what} {tmp_path}: "))
        counts = line.removeprefix(f"{what} {tmp_path}: 4 images; left out: ").split(", ")
        assert counts[0] == "2 hidden or system file"
        assert set(counts[1:]) == {"1 not an image (no suffix)", "1 not an image (.json)", "1 not an image (.txt)"}


def test_metrics_and_preprocessing_find_the_same_pictures(tmp_path):
    tree = make_tree(tmp_path / "tree", 1)
    write_oddities(tree)
    for damaged in (tree / "damaged").iterdir():
        damaged.unlink()  # an error in metrics, listed by preprocessing.py
    found = [path.relative_to(tree).as_posix() for path in FolderImages(tree).files]
    assert found == [source.path for source in list_sources(tree)[0]]


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict:
    """Data sets of every kind that loaders get, by name."""
    root = tmp_path_factory.mktemp("sets")
    data, vae = make_data(root, per_class=2), published.write_vae(root / "vae")
    run("cache_latents.py", *cache_flags(data, vae))
    pixels = np.random.RandomState(0).randint(0, 256, (100, 32, 32, 3)).astype(np.uint8)
    np.savez(root / "stored.npz", arr_0=pixels)
    np.savez_compressed(root / "compressed.npz", arr_0=pixels)
    images = open_images(data)
    return {
        "npz": NpzImages(root / "stored.npz"),
        "compressed": NpzImages(root / "compressed.npz"),
        "share": Subset(NpzImages(root / "stored.npz"), range(0, 100, 3)),
        "folder": FolderImages(root / "tree"),
        "images": images,
        "latents": open_latents(data, "latents", images),
    }


def test_data_sets_are_sent_to_workers_without_their_pixels(sets):
    assert {name: size for name, data in sets.items() if (size := len(pickle.dumps(data))) > 2000} == {}


@pytest.mark.slow
def test_workers_that_are_not_forked_read_the_same(sets):
    data = ConcatDataset(sets.values())
    loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    for found, expected in zip(loader, (data[i] for i in range(len(data))), strict=True):
        for one, other in zip([*found], [*expected], strict=True):
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


@pytest.mark.slow
def test_training_and_evaluation_work_with_workers_that_are_not_forked(sets, tmp_path):
    root = sets["folder"].path.parent
    latents = ("--data-dir", root / "data", "--vae-ckpt", root / "vae/sdvae.pt", "--vae-latents-name", "latents")
    training = (*TINY, *TINY_SIT, *latents, "--exp-name", "spawned", "--output-dir", tmp_path, "--max-train-steps", 2)
    images = ("--samples", root / "stored.npz", "--reference", root / "compressed.npz", *FID, "--num-workers", 1)
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        run("train_ldm_only.py", *training)
        run("evaluate.py", *images, "--output", tmp_path / "result.json")
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert len(records(tmp_path / "spawned/metrics.jsonl")) == 2
    assert json.loads((tmp_path / "result.json").read_text())["samples"]["count"] == len(sets["npz"])
