"""From a tree of image files to shards: every file becomes a row or is listed, whatever it holds."""

import json
import os
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import preprocessing
from dataset import ImageDataset
from errors import UserError
from images import CLASSES, make_tree, photo
from preprocessing import preprocess
from scripts import ROOT, run
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


@pytest.mark.parametrize("content", ["{", "{}", '{"labels": 3}', '{"labels": [["a.png", -1]]}'])
def test_unusable_dataset_json_is_one_clear_error(tmp_path, content):
    tree = make_tree(tmp_path / "tree", 1)
    (tree / "dataset.json").write_text(content)
    with pytest.raises(UserError, match="dataset.json.*expected"):
        preprocess(tree, tmp_path / "data", 32, 1, None)


# a path in the tree -> how other tools and systems write it
FORMS = {
    "plain": str,
    "backslashes": lambda path: path.replace("/", "\\"),
    "dots": lambda path: f"./{path}",
    "dots and backslashes": lambda path: f".\\x\\..\\{path}",
    "doubled": lambda path: path.replace("/", "//"),
    "absolute": lambda path: os.path.join("TREE", path),
    "absolute, behind a link": lambda path: os.path.join("REAL", path),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("encoding", ["utf8", "utf-8-sig", "utf-16"])
def test_paths_in_dataset_json_are_found_as_other_systems_write_them(tmp_path, form, encoding):
    (tmp_path / "tree").symlink_to(make_tree(tmp_path / "real", 1))
    tree = tmp_path / "tree"
    photo(9).save(tree / "ape/._0.png")
    labels = [[FORMS[form](path), label] for path, label in (("ape/0.png", 2), ("ape/._0.png", 2), ("cat/0.png", 1))]
    content = json.dumps({"labels": labels}).replace("TREE", str(tree)).replace("REAL", str(tmp_path / "real"))
    (tree / "dataset.json").write_text(content, encoding)
    sources, skipped, _ = list_sources(tree)
    assert [tuple(source) for source in sources] == [("ape/0.png", 2), ("cat/0.png", 1)]
    assert dict(skipped)["bee/0.png"] == "no label in dataset.json"
    assert dict(skipped)["ape/._0.png"] == "hidden or system file"


@pytest.mark.parametrize("name", ["tree/ape/0.png", "/elsewhere/ape/0.png", "C:\\tree\\ape\\0.png", "APE/0.PNG"])
def test_a_dataset_json_of_other_files_is_told_apart_from_no_images(tmp_path, name):
    tree = make_tree(tmp_path / "tree", 1)
    (tree / "dataset.json").write_text(json.dumps({"labels": [[name, 0]]}))
    with pytest.raises(
        UserError, match="dataset.json: none of the 1 files that it names, such as .*expected paths rel"
    ):
        list_sources(tree)


def test_labels_of_null_are_one_class(tmp_path):
    tree = make_tree(tmp_path / "tree", 1)
    photo(9).save(tree / "stray.png")
    photo(9).save(tree / "ape/._0.png")
    (tree / "ape/notes.txt").write_text("no picture")
    (tree / "dataset.json").write_text('{"labels": null}')
    index, skipped = preprocess(tree, tmp_path / "data", 32, 1, None)
    assert (index["num_classes"], index["classes"], index["class_counts"]) == (1, None, [4])
    assert {entry.path for entry in skipped} == {"ape/._0.png", "ape/notes.txt"}


def write_oddities(tree: Path) -> set[str]:
    """What lies beside images in practice, and classes' folders that give none; the paths that must be listed."""
    (tree / "empty/below").mkdir(parents=True)
    pictures = ("ape/.ipynb_checkpoints/0-checkpoint.png", "bee/@eaDir/0.png/SYNOFILE_THUMB_M.jpg", "cat/._0.png")
    pictures += (".Trash-1000/files/1.png", "lost+found/2.png", "ape/deep/#recycle/3.png", "bee/0.png~")
    texts = ("__MACOSX/ape/._0.png", "annotations/0.xml", "annotations/README", "ape/Thumbs.db", "cat/desktop.ini")
    texts += ("videos/clip.mp4", "videos/clip.mpg", "damaged/0.png", "damaged/1.jpg", "bee/0.png.part", "labels.csv")
    for path in (*pictures, *texts):
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        if path in pictures:
            photo(9).save(tree / path, format="PNG")
        else:
            (tree / path).write_text("no picture")
    photo(1).save(tree / "ape/no-suffix", format="PNG")
    photo(2).save(tree / "ape/n0001.17", format="JPEG")
    photo(3).save(tree / "bee/NAME.JPEG")
    return {*pictures, *texts}


def test_a_class_is_a_folder_with_an_image_and_what_is_hidden_is_no_image(tmp_path):
    tree = make_tree(tmp_path / "tree", 1)
    odd = write_oddities(tree)
    flags = ("--imagenet-path", tree, "--output-path", tmp_path / "data", "--resolution", 32, "--num-workers", 2)
    said = run("preprocessing.py", *flags).stdout
    data = ImageDataset(tmp_path / "data")
    assert (data.classes, data.class_counts) == (["ape", "bee", "cat"], [3, 2, 1])
    listed = dict(line.split("\t") for line in (tmp_path / "data/images/skipped.txt").read_text().splitlines())
    assert set(listed) == odd
    hidden = {path for path, reason in listed.items() if reason == "hidden or system file"}
    assert len(hidden) == 10
    assert f"{len(odd)} files skipped, listed in {tmp_path}/data/images/skipped.txt: 10 hidden or system file" in said
    assert "labels and their images, 1 to 3: 0 = ape (3), 1 = bee (2), 2 = cat (1)" in said
    assert "sorted as text" not in said


@pytest.mark.parametrize("refused", ["lost+found", "tree", "bee"])
def test_only_hidden_folders_may_be_unreadable(tmp_path, monkeypatch, refused):
    tree, scandir = make_tree(tmp_path / "tree", 1), os.scandir
    (tree / "lost+found").mkdir()

    def refuse(path):
        if Path(path).name == refused:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with nullcontext() if refused == "lost+found" else pytest.raises(PermissionError):
        assert list_sources(tree)[2] == list(CLASSES)


@pytest.mark.parametrize("names", [("1", "10", "2"), ("c 9", "c10", "c9"), ("n002", "n01")])
def test_numbered_folders_are_announced_with_their_labels(tmp_path, names):
    for i, name in enumerate(names):
        (tmp_path / "tree" / name).mkdir(parents=True)
        photo(i).save(tmp_path / "tree" / name / "0.png")
    flags = ("--imagenet-path", tmp_path / "tree", "--output-path", tmp_path / "data", "--resolution", 32)
    said = run("preprocessing.py", *flags, "--num-workers", 1).stdout
    labels = ", ".join(f"{label} = {name} (1)" for label, name in enumerate(names))
    assert (
        f"numbered folders are sorted as text, as ImageFolder does; labels and their images, 1 to 1: {labels}" in said
    )


def test_many_classes_are_shortened():
    line = preprocessing.describe_classes([f"n{i:04d}" for i in range(1000)], [7] * 999 + [2])
    assert line.startswith("labels and their images, 2 to 7: 0 = n0000 (7), 1 = n0001 (7), ")
    assert line.endswith(
        "(7), ..., 995 = n0995 (7), 996 = n0996 (7), 997 = n0997 (7), 998 = n0998 (7), 999 = n0999 (2)"
    )
    assert len(line) < 300


@pytest.mark.parametrize("output", ["tree/data", "tree", "tree/deep/link/data"])
def test_the_output_folder_inside_the_tree_is_no_part_of_it(tmp_path, output):
    tree = make_tree(tmp_path / "tree", 1)
    (tree / "deep").mkdir()
    (tree / "deep/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    for _ in range(2):
        index, skipped = preprocess(tree, tmp_path / output, 32, 1, None)
        assert (index["classes"], index["images"], skipped) == (list(CLASSES), 3, [])
        photo(9).save(tmp_path / output / "images/preview.png")


@pytest.mark.parametrize("name", ["birds.zip", "birds.tar", "birds.TAR.GZ", "birds.7z", "birds.parquet"])
def test_archives_have_to_be_unpacked(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04 anything")
    said = run("preprocessing.py", "--imagenet-path", tmp_path / name, code=2).stderr
    assert said == f"error: --imagenet-path {tmp_path / name}: {NO_FOLDER}\n"
    with pytest.raises(UserError, match=r"no images; expected one folder .*; found: 1 not an image \(\.\w+\); unpack"):
        preprocess(tmp_path, tmp_path / "data", 32, 1, None)


NO_FOLDER = "a file, but no images.h5; unpack archives, and name the folder"
MEGABYTES = np.random.RandomState(0).bytes(100_000).hex() * 20  # 4 MB of text


@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt", "XMP", "iCCP"])
def test_a_png_with_megabytes_of_text_is_read(tmp_path, kind):
    info, options = PngInfo(), {}
    if kind in ("tEXt", "zTXt"):
        info.add_text("history", MEGABYTES, zip=kind == "zTXt")
    elif kind == "iCCP":
        options = {"icc_profile": MEGABYTES.encode()}
    else:
        info.add_itxt("XML:com.adobe.xmp" if kind == "XMP" else "history", MEGABYTES, zip=kind == "iTXt")
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
    Image.new("RGB", (2, 2000)).save(tree / "cat/strip.png")
    index, _ = preprocess(tree, tmp_path / "data", 32, 2, None)
    assert (index["images"], index["skipped"], index["classes"]) == (6, 7, list(CLASSES))
    listed = dict(line.split("\t") for line in (tmp_path / "data/images/skipped.txt").read_text().splitlines())
    assert set(listed) == {
        *("ape/cut.png", "bee/cut.jpg", "bee/empty.jpg", "cat/notes.txt", "cat/dangling.png", "stray.png"),
        "cat/strip.png",
    }
    assert listed["cat/notes.txt"] == "not an image (.txt)"
    assert listed["stray.png"] == "not inside a class folder"
    assert all(listed.values())


def test_images_that_announce_more_pixels_than_memory_should_hold_are_listed_before_they_are_decoded(
    tmp_path, monkeypatch
):
    tree = make_tree(tmp_path / "tree", 1)
    (tree / "ape/bomb.png").write_bytes(bomb_png(100_000))
    (tree / "ape/large.png").write_bytes(bomb_png(9460))  # just above the bound, where Pillow only warns
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail(f"{image.size} was decoded"))
    for name in ("bomb", "large"):
        with pytest.raises(ValueError, match="more than 89478485 pixels"), warnings.catch_warnings(record=True) as seen:
            read_image(tree / f"ape/{name}.png", 32)
        assert not seen
    monkeypatch.undo()
    index, skipped = preprocess(tree, tmp_path / "data", 32, 1, None)
    assert (index["images"], index["skipped"]) == (3, 2)
    assert {(entry.path, entry.reason) for entry in skipped} == {
        ("ape/bomb.png", "ValueError: more than 89478485 pixels"),
        ("ape/large.png", "ValueError: more than 89478485 pixels"),
    }


@pytest.fixture
def many(tmp_path) -> tuple[list[str], Path]:
    """A command that preprocesses thousands of images, and the folder that its shards go to."""
    (tmp_path / "tree/only").mkdir(parents=True)
    photo(0, 250, 250).save(tmp_path / "photo.png")
    for i in range(2000):
        (tmp_path / f"tree/only/{i:04d}.png").symlink_to(tmp_path / "photo.png")
    flags = ("--imagenet-path", tmp_path / "tree", "--output-path", tmp_path / "data", "--resolution", 32)
    return [sys.executable, "preprocessing.py", *map(str, flags), "--num-workers", "2"], tmp_path / "data/images"


def until_a_shard_is_there(process: subprocess.Popen, images: Path) -> None:
    while not list(images.glob("*.safetensors")):
        assert process.poll() is None
        time.sleep(0.05)


def children(process: subprocess.Popen) -> list[int]:
    return [int(child) for child in open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()]


def is_running(pid: int) -> bool:
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_workers_end_with_a_main_process_that_is_killed_and_the_same_command_continues(many):
    command, images = many
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    until_a_shard_is_there(process, images)
    workers = children(process)
    assert len(workers) == 2
    assert all(map(is_running, workers))
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline, "workers live on"
        time.sleep(0.1)
    kept = {path: path.stat().st_mtime_ns for path in images.glob("*.safetensors")}
    (images / ".00003.safetensors.1.tmp").write_bytes(b"half")
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert sorted(path.name for path in images.iterdir()) == [
        *(".lock", *(f"{i:05d}.safetensors" for i in range(4)), "index.json", "skipped.txt"),
    ]
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


def test_max_images_takes_the_first_in_sorted_order(tmp_path):
    index, _ = preprocess(make_tree(tmp_path / "tree", 3), tmp_path / "data", 32, 1, 4)
    assert index["images"] == 4
    assert [label for _, label in rows(tmp_path / "data")] == [0, 0, 0, 1]


def test_any_number_of_workers_reads_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocessing, "SHARD_IMAGES", 4)
    preprocess(make_tree(tmp_path / "tree", 5), tmp_path / "data", 32, 1, None)
    dataset = ImageDataset(tmp_path / "data")
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=2)
    expected = torch.stack([dataset[i][0] for i in range(len(dataset))])
    assert torch.equal(torch.cat([pixels for pixels, _ in loader]), expected)
