"""From a tree of image files to shards: every file becomes a row or is listed, whatever it holds."""

import json
import subprocess
import time

import numpy as np
import psutil
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import preprocessing
from dataset import ImageDataset
from errors import UserError
from images import CLASSES, make_tree, photo
from preprocessing import preprocess
from scripts import ROOT, command
from storage.photographs import center_crop, list_sources, read_image
from test_files import bomb_png


def rows(data) -> list[tuple[np.ndarray, int]]:
    dataset = ImageDataset(data)
    return [(dataset[i][0].numpy(), dataset[i][1]) for i in range(len(dataset))]


def expected_row(image: Image.Image, size: int = 32) -> np.ndarray:
    return np.asarray(center_crop(image.convert("RGB"), size)).transpose(2, 0, 1)


def test_class_folders(tmp_path):
    tree = make_tree(tmp_path / "tree", 3)
    index, _ = preprocess(tree, tmp_path / "data", 32, 2, None)
    assert (index["images"], index["num_classes"], index["skipped"]) == (9, 3, 0)
    assert (index["classes"], index["class_counts"]) == (list(CLASSES), [3, 3, 3])
    for i, (pixels, label) in enumerate(rows(tmp_path / "data")):
        assert label == i // 3
        np.testing.assert_array_equal(pixels, expected_row(photo(100 * (i // 3) + i % 3)))
    preprocess(tree, tmp_path / "four", 32, 1, 4)  # --max-images takes the first in sorted order
    assert [label for _, label in rows(tmp_path / "four")] == [0, 0, 0, 1]


def test_labels_of_dataset_json_win_over_folders(tmp_path):
    tree = make_tree(tmp_path / "tree", 2)
    labels = [["ape/0.png", 7], ["bee/1.png", 2], ["cat/9.png", 1]]
    (tree / "dataset.json").write_text(json.dumps({"labels": labels}))
    index, _ = preprocess(tree, tmp_path / "data", 32, 1, None)
    assert [label for _, label in rows(tmp_path / "data")] == [7, 2]
    assert (index["num_classes"], index["classes"]) == (8, None)
    assert index["class_counts"] == [0, 0, 1, 0, 0, 0, 0, 1]
    skipped = (tmp_path / "data/images/skipped.txt").read_text()
    assert index["skipped"] == 5
    assert "cat/9.png\tin dataset.json, but no such file" in skipped
    assert skipped.count("no label in dataset.json") == 4


MEGABYTES = np.random.RandomState(0).bytes(100_000).hex() * 20  # 4 MB of text


@pytest.mark.parametrize("kind", ["tEXt", "XMP", "iCCP"])
def test_a_png_with_megabytes_of_text_is_read(tmp_path, kind):
    info, options = PngInfo(), {"icc_profile": MEGABYTES.encode()} if kind == "iCCP" else {}
    if kind == "tEXt":
        info.add_text("history", MEGABYTES)
    elif kind == "XMP":
        info.add_itxt("XML:com.adobe.xmp", MEGABYTES)
    photo(5).save(tmp_path / "long.png", pnginfo=info, **options)
    np.testing.assert_array_equal(read_image(tmp_path / "long.png", 32), expected_row(photo(5)))


def save_kinds(folder, height: int = 40) -> dict[str, Image.Image]:
    """Files of every kind that photo collections hold, and the RGB picture that each stands for."""
    base = photo(5, height=height)
    grey = base.convert("L")
    expected = {}
    grey.save(folder / "grey.png")
    expected["grey.png"] = grey
    cmyk = base.convert("CMYK")
    cmyk.save(folder / "cmyk.jpg", quality=100)
    expected["cmyk.jpg"] = Image.open(folder / "cmyk.jpg").convert("RGB")
    alpha = base.copy()
    alpha.putalpha(0)
    alpha.save(folder / "transparent.png")
    expected["transparent.png"] = Image.new("RGB", base.size, "white")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to show
    base.save(folder / "turned.png", exif=exif)
    expected["turned.png"] = base.transpose(Image.Transpose.ROTATE_270)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    deep.save(folder / "sixteen-bit.png")
    expected["sixteen-bit.png"] = grey
    base.convert("P").save(folder / "palette.gif")
    expected["palette.gif"] = Image.open(folder / "palette.gif").convert("RGB")
    return expected


def test_every_kind_of_image_becomes_the_rgb_it_shows(tmp_path):
    (tmp_path / "tree/only").mkdir(parents=True)
    expected = save_kinds(tmp_path / "tree/only")
    index, _ = preprocess(tmp_path / "tree", tmp_path / "data", 32, 1, None)
    assert index["skipped"] == 0
    for name, (pixels, _) in zip(sorted(expected), rows(tmp_path / "data"), strict=True):
        np.testing.assert_array_equal(pixels, expected_row(expected[name]), err_msg=name)


def test_broken_files_are_counted_and_listed(tmp_path):
    tree = make_tree(tmp_path / "tree", 2)
    whole = (tree / "ape/0.png").read_bytes()
    (tree / "ape/cut.png").write_bytes(whole[: len(whole) // 2])
    photo(1, 640, 480).save(tree / "bee/cut.jpg")
    (tree / "bee/cut.jpg").write_bytes((tree / "bee/cut.jpg").read_bytes()[:3000])
    (tree / "bee/empty.jpg").write_bytes(b"")
    (tree / "cat/notes.txt").write_text("no picture")
    (tree / "stray.png").write_bytes(whole)
    (tree / "cat/dangling.png").symlink_to("nowhere.png")
    index, _ = preprocess(tree, tmp_path / "data", 32, 2, None)
    assert (index["images"], index["skipped"], index["classes"]) == (6, 6, list(CLASSES))
    listed = dict(line.split("\t") for line in (tmp_path / "data/images/skipped.txt").read_text().splitlines())
    assert set(listed) == {
        *("ape/cut.png", "bee/cut.jpg", "bee/empty.jpg", "cat/notes.txt", "cat/dangling.png", "stray.png"),
    }
    assert listed["cat/notes.txt"] == "not an image (.txt)"
    assert listed["stray.png"] == "not inside a class folder"
    assert all(listed.values())


def test_images_that_announce_more_pixels_than_memory_should_hold_are_listed_before_they_are_decoded(
    tmp_path, monkeypatch
):
    tree = make_tree(tmp_path / "tree", 1)
    (tree / "ape/bomb.png").write_bytes(bomb_png(100_000))
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail(f"{image.size} was decoded"))
    with pytest.raises(Image.DecompressionBombError, match="exceeds limit of 178956970 pixels"):
        read_image(tree / "ape/bomb.png", 32)
    monkeypatch.undo()
    index, skipped = preprocess(tree, tmp_path / "data", 32, 1, None)
    assert (index["images"], index["skipped"]) == (3, 1)
    assert [entry.path for entry in skipped] == ["ape/bomb.png"]


@pytest.mark.slow
def test_workers_end_with_a_main_process_that_is_killed_and_the_same_command_continues(tmp_path):
    (tmp_path / "tree/only").mkdir(parents=True)
    photo(0, 250, 250).save(tmp_path / "photo.png")
    for i in range(2000):
        (tmp_path / f"tree/only/{i:04d}.png").symlink_to(tmp_path / "photo.png")
    flags = ("--imagenet-path", tmp_path / "tree", "--output-path", tmp_path / "data", "--resolution", 32)
    line, images = command("preprocessing.py", *flags, "--num-workers", 2), tmp_path / "data/images"
    process = psutil.Popen(line, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not list(images.glob("*.safetensors")):
        assert process.poll() is None
        time.sleep(0.05)
    workers = process.children()
    assert len(workers) == 2
    process.kill()
    process.wait()
    assert not psutil.wait_procs(workers, timeout=10)[1], "workers live on"
    kept = {path: path.stat().st_mtime_ns for path in images.glob("*.safetensors")}
    (images / ".00003.safetensors.1.tmp").write_bytes(b"half")
    subprocess.run(line, cwd=ROOT, check=True, capture_output=True)
    shards = [f"{i:05d}.safetensors" for i in range(4)]
    assert sorted(path.name for path in images.iterdir()) == [".lock", *shards, "index.json", "skipped.txt"]
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


def test_shards_do_not_depend_on_workers_and_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocessing, "SHARD_IMAGES", 2)
    tree = make_tree(tmp_path / "tree", 3)
    preprocess(tree, tmp_path / "one", 32, 1, None)
    preprocess(tree, tmp_path / "three", 32, 3, None)
    shards = sorted((tmp_path / "one/images").glob("*.safetensors"))
    assert len(shards) == 5
    assert [path.read_bytes() for path in shards] == [
        path.read_bytes() for path in sorted((tmp_path / "three/images").glob("*.safetensors"))
    ]
    whole = shards[1].read_bytes()
    shards[0].unlink()  # as if interrupted before it was written
    shards[1].write_bytes(whole[: len(whole) // 2])  # cut short
    untouched = shards[2].stat().st_mtime_ns
    preprocess(tree, tmp_path / "one", 32, 1, None)
    assert shards[2].stat().st_mtime_ns == untouched
    assert shards[1].read_bytes() == whole
    np.testing.assert_array_equal(rows(tmp_path / "one")[0][0], rows(tmp_path / "three")[0][0])


def test_a_file_that_vanishes_meanwhile_ends_the_run_and_the_same_command_completes(tmp_path, monkeypatch):
    tree = make_tree(tmp_path / "tree", per_class=2)
    sources, _, _ = list_sources(tree)
    gone = (tree / sources[1].path).rename(tmp_path / "gone.png")
    monkeypatch.setattr("preprocessing.list_sources", lambda *_: (sources, [], None))
    with pytest.raises(UserError, match="was listed, and now is gone; run the same again"):
        preprocess(tree, tmp_path / "data", 32, 1, None)
    gone.rename(tree / sources[1].path)
    index, skipped = preprocess(tree, tmp_path / "data", 32, 1, None)
    assert (index["images"], skipped) == (len(sources), [])
