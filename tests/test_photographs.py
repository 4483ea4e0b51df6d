"""Which files of a tree are images, their labels, and what is said of the others."""

import json
import os
from pathlib import Path

import pytest

from dataset import ImageDataset
from errors import UserError
from images import CLASSES, make_tree, photo
from preprocessing import preprocess
from scripts import refusal, run
from storage.photographs import list_sources

NO_FOLDER = "a file, but no images.h5; unpack archives, and name the folder"


@pytest.mark.parametrize("content", ["{", "{}", '{"labels": 3}', '{"labels": [["a.png", -1]]}'])
def test_unusable_dataset_json_is_one_clear_error(tmp_path, content):
    tree = make_tree(tmp_path / "tree", 1)
    (tree / "dataset.json").write_text(content)
    with pytest.raises(UserError, match="dataset.json.*expected"):
        preprocess(tree, tmp_path / "data", 32, 1, None)


# a path in the tree -> how other tools and systems write it
FORMS = {
    "backslashes": lambda path: path.replace("/", "\\"),
    "dots and backslashes": lambda path: f".\\x\\..\\{path}",
    "doubled": lambda path: "./" + path.replace("/", "//"),
    "absolute": lambda path: os.path.join("TREE", path),
    "absolute, behind a link": lambda path: os.path.join("REAL", path),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
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


@pytest.mark.parametrize("name", ["tree/ape/0.png", "/elsewhere/ape/0.png", "C:\\tree\\ape\\0.png"])
def test_a_dataset_json_of_other_files_is_told_apart_from_no_images(tmp_path, name):
    tree = make_tree(tmp_path / "tree", 1)
    (tree / "dataset.json").write_text(json.dumps({"labels": [[name, 0]]}))
    with pytest.raises(UserError, match="none of the 1 files that it names, such as .*expected paths rel"):
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


@pytest.mark.parametrize("names", [("1", "10", "2"), ("c 9", "c10", "c9"), ("n002", "n01")])
def test_numbered_folders_are_announced_with_their_labels(tmp_path, names):
    for i, name in enumerate(names):
        (tmp_path / "tree" / name).mkdir(parents=True)
        photo(i).save(tmp_path / "tree" / name / "0.png")
    flags = ("--imagenet-path", tmp_path / "tree", "--output-path", tmp_path / "data", "--resolution", 32)
    said = run("preprocessing.py", *flags, "--num-workers", 1).stdout
    labels = ", ".join(f"{label} = {name} (1)" for label, name in enumerate(names))
    assert f"sorted as text, as ImageFolder does; labels and their images, 1 to 1: {labels}" in said


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


@pytest.mark.parametrize("name", ["birds.zip", "birds.TAR.GZ", "birds.parquet"])
def test_archives_have_to_be_unpacked(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04 anything")
    line = refusal("preprocessing.py", "--imagenet-path", tmp_path / name)
    assert line == f"error: --imagenet-path {tmp_path / name}: {NO_FOLDER}"
    with pytest.raises(UserError, match=r"no images; expected one folder .*; found: 1 not an image \(\.\w+\); unpack"):
        preprocess(tmp_path, tmp_path / "data", 32, 1, None)
